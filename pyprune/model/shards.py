"""Safetensors files, read by plain file reads and written crash-safely.

Reading goes through ``preadv`` into the tensor's own memory instead of a memory map: a block that was released no
longer counts as resident, and a truncated file is a sentence instead of a bus error. Writing streams the tensors' bytes
through a checksum to a temporary name, fsyncs, renames, and fsyncs the folder.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.config import ConfigError

CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: code for code, dtype in CODES.items()}
CHUNK = 16 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputError(ConfigError):
    """The output cannot be written: what, where, how much room there is, and the way out."""


def output_error(error: OSError, path: Path, needed: int | None = None) -> OutputError:
    """The sentence for an ``OSError`` met while writing ``path``."""
    folder = next(p for p in [path, *path.parents] if p.is_dir())
    wanted = "" if needed is None else f" ({needed / 1e6:.1f} MB)"
    if error.errno in FULL:
        free = shutil.disk_usage(folder).free
        return OutputError(f"no room to write {path}{wanted}: {error.strerror}, {free / 1e6:.1f} MB are free there")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all: temporary name, fsync, rename, fsync of the folder. Raises :class:`OutputError`."""
    _write(path, [memoryview(data)])


def write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all; returns the SHA-256 of its bytes.

    Tensors are taken from the host or a device one at a time; the file depends on names and values only.
    """
    entries = {name: (NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
    parts = (memory_of(t.detach().cpu().contiguous()) for t in tensors.values() if t.numel())
    return write_parts(path, header_of(entries, {"format": "pt"}), parts)


def header_of(entries: dict[str, tuple[str, list[int], int]], metadata: dict[str, str]) -> builtins.bytes:
    """The header of a safetensors file: name → type, shape and bytes of tensors that follow each other."""
    header: dict = {"__metadata__": metadata}
    offset = 0
    for name, (code, shape, size) in entries.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_parts(path: Path, header: builtins.bytes, parts: Iterable[memoryview]) -> str:
    """Write a safetensors file of this header and the bytes behind it, whole or not at all; returns its SHA-256."""
    size = max((e["data_offsets"][1] for n, e in json.loads(header).items() if n != "__metadata__"), default=0)
    return _write(path, [memoryview(struct.pack("<Q", len(header)) + header)], parts, size)


def _write(path: Path, first: list[memoryview], rest=(), size: int = 0) -> str:
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            for group in (first, rest):
                for part in group:
                    for start in range(0, len(part), CHUNK):
                        digest.update(part[start : start + CHUNK])
                        file.write(part[start : start + CHUNK])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise output_error(error, path, size or sum(map(len, first))) from error
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def split_header(header: Any, where: str) -> tuple[dict[str, str], dict[str, dict]]:
    """Metadata and tensors of a header. Raises ConfigError, with the tensor's name, for one that is none."""
    header = dict(header) if isinstance(header, dict) else {"": None}
    metadata = header.pop("__metadata__", None) or {}
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not (
            isinstance(entry.get("dtype"), str)
            and isinstance(shape, list)
            and isinstance(offsets, list)
            and all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets])
            and len(offsets) == 2
            and offsets[0] <= offsets[1]
        ):
            raise ConfigError(f"{where} is damaged: its header does not say where {name or 'anything'} lies")
    return metadata if isinstance(metadata, dict) else {}, header


