"""Where activations live, and how they reach a GPU and come back.

Two back-ends behind one allocator: host memory (pinned for a GPU), and above a byte budget memory-mapped files that are
deleted from the start, so nothing outlives the process. A GPU sees them through a ring of fixed device buffers: batch
i+1 is copied in and batch i−1 out on CUDA streams of their own while batch i computes, ordered by events alone.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import resource
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyprune.model.shards import output_error

K = TypeVar("K")
DEPTH = 3
"""Device buffers of a ring: one being filled, one computed with, one that the next copy may take at once."""


def peak_memory() -> int:
    """Most bytes of host memory that this process has held at once (``getrusage`` would count the memory of the process
    that started it)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def available_memory() -> int:
    """Bytes of host memory this process may still take: free memory, or less under a cgroup or a resource limit."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for used, limit in (
        ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max"),
        ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    data = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if data != resource.RLIM_INFINITY:
        with open("/proc/self/status") as file:
            taken = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
        free = min(free, data - taken)
    return max(free, 0)


@dataclass
class _Taken:
    """Bytes in use in one place, and the most there were at once."""

    now: int = 0
    peak: int = 0

    def take(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def free(self, size: int) -> None:
        self.now -= size


class Store:
    """Allocates host tensors for activations within a budget; what does not fit is mapped from a file."""

    def __init__(self, budget: int | None = None, folder: Path | str | None = None, pin: bool = False):
        """budget: bytes of host memory (None: half of what is free now). folder: for the files; None: the system's
        temporary one. pin: page-lock the memory, for a GPU to copy from."""
        self.budget = available_memory() // 2 if budget is None else budget
        self.folder, self.pin = folder, pin
        self._memory, self._files = _Taken(), _Taken()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised host tensor. Raises OutputError if the folder has no room for its file."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.now + size <= self.budget or size == 0:
            tensor, taken = torch.empty(shape, dtype=dtype, pin_memory=self.pin), self._memory
        else:
            tensor, taken = self._mapped(shape, dtype, size), self._files
        taken.take(size)
        weakref.finalize(tensor, taken.free, size)
        return tensor

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Count ``size`` bytes of memory that others take as in use for the duration."""
        self._memory.take(size)
        try:
            yield
        finally:
            self._memory.free(size)

    @property
    def in_memory(self) -> int:
        """Bytes of the tensors that are now in memory."""
        return self._memory.now

    @property
    def in_files(self) -> int:
        """Bytes of the tensors that are now in files."""
        return self._files.now

    @property
    def peak_in_files(self) -> int:
        """Most bytes that were in files at once."""
        return self._files.peak

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        handle, name = tempfile.mkstemp(prefix="activations-", dir=self.folder)
        try:
            os.posix_fallocate(handle, 0, size)  # a full disk is an error here, not a bus error later
            return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        except OSError as error:
            raise output_error(error, Path(name), size) from error
        finally:
            os.close(handle)
            os.unlink(name)  # the mapping keeps the bytes; the file is gone with the process


