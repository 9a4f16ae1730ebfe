"""Which implementation of an op runs now: what the user named, else what a run has fixed, else what this machine's
measurements say.

:func:`backend` names one for a ``with`` block, :func:`settle` decides once for a whole run, whose choice :func:`pinned`
holds, and :func:`disqualify` takes one out that was found wrong. A choice is a mapping: type of device → class of an op
(:mod:`pyprune.ops.classes`), or a forward pass → name of a back-end.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable

import torch
from torch import Tensor

from pyprune.config import OPS, ConfigError, parse_backend
from pyprune.ops import classes, qualification
from pyprune.ops.backends import TABLE, candidates

_forced: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("pyprune_backend", default=None)
_pinned: contextvars.ContextVar[dict[str, dict[str, str]] | None] = contextvars.ContextVar(
    "pyprune_pinned", default=None
)
_settled: dict[tuple[str, bool], dict[str, str]] = {}
"""Type of device, and whether there is one thread → what ``auto`` takes."""
_loaded: dict[tuple[str, str, str], Callable] = {}
"""Op, type of device and back-end → its function."""


@contextlib.contextmanager
def backend(name: str):
    """Inside the ``with`` block every op runs on this back-end (or by op, as :func:`pyprune.config.parse_backend`
    reads it); ``"auto"`` restores the choice by device.

    Raises ``ValueError`` for an unknown name, and the op raises ``RuntimeError`` with the reason if it cannot run. A
    run settles that before it begins: :func:`settle`.
    """
    token = _forced.set(parse_backend(name))
    try:
        yield
    finally:
        _forced.reset(token)


def verdicts(device: str, *, measure: bool = True, again: bool = False) -> dict[str, dict]:
    """What ``auto`` takes for tensors on a type of device, by class of op, and why; see
    :func:`qualification.verdicts`."""
    return qualification.verdicts(device, candidates(device), measure=measure, again=again)


def taken(key: str, device: str) -> str:
    """Name of the candidate that a class of an op, or a forward pass of ``FORWARDS``, uses now for tensors on a type of
    device."""
    op = classes.op_of(key)
    forced = _forced.get() or {}
    if (name := forced.get(op, forced.get("", "auto"))) != "auto":
        return _named(op, name)
    pinned = (_pinned.get() or {}).get(device)
    if pinned is not None:
        return pinned.get(key, pinned.get(op, "reference"))
    return _automatic(device)[key]


def taken_for(op: str, x: Tensor) -> str:
    """The same for an op whose classes are types of numbers, and tensors like ``x``."""
    return taken(classes.by_type(op, x.dtype), x.device.type)


def _named(op: str, name: str) -> str:
    """A back-end, or the forward passes that go with it."""
    return name if op in OPS else "torch" if name == "reference" else "pyprune"


def _automatic(device: str) -> dict[str, str]:
    """What this machine's measurements say, made if need be."""
    threads = device, torch.get_num_threads() == 1
    if threads not in _settled:
        _settled[threads] = {key: verdict["takes"] for key, verdict in verdicts(device).items()}
    return _settled[threads]


def check_backend(text: str, device: str) -> str | None:
    """A sentence if some op cannot run on the back-end that was asked for all of them, and takes ``auto``'s instead.

    Raises ConfigError, before any work, if that back-end cannot run here at all, or not the op it was named for.
    """
    named = parse_backend(text)
    absent = {}
    for name in {named[""]} if "" in named else ():
        if (reason := TABLE[name].unusable(device)) is not None:
            raise ConfigError(f"backend {text!r} cannot run on {device}: {reason}; pyprune env shows what can")
        absent = {op: name for op in OPS if op not in named and TABLE[name].why_not(op, device) is not None}
    refused = {
        op: reason
        for op, name in named.items()
        if op and name != "auto" and (reason := TABLE[name].why_not(op, device)) is not None
    }
    if refused:
        raise ConfigError(
            f"backend {text!r} cannot run on {device}: {'; '.join(dict.fromkeys(refused.values()))}; "
            "pyprune env shows what can"
        )
    if not absent:
        return None
    return f"the {named['']} back-end has no {', no '.join(absent)}: there the choice is automatic"


