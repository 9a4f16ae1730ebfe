"""What a field says in one text or mapping: N:M patterns, sparsities by number and by name, back-ends by op."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pyprune.config.checks import ConfigError, check_choice
from pyprune.config.values import ATTENTION, BACKENDS, MLP, OPS, REST, STRUCTURED_PATTERNS


def parse_nm(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` → ``(2, 4)``; None for a pattern that is not N:M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


def check_pattern(pattern: str) -> None:
    """Refuse what is no pattern."""
    nm = parse_nm(pattern) if isinstance(pattern, str) else None
    if nm is None:
        if pattern not in ("unstructured", *STRUCTURED_PATTERNS):
            raise ConfigError(
                f"pattern must be unstructured, N:M (2:4, 4:8), {', '.join(STRUCTURED_PATTERNS)}, got {pattern!r}"
                + _meant(str(pattern))
            )
        return
    n, m = nm
    if not 0 < n < m or m > 16:
        raise ConfigError(
            f"pattern {pattern!r}: N non-zeros in every M weights needs 0 < N < M ≤ 16"
            + (f"; did you mean '{m}:{n}'?" if 0 < m < n <= 16 else "")
        )


def _meant(pattern: str) -> str:
    """What is asked where a pattern is almost one: ``neuron``, ``2-4``."""
    if match := re.fullmatch(r"(\d+)\D(\d+)", pattern):
        return f"; did you mean '{match[1]}:{match[2]}'?"
    near = difflib.get_close_matches(pattern, ["unstructured", *STRUCTURED_PATTERNS], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def checked_sparsity(asked: Any, pattern: str) -> float | tuple[float, ...] | dict[str, float]:
    """The sparsity of a run whose ``pattern`` is valid: one number, several for a list, or a mapping by name. None is
    0.5, or 1 − N/M. Raises ConfigError for what is no sparsity or contradicts the pattern."""
    if (nm := parse_nm(pattern)) is not None:
        asked = _implied(asked, pattern, 1 - nm[0] / nm[1])
    if asked is None:
        return 0.5
    if isinstance(asked, Mapping):
        return _by_name(asked, pattern)
    values = asked if isinstance(asked, (list, tuple)) else [asked]
    if not values:
        raise ConfigError("sparsity is an empty list")
    found = tuple(fraction("sparsity", value) for value in values)
    names = [member_name(value) for value in found]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise ConfigError(
            f"sparsity has two values for the folder {twice}: {sparsity_text(found)}; leave one of them out"
        )
    many = isinstance(asked, (list, tuple)) and (pattern in STRUCTURED_PATTERNS or len(found) > 1)
    return found if many else found[0]


def _implied(asked: Any, pattern: str, implied: float) -> Any:
    """The sparsity that an N:M pattern implies, unless another one was asked for."""
    if asked is None:
        return implied
    if isinstance(asked, Mapping):
        raise ConfigError(
            f"sparsity {sparsity_text(asked)} contradicts pattern {pattern!r}, which is sparsity "
            f"{implied:g} wherever it is applied; leave it out and choose weights by targets or ignore"
        )
    if isinstance(asked, (list, tuple)) or abs(float(asked) - implied) > 1e-9:
        raise ConfigError(
            f"sparsity {asked} contradicts pattern {pattern!r}, which is sparsity "
            f"{implied:g}; leave sparsity out or choose another pattern"
        )
    return asked


def _by_name(asked: Mapping, pattern: str) -> dict[str, float]:
    """A mapping of sparsities, checked as far as it can be without a model."""
    if not asked:
        raise ConfigError("sparsity is an empty mapping: give a number, or name parts, such as {'mlp': 0.6}")
    for key in asked:
        if not isinstance(key, str) or not key.strip():
            raise ConfigError(f"a key of sparsity must be a name or a pattern, got {key!r}")
    found = {key.strip(): fraction(f"sparsity of {key.strip()}", value) for key, value in asked.items()}
    if all(key in found for key in REST):
        raise ConfigError("sparsity names the rest twice, by * and by default; leave one of them out")
    other = {"heads": MLP, "neurons": ATTENTION}.get(pattern)
    if other in found:
        raise ConfigError(
            f"sparsity {other}={found[other]:g} would do nothing: pattern={pattern!r} leaves the {other} "
            "alone; pattern='structured' removes both heads (attention) and neurons (mlp)"
        )
    return found


def member_name(sparsity: float) -> str:
    """Name of the folder of one of several sparsities, in the output folder: ``sparsity-0.3``."""
    return f"sparsity-{sparsity:g}"


def fraction(name: str, value: Any) -> float:
    """A sparsity; ConfigError for what is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        hint = f"; did you mean {value / 100:g}?" if number and 5 <= value < 100 else ""
        raise ConfigError(f"{name} must be in [0, 1), the fraction of zeros, got {value!r}{hint}")
    return float(value)


def sparsity_text(sparsity: Any) -> str:
    """A sparsity as the command line takes it: ``0.5``, ``0.3,0.5`` or ``mlp=0.6,attention=0.4``."""
    if isinstance(sparsity, Mapping):
        return ",".join(f"{key}={value:g}" for key, value in sparsity.items())
    return ",".join(f"{value:g}" for value in (sparsity if isinstance(sparsity, (list, tuple)) else [sparsity]))


def parse_backend(text: str) -> dict[str, str]:
    """Op → back-end of ``auto``, ``cuda``, ``obs_sweep=cuda,nm_mask=triton`` or ``cuda,linear=reference``; under the
    empty name what all other ops take, if that is not ``auto``."""
    named: dict[str, str] = {}
    for part in text.split(","):
        op, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals:
            op, name = "", op
            check_choice("backend", name, ("auto", *BACKENDS))
        else:
            check_choice(f"op in backend {text!r}", op, OPS)
            check_choice(f"backend of {op}", name, ("auto", *BACKENDS))
        if op in named:
            raise ConfigError(f"backend {text!r} names two back-ends for {op or 'every op'}; leave one of them out")
        named[op] = name
    default = named.get("", "auto")
    return {op: name for op, name in named.items() if name != "auto" or (op and default != "auto")}


def check_backends(backends) -> None:
    """Refuse what is no record of back-ends; what is in it is looked at where it is to be followed."""
    for device, taken in backends.items() if isinstance(backends, dict) else [("", backends)] * (backends is not None):
        if not isinstance(taken, dict) or not all(isinstance(text, str) for text in (device, *taken, *taken.values())):
            raise ConfigError(
                "backends must map a type of device to a mapping of ops to back-ends, such as {'cpu': {'linear': "
                f"'reference'}}, got {backends!r}"
            )
