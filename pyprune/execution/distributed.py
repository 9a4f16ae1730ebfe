"""Many processes under ``torchrun``: who has which sequences, sums over all, and what happens when one dies.

Calibration is data-parallel: every process holds the model (or streams it), its share of the sequences, and sums
statistics and gradients with the others; the solves of a block are dealt out and broadcast; process 0 writes. Without
``torchrun`` everything here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyprune.config import ConfigError

T = TypeVar("T")
COLLECTIVE_MINUTES = 60
"""How long a collective may wait: one process may be solving or evaluating while the others wait."""
BEAT, SILENCE = 2.0, 30.0
"""Seconds between two signs of life, and seconds without one after which a process counts as dead."""
GONE, FAILED = "gone", "failed"
"""The last sign of a process says that it is done, or that it failed."""
AGAIN = "run the same command with --resume, with any number of processes"
LOST = 75
"""Exit code of a process that stops because another one did (EX_TEMPFAIL: trying again makes sense)."""


class PeerError(ConfigError):
    """Another process failed; what it met is in its own message."""


class World:
    """All processes of a run; alone, every method is the identity."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """This process writes and reports."""
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T | None:
        """``work()`` on process 0, None elsewhere; if it raises, every process raises."""
        if self.size == 1:
            return work()
        error = result = None
        if self.leads:
            try:
                result = work()
            except Exception as caught:  # handed to the others first, raised again below
                error = caught
        told = self.same(None if error is None else str(error))
        if error is not None:
            raise error
        if told is not None:
            raise PeerError(told)
        return result

    def same(self, value: T) -> T:
        """Process 0's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        with self._guard():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def everyone(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._guard():
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        return any(self.everyone(bool(flag)))

    def span(self, count: int) -> tuple[int, int]:
        """First and one past the last of this process's part of ``count`` things, contiguous."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Owner of each piece of work: the dearest first, each to whoever has least."""
        load = [0.0] * self.size
        owners = [0] * len(costs)
        for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
            owners[k] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owners[k]] += costs[k]
        return owners

    def sum_(self, *tensors: Tensor | None) -> None:
        """Sum tensors over all processes, in place."""
        if self.size > 1:
            with self._guard():
                for tensor in tensors:
                    if tensor is not None and tensor.numel():
                        dist.all_reduce(tensor)

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Give every process the owner's values, in place; any dtype and strides."""
        if self.size == 1:
            return
        flat = tensor.detach().contiguous().reshape(-1)
        with self._guard():
            dist.broadcast(flat.view(torch.uint8) if flat.numel() else flat, src=owner)
        if self.rank != owner:
            tensor.copy_(flat.view(tensor.shape))

    def share(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int, device: torch.device) -> Tensor:
        """The owner's float32 tensor, everywhere; the others need not have one."""
        if tensor is None or self.rank != owner:
            tensor = torch.empty(shape, device=device)
        if self.size > 1:
            tensor = tensor.contiguous()
            self.send_(tensor, owner)
        return tensor

    def tensors(self, found: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
        """Process 0's named tensors, everywhere."""
        found = found or {}
        if self.size == 1:
            return found
        kinds = self.same([(name, t.dtype, tuple(t.shape)) for name, t in found.items()])
        out = {}
        for name, dtype, shape in kinds:
            tensor = found[name].to(device) if self.leads else torch.empty(shape, dtype=dtype, device=device)
            self.send_(tensor, 0)
            out[name] = tensor
        return out

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """A collective that broke means that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.size} stopped because another one did "
                f"({' '.join(str(error).split())[:120]}); finished blocks are safe, {AGAIN}"
            ) from error

    def close(self, failed: bool = False) -> None:
        """Leave the world; after a failure, without waiting for the other processes."""


class Torchrun(World):
    """The processes that ``torchrun`` started; one group for the life of the process, whatever it runs."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # NCCL for tensors on GPUs, gloo for objects and host tensors
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=COLLECTIVE_MINUTES)
        )
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=SILENCE),
        )
        self.pulse = Pulse(store, self.rank, self.size)
        self._heart = threading.Thread(target=self.pulse.beat, daemon=True, name="pyprune-heartbeat")
        self._heart.start()
        self.failed = False
        atexit.register(self._leave)

    def close(self, failed: bool = False) -> None:
        self.pulse.running = False
        self.failed |= failed
        if not failed:
            with self._guard():
                dist.barrier()

    def _leave(self) -> None:
        self.pulse.stop(FAILED if self.failed else GONE)
        self._heart.join()  # a thread inside the store's C++ code cannot be left behind
        if not self.failed:
            dist.destroy_process_group()


class Pulse:
    """Signs of life, and the end of this process, with a message, when another one gives none.

    A collective that waits for a dead process may never return (NCCL), so this cannot be an exception.
    """

    def __init__(
        self,
        store,
        rank: int,
        size: int,
        leave: Callable[[int], None] = os._exit,
        beat: float = BEAT,
        silence: float = SILENCE,
    ):
        self.store, self.rank, self.size, self.leave = store, rank, size, leave
        self.interval, self.silence = beat, silence
        self.running = False
        """A run is under way: others are needed."""
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}

    def stop(self, word: str) -> None:
        """Write the last sign: this process is done, or it failed."""
        self._ended.set()
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.set(self._key(self.rank), word)

    def _key(self, rank: int) -> str:
        return f"pyprune/alive/{rank}"

    def beat(self) -> None:
        count = 0
        while not self._ended.wait(self.interval):
            count += 1
            try:
                self.store.set(self._key(self.rank), str(count))
                other = self.silent(time.monotonic())
                name = None if other is None else f"process {other}"
            except (RuntimeError, dist.DistError):
                name = "the process that keeps the store"
            if name is not None and self.running and not self._ended.is_set():
                print(
                    f"pyprune: process {self.rank} of {self.size} stops: no sign of life from {name}; finished "
                    f"blocks are safe, {AGAIN}",
                    file=sys.stderr,
                    flush=True,
                )
                self.leave(LOST)
                return

    def silent(self, now: float) -> int | None:
        """The rank of a process that gave no sign for too long, or failed a while ago; None if there is none."""
        for other in range(self.size):
            key = self._key(other)
            sign = self.store.get(key).decode() if self.store.check([key]) else ""
            if other not in self._seen or self._seen[other][0] != sign:
                self._seen[other] = (sign, now)
            patience = self.silence / 3 if sign == FAILED else self.silence
            if sign != GONE and now - self._seen[other][1] > patience:
                return other
        return None


_world: Torchrun | None = None


def start() -> World:
    """The world this process belongs to: what ``torchrun`` started, else itself alone."""
    global _world
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        return World()
    if _world is None:
        _world = Torchrun()
    _world.pulse.running = True
    return _world