class Shard:
    """One safetensors file: its header is read and checked at once, its tensors when asked."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise ConfigError(
                        f"{self.path} is truncated or no safetensors file: its header of {length} bytes "
                        f"does not fit its {size} bytes; download or write it again"
                    )
                header = json.loads(file.read(length))
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self.path} is damaged: its header is not valid JSON; download or write it again"
            ) from error
        self.start = 8 + length
        self.metadata, self.entries = split_header(header, str(self.path))
        end = max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)
        if self.start + end > size:
            raise ConfigError(
                f"{self.path} is truncated: its tensors end at byte {self.start + end}, the file at "
                f"{size}; download or write it again"
            )

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(stop - start for start, stop in (entry["data_offsets"] for entry in self.entries.values()))

    def bytes_of(self, name: str) -> int:
        """Of one tensor."""
        start, stop = self.entries[name]["data_offsets"]
        return stop - start

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor, from the header."""
        entry = self.entries[name]
        if entry["dtype"] not in CODES:
            raise ConfigError(
                f"{name} in {self.path} is stored as {entry['dtype']}, which pyprune does not prune; "
                "convert the checkpoint to bfloat16, float16 or float32"
            )
        return CODES[entry["dtype"]], tuple(entry["shape"])

    def read(self, name: str, pin: bool = False) -> Tensor:
        """A tensor in memory of its own. Raises ConfigError if the file ends early."""
        dtype, shape = self.info(name)
        needed = math.prod(shape) * dtype.itemsize
        if self.bytes_of(name) != needed:
            raise ConfigError(
                f"{name} in {self.path} has {self.bytes_of(name)} bytes, its shape {list(shape)} needs {needed}; "
                "the file is damaged"
            )
        tensor = torch.empty(shape, dtype=dtype, pin_memory=pin)
        self._fill(name, tensor)
        return tensor

    def read_bytes(self, name: str) -> Tensor:
        """The bytes of a tensor as they lie in the file, uint8; also of a type that pyprune does not know."""
        data = torch.empty(self.bytes_of(name), dtype=torch.uint8)
        self._fill(name, data)
        return data

    def _fill(self, name: str, tensor: Tensor) -> None:
        if not tensor.numel():
            return
        start, view, done = self.entries[name]["data_offsets"][0], memory_of(tensor), 0
        handle = os.open(self.path, os.O_RDONLY)
        try:
            while done < len(view):
                got = os.preadv(handle, [view[done : done + CHUNK]], self.start + start + done)
                if got == 0:
                    raise ConfigError(f"{self.path} ended inside {name}; it is truncated: download or write it again")
                done += got
        except OSError as error:
            raise ConfigError(f"cannot read {name} from {self.path}: {error.strerror}") from error
        finally:
            os.close(handle)

    def sample(self, name: str, count: int = 64) -> builtins.bytes:
        """A few evenly spaced bytes of a tensor: tells two checkpoints apart without reading them."""
        start, stop = self.entries[name]["data_offsets"]
        piece = min(count, stop - start)
        with open(self.path, "rb") as file:
            found = []
            for k in range(3):
                file.seek(self.start + start + (stop - start - piece) * k // 2)
                found.append(file.read(piece))
        return b"".join(found)


class Files:
    """All tensors of a checkpoint folder, by name, over its one or many safetensors files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise ConfigError(f"{index} is damaged: it has no weight_map") from error
            shards = {file: Shard(self.folder / file) for file in sorted(set(weight_map.values()))}
            self.where = {name: shards[file] for name, file in weight_map.items()}
            for name, shard in self.where.items():
                if name not in shard.entries:
                    raise ConfigError(f"{shard.path} lacks {name}, which {index.name} says it holds")
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                raise ConfigError(f"{folder} holds no safetensors files")
            self.where = {name: shard for shard in map(Shard, paths) for name in shard.entries}

    @property
    def bytes(self) -> int:
        return sum(
            stop - start for name, shard in self.where.items() for start, stop in [shard.entries[name]["data_offsets"]]
        )

    def bytes_as(self, dtype: torch.dtype) -> int:
        """What the tensors take in memory when the floating-point ones are of this type."""
        total = 0
        for name, shard in self.where.items():
            entry = shard.entries[name]
            start, stop = entry["data_offsets"]
            own = CODES.get(entry["dtype"])
            total += math.prod(entry["shape"]) * dtype.itemsize if own and own.is_floating_point else stop - start
        return total

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.where[name].info(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name)[1]

    def read(self, name: str, pin: bool = False) -> Tensor:
        return self.where[name].read(name, pin)

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and a sample of every tensor."""
        digest = hashlib.sha256()
        for name in sorted(self.where):
            shard = self.where[name]
            digest.update(json.dumps([name, shard.entries[name]["dtype"], shard.entries[name]["shape"]]).encode())
            digest.update(shard.sample(name))
        return digest.hexdigest()
