"""Weights that come and go: a model opened without its blocks, each read from safetensors when it is its turn.

The next block is read in a thread while the present one computes; a finished one is released once its shard is on the
disk, and comes back from there. Embeddings, final norm, head and rotary tables stay. Peak memory is about two blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.execution.activation_store import available_memory
from pyprune.execution.executor import Resident
from pyprune.model import checkpoint
from pyprune.model.attributes import dtype_named, quantisation
from pyprune.model.blocks import ModelView, check_finite
from pyprune.model.origin import Origin
from pyprune.model.shards import Files, Shard, write_shard
from pyprune.model.skeleton import skeleton

SHARE = 0.5
"""``stream="auto"`` streams a model that needs more than this share of the free memory."""


class Streamed(Resident):
    """Blocks read on demand and one ahead."""

    streamed = True

    def __init__(self, view: ModelView, files: Files, dtype: torch.dtype, pin: bool = False):
        self.view, self.files, self.dtype, self.pin = view, files, dtype, pin
        self.saved: dict[int, Shard] = {}
        # the reader thread must not look at ``view.blocks``: recorders stand there while arguments are recorded
        self._blocks = list(view.blocks)
        self._names = [list(block.state_dict()) for block in view.blocks]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pyprune-weights")
        self._ahead: dict[int, Future] = {}
        self._present: set[int] = set()
        view.hold = self.hold

    def acquire(self, index: int) -> None:
        if index not in self._present:
            tensors = self._ahead.pop(index).result() if index in self._ahead else self._read(index)
            fill(self._blocks[index], tensors)
            self._present.add(index)
        after = index + 1
        if after < len(self._blocks) and after not in self._present and after not in self._ahead:
            for stale in list(self._ahead):
                self._ahead.pop(stale).cancel()
            self._ahead[after] = self._reader.submit(self._read, after)

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[None]:
        """Keep a block's weights real inside the ``with`` block, whatever they were before."""
        present = index in self._present
        self.acquire(index)
        try:
            yield
        finally:
            if not present:
                self.release(index)

    def _read(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.view.path}.{index}."
        source = self.saved.get(index, self.files)
        tensors = {name: source.read(prefix + name, self.pin) for name in self._names[index]}
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def release(self, index: int, saved: Path | None = None) -> None:
        if saved is not None:
            self.saved[index] = Shard(saved)
            prefix = f"{self.view.path}.{index}."
            self._names[index] = [name.removeprefix(prefix) for name in self.saved[index].entries]
        if index in self._present:
            self._present.remove(index)
            for module, name, parameter in _parameters(self._blocks[index]):
                module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    def save(self, folder: Path) -> None:
        """Write config and weights of the finished model: one shard per block, linked where the journal wrote it."""
        model, view = self.view.model, self.view
        checkpoint.save_settings(model, folder)
        count = len(view.blocks) + 1
        names = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
        inside = f"{view.path}."
        state = {name: tensor for name, tensor in model.state_dict().items()
                 if name in self.files and not name.startswith(inside)}
        write_shard(folder / names[0], state)
        for index, shard in self.saved.items():
            target = folder / names[index + 1]
            try:
                os.link(shard.path, target)
            except OSError:  # a file system without links
                shutil.copyfile(shard.path, target)
        where = dict.fromkeys(state, names[0])
        where |= {name: names[index + 1] for index, shard in sorted(self.saved.items()) for name in shard.entries}
        total = sum((folder / name).stat().st_size for name in names)
        checkpoint.write_json(folder / "model.safetensors.index.json",
                              {"metadata": {"total_size": total}, "weight_map": where})


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module whose parameters are on the meta device these values, its buffers copies of them."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner.get_buffer(leaf).copy_(tensor)


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]


@dataclass
class Opened:
    """A model and how its weights are held."""

    model: nn.Module
    tokenizer: Any
    weights: Resident
    view: ModelView
    origin: Origin = field(default_factory=Origin)

    def identity(self) -> dict:
        """What tells this model from another: its class, its type and a digest of its weights or of its files."""
        digest = self.weights.files.fingerprint() if isinstance(self.weights, Streamed) else \
            weights_digest(self.model.state_dict().items())
        return {"architecture": type(self.model).__name__, "weights": digest,
                "dtype": str(next(self.model.parameters()).dtype)[6:]}


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, type, shape and a sum of every tensor's bits: any single change shows, at memory speed."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        whole = len(flat) // 8 * 8
        bits = int(flat[:whole].view(torch.int64).sum()) if whole else 0
        head = flat[:256].numpy().tobytes() + flat[whole:].numpy().tobytes()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), bits]).encode() + head)
    return digest.hexdigest()


