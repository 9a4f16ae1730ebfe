"""Where activations lie: two back-ends with the same bits, and the device ring under adversarial schedules."""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import os
import random
import subprocess
import sys
import weakref

import numpy as np
import pytest
import tiny
import torch

from pyprune.config import Evaluation, Reconstruction
from pyprune.execution.activation_store import DEPTH, Ring, Store, available_memory, peak_memory
from pyprune.model.shards import OutputError
from pyprune.pipeline.prune import prune


def run(model=None, **fields):
    fields = {"evaluation": Evaluation(enabled=False), "calibration": tiny.ids(12, 24), **fields}
    return prune(model or tiny.model("llama"), progress=False, **fields)


def equal(one, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.model.state_dict().values(), other.model.state_dict().values()))


def test_beyond_the_budget_activations_are_mapped_from_files_that_are_gone(tmp_path):
    store = Store(budget=1000, folder=tmp_path)
    small, large = store.empty((10, 10), torch.float32), store.empty((30, 30), torch.bfloat16)
    large.copy_(torch.arange(900).view(30, 30))
    assert (store.in_memory, store.in_files) == (400, 1800)
    assert not list(tmp_path.iterdir())
    assert torch.equal(large.float(), torch.arange(900).view(30, 30).float().bfloat16().float())
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) in maps.read()
    del small, large
    gc.collect()
    assert (store.in_memory, store.in_files, store.peak_in_files) == (0, 0, 1800)


def test_a_full_disk_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="no room to write .*activations-.*are free there"):
        run(memory_budget_gb=1e-9)


@pytest.mark.parametrize(
    "fields", [dict(), dict(reconstruct="block", global_propagation=True, reconstruction=Reconstruction(epochs=1))]
)
def test_both_back_ends_give_the_same_bits(fields):
    assert equal(run(**fields), run(memory_budget_gb=1e-9, **fields))


def test_available_memory_is_what_is_left():
    assert 2**20 < available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Below, the ring on a device whose streams run as late and as unordered as their events allow.


class Device:
    """Streams, events and memory with ``torch.cuda``'s meaning: work is queued, and done in any order that events
    permit; memory that the host lets go is given away at once, as the caching allocator does within a stream."""

    def __init__(self, seed: int):
        self.random, self.streams, self.done = random.Random(seed), [], set()
        self.compute = self.current = self.Stream()
        self.blocks: dict[int, np.ndarray] = {}
        self.free: list[tuple[int, list]] = []
        self.kept: dict[int, list] = {}

    def Stream(self, device=None):
        return _Stream(self)

    def Event(self):
        return _Event(self)

    def current_stream(self, device=None):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def put(self, stream, work, needs=None):
        stream.queue.append((work, needs))
        for _ in range(self.random.choice((0, 0, 1, 5))):
            self.step()

    def step(self) -> bool:
        ready = [s for s in self.streams if s.queue and (s.queue[0][1] is None or s.queue[0][1] in self.done)]
        if ready:
            self.random.choice(ready).queue.popleft()[0]()
        return bool(ready)

    def empty(self, count: int) -> torch.Tensor:
        """Memory for the compute stream: the smallest block that is free and no recorded stream still uses."""
        for place in sorted(range(len(self.free)), key=lambda i: self.blocks[self.free[i][0]].size):
            address, uses = self.free[place]
            if self.blocks[address].size >= count and all(event.token in self.done for event in uses):
                del self.free[place]
                break
        else:
            block = np.full(count, np.nan, np.float32)
            address = block.ctypes.data
            self.blocks[address] = block
        handle = torch.from_numpy(self.blocks[address][:count])
        self.kept[address] = []
        weakref.finalize(handle, self._let_go, address)
        return handle

    def _let_go(self, address: int) -> None:
        events = []
        for stream in self.kept[address]:
            events.append(self.Event())
            events[-1].record(stream)
        self.free.append((address, events))

    def memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """What work on the device sees of a tensor: its memory, which it does not keep from being given away."""
        block = self.blocks.get(tensor.untyped_storage().data_ptr())
        if block is None:  # the host's
            return tensor
        return torch.from_numpy(block).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def copy(self, stream, target: torch.Tensor, source: torch.Tensor, work=lambda x: x) -> None:
        """``target.copy_(work(source))`` when its turn comes."""
        target, source = self.memory(target), self.memory(source)
        self.put(stream, lambda: target.copy_(work(source)))


class _Stream:
    def __init__(self, device):
        self.device, self.queue = device, collections.deque()
        device.streams.append(self)

    def wait_event(self, event):
        if event.token is not None:
            self.device.put(self, lambda: None, event.token)

    def wait_stream(self, other):
        event = self.device.Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self):
        event = self.device.Event()
        event.record(self)
        event.synchronize()


class _Event:
    def __init__(self, device):
        self.device, self.token = device, None

    def record(self, stream):
        token = self.token = object()
        self.device.put(stream, lambda: self.device.done.add(token))

    def synchronize(self):
        while self.token is not None and self.token not in self.device.done:
            assert self.device.step(), "deadlock"


