"""Texts that need no network: the documentation inside every Python, and prose in the public domain that is part of
the package (``prose/LICENCES.md``). As a source each has a name, ``builtin:novel``.

Calibration and measurement share none of them: the documentation is cut in two, essays are for calibration, and a
novel, unlike either, for measuring how far a result carries.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pyprune.config import ConfigError
from pyprune.sources import BUILTIN

DOCUMENTATION, REST, ESSAYS, NOVEL = (
    BUILTIN + name for name in ("documentation", "documentation-rest", "essays", "novel")
)
TEXTS = {
    DOCUMENTATION: "the Python documentation of this interpreter",
    REST: "the rest of the Python documentation",
    ESSAYS: "essays of the Jargon File",
    NOVEL: "Jane Austen's Northanger Abbey",
}
"""Name → what it is, in reports."""
CALIBRATION = (DOCUMENTATION, ESSAYS)
"""What a run is calibrated on that names no text, in equal shares."""


def paragraphs(name: str) -> list[str]:
    """The paragraphs of a text. Raises ConfigError for a name that is none."""
    if name not in TEXTS:
        raise ConfigError(f"there is no text {name!r}; built in are {', '.join(TEXTS)}")
    if name in (DOCUMENTATION, REST):
        return _documentation()[name == REST]
    text = (Path(__file__).parent / "prose" / f"{name.removeprefix(BUILTIN)}.txt").read_text(encoding="utf-8")
    return text.rstrip("\n").split("\n\n")


@functools.cache
def _documentation() -> tuple[list[str], list[str]]:
    """The Python documentation, three fifths and the rest. Topics repeat each other, so paragraphs are taken once and
    then cut in two: the parts share none."""
    from pydoc_data import topics

    seen, found = set(), []
    for text in topics.topics.values():
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                found.append(paragraph.strip("\n"))
    half, total = 0, sum(map(len, found)) * 3 // 5
    while total > 0:
        total -= len(found[half])
        half += 1
    return found[:half], found[half:]
