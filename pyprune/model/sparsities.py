"""A sparsity for each weight, where a run asks for several by name: ``{"mlp": 0.6, "*.o_proj": 0.3, "*": 0.5}``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from pyprune.config import KINDS, REST, ConfigError
from pyprune.model.names import matches


def rules(asked: Mapping[str, float], kinds: Mapping[str, str | None], *, told: bool = True) -> dict[str, str]:
    """The key that counts for each weight: the first pattern that names it, else its kind, else the rest (``*``).

    kinds: full name of everything that can be pruned, with its kind; None where that is not known. told: False where
    kinds are still to be found out, so that only patterns are looked at. Weights that no key names are left out: they
    stay dense.
    Raises ConfigError for a key that names nothing, or nothing that the keys before it leave.
    """
    patterns = [key for key in asked if key not in (*KINDS, *REST)]
    rest = next((key for key in asked if key in REST), None)
    found: dict[str, str] = {}
    for name, kind in kinds.items():
        key = next((pattern for pattern in patterns if matches(name, [pattern])), None)
        if key is None and told and kind in asked:
            key = kind
        if key is None and told:
            key = rest
        if key is not None:
            found[name] = key
    used = set(found.values())
    for key in asked:
        if key not in used and key not in REST and (told or key in patterns):
            raise ConfigError(_unused(key, asked, kinds, patterns))
    return found


def _unused(key: str, asked: Mapping[str, float], kinds: Mapping[str, str | None], patterns: list[str]) -> str:
    """The sentence for a key that decides nothing."""
    start = f"sparsity {key}={asked[key]:g} "
    if key in KINDS:
        if any(kind == key for kind in kinds.values()):
            return start + f"decides nothing: other keys name all of the {key}; leave it out"
        known = sorted({kind for kind in kinds.values() if kind})
        how = f"there is only {known[0]}" if known else "attention and mlp cannot be told apart in these blocks"
        return start + f"names no weight that this run prunes: {how}; name layers by patterns, such as {_some(kinds)}"
    before = patterns[: patterns.index(key)]
    if any(matches(name, [key]) for name in kinds):
        return start + f"decides nothing: {', '.join(before)} before it name all that it names; put it first"
    names = sorted({part for name in kinds for part in _spellings(name)} | {*KINDS, "*"})
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return (
        start
        + f"names no weight that this run prunes{hint} Keys are {', '.join(KINDS)}, * and patterns of "
        + (f"names, such as {_some(kinds)}")
    )


def _spellings(name: str) -> Iterable[str]:
    """What a key may call a weight: its module with and without what stands around it."""
    parts = name.removesuffix(".weight").split(".")
    blocks = [f"{before}.{part}" for before, part in zip(parts, parts[1:]) if part.isdigit()]
    return [".".join(parts), ".".join(parts[-2:]), "*." + parts[-1], parts[-1], *blocks]


def _some(kinds: Mapping[str, str | None], most: int = 12) -> str:
    """The last two parts of the names there are."""
    short = dict.fromkeys(".".join(name.removesuffix(".weight").split(".")[-2:]) for name in kinds)
    return ", ".join([*short][:most]) + (" …" if len(short) > most else "")