def settle(
    device: str,
    recorded: dict[str, dict[str, str]] | None = None,
    asked: str = "auto",
    repeated: dict[str, dict[str, str]] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, str]]:
    """What a run on a type of device takes, device → class of op → name, for :func:`pinned`: what an interrupted one
    recorded, else what was asked for or is in force now, else what the run took that this one repeats, else what this
    machine's measurements say, made if need be.

    An op that ``recorded`` does not know, as the version that began the run had none, takes the reference: in its place
    that version ran plain PyTorch. warn: hears of these, and where ``repeated`` cannot be followed here. Raises
    ConfigError where ``recorded`` and ``asked`` cannot.
    """
    if recorded:
        _check_recorded(recorded)
        return {kind: _completed(kind, _trusted(kind, choices), warn) for kind, choices in recorded.items()}
    check_backend(asked, device)
    named, found = parse_backend(asked) or _forced.get() or {}, {}
    before = (repeated or {}).get(device, {})
    lost: dict[tuple[str, str], list[str]] = {}
    known = verdicts(device, measure=False) if before else {}
    for key in candidates(device):
        op = classes.op_of(key)
        name = named.get(op, named.get("", "auto"))
        if name != "auto" and op in OPS and op not in named and TABLE[name].why_not(op, device) is not None:
            name = "auto"
        was = before.get(key, before.get(op)) if name == "auto" else None
        reason = _unfit(op, was, device) or known.get(key, {}).get("failed", {}).get(was) if was else None
        if was and not reason:
            found[key] = was
            continue
        found[key] = _automatic(device)[key] if name == "auto" else _named(op, name)
        if was and reason:
            lost.setdefault((was, reason), []).append(f"{key} takes {found[key]}")
    for (was, reason), instead in lost.items():
        warn(
            f"the repeated run took the {was} back-end, which cannot be taken here ({reason}): {', '.join(instead)}; "
            "the result may differ from that run's by rounding"
        )
    if repeated and not before:
        warn(
            f"the repeated run took its back-ends on {', '.join(repeated)}: on {device} the choice is automatic, and "
            "the result may differ from that run's by rounding"
        )
    return {device: found}


def _unfit(op: str, name: str, device: str) -> str | None:
    """Why what another run took for an op, or as a forward pass, cannot be taken here."""
    known = TABLE if op in OPS else ("pyprune", "torch")
    if name not in known:
        return f"there is no back-end {name!r} for it"
    return TABLE[name].why_not(op, device) if op in OPS else None


def _trusted(device: str, choices: dict[str, str]) -> dict[str, str]:
    """The reference in place of what has failed on this machine since."""
    known = verdicts(device, measure=False)
    failed = {key: known.get(key, {}).get("failed", {}) for key in choices}
    return {
        key: _named(classes.op_of(key), "reference") if name in failed[key] else name for key, name in choices.items()
    }


def _completed(device: str, choices: dict[str, str], warn: Callable[[str], None]) -> dict[str, str]:
    """The reference for what the record of an older version does not know."""
    missing = {
        key: _named(op, "reference")
        for key in candidates(device)
        if key not in choices and (op := classes.op_of(key)) not in choices
    }
    if missing:
        warn(
            f"the interrupted run has no record of a back-end for {', '.join(missing)}, as an older version began it: "
            "the reference is taken"
        )
    return choices | missing


def _check_recorded(recorded: dict[str, dict[str, str]]) -> None:
    for device, choices in recorded.items():
        known = {*OPS, *candidates(device)}
        for key, name in choices.items():
            reason = _unfit(classes.op_of(key), name, device) if key in known else "there is no such op"
            if reason is not None:
                raise ConfigError(
                    f"the interrupted run took the {name} back-end for {key}, which cannot run here: {reason}; "
                    "resume it where it began, or start anew in another folder"
                )


@contextlib.contextmanager
def pinned(choices: dict[str, dict[str, str]]):
    """Inside the ``with`` block ops take these, as :func:`settle` gave them."""
    tokens = _pinned.set(choices), _forced.set(None)
    try:
        yield
    finally:
        _forced.reset(tokens[1])
        _pinned.reset(tokens[0])


def disqualify(op: str, device: str, reason: str) -> str:
    """No more of what ``op`` takes now on a type of device: the reference from here on in this run, and the next
    candidate in every later one on this machine, until ``pyprune env --qualify``. Returns its name."""
    names = {taken(key, device) for key in classes.keys_of(op)} - {"reference"}
    for name in sorted(names):
        qualification.disqualify(device, candidates(device), classes.keys_of(op), name, reason)
    for choices in ((_pinned.get() or {}).get(device), *(c for (d, _), c in _settled.items() if d == device)):
        if choices is not None:
            choices.update(dict.fromkeys(classes.keys_of(op), "reference"))
    return ", ".join(sorted(names)) or "reference"


def implementation(key: str, device: torch.device) -> Callable:
    """The function that runs now for a class of an op and tensors on ``device``. Raises ``RuntimeError`` with the
    reason if a back-end was named that cannot run there."""
    name, op = taken(key, device.type), classes.op_of(key)
    place = (op, device.type, name)
    if place not in _loaded:
        if (reason := TABLE[name].why_not(op, device)) is not None:
            raise RuntimeError(f"back-end {name!r} was asked for {op} but cannot run: {reason}")
        _loaded[place] = TABLE[name].load(op)
    return _loaded[place]


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of these is wanted and no back-end is named: the reference runs, as kernels give
    none."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors) and not _forced.get()
