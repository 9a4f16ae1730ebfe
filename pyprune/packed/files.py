"""``pyprune pack`` and ``pyprune unpack``: a checkpoint folder without its zeros, and back to the same bytes.

One file at a time is read, and the packed one written; the whole folder appears under its name at the end or not at
all. Everything that is no safetensors file travels along. Matrices of blocks are packed where it saves a tenth or more;
embeddings and vectors stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.model import checkpoint
from pyprune.model.names import in_block
from pyprune.model.packed_shards import (
    FORMAT,
    INDEX,
    MASK,
    OFFSETS,
    VALUES,
    VERSION,
    PackedFiles,
    PackedShard,
    is_packed,
    matrix_shape,
    offsets_type,
    pays,
)
from pyprune.model.shards import (
    CODES,
    NAMES,
    Files,
    Shard,
    header_of,
    memory_of,
    output_error,
    write_bytes,
    write_parts,
)
from pyprune.ops.packed import Packed, pack_bitmask
from pyprune.packed import card
from pyprune.packed.modules import SparseLinear

FILE = "model.safetensors"
DENSE_INDEX = "model.safetensors.index.json"
Entry = tuple[str, str, list[int], Tensor]
"""Of a file to write: name, type, shape and data."""


@dataclass(frozen=True)
class Packing:
    """What packing a folder did."""

    weights: int
    """Matrices that are packed."""
    matrices: int
    """Matrices of the blocks."""
    bytes: int
    """Of all packed files."""
    dense_bytes: int
    """Of the files that they were made of."""
    matrix_bytes: int
    """That the packed matrices take."""
    dense_matrix_bytes: int
    """That the packed matrices took before."""

    def sentence(self) -> str:
        """``210 of 210 matrices packed: 162.3 MB, 0.61 of the dense 269.1 MB (the packed matrices: 0.57)``."""
        share = f" (the packed matrices: {self.matrix_bytes / self.dense_matrix_bytes:.3f})" if self.weights else ""
        return (
            f"{self.weights} of {self.matrices} matrices packed: {self.bytes / 1e6:.1f} MB, "
            f"{self.bytes / max(1, self.dense_bytes):.2f} of the dense {self.dense_bytes / 1e6:.1f} MB{share}"
        )


Progress = Callable[[int, int], None]
"""Called after each tensor with the bytes that are done and those of all dense files."""


def pack(directory: str | Path, output: str | Path, *, progress: Progress | None = None) -> Packing:
    """Write the checkpoint in ``directory`` to ``output`` without its zeros (docs/formats.md).

    A zero is the bit pattern of +0; −0.0 and any NaN are values and kept, so that :func:`unpack` gives back the same
    bytes. progress: called with the bytes that are done and those of all files.
    Raises ConfigError, before anything is written, for a folder without safetensors files and one that is packed
    already, and for one in which packing would save nothing; OutputError if ``output`` cannot be written.
    """
    source = Path(directory).expanduser()
    if not source.is_dir():
        raise ConfigError(f"no such folder: {source}")
    if is_packed(source):
        raise ConfigError(f"{source} is packed already: it has a {INDEX}")
    checkpoint.refuse_several(source)
    Files(source)  # one that cannot be read is refused at once
    with writing(output) as folder:
        _copy_others(source, folder)
        found = _pack_files(source, folder, progress)
        if not found.weights:
            raise ConfigError(
                f"packing {source} would save nothing: none of its {found.matrices} matrices has zeros enough "
                "(at 16 bits, 17 %); prune it first"
            )
        _add_card(folder, found, Path(output).expanduser().absolute().name)
    return found


def pack_here(folder: Path, name: str) -> Packing:
    """Pack the checkpoint that a run has assembled in ``folder``, where it lies; its card calls it ``name``. One in
    which that would save nothing stays as it is, with a warning."""
    dense = sorted(folder.glob("*.safetensors"))
    found = _pack_files(folder, folder)
    if found.weights:
        unused = [*dense, folder / DENSE_INDEX]
        _add_card(folder, found, name)
    else:
        warnings.warn(
            f"{name} is written unpacked: none of its matrices has zeros enough for packing to pay", stacklevel=2
        )
        unused = [*(folder / packed_name(path.name) for path in dense), folder / INDEX]
    for path in unused:
        path.unlink(missing_ok=True)
    return found


def unpack(directory: str | Path, output: str | Path, *, progress: Progress | None = None) -> None:
    """Write the packed checkpoint in ``directory`` to ``output`` as it was before :func:`pack`, to the byte.

    Raises ConfigError, with the tensor's name, for files that are damaged, and OutputError if ``output`` cannot be
    written; nothing is left of ``output`` then.
    """
    source = Path(directory).expanduser()
    if not is_packed(source):
        raise ConfigError(f"{source} is not packed: it has no {INDEX}")
    index = PackedFiles(source).index
    shards = {dense: PackedShard(source / file) for file, dense in sorted(index["files"].items())}
    count = counter(sum(shard.bytes for shard in shards.values()), progress)
    with writing(output) as folder:
        _copy_others(source, folder)
        for dense, shard in shards.items():
            write_parts(folder / dense, shard.header.encode(), _dense_parts(shard, count))
        if index.get("dense_index") is not None:
            write_bytes(folder / DENSE_INDEX, index["dense_index"].encode())
        readme = folder / "README.md"
        if readme.is_file():
            rest = card.without_section(card.read(readme))
            card.write(readme, rest) if rest else readme.unlink()


def _dense_parts(shard: PackedShard, count: Callable[[int], None]) -> Iterator[memoryview]:
    for name in shard.in_order():
        yield memory_of(shard.read_bytes(name))
        count(shard.bytes_of(name))


@contextlib.contextmanager
def writing(output: str | Path) -> Iterator[Path]:
    """:func:`pyprune.model.checkpoint.staged`, in which whatever cannot be written is a sentence."""
    try:
        with checkpoint.staged(output) as folder:
            yield folder
    except OSError as error:
        raise output_error(error, Path(output).expanduser()) from error


def counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """What adds up the bytes that are done, and tells ``progress``."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return count