def why_whole(name: str, model: nn.Module, view: ModelView, files: Files) -> str | None:
    """Why a checkpoint cannot be streamed, or None; a tensor of the wrong shape is a ConfigError."""
    if view.shared:
        return "its blocks are applied several times, or share weights"
    owners: dict[int, list[str]] = {}
    shapes = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
        shapes[key] = tuple(parameter.shape)
    for keys in owners.values():
        found = [key for key in keys if key in files]
        if not found:
            return f"its files have no {keys[0]}: their names are not the model's"
        if len(keys) > 1 and any(key.startswith(view.path + ".") for key in keys):
            return f"{keys[0]} and {keys[1]} share their weight"
        if len(found) > 1 and not all(torch.equal(files.read(found[0]), files.read(key)) for key in found[1:]):
            return f"its config says that {found[0]} and {found[1]} are one, its files hold two"
        for key in found:
            if files.info(key)[1] != shapes[key]:
                raise ConfigError(f"{key} in {name} has shape {list(files.info(key)[1])}, its architecture needs "
                                  f"{list(shapes[key])}")
    return None


def open_checkpoint(name: str, dtype: str = "auto", stream: str = "auto", obstacle: str | None = None,
                    streamed: bool | None = None, pin: bool = False) -> Opened:
    """Open a checkpoint for streaming or load it whole, as ``stream`` (auto, always, never) says.

    obstacle: why the caller needs it whole. streamed: what an interrupted run did, which its continuation repeats.
    ``auto`` streams what needs more than half of the free memory, if it can be streamed and nothing stands against it.
    Raises ConfigError where ``always`` cannot.
    """
    wanted = stream == "always" if streamed is None else streamed
    if stream == "never" or (streamed is False):
        return whole(name, dtype)
    source = checkpoint.resolve(name)
    if obstacle is None:
        if source.gguf_file or not source.local or not any(Path(source.path).glob("*.safetensors")):
            obstacle = "only a local folder of safetensors files can be read block by block"
        else:
            opened = _open(name, dtype, Path(source.path), wanted, pin)
            if isinstance(opened, Opened):
                return opened
            obstacle = opened
    if wanted:
        raise ConfigError(f"{name} cannot be streamed: {obstacle}; set stream='never' (or auto) to load it whole")
    return whole(name, dtype)


def whole(name: str, dtype: str = "auto") -> Opened:
    """The model loaded into memory. Raises ConfigError for a tensor that is not finite."""
    loaded, origin = checkpoint.load_with_origin(name, dtype)
    check_finite(loaded.model.state_dict().items())
    return Opened(*loaded, Resident(), ModelView(loaded.model), origin)


def _open(name: str, dtype: str, folder: Path, wanted: bool, pin: bool) -> Opened | str:
    """The streamed model, or why not."""
    import transformers

    if checkpoint.structured_sizes(checkpoint.resolve(name)):
        return "its blocks have sizes of their own"
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    if quantisation(hf_config) is not None:
        return "it is quantised"
    origin = checkpoint.find_origin(checkpoint.resolve(name))
    files = origin.files
    if not isinstance(files, Files):
        return "only a local folder of safetensors files can be read block by block"
    if not wanted and files.bytes < SHARE * available_memory():
        return "it fits into memory"
    kind = checkpoint_dtype(hf_config, files) if dtype == "auto" else getattr(torch, dtype)
    model = skeleton(hf_config, kind, origin)
    view = ModelView(model)
    if (reason := why_whole(name, model, view, files)) is not None:
        return reason
    inside = f"{view.path}."
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if not key.startswith(inside):
            owners.setdefault(id(parameter), []).append(key)
    for keys in owners.values():
        tensor = files.read(next(key for key in keys if key in files)).to(kind)
        shared = nn.Parameter(tensor, requires_grad=False)
        for key in keys:
            path, _, leaf = key.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = shared
    stored = {key for key in model.state_dict() if key in files and not key.startswith(inside)}
    for key, buffer in model.named_buffers():
        if key in stored:
            buffer.copy_(files.read(key))
    known = {*model.state_dict(), *(key for key, _ in model.named_parameters(remove_duplicate=False))}
    for key in files.where:
        if key in known:
            tensor = files.read(key)
            check_finite([(key, tensor.to(kind) if tensor.is_floating_point() else tensor)])
    origin.keep(set(files.where) - known, model)
    tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(name))
    return Opened(model, tokenizer, Streamed(view, files, kind, pin), view, origin)


def checkpoint_dtype(config: Any, files: Files) -> torch.dtype:
    """What ``dtype="auto"`` means: the config's, else that of the first floating tensor."""
    stored = (files.info(name)[0] for name in files.where)
    return dtype_named(config) or next(dtype for dtype in stored if dtype.is_floating_point)
