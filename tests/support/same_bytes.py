"""A model in a folder, and whether two folders hold the same tensors to the bit."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file


def source(folder, architecture="llama", **changes) -> str:
    tiny.model(architecture, **changes).save_pretrained(folder)
    return str(folder)


def stored(folder) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, whether it is one file or one shard per block."""
    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def files(folder) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name if path.parent != Path(folder) else ''}/{name}": tensor
        for path in sorted(Path(folder).rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same(one, other):
    one, other = files(one), files(other)
    assert set(one) == set(other) and one
    assert all(torch.equal(one[name], other[name]) for name in one)
