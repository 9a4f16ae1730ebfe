"""What a checkpoint really holds: zeros, N:M violations and coverage, read from its files one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.checkpoint import members
from pyprune.model.names import in_block
from pyprune.model.packed_shards import PackedFiles, is_packed

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
PRUNED = 0.01
"""A matrix with at least this share of exact zeros counts as pruned: dequantised dense weights have a few by chance."""


def inspect(directory: str | Path) -> dict:
    """True sparsity, N:M violations and coverage of any safetensors or ``.bin`` checkpoint, ours or not.

    Returns ``sparsity`` (zeros in the matrices of the blocks), ``sparsity_of_pruned`` (in those that are pruned),
    ``sparsity_of_model`` (in all parameters), ``patterns`` (per N:M: groups with more than N non-zeros, over the pruned
    matrices), ``holds`` (patterns without a violation), ``coverage`` (share of block matrix weights in pruned matrices,
    and the names of the others), ``non_finite``, ``weights`` (the same per matrix) and ``pruning`` (``pruning.json``
    without its weights); of a packed checkpoint also ``packed`` (matrices that are packed, their bytes, and those that
    they would have as dense ones), and for each of ``weights`` whether it is.
    A folder of several sparsities gives ``members``, the same of each. Raises :class:`ConfigError` if there is no
    checkpoint.
    """
    if len(found := members(directory)) > 1:
        return {"path": str(directory), "members": [inspect(path) for path in found]}
    folder = Path(directory).expanduser()
    files = weight_files(folder)
    transposed = _transposed(folder)
    packed = PackedFiles(folder) if is_packed(folder) else None
    rows, parameters, zeros, non_finite, names = [], 0, 0, 0, set()
    for name, tensor in tensors(files) if packed is None else ((name, packed.read(name)) for name in packed.where):
        if not tensor.is_floating_point() or name in names:
            continue
        names.add(name)
        empty = tensor.numel() - int(torch.count_nonzero(tensor))
        parameters, zeros = parameters + tensor.numel(), zeros + empty
        bad = int((~torch.isfinite(tensor)).sum())
        non_finite += bad
        if tensor.ndim in (2, 3) and in_block(name):
            matrix = tensor.mT if any(name.endswith(t) for t in transposed) else tensor
            rows.append(
                {
                    "name": name,
                    "shape": list(matrix.shape),
                    "dtype": str(tensor.dtype)[6:],
                    "zeros": empty,
                    "sparsity": empty / tensor.numel(),
                    "non_finite": bad,
                    "violations": {key: violations(matrix, *nm) for key, nm in PATTERNS.items()},
                    **({} if packed is None else {"packed": name in packed.packed}),
                }
            )
    if not rows:
        raise ConfigError(f"{directory} has no matrices inside numbered blocks: not a transformer checkpoint")
    return {
        "path": str(directory),
        "format": files[0].suffix[1:],
        **({} if packed is None else {"packed": packed.summary()}),
        "bytes": sum(f.stat().st_size for f in files),
        "parameters": parameters,
        "sparsity_of_model": zeros / parameters,
        **_summary(rows),
        "non_finite": non_finite,
        "pruning": _record(folder),
        "weights": rows,
    }


def violations(matrix: Tensor, n: int, m: int) -> int | None:
    """Groups of ``m`` consecutive inputs with more than ``n`` non-zeros in ``[…, out, in]``; None if undivided."""
    if matrix.shape[-1] % m:
        return None
    return int(((matrix != 0).unflatten(-1, (-1, m)).sum(-1) > n).sum())


def _summary(rows: list[dict]) -> dict:
    size = {row["name"]: _numel(row["shape"]) for row in rows}
    pruned = [row for row in rows if row["sparsity"] >= PRUNED]
    total, reached = sum(size.values()), sum(size[row["name"]] for row in pruned)
    patterns = {}
    for key, (_, m) in PATTERNS.items():
        counts = [row["violations"][key] for row in pruned]
        groups = sum(size[row["name"]] // m for row in pruned if row["violations"][key] is not None)
        broken = sum(c for c in counts if c is not None)
        patterns[key] = {
            "groups": groups,
            "violations": broken,
            "fraction": broken / groups if groups else None,
            "undivided": sum(c is None for c in counts),
        }
    return {
        "sparsity": sum(row["zeros"] for row in rows) / total,
        "sparsity_of_pruned": sum(row["zeros"] for row in pruned) / reached if reached else 0.0,
        "patterns": patterns,
        "holds": [key for key, p in patterns.items() if pruned and not p["violations"] and not p["undivided"]],
        "coverage": {
            "fraction": reached / total,
            "matrices": len(rows),
            "pruned": len(pruned),
            "dense": [row["name"] for row in rows if row["sparsity"] < PRUNED],
        },
    }


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint folder: safetensors if there are any, else ``.bin``."""
    if not folder.is_dir():
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; give the folder of the checkpoint")
        raise ConfigError(f"no such folder: {folder}")
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ConfigError(f"{folder} holds no .safetensors or .bin weights")


def tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the files, one at a time in memory."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118  not a dict: it has no iterator
                        yield name, handle.get_tensor(name)
            else:
                yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ConfigError(f"{file} is not a readable weight file: {' '.join(str(error).split())}") from error


def _transposed(folder: Path) -> set[str]:
    """Names of block weights stored ``[in, out]``: asked of the architecture itself, built without memory."""
    if not (folder / "config.json").is_file():
        return set()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            view = ModelView(transformers.AutoModel.from_config(config))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return set()  # an architecture transformers does not know: nn.Linear's [out, in] is all that can be assumed
    before = len(view.path.rpartition(".")[0])
    return {
        view.full_name(i, ref.path)[before:].removeprefix(".")
        for i, block in enumerate(view.blocks)
        for ref in weights_of(block)
        if ref.transposed
    }


def _record(folder: Path) -> dict | None:
    path = folder / "pruning.json"
    if not path.is_file():
        return None
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "weights"}
