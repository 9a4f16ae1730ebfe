"""Packed checkpoints as files: sparse matrices without their zeros, read as if they were dense. docs/formats.md.

A packed shard is a safetensors file. A packed matrix ``name`` is stored in it as ``name.mask``, ``name.values`` and
``name.offsets`` (the layout of :mod:`pyprune.ops.packed`), every other tensor under its own name. The header of the
dense file, to the letter, is in its metadata: shapes, types and order of the dense tensors, so that unpacking gives
back the very bytes of the file.

Nothing of a file is believed: what the header says is compared with itself when the file is opened, mask, offsets and
values of a matrix when it is read.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.model.shards import CODES, NAMES, Files, Shard, split_header
from pyprune.ops.arguments import FLOATS
from pyprune.ops.packed import DamagedWeight, Packed, unpack_bitmask

FORMAT, VERSION = "pyprune-packed", 1
INDEX = "packed.safetensors.index.json"
"""Names every dense tensor's file, and by being there says that a folder is packed."""
MASK, VALUES, OFFSETS = ".mask", ".values", ".offsets"
PARTS = (MASK, VALUES, OFFSETS)
OFFSET_TYPES = (torch.int32, torch.int64)
"""Offsets are stored in the first that holds the last of them."""
WORTH = 0.9
"""A matrix is packed if that takes at most this share of its dense bytes: at 16 bits from 17 % zeros on."""


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (Path(folder).expanduser() / INDEX).is_file()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns as which a tensor is packed: of experts ``[experts, out, in]`` each slice's rows follow."""
    return math.prod(shape[:-1]), shape[-1]


def offsets_type(values: int) -> torch.dtype:
    """The smallest type that holds the offsets of so many values."""
    return OFFSET_TYPES[values > torch.iinfo(OFFSET_TYPES[0]).max]


