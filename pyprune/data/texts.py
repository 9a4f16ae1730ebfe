"""Where text and token ids come from: files, Hub data sets, lists, tensors, texts that come with pyprune.

Calibration and evaluation read through this one file, so that the same source means the same text in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyprune.config import ConfigError
from pyprune.data import builtin
from pyprune.data.given import refuse_stand_in, text_rows
from pyprune.sources import DATA_FILES, absent, columns_of, is_name, kind, split

TEXT_COLUMNS = ("text", "content", "sentence", "document", "body", "article", "question", "sentence1", "sentence2")


def describe(source: Any) -> str:
    """A source in a few words, for reports."""
    if source is None:
        return describe(list(builtin.CALIBRATION))
    if is_name(source):
        return builtin.TEXTS.get(str(source), str(source))
    if isinstance(source, str):
        return "a text given in Python"
    if len(several := mixture(source)) > 1:
        return " and ".join(map(describe, several))
    if isinstance(source, Tensor):
        return f"a tensor of token ids {list(source.shape)}"
    found = kind(source)
    if found == "table":
        return f"a data set given in Python (columns {', '.join(columns_of(source) or ())})"
    return f"{len(source)} texts given in Python" if found == "prose" else "token ids given in Python"


def mixture(source: Any) -> list:
    """The sources in ``Calibration.source``: each entry of a list in which every one is the name of a file, of a text
    that comes with pyprune, or of a data set with its owner's; else the one source itself. A list of words is text."""
    several = isinstance(source, list) and len(source) > 1 and all(map(is_name, source))
    return list(source) if several and all(_names_one(str(name)) for name in source) else [source]


def _names_one(name: str) -> bool:
    known = kind(name) in ("builtin", "ids", "table", "prose")
    return known or Path(name).exists() or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def check_rows(rows: list[Tensor], name: str, what: str) -> None:
    """Raise ConfigError at the first row that is no sequence: fewer than two tokens."""
    if (short := next((i for i, row in enumerate(rows) if len(row) < 2), None)) is not None:
        raise ConfigError(f"row {short} of {name} has {len(rows[short])} tokens; {what} needs at least 2")


def check_length(rows: list[Tensor], name: str, field: str, asked: int) -> None:
    """Raise ConfigError if no row has as many tokens as the field asks for."""
    longest = max(map(len, rows))
    if asked > longest:
        raise ConfigError(
            f"{field} is {asked}, but {name} has rows of {longest} tokens; leave {field} out or set {field}={longest}"
        )


def check_vocabulary(sequences: list[Tensor], vocab_size: int | None) -> None:
    """Raise ConfigError at the first id outside ``[0, vocab_size)``: a GPU would only abort on it."""
    if vocab_size is None:
        return
    for i, row in enumerate(sequences):
        wrong = row[(row < 0) | (row >= vocab_size)]
        if wrong.numel():
            raise ConfigError(
                f"token id {wrong[0].item()} in sequence {i} is outside the model's vocabulary of "
                f"{vocab_size}; were these ids made with another tokenizer?"
            )


def read(source: Any, *, split: str, subset: str | None, text_column: str | None) -> Iterator[str]:
    """The texts of a source, one document at a time.

    ``.txt`` is one document, except WikiText's tokenised form, which gives the rows of the Hub data set, so that joined
    with blank lines it is the very text that published perplexities are measured on.
    """
    given = text_rows(source)
    if given is not None:
        first = next(iter(given), None)
        if isinstance(first, Mapping):
            return _columns(given, describe(source), text_column)
        return iter(given)
    if kind(source) == "builtin":
        return iter(builtin.paragraphs(str(source)))
    path = Path(source)
    if path.is_file() and path.suffix in (".txt", ".md", ".rst", ""):
        return iter(_text_rows(path))
    return _columns(_dataset(str(source), path, split, subset), str(source), text_column)


def _text_rows(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if re.match(r"\s* = [^=\n]+ = \n", text) and " @-@ " in text:
        return [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    return [text]


def check_there(text: Any) -> None:
    """Raise ConfigError for a local file or folder among the sources in ``text`` that is not there, and for one that
    was in memory when it was written down, reading none."""
    for source in split(text):
        if isinstance(source, (str, Path)) and is_name(source):
            refuse_stand_in(source)
    if (why := absent(text)) is not None:
        raise ConfigError(why)


def _dataset(source: str, path: Path, split: str, subset: str | None) -> Iterable[dict]:
    """Rows of a local or Hub data set, streamed: a data set far larger than what is needed is not downloaded whole."""
    import datasets

    try:
        if path.is_file():
            if path.suffix not in DATA_FILES:
                raise ConfigError(
                    f"{path}: cannot read {path.suffix!r} files; give .txt, .npy, {', '.join(DATA_FILES)}"
                )
            options = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(
                DATA_FILES[path.suffix], data_files=str(path), split="train", streaming=True, **options
            )
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        check_there(source)
        return datasets.load_dataset(source, subset, split=split, streaming=True)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"data set {source!r} has no split {split!r}") from error
    except Exception as error:  # the data set library raises a dozen types for a name it cannot find or reach
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"cannot load the data set {source!r} (split {split!r}, subset {subset!r}): {reason}; it is "
            "neither a local file nor a data set that can be reached"
        ) from error


def _columns(rows: Iterable[dict], source: str, text_column: str | None) -> Iterator[str]:
    columns: list[str] | None = None
    try:
        for row in rows:
            columns = columns or _find_columns(row, source, text_column)
            yield from (row[c] for c in columns if isinstance(row.get(c), str))
    except ConfigError:
        raise
    except Exception as error:  # streaming reads lazily: a broken line or a lost connection shows up here
        raise ConfigError(f"cannot read {source}: {' '.join(str(error).split())}") from error


def _find_columns(row: dict, source: str, text_column: str | None) -> list[str]:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if text_column is not None:
        wanted = [name.strip() for name in text_column.split(",")]
        missing = [name for name in wanted if name not in strings]
        if missing:
            raise ConfigError(
                f"text_column {missing[0]!r} is no text column of {source}; its text columns are "
                f"{', '.join(strings) or 'none'}"
            )
        return wanted
    if {"sentence1", "sentence2"} <= set(strings) and "text" not in strings:
        return ["sentence1", "sentence2"]
    known = [name for name in TEXT_COLUMNS if name in strings]
    if not (known or strings):
        raise ConfigError(f"{source} has no text column: its columns are {', '.join(row)}")
    return [known[0]] if known else [max(strings, key=lambda name: len(row[name]))]
