"""Text and token ids that Python code gives in memory, in the forms that people have them in.

Text: a string, a list or tuple of strings, a list of dictionaries or a data set of the ``datasets`` library with a
column of text. Token ids: a tensor or array ``[samples, tokens]``, one sequence, a list of sequences (lists, arrays or
tensors), a tokenizer's output, a list of dictionaries or a data set with ``input_ids``, the (input, target) pairs of
the published pruning code, a ``DataLoader``. Positions that an ``attention_mask`` masks are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.sources import columns_of, in_memory, is_name

FORMS = (
    "a path, the id of a Hub data set, text, a list of texts, token ids (a tensor or array [samples, tokens], lists), "
    "a tokenizer's output, a list of dictionaries, a datasets.Dataset or a DataLoader"
)


def settled(source: Any, count: int | None = None) -> Any:
    """A source that is not used up by reading it: a ``DataLoader`` or a torch data set becomes the list of its first
    ``count`` sequences (None: all) or of its texts; anything else stays."""
    loader = isinstance(source, (torch.utils.data.DataLoader, torch.utils.data.Dataset))
    if not loader or columns_of(source) is not None:
        return source
    batches = source if hasattr(source, "__iter__") else (source[i] for i in range(len(source)))
    return list(itertools.islice(itertools.chain.from_iterable(map(_batch, batches)), count))


def _batch(batch: Any) -> list:
    """The texts or the sequences of one batch of a loader."""
    if isinstance(batch, Mapping) and "input_ids" not in batch:
        columns = [value for value in batch.values() if _texts(value)]
        if not columns:
            raise ConfigError(f"a batch of the DataLoader has neither input_ids nor text, only {', '.join(batch)}")
        return list(columns[0])
    if isinstance(batch, str):
        return [batch]
    return list(batch) if _texts(batch) else sequences(batch, "a batch of the DataLoader")


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, str) for entry in value)


def token_rows(source: Any) -> list[Tensor] | None:
    """The sequences of a source that already is token ids, 1-D int64 tensors in order and without padding; None for any
    other source."""
    if source is None or isinstance(source, str) or _texts(source):
        if isinstance(source, str) and is_name(source) and source.endswith(".npy"):
            return sequences(_load_npy(Path(source)), "token ids")
        return None
    if isinstance(source, Path):
        return token_rows(str(source))
    columns = columns_of(source)
    if columns is not None:
        if "input_ids" not in columns:
            return None
        return [row for entry in source for row in sequences(entry, "input_ids")]
    return sequences(settled(source), "token ids")


def sequences(found: Any, name: str) -> list[Tensor]:
    """Sequences of token ids in a tensor, an array, nested lists, a mapping or a pair."""
    if isinstance(found, Mapping):
        if "input_ids" not in found:
            raise ConfigError(f"a mapping of token ids needs input_ids, got the keys {', '.join(map(str, found))}")
        return _masked(sequences(found["input_ids"], name), found.get("attention_mask"))
    if isinstance(found, tuple) and found and all(hasattr(entry, "ndim") for entry in found):
        return _pair(found, name)
    if isinstance(found, (list, tuple)):
        if found and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in found):
            return [torch.tensor(found, dtype=torch.long)]
        if not found:
            raise ConfigError(f"{name} are an empty {type(found).__name__}")
        return [row for i, entry in enumerate(found) for row in sequences(entry, f"sequence {i}")]
    if not hasattr(found, "ndim"):
        raise ConfigError(f"text and token ids come as {FORMS}; got {type(found).__name__}")
    ids = torch.as_tensor(found)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{name} must be integers, got {str(ids.dtype)[6:]}")
    if ids.ndim in (1, 2) and 0 in ids.shape:
        raise ConfigError(f"empty {name}: shape {list(ids.shape)} holds no token")
    if ids.ndim not in (1, 2):
        raise ConfigError(f"{name} must be a matrix [samples, tokens] or one sequence, got shape {list(ids.shape)}")
    ids = ids.detach().cpu().long()
    return [ids] if ids.ndim == 1 else list(ids)


def _pair(found: tuple, name: str) -> list[Tensor]:
    """The first of ``(ids, mask)`` without what is masked, or of ``(input, target)``."""
    rows, second = sequences(found[0], name), torch.as_tensor(found[1]) if len(found) > 1 else None
    is_mask = second is not None and second.numel() > 0 and bool(((second == 0) | (second == 1)).all())
    return _masked(rows, second) if is_mask else rows


def _masked(rows: list[Tensor], mask: Any) -> list[Tensor]:
    if mask is None:
        return rows
    keep = [mask] if len(rows) == 1 and getattr(mask, "ndim", 0) == 1 else mask
    keep = [keep] if isinstance(keep, list) and keep and isinstance(keep[0], int) else keep
    kept = [torch.as_tensor(part) for part in keep]
    shapes = [len(row) for row in rows], [part.numel() for part in kept]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"the attention mask has shape {_shape(kept)}, the token ids {_shape(rows)}: they must be the same"
        )
    return [row[part.bool().reshape(-1)] for row, part in zip(rows, kept)]


def _shape(rows: list[Tensor]) -> list[int]:
    return [len(rows), max(map(len, rows), default=0)]


def _load_npy(path: Path):
    import numpy

    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    try:
        return numpy.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not a .npy array of token ids: {error}") from error


def refuse_stand_in(source: Any) -> None:
    """Raise ConfigError for the name that a record gives to a source which was in memory."""
    if isinstance(source, str) and in_memory(source):
        raise ConfigError(
            f"the source {source} was in memory when this configuration was written; put a path to the "
            "same data in its place"
        )


def text_rows(source: Any) -> Iterable[Any] | None:
    """Strings given in memory, or mappings with columns of which some are text; None for a source that has a name."""
    if is_name(source):
        refuse_stand_in(source)
        return None
    if isinstance(source, str):
        return [source]
    if _texts(source) or columns_of(source) is not None:
        return source
    found = settled(source)
    if _texts(found):
        return found
    raise ConfigError(f"text and token ids come as {FORMS}; got {_what(source)}")


def _what(source: Any) -> str:
    if isinstance(source, (list, tuple)):
        kinds = ", ".join(sorted({type(entry).__name__ for entry in source})) or "nothing"
        return f"a {type(source).__name__} of {kinds}"
    return type(source).__name__


def contents(source: Any) -> Iterator[bytes]:
    """What a source in memory holds, as bytes whose hash tells it from any other."""
    rows = token_rows(source) if columns_of(source) is None or "input_ids" in (columns_of(source) or ()) else None
    if rows is not None:
        for row in rows:
            yield row.numpy().astype("<i8").tobytes() + b"\n"
        return
    for entry in text_rows(source) or ():
        yield (entry if isinstance(entry, str) else repr(sorted(entry.items()))).encode() + b"\0"