class SimulatedRing(Ring):
    def __init__(self, device, pinned):
        super().__init__(torch.device("cpu"), torch.float32, api=device)
        self.simulated, self.pinned = device, pinned

    def _pinned(self, host):
        return self.pinned

    def _pin(self, count, dtype):
        return torch.full((count,), float("nan"), dtype=dtype)

    def _allocate(self, count):
        return self.simulated.empty(count)

    def _keep(self, value, stream):
        self.simulated.kept[value.untyped_storage().data_ptr()].append(stream)

    def _copy(self, target, source):
        self.simulated.copy(self.simulated.current, target, source)


def passes(ring: SimulatedRing, device: Device, batches: int = 7, rounds: int = 3, abandon: bool = False) -> bool:
    """In-place passes ``x ← 2x + 1`` over a store of longer and longer batches, by way of a temporary tensor each;
    whether it ends as it must. abandon: every pass is begun once in vain, and its first batch still used."""
    store = [torch.arange(4.0 * (1 + k // 3)) + k for k in range(batches)]
    wanted = [x.clone() for x in store]
    used, expected = [], []
    for _ in range(rounds):
        if abandon:
            items = ring.read(enumerate(store))
            used.append(torch.empty_like(store[0]))
            expected.append(wanted[0].clone())
            device.copy(device.compute, used[-1], next(items)[1])
            items.close()
        for key, x in ring.read(enumerate(store)):
            doubled, out = device.empty(x.numel()), device.empty(x.numel())
            device.copy(device.compute, doubled, x, lambda x: 2 * x)
            device.copy(device.compute, out, doubled, lambda x: x + 1)
            del doubled
            ring.write(store[key], out)
            del out
        wanted = [2 * x + 1 for x in wanted]
    ring.drain()
    device.compute.synchronize()
    return all(map(torch.equal, [*store, *used], [*wanted, *expected]))


def leaves_in_order(ring: SimulatedRing, device: Device) -> bool:
    """A ring that goes in the middle of a pass; whether its memory is given to others after its last copy only."""
    items = ring.read(enumerate([torch.zeros(4), torch.zeros(4)]))
    next(items)
    items.close()
    ring.slots.clear()
    found = []
    for value in (torch.ones(4), torch.full((4,), 2.0)):
        other, seen = device.empty(4), torch.zeros(4)
        device.copy(device.compute, other, value)
        device.copy(device.compute, seen, other)
        found.append((seen, value))
    device.compute.synchronize()
    return all(torch.equal(seen, value) for seen, value in found)


@pytest.mark.parametrize("abandon", [False, True])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_ring_is_right_under_every_schedule(pinned, abandon):
    for seed in range(150):
        device = Device(seed)
        ring = SimulatedRing(device, pinned)
        assert passes(ring, device, abandon=abandon), seed
        assert len(ring.slots) == DEPTH and sum(s.device is not None for s in ring.slots) == DEPTH


@pytest.mark.parametrize("pinned", [True, False])
def test_a_ring_that_goes_takes_its_copies_along(pinned):
    for seed in range(150):
        device = Device(seed)
        assert leaves_in_order(SimulatedRing(device, pinned), device), seed


@pytest.mark.parametrize("missing", ["filled", "used", "ready", "between passes", "allocated", "kept in", "kept out"])
def test_a_missing_event_would_be_caught(missing, monkeypatch):
    """The simulated device finds each ordering mistake that the ring could make."""
    wrong = 0
    for seed in range(150):
        device = Device(seed)
        ring = SimulatedRing(device, True)
        wait, keep = ring.into.wait_stream, ring._keep
        if missing in ("filled", "used"):
            for slot in ring.slots:
                getattr(slot, missing).record = lambda stream: None
        elif missing == "ready":
            ring.out.wait_event = lambda event: None
        elif missing in ("between passes", "allocated"):
            unseen = ring.out if missing == "between passes" else device.compute
            ring.into.wait_stream = lambda other, wait=wait, unseen=unseen: other is unseen or wait(other)
        else:
            unseen = ring.into if missing == "kept in" else ring.out
            ring._keep = lambda value, stream, keep=keep, unseen=unseen: stream is unseen or keep(value, stream)
        if missing == "kept in":
            wrong += not leaves_in_order(ring, device)
        else:
            wrong += not passes(ring, device, batches=2 if missing == "between passes" else 7, rounds=5)
    assert wrong > 0


def test_peak_memory_is_that_of_the_process_alone():
    """And not of the one that started it, which holds a gigabyte."""
    ballast = torch.ones(2**28)
    code = "a = peak_memory(); b = b'x' * 2**27; print(a, peak_memory())"
    start = (
        f"import sys; sys.path[:] = {sys.path!r}; from pyprune.execution.activation_store import peak_memory; {code}"
    )
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert peak_memory() > 4 * len(ballast) > before and 0.9 * 2**27 < after - before < 2 * 2**27