class Plain:
    """The same interface as :class:`Ring` where the device is the host: views of the store, plain copies."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def read(self, items: Iterable[tuple[K, Tensor]]) -> Iterator[tuple[K, Tensor]]:
        for key, host in items:
            yield key, host.to(self.device, self.dtype)

    def write(self, host: Tensor, value: Tensor, several: bool = False) -> None:
        host.copy_(value)

    def drain(self) -> None:
        """All writes have happened."""


class _Slot:
    """One device buffer, the pinned buffer in front of it where the store is not pinned, and its events."""

    def __init__(self, api):
        self.device: Tensor | None = None
        self.staging: Tensor | None = None
        self.filled, self.used = api.Event(), api.Event()
        self.busy = False
        """A copy from the staging buffer may still be under way."""


class Ring:
    """Batches to and from a GPU: ``DEPTH`` buffers in, ``DEPTH`` staging buffers out, one CUDA stream each way."""

    def __init__(self, device: torch.device, dtype: torch.dtype, api=torch.cuda):
        """api: what provides streams and events; ``torch.cuda`` but in tests."""
        self.device, self.dtype, self.api = device, dtype, api
        self.into, self.out = api.Stream(device), api.Stream(device)
        self.slots = [_Slot(api) for _ in range(DEPTH)]
        self.turn = 0
        self._late: collections.deque[tuple[Any, Tensor, Tensor]] = collections.deque()

    def read(self, items: Iterable[tuple[K, Tensor]]) -> Iterator[tuple[K, Tensor]]:
        """Each batch on the device, copied in while its predecessors compute. A yielded tensor is valid until
        ``DEPTH − 1`` more were asked for."""
        compute = self.api.current_stream(self.device)
        self.into.wait_stream(self.out)  # what earlier passes wrote is what this one reads
        self.into.wait_stream(compute)  # a pass that was abandoned has not said what it used
        self._flush()
        rest = iter(items)
        queue: collections.deque[tuple[K, _Slot, Tensor]] = collections.deque()

        def issue() -> None:
            for key, host in rest:
                slot = self.slots[self.turn]
                self.turn = (self.turn + 1) % DEPTH
                queue.append((key, slot, self._copy_in(slot, host)))
                return

        for _ in range(DEPTH - 1):
            issue()
        while queue:
            key, slot, buffer = queue.popleft()
            compute.wait_event(slot.filled)
            yield key, buffer
            slot.used.record(compute)
            issue()

    def _copy_in(self, slot: _Slot, host: Tensor) -> Tensor:
        if slot.device is None or slot.device.numel() < host.numel():
            slot.device = self._allocate(host.numel())
            # The allocator follows the computing stream alone: kernels that wait there may still read this memory, and
            # it may be given away again while a copy is under way.
            self.into.wait_stream(self.api.current_stream(self.device))
            self._keep(slot.device, self.into)
        buffer = slot.device[: host.numel()].view(host.shape)
        if not self._pinned(host):
            if slot.busy:
                slot.filled.synchronize()
            if slot.staging is None or slot.staging.numel() < host.numel():
                slot.staging = self._pin(host.numel(), host.dtype)
            staging = slot.staging[: host.numel()].view(host.shape)
            staging.copy_(host)
            host, slot.busy = staging, True
        self.into.wait_event(slot.used)
        with self.api.stream(self.into):
            self._copy(buffer, host)
        slot.filled.record(self.into)
        return buffer

    def write(self, host: Tensor, value: Tensor, several: bool = False) -> None:
        """Copy a batch's result to the store, behind the computation that makes it.

        several: of results that are there already, so that waiting for one means to wait for all.
        """
        value = value.to(host.dtype)
        ready = self.api.Event()
        ready.record(self.api.current_stream(self.device))
        self.out.wait_event(ready)
        target = host if self._pinned(host) else self._pin(host.numel(), host.dtype).view(host.shape)
        with self.api.stream(self.out):
            self._copy(target, value)
        self._keep(value, self.out)
        if target is not host:
            done = self.api.Event()
            done.record(self.out)
            self._late.append((done, target, host))
            if len(self._late) > DEPTH and not several:
                self._land()

    def _land(self) -> None:
        done, staging, host = self._late.popleft()
        done.synchronize()
        host.copy_(staging)

    def _flush(self) -> None:
        while self._late:
            self._land()

    def drain(self) -> None:
        """All writes have happened: the host may read the store."""
        self.out.synchronize()
        while self._late:
            _, staging, host = self._late.popleft()
            host.copy_(staging)

    # one line each, so that a test can stand in for the device
    def _pinned(self, host: Tensor) -> bool:
        return host.is_pinned()

    def _pin(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def _allocate(self, count: int) -> Tensor:
        return torch.empty(count, dtype=self.dtype, device=self.device)

    def _keep(self, value: Tensor, stream) -> None:
        value.record_stream(stream)  # its memory is not given away before what the stream has queued is done

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)


def transfers(device: torch.device, dtype: torch.dtype) -> Plain | Ring:
    """How batches reach a device: the ring on a GPU, plain copies elsewhere."""
    return Ring(device, dtype) if device.type == "cuda" else Plain(device, dtype)
