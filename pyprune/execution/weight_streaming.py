"""Weights that come and go: a model opened without its blocks, each read from safetensors when it is its turn.

The next block is read in a thread while the present one computes; a finished one is released once its shard is on the
disk, and comes back from there. Embeddings, final norm, head and rotary tables stay. Peak memory is about two blocks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.execution.executor import Resident
from pyprune.execution.unopened import FORMAT, Unopened
from pyprune.model import assembly, checkpoint
from pyprune.model.blocks import ModelView, check_finite
from pyprune.model.origin import Origin
from pyprune.model.shards import Files, Shard


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

    def of_copy(self, view: ModelView) -> Streamed:
        return Streamed(view, self.files, self.dtype, self.pin)

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

    def coming(self, index: int, block: nn.Module) -> Callable[[], dict[str, Tensor]] | None:
        return self._ahead[index].result if index in self._ahead else None

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
        """Write config and weights of the finished model, its blocks linked from where the journal wrote them."""
        inside = f"{self.view.path}."
        rest = {
            name: tensor
            for name, tensor in self.view.model.state_dict().items()
            if name in self.files and not name.startswith(inside)
        }
        shards = [self.saved[index] for index in range(len(self.view.blocks))]
        assembly.link(self.view.model, folder, assembly.BlockShards(self.view.path, shards), rest, as_named=True)


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

    def copy(self) -> Opened:
        """The same model once more, for a run that changes it; it must not have been changed yet."""
        own = copy.deepcopy(self.model)
        view = ModelView(own)
        return dataclasses.replace(self, model=own, view=view, weights=self.weights.of_copy(view))

    def identity(self) -> dict:
        """What tells this model from another: its class, its type and a digest of its weights or of its files."""
        digest = (
            self.weights.files.fingerprint()
            if isinstance(self.weights, Streamed)
            else weights_digest(self.model.state_dict().items())
        )
        return {
            "architecture": type(self.model).__name__,
            "weights": digest,
            "dtype": str(next(self.model.parameters()).dtype)[6:],
        }


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


def open_checkpoint(
    name: str,
    dtype: str = "auto",
    stream: str = "auto",
    obstacle: str | None = None,
    streamed: bool | None = None,
    pin: bool = False,
    models: int = 1,
) -> Opened:
    """Open a checkpoint for streaming or load it whole, as :meth:`Unopened.streams` decides.

    obstacle: why the caller needs it whole. streamed: what an interrupted run did, which its continuation repeats.
    models: how many the caller would hold at once.
    """
    if streamed is not None:
        stream = "always" if streamed else "never"
    found = Unopened(name, dtype)
    if stream != "never" and found.files is None:
        obstacle = obstacle or FORMAT
    return open_streamed(found, stream, obstacle, pin, models) or whole(name, dtype)


def open_streamed(
    found: Unopened, stream: str, obstacle: str | None = None, pin: bool = False, models: int = 1
) -> Opened | None:
    """The model without its blocks; None where :meth:`Unopened.streams` decides that it is loaded whole."""
    if found.streams(stream, obstacle, models)[0] and found.files is not None:
        return _streamed(found, found.files, pin)
    return None


def whole(name: str, dtype: str = "auto") -> Opened:
    """The model loaded into memory. Raises ConfigError for a tensor that is not finite."""
    loaded, origin = checkpoint.load_with_origin(name, dtype)
    check_finite(loaded.model.state_dict().items())
    return Opened(*loaded, Resident(), ModelView(loaded.model), origin)


def _streamed(found: Unopened, files: Files, pin: bool) -> Opened:
    """The model of a checkpoint without its blocks, whose tensors are all read once: NaN and infinity are named."""
    view, kind, origin = found.view, found.kind, found.origin
    model, inside = view.model, f"{view.path}."
    for keys in assembly.names_of(model):
        if keys[0].startswith(inside):
            continue
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
    tokenizer = checkpoint.load_tokenizer(found.source)
    return Opened(model, tokenizer, Streamed(view, files, kind, pin), view, origin)