def packed_bytes(shape: tuple[int, ...], values: int, dtype: torch.dtype) -> int:
    """What a tensor with so many values that are kept takes when it is packed."""
    rows, columns = matrix_shape(shape)
    return rows * ((columns + 7) // 8) + values * dtype.itemsize + (rows + 1) * offsets_type(values).itemsize


def pays(shape: tuple[int, ...], values: int, dtype: torch.dtype) -> bool:
    """Whether a tensor is worth packing: a floating-point matrix, or a stack of them, with zeros enough."""
    return (
        dtype in FLOATS
        and len(shape) >= 2
        and packed_bytes(shape, values, dtype) <= WORTH * math.prod(shape) * dtype.itemsize
    )


def read_index(folder: Path) -> dict:
    """The index of a packed folder. Raises ConfigError for a damaged one and a version that is not known."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        where, metadata = index["weight_map"], index["metadata"]
        whole = isinstance(metadata, dict) and isinstance(index["files"], dict)
        whole = whole and all(
            isinstance(v, str) and v == Path(v).name
            for names in (where.values(), index["files"].keys(), index["files"].values())
            for v in names
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: it does not say which file holds what; pack the model again") from error
    if not whole:
        raise ConfigError(f"{path} is damaged: it does not say which file holds what; pack the model again")
    check_version(metadata, str(path))
    return index


def check_version(metadata: dict, where: str) -> None:
    """Refuse what is no packed file, and a version that is not known."""
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{where} is no packed checkpoint: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if str(metadata.get("version")) != str(VERSION):
        raise ConfigError(
            f"{where} has version {metadata.get('version')!r} of the packed format, this pyprune reads {VERSION}; "
            "update pyprune"
        )


class PackedShard(Shard):
    """A packed file, read under the dense tensors' names."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.stored = stored = Shard(path)
        check_version(stored.metadata, str(path))
        self.header = stored.metadata.get("dense_header", "")
        """Of the dense file, to the letter."""
        try:
            header = json.loads(self.header)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is damaged: the dense file's header in it is not valid JSON") from error
        self.metadata, self.entries = split_header(header, f"the dense file's header in {path}")
        self.packed = {name for name in self.entries if name not in stored.entries}
        """Names of the matrices that are packed."""
        known = (self.entries.keys() - self.packed) | {name + part for name in self.packed for part in PARTS}
        for name in sorted(stored.entries.keys() ^ known):
            raise ConfigError(f"{path} is damaged: {name} is {'missing' if name in known else 'of no tensor'}")
        self._check_layout()
        for name in self.entries:
            self._check_entry(name)

    def _check_layout(self) -> None:
        """The dense tensors follow each other without holes, as a safetensors file has to."""
        end = 0
        for name in self.in_order():
            start, stop = self.entries[name]["data_offsets"]
            code, shape = self.entries[name]["dtype"], self.entries[name]["shape"]
            dense = math.prod(shape) * CODES[code].itemsize if code in CODES else stop - start
            if start != end or stop - start != dense:
                raise ConfigError(f"{self.path} is damaged: {name} of the dense file lies at bytes {start} to {stop}")
            end = stop

    def _check_entry(self, name: str) -> None:
        """Shapes and types of what is stored for a tensor are those that its dense shape and type ask for."""
        entry = self.entries[name]
        if name not in self.packed:
            known = self.stored.entries[name]
            if (entry["dtype"], entry["shape"], self.bytes_of(name)) != (
                known["dtype"],
                known["shape"],
                self.stored.bytes_of(name),
            ):
                raise ConfigError(
                    f"{name} in {self.path} is damaged: the dense file's header says something else of it"
                )
            return
        shape = tuple(entry["shape"])
        if CODES.get(entry["dtype"]) not in FLOATS or len(shape) < 2:
            raise ConfigError(f"{name} in {self.path} is damaged: {entry['dtype']} {list(shape)} is never packed")
        rows, columns = matrix_shape(shape)
        found = {part: self.stored.entries[name + part] for part in PARTS}
        wanted: dict[str, tuple[tuple[str, ...], list[int]]] = {
            MASK: (("U8",), [rows, (columns + 7) // 8]),
            OFFSETS: (tuple(NAMES[dtype] for dtype in OFFSET_TYPES), [rows + 1]),
            VALUES: ((entry["dtype"],), found[VALUES]["shape"][:1]),
        }
        for part, (codes, sizes) in wanted.items():
            if found[part]["dtype"] not in codes or found[part]["shape"] != sizes:
                raise ConfigError(
                    f"{name} in {self.path} is damaged: {part[1:]} is {found[part]['dtype']} {found[part]['shape']}, "
                    f"{entry['dtype']} {list(shape)} needs {' or '.join(codes)} {sizes}"
                )

    def in_order(self) -> list[str]:
        """Names by their place in the dense file."""
        return sorted(self.entries, key=lambda name: self.entries[name]["data_offsets"])

    def read_packed(self, name: str) -> Packed:
        """A packed matrix as it is stored. Raises ConfigError, with its name, if it contradicts itself."""
        mask, values, offsets = (self.stored.read(name + part) for part in PARTS)
        try:
            found = Packed(mask, values, offsets.long(), self.entries[name]["shape"][-1])
            found.check()
        except DamagedWeight as error:
            raise ConfigError(f"{name} in {self.path} is damaged: {error}; pack the model again") from error
        return found

    def read(self, name: str, pin: bool = False) -> Tensor:
        """A tensor as it was in the dense file, to the bit, in memory of its own."""
        if name not in self.packed:
            return self.stored.read(name, pin)
        dense = unpack_bitmask(self.read_packed(name)).view(self.info(name)[1])
        return dense.pin_memory() if pin else dense

    def read_bytes(self, name: str) -> Tensor:
        if name not in self.packed:
            return self.stored.read_bytes(name)
        return self.read(name).reshape(-1).view(torch.uint8)

    def sample(self, name: str, count: int = 64) -> bytes:
        parts = [name + part for part in PARTS] if name in self.packed else [name]
        return b"".join(self.stored.sample(part, count) for part in parts)


class PackedFiles(Files):
    """All tensors of a packed checkpoint folder, by their dense names."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.index = read_index(self.folder)
        where = self.index["weight_map"]
        shards = {file: PackedShard(self.folder / file) for file in sorted(set(where.values()))}
        self.where: dict[str, Any] = {name: shards[file] for name, file in where.items()}
        for name, shard in self.where.items():
            if name not in shard.entries:
                raise ConfigError(f"{shard.path} lacks {name}, which {INDEX} says it holds")

    @functools.cached_property
    def packed(self) -> set[str]:
        """Names of the matrices that are packed."""
        return {name for name, shard in self.where.items() if name in shard.packed}

    def summary(self) -> dict[str, int]:
        """Number of packed matrices, their bytes, and the bytes that they would have as dense ones."""
        parts = [self.where[name].stored.bytes_of(name + part) for name in self.packed for part in PARTS]
        whole = [self.where[name].bytes_of(name) for name in self.packed]
        return {"matrices": len(self.packed), "bytes": sum(parts), "dense_bytes": sum(whole)}

    def read_packed(self, name: str) -> Packed:
        return self.where[name].read_packed(name)


def files_of(folder: str | Path) -> Files:
    """The tensors of a folder of safetensors files, packed or not."""
    return PackedFiles(folder) if is_packed(folder) else Files(folder)


class Unread:
    """A tensor of a checkpoint that is read when it is indexed: what transformers takes in place of a tensor."""

    def __init__(self, files: Files, name: str):
        self.files, self.name = files, name
        self.dtype, self.shape = files.info(name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.files.read(self.name)[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)