def packed_name(dense: str) -> str:
    """A name that no stock loader takes for weights of its own."""
    return f"packed-{dense}"


def _copy_others(source: Path, folder: Path) -> None:
    """Copy every other file, sub-folders too, but for what lies in hidden folders."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parent.parts)
        if hidden or not path.is_file() or place.parent == Path() and is_of_weights(path.name):
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / place)


def is_of_weights(name: str) -> bool:
    """Whether a file is read for its weights, and written anew."""
    return name.endswith(".safetensors") or name in (INDEX, DENSE_INDEX)


def _pack_files(source: Path, folder: Path, progress: Progress | None = None) -> Packing:
    """Write the packed files of ``source`` and their index into ``folder``."""
    dense, files = Files(source), {}
    totals = [0] * 6
    paths = sorted(source.glob("*.safetensors"))
    count = counter(sum(Shard(path).bytes for path in paths), progress)
    for path in paths:
        files[packed_name(path.name)] = path.name
        row = pack_file(path, folder / packed_name(path.name), count)
        totals = [total + part for total, part in zip(totals, row)]
    found = Packing(*totals)
    text = (source / DENSE_INDEX).read_bytes().decode() if (source / DENSE_INDEX).is_file() else None
    where = {name: packed_name(shard.path.name) for name, shard in dense.where.items()}
    _write_index(folder, found, where, files, text)
    return found


def _write_index(folder: Path, found: Packing, where: dict, files: dict, dense_index: str | None) -> None:
    index = {
        "metadata": {"format": FORMAT, "version": VERSION, **dataclasses.asdict(found)},
        "weight_map": where,
        "files": files,
        "dense_index": dense_index,
    }
    write_bytes(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def pack_file(source: Path, target: Path, count: Callable[[int], None]) -> tuple[int, int, int, int, int, int]:
    """Pack one safetensors file; returns the fields of :class:`Packing` for it."""
    shard, entries = Shard(source), []
    packed = matrices = size = dense_size = 0
    for name in sorted(shard.entries, key=lambda name: shard.entries[name]["data_offsets"]):
        entry = shard.entries[name]
        matrices += len(entry["shape"]) >= 2 and in_block(name)
        parts = _parts(shard, name)
        if len(parts) > 1:
            packed += 1
            size += sum(data.nbytes for _, _, _, data in parts)
            dense_size += shard.bytes_of(name)
        entries += parts
        count(shard.bytes_of(name))
    with open(source, "rb") as file:
        header = file.read(shard.start)[8:].decode()
    write_packed(target, entries, header)
    return packed, matrices, target.stat().st_size, source.stat().st_size, size, dense_size


def write_packed(target: Path, entries: list[Entry], dense_header: str) -> None:
    """Write a packed file of these tensors; ``dense_header`` is that of the file that they were or would be."""
    # wide types first, as every writer of safetensors does: then each tensor begins at a multiple of its elements' size
    entries = sorted(entries, key=lambda entry: -CODES[entry[1]].itemsize if entry[1] in CODES else -1)
    sizes = {name: (code, shape, data.nbytes) for name, code, shape, data in entries}
    if len(sizes) != len(entries):
        raise ConfigError(f"{target.name} cannot be packed: it has tensors that end in {MASK}, {VALUES} or {OFFSETS}")
    metadata = {"format": FORMAT, "version": str(VERSION), "dense_header": dense_header}
    parts = (memory_of(data.cpu().contiguous()) for _, _, _, data in entries if data.numel())
    write_parts(target, header_of(sizes, metadata), parts)


def save_packed(model: Any, save_directory: str | Path, **_unused: Any) -> None:
    """Write a live model with packed layers as a packed checkpoint: what its ``save_pretrained`` does.

    The names are the model's own. Raises ConfigError for a folder that is not empty.
    """
    entries, dense, known = [], {}, set()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if name in ignored or path in layers and leaf in ("mask", "offsets"):
            continue
        if path in layers and leaf == "values":
            layer, name = layers[path], f"{path}.weight"
            shape, packed = [layer.out_features, layer.in_features], layer.packed
            if layer.transposed:
                shape, packed = shape[::-1], pack_bitmask(layer.weight.T)
            dense[name] = (NAMES[tensor.dtype], shape, math.prod(shape) * tensor.itemsize)
            entries += packed_entries(name, packed)
        elif (tensor.data_ptr(), tensor.shape) not in known or not tensor.numel():
            known.add((tensor.data_ptr(), tensor.shape))
            dense[name] = (NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes)
            entries.append((name, NAMES[tensor.dtype], list(tensor.shape), tensor.detach()))
    packed_names = {f"{path}.weight" for path in layers}
    found = Packing(
        len(layers),
        sum(in_block(name) and len(shape) >= 2 for name, (_, shape, _) in dense.items()),
        sum(e[3].nbytes for e in entries),
        sum(size for _, _, size in dense.values()),
        sum(e[3].nbytes for e in entries if e[0].rpartition(".")[0] in packed_names),
        sum(size for name, (_, _, size) in dense.items() if name in packed_names),
    )
    with writing(save_directory) as folder:
        checkpoint.save_settings(model, folder)
        write_packed(folder / packed_name(FILE), entries, header_of(dense, {"format": "pt"}).decode())
        _write_index(folder, found, dict.fromkeys(dense, packed_name(FILE)), {packed_name(FILE): FILE}, None)
        _add_card(folder, found, Path(save_directory).expanduser().absolute().name)


def _parts(shard: Shard, name: str) -> list[Entry]:
    """What is stored for a tensor: mask, values and offsets if that pays, else the bytes it has."""
    entry = shard.entries[name]
    dtype = CODES.get(entry["dtype"])
    if dtype is not None and dtype.is_floating_point and len(entry["shape"]) >= 2 and in_block(name):
        tensor = shard.read(name)
        if (found := packed_if_it_pays(tensor)) is not None:
            return packed_entries(name, found)
    return [(name, entry["dtype"], entry["shape"], shard.read_bytes(name))]


def packed_entries(name: str, packed: Packed) -> list[Entry]:
    """What is stored for a packed matrix."""
    offsets = packed.offsets.to(offsets_type(len(packed.values)))
    tensors = {MASK: packed.mask, VALUES: packed.values.detach(), OFFSETS: offsets}
    return [(name + part, NAMES[tensor.dtype], list(tensor.shape), tensor) for part, tensor in tensors.items()]


def packed_if_it_pays(tensor: Tensor) -> Packed | None:
    """A tensor packed as the matrix of its rows, None where that saves less than a tenth."""
    if tensor.dtype not in PACKABLE or not tensor.numel():
        return None
    kept = int(torch.count_nonzero(tensor.contiguous().view(PACKABLE[tensor.dtype])))
    if not pays(tuple(tensor.shape), kept, tensor.dtype):
        return None
    return pack_bitmask(tensor.reshape(matrix_shape(tuple(tensor.shape))))


PACKABLE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Types that are packed, and the integers of their bits: zero is the bit pattern of +0."""


def _add_card(folder: Path, found: Packing, name: str) -> None:
    readme = folder / "README.md"
    text = card.read(readme) if readme.is_file() else ""
    card.write(readme, card.with_section(text, card.section(found.sentence(), name)))
