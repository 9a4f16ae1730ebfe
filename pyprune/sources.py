"""What kind of thing a source of text or token ids is, told from its name or type alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXT_FILES = (".txt", ".md", ".rst")
BUILTIN = "builtin:"
"""How the names of texts begin that come with pyprune."""


def kind(source: Any) -> str:
    """``builtin`` for None and ``builtin:…``; ``ids``; ``prose``, given in memory or a text file; ``table``, a file
    with columns; ``data set``, any other name, also that of a source which was in memory when it was written down."""
    if source is None or (isinstance(source, str) and source.startswith(BUILTIN)):
        return "builtin"
    if not isinstance(source, (str, Path)):
        return "prose" if isinstance(source, (list, tuple)) and source and isinstance(source[0], str) else "ids"
    suffix = Path(source).suffix
    if suffix == ".npy":
        return "ids"
    if suffix in DATA_FILES:
        return "table"
    if suffix in TEXT_FILES or (len(str(source)) < 1024 and Path(source).is_file()):
        return "prose"
    return "data set"


def kinds(text: Any) -> set[str]:
    """The kinds in ``Evaluation.text`` or ``Calibration.source``, a source or a list of several; prose in a list counts
    as any name."""
    if isinstance(text, list) and text and not all(getattr(entry, "ndim", 0) == 1 for entry in text):
        return {kind(entry) for entry in text}
    return {kind(text)}
