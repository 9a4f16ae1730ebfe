"""The finished checkpoint, assembled from the blocks that a run has written already: no weight is written twice.

It is one shard per block, linked from where the run wrote it, and one for the rest. A model that no run has written
(:meth:`PruneResult.save`), and one that transformers stores under other names than its own, is written by transformers.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyprune.model import checkpoint
from pyprune.model.shards import Shard


@dataclass(frozen=True)
class BlockShards:
    """The finished blocks of a model on the disk, one shard each, with the names that their tensors have in it."""

    path: str
    """Of the list of blocks in the model."""
    shards: list[Shard]


def save(model: nn.Module, folder: Path, blocks: BlockShards | None = None) -> None:
    """Write config and weights of a model in memory; ``blocks``, where a run has left them, are linked if they are what
    transformers would write."""
    if blocks is None or not stores_as_held(model, blocks.path) or not _hold(model, blocks):
        checkpoint.save_model(model, folder)
        return
    inside = f"{blocks.path}."
    rest = {name: tensor for name, tensor in checkpoint.state_of(model).items() if not name.startswith(inside)}
    link(model, folder, blocks, rest)


def link(model: nn.Module, folder: Path, blocks: BlockShards, rest: dict[str, Tensor], as_named: bool = False) -> None:
    """Write config, the tensors outside the blocks (``rest``), a link to every block's shard, and the index.

    as_named: as :func:`pyprune.model.checkpoint.save_model` takes it.
    """
    checkpoint.save_model(model, folder, rest, as_named)
    count = len(blocks.shards) + 1
    paths = [folder / f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    os.replace(folder / "model.safetensors", paths[0])
    for shard, path in zip(blocks.shards, paths[1:]):
        try:
            os.link(shard.path, path)
        except OSError:  # a file system without links
            shutil.copyfile(shard.path, path)
    shards = [Shard(paths[0]), *blocks.shards]
    where = {name: path.name for shard, path in zip(shards, paths) for name in shard.entries}
    checkpoint.write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": sum(shard.bytes for shard in shards)}, "weight_map": where},
    )


def stored_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def stores_as_held(model: Any, path: str) -> bool:
    """Whether transformers stores the tensors of the blocks at ``path`` under the names and with the values that they
    have in the model. It renames some and takes others apart (fused experts become one tensor per expert), leaves out
    what a class names, and stores a tensor that has several names once; a class may also save itself in its own way."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    inside = f"{path}."
    if type(model).save_pretrained is not PreTrainedModel.save_pretrained or getattr(
        model, "_hf_peft_config_loaded", False
    ):
        return False
    if any(len(names) > 1 and any(name.startswith(inside) for name in names) for names in names_of(model)):
        return False
    held = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    if any(name.startswith(inside) and name in held for name in model._keys_to_ignore_on_save or ()):
        return False
    stored = revert_weight_conversion(model, dict(held))
    return all(stored.get(name) is tensor for name, tensor in held.items() if name.startswith(inside))


def names_of(model: nn.Module) -> list[list[str]]:
    """The names of every parameter: several where it stands at several places."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def _hold(model: nn.Module, blocks: BlockShards) -> bool:
    """Whether the shards hold exactly the blocks' tensors: several sparsities share one shard, and a structured model
    may be given biases after its last block."""
    held = {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{blocks.path}.")
    }
    return held == {name: shard.info(name) for shard in blocks.shards for name in shard.entries}
