"""What kind of thing a source of text or token ids is, told from its name or type alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXT_FILES = (".txt", ".md", ".rst")
BUILTIN = "builtin:"
"""How the names of texts begin that come with pyprune."""
FILES = (*DATA_FILES, *TEXT_FILES, ".npy")
LONGEST_NAME = 255
"""Characters that a file system takes between two slashes; a longer string is text."""


def kind(source: Any) -> str:
    """``builtin`` for None and ``builtin:…``; ``ids``; ``prose``, given in memory or a text file; ``table``, a file or
    rows with columns; ``data set``, any other name, also that of a source which was in memory when it was written
    down."""
    if source is None or (isinstance(source, str) and source.startswith(BUILTIN) and is_name(source)):
        return "builtin"
    if not is_name(source):
        if isinstance(source, str) or _all_strings(source):
            return "prose"
        columns = columns_of(source)
        return "ids" if columns is None or "input_ids" in columns else "table"
    suffix = Path(source).suffix
    if suffix == ".npy":
        return "ids"
    if suffix in DATA_FILES:
        return "table"
    if suffix in TEXT_FILES or Path(source).is_file():
        return "prose"
    return "data set"


def kinds(text: Any) -> set[str]:
    """The kinds of all sources in ``Evaluation.text`` or ``Calibration.source``."""
    return {kind(entry) for entry in split(text)}


def is_name(source: Any) -> bool:
    """Whether a source is named, by a path or the id of a data set, and not text itself.

    A string is a name if it has no white space in it, if it ends as files of text do, or if such a file exists.
    """
    if isinstance(source, Path):
        return True
    if not isinstance(source, str) or not source or "\n" in source:
        return False
    if max(map(len, source.split("/"))) > LONGEST_NAME or len(source) > 4096:
        return False
    if not re.search(r"\s", source) or source.endswith(FILES) or in_memory(source):
        return True
    return Path(source).exists()


def in_memory(name: str) -> bool:
    """Whether a name stands for a source that was in memory when it was written down."""
    return name.startswith("<") and name.endswith(">")


def columns_of(source: Any) -> list[str] | None:
    """Columns of a data set in memory: one of the ``datasets`` library, or a list of mappings; None for all else."""
    names = getattr(source, "column_names", None)
    if isinstance(names, (list, tuple)):
        return list(names)
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], Mapping):
        return list(source[0])
    return None


def split(text: Any) -> list:
    """The sources in ``Evaluation.text``: itself, or each entry of a list of names, data sets or matrices.

    Texts, sequences of token ids and rows with columns are one source, however many there are; so is a pair of token
    ids and their mask.
    """
    if not isinstance(text, (list, tuple)) or not text or columns_of(text) is not None:
        return [text]
    if _all_strings(text):
        return list(text) if all(map(is_name, text)) else [text]
    if all(isinstance(entry, (int, tuple)) or _dimensions(entry) == 1 for entry in text):
        return [text]
    pair = isinstance(text, tuple) and len(text) == 2
    return [text] if pair and all(_dimensions(entry) == 2 for entry in text) else list(text)


def _dimensions(entry: Any) -> int | None:
    """Of a tensor, an array, or a list of numbers."""
    if isinstance(entry, list):
        return 1 if entry and all(isinstance(value, int) for value in entry) else None
    return getattr(entry, "ndim", None)


def _all_strings(source: Any) -> bool:
    return isinstance(source, (list, tuple)) and bool(source) and all(isinstance(entry, str) for entry in source)


def absent(text: Any) -> str | None:
    """A sentence for the first local file or folder among the sources in ``text`` that is not there, or holds nothing;
    None if there is none."""
    for source in split(text):
        if not isinstance(source, (str, Path)) or not is_name(source):
            continue
        path = Path(source)
        if not path.exists() and (_is_local(str(source), path) or path.suffix in FILES):
            return f"no such file{'' if path.suffix == '.npy' else ' or folder'}: {source}"
        if path.is_file() and not path.stat().st_size:
            return f"{source} is empty"
    return None


def _is_local(source: str, path: Path) -> bool:
    """Whether a name can only be that of a file or a folder here."""
    return path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
