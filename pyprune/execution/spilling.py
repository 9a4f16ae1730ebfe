"""What a paused forward pass keeps alive, and its way to the activation store and back.

A pass that stands still holds its tensors in the frames of the model's own code, where nothing can replace them. Their
memory can be: a storage is copied out and resized to nothing, and refilled before the pass goes on, as FSDP does with
parameters (arXiv 2304.11277). No architecture has to be known for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.execution.activation_store import Store

ALIGNMENT = 64


class Elsewhere(Exception):
    """A pass used a tensor whose memory another, paused one has given away."""


class Alive(TorchDispatchMode):
    """Knows the storages that were made since it was entered and are still alive; :meth:`update`, called where a pass
    is to pause, takes the peak of their bytes. Entered in a pass's own thread.

    Raises Elsewhere where an operation is given a tensor without its memory.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = set()
        for tensor in _tensors([args, kwargs or {}]):
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0 < tensor.numel() and not tensor.is_meta:
                raise Elsewhere
            given.add(StorageWeakRef(storage))
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = StorageWeakRef(storage)
            if key not in given:  # a view, also of a parameter, makes nothing
                self._made[key] = storage.nbytes()
        return out

    def refs(self) -> list[StorageWeakRef]:
        """Storages that are alive now."""
        self._made = {key: size for key, size in self._made.items() if not key.expired()}
        return list(self._made)

    def update(self, rows: Tensor | None = None, dense: Tensor | None = None) -> None:
        self.peak = max(self.peak, sum(self._made[ref] for ref in self.refs()))


class Spilled:
    """The storages of one pass, in a store while the pass stands still."""

    def __init__(self, store: Store):
        self.store = store
        self._buffer: Tensor | None = None
        self._away: list[tuple[StorageWeakRef, int, int]] = []
        """With place and bytes in the buffer."""

    def out(self, alive: Alive) -> None:
        """Copy all that is alive to the store and free its memory. Raises OutputError if the disk has no room."""
        taken, start = [], 0
        for ref in alive.refs():
            storage = _storage(ref)
            if storage is not None and storage.resizable() and storage.nbytes():
                taken.append((ref, storage, start))
                start += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        if self._buffer is None or len(self._buffer) < start:
            self._buffer = None  # given back before a larger one is asked for
            self._buffer = self.store.empty((start,), torch.uint8)
        for ref, storage, place in taken:
            size = storage.nbytes()
            self._buffer[place : place + size].copy_(_bytes(storage), non_blocking=True)
            storage.resize_(0)
            self._away.append((ref, place, size))

    def back(self) -> None:
        """Give what is still alive its memory and values again."""
        away, self._away = self._away, []
        for ref, place, size in away:
            storage = _storage(ref)
            if storage is not None and self._buffer is not None:
                storage.resize_(size)
                _bytes(storage).copy_(self._buffer[place : place + size], non_blocking=True)


def _storage(ref: StorageWeakRef) -> UntypedStorage | None:
    return UntypedStorage._new_with_weak_ptr(ref.cdata)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(tree) -> list[Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []
