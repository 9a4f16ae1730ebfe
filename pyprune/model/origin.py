"""What a checkpoint holds beside the model that is pruned, and how it reaches the written one unchanged.

That is tensors the model's class does not use (the head of another task, layers for drafting) and every file that is
neither weights nor written anew: generation configuration, tokenizer, chat template, the modules of
sentence-transformers, preprocessing, custom code, licence.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pyprune.model.blocks import check_finite
from pyprune.model.packed_shards import files_of
from pyprune.model.shards import Files, write_shard

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
)
"""How files of weights end, in whatever form; an index of shards, ``….index.json``, goes with them."""
LOADED = (
    "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors",
    "model.safetensors.index.json",
    "packed-model*.safetensors",
)
"""Weights that transformers, or pyprune, takes, of all that a repository on the Hub may hold."""
REWRITTEN = (
    "config.json",
    "pruning.json",
    "report.json",
    "report.html",
    "run.yaml",
    "refinement.json",
    "refine.yaml",
)
"""Files that every run writes itself, or that tell of another run."""
CARD = "README.original.md"
"""The dense model's card, beside the pruned one's."""
KEPT = "model-kept.safetensors"
"""Shard of the tensors that the model does not use."""


class Pickled:
    """The tensors of a checkpoint stored as ``pytorch_model.bin``, by name as ``Files`` has them."""

    def __init__(self, paths: Iterable[Path]):
        self.where = {name: path for path in paths for name in self._open(path)}

    @staticmethod
    def _open(path: Path) -> dict[str, Tensor]:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.where[name])[name].shape)

    def read(self, name: str) -> Tensor:
        return self._open(self.where[name])[name].clone()


def stored(folder: Path) -> Files | Pickled | None:
    """The tensors of a checkpoint folder, as transformers finds them; None where there are none."""
    if any(folder.glob("*.safetensors")):
        return files_of(folder)
    paths = sorted(folder.glob("pytorch_model*.bin"))
    return Pickled(paths) if paths else None


@dataclass
class Origin:
    """Where a model comes from, and what of it is not in the model."""

    folder: Path | None = None
    """With its side files; None for a live model and a GGUF file, which have none."""
    files: Files | Pickled | None = None
    kept: list[str] = field(default_factory=list)
    """Names of the tensors that the model does not use."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, for the report."""

    def keep(self, names: Iterable[str], model: torch.nn.Module) -> None:
        """Tensors of the file that loading left over are kept, but for tables that the model computes itself.

        Raises ConfigError for one that holds NaN or infinity.
        """
        buffers = dict(model.named_buffers())
        for name in sorted(names):
            if self.files is None or name not in self.files:
                self.notes.append(
                    f"{type(model).__name__} does not use {name}, which the checkpoint stores under "
                    "another name: it is missing from the written one"
                )
                continue
            tensor = self.files.read(name)
            check_finite([(name, tensor)])
            if name not in buffers or not same_values(tensor, buffers[name]):
                self.kept.append(name)
        if self.kept:
            more = f" and {len(self.kept) - 1} more" if len(self.kept) > 1 else ""
            self.notes.append(
                f"{type(model).__name__} does not use {self.kept[0]}{more} of the checkpoint: kept "
                "unchanged in the written one; if they are part of your model, put the class that uses "
                "them into architectures of config.json"
            )

    def carry(self, folder: Path) -> None:
        """Copy everything but weights and what a run writes itself into ``folder``."""
        if self.folder is None:
            return
        modules = module_folders(self.folder)
        ours = (self.folder / "pruning.json").is_file()
        for path, folders, names in os.walk(self.folder):
            here = Path(path)
            place = here.relative_to(self.folder)
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".") and (place / name in modules or not has_weights(here / name))
            ]
            for name in names:
                if name.startswith(".") or is_weights(name) and place not in modules:
                    continue
                if place == Path() and (name in REWRITTEN or name == "README.md" and ours):
                    continue
                target = folder / place / (CARD if place == Path() and name == "README.md" else name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, target)

    def add_kept(self, folder: Path) -> None:
        """Add the tensors that the model does not use to the checkpoint in ``folder``, as a shard of their own."""
        if not self.kept or self.files is None:
            return
        tensors = {name: self.files.read(name) for name in self.kept}
        path = folder / "model.safetensors.index.json"
        if path.is_file():
            index = json.loads(path.read_text())
        else:
            first = folder / "model-00001-of-00001.safetensors"
            os.replace(folder / "model.safetensors", first)
            index = {
                "metadata": {"total_size": first.stat().st_size},
                "weight_map": dict.fromkeys(Files(folder).where, first.name),
            }
        tensors = {name: tensor for name, tensor in tensors.items() if name not in index["weight_map"]}
        write_shard(folder / KEPT, tensors)
        index["weight_map"] |= dict.fromkeys(tensors, KEPT)
        index["metadata"]["total_size"] += sum(t.numel() * t.element_size() for t in tensors.values())
        path.write_text(json.dumps(index, indent=1) + "\n")


def same_values(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.cpu().double(), other.cpu().double())


def is_weights(name: str) -> bool:
    return name.endswith((*WEIGHTS, ".index.json"))


def has_weights(folder: Path) -> bool:
    """A sub-folder with weights is another form of the dense model (ONNX, a checkpoint of its training)."""
    return any(is_weights(path.name) for path in folder.iterdir())


def module_folders(folder: Path) -> set[Path]:
    """Folders that ``modules.json`` of sentence-transformers names: theirs are weights of their own, of no block."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {Path(module["path"]) for module in json.loads((folder / "modules.json").read_text())} - {Path()}
    return set()


def folder_of(path: str, local: bool) -> Path | None:
    """The folder of a checkpoint; of a Hub id the one in the cache, with its side files fetched if that is
    possible, None if there is none."""
    if local:
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    weights = [f"*{ending}" for ending in WEIGHTS]
    try:
        folder = Path(snapshot_download(path, ignore_patterns=weights))
        modules = [f"{module.as_posix()}/*" for module in module_folders(folder)]
        snapshot_download(path, allow_patterns=[*LOADED, *modules])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        pass
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
