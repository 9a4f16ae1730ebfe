"""Activations: two back-ends, the device ring under adversarial schedules, the fewest passes, memory that runs out."""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import os
import random
import weakref

import numpy as np
import pytest
import tiny
import torch

from pyprune.config import ConfigError, Evaluation, Reconstruction
from pyprune.execution.activation_store import DEPTH, Ring, Store, available_memory
from pyprune.execution.executor import Activations, Executor, target_tokens
from pyprune.model.blocks import ModelView
from pyprune.model.shards import OutputError
from pyprune.pipeline import mask_work
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


@pytest.mark.parametrize("fields", [dict(), dict(reconstruct="block", global_propagation=True,
                                                 reconstruction=Reconstruction(epochs=1))])
def test_both_back_ends_give_the_same_bits(fields):
    assert equal(run(**fields), run(memory_budget_gb=1e-9, **fields))


def test_available_memory_is_what_is_left():
    assert 2**20 < available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_sequences_of_different_length_are_never_padded():
    sequences = [torch.arange(3, 3 + n) for n in (7, 4, 7, 9, 4)]
    activations = Activations(sequences, 2, torch.float32)
    assert {length: tuple(data.shape) for length, data in activations.data.items()} == {
        4: (2, 4, 2), 7: (2, 7, 2), 9: (1, 9, 2)}
    assert activations.rows == {4: [1, 4], 7: [0, 2], 9: [3]} and activations.tokens == 31
    covered = [row for b in activations.batches(1) for row in activations.rows[b.length][b.start:b.stop]]
    assert sorted(covered) == [0, 1, 2, 3, 4]


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


@pytest.mark.parametrize("fields, whole, stopped", [
    (dict(method="magnitude"), [0, 0, 0], [0, 0, 0]),
    (dict(method="wanda"), [5, 5, 1], [3, 3, 3]),  # the first batch finds the order, the rest stop; last: not passed on
    (dict(method="sparsegpt"), [5, 5, 1], [3, 3, 3]),
    (dict(method="wanda", inputs="dense"), [4, 4, 4], [0, 0, 0]),  # one pass in all
])
def test_blocks_run_no_more_than_the_method_needs(monkeypatch, fields, whole, stopped):
    """12 sequences in 4 batches; calls of a block that reach its end, and that stop before its last product."""
    started, ended = collections.Counter(), collections.Counter()
    forward = Executor.forward
    def counting(self, index, module, hidden, beside):
        started[index] += 1
        out = forward(self, index, module, hidden, beside)
        ended[index] += 1
        return out
    monkeypatch.setattr(Executor, "forward", counting)
    reads = {"calibration": tiny.ids(12, 24), "batch_size": 3} if any(whole) else {}
    prune(tiny.model("llama"), evaluation=Evaluation(enabled=False), progress=False, probe_samples=0, **reads, **fields)
    assert [ended[i] for i in range(3)] == whole
    assert [started[i] - ended[i] for i in range(3)] == stopped


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [1, 5, 13])
def test_experts_see_every_token_routed_to_them_whatever_the_batch(architecture, batch_size):
    from pyprune.masks.statistics import Statistics, observe
    from pyprune.model.blocks import weights_of

    view = ModelView(tiny.model(architecture))
    executor = Executor(view, batch_size=batch_size)
    activations = executor.embed(list(tiny.ids(13, 24)))
    with executor.compute(0) as module:
        observer = observe(executor, 0, module, weights_of(module), activations, Statistics)
    tokens = {name: s.tokens for name, s in observer.sinks.items()}
    for kind in ("gate_up_proj", "down_proj"):
        assert sum(count for name, count in tokens.items() if kind in name) == 13 * 24 * 2, "two experts per token"


def limited(most: int, where: str):
    """A model that runs out of memory at a layer with more than ``most`` sequences."""
    model = tiny.model("llama")
    def refuse(module, args):
        if args[0].shape[0] > most:
            raise torch.OutOfMemoryError("simulated")
    model.get_submodule(where).register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("where", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("inputs", ["propagated", "dense"])
def test_a_batch_that_does_not_fit_is_halved_and_counted_once(where, inputs, monkeypatch):

    counts = []
    gather = mask_work.gather
    def counting(run, index, *args):
        observer = gather(run, index, *args)
        counts.append({name: s.tokens for name, s in observer.sinks.items()})
        return observer
    monkeypatch.setattr(mask_work, "gather", counting)
    result = run(limited(3, where), batch_size=12, inputs=inputs)
    assert [set(c.values()) for c in counts] == [{12 * 24}] * 3
    assert "ran out of memory" in " ".join(result.report["warnings"]) and "batch_size=3" in " ".join(
        result.report["warnings"])
    monkeypatch.undo()
    plain = run(batch_size=12, inputs=inputs)
    agree = [((p == 0) == (q == 0)).float().mean().item() for p, q in zip(result.model.parameters(),
                                                                       plain.model.parameters())]
    assert min(agree) > 0.99


def test_one_sequence_that_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match="one sequence of 24 tokens does not fit on cpu beside block 1.*about 12"):
        run(limited(0, "model.layers.1.mlp.down_proj"))


def test_statistics_that_do_not_fit_are_not_counted_twice(monkeypatch):
    from pyprune.masks.statistics import Statistics

    def refuse(self, x):
        raise torch.OutOfMemoryError("simulated")
    monkeypatch.setattr(Statistics, "_update", refuse)
    with pytest.raises(ConfigError, match="the statistics of self_attn.q_proj.weight in block 0 do not fit"):
        run()


def test_a_moved_block_is_a_copy_in_the_compute_type():
    view = ModelView(tiny.model("llama"))
    executor = Executor(view, compute_dtype=torch.bfloat16)
    with executor.compute(1) as module:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        for p, q in zip(module.parameters(), view.blocks[1].parameters()):
            assert torch.equal(p, q.bfloat16()) and p.data_ptr() != q.data_ptr()
        assert module.self_attn.config is not None and type(module) is type(view.blocks[1])


def test_cuda_and_cuda_0_are_one_device(monkeypatch):
    """Where a block lies already it is not copied, whichever of the GPU's names was given."""
    from pyprune.evaluation.perplexity import pick_device

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pyprune.execution.executor.transfers", lambda device, dtype: device)
    view, here = ModelView(tiny.model("llama")), torch.device("cuda:1")
    for name in ("cuda", "cuda:1", torch.device("cuda")):
        executor = Executor(view, device=name, store=Store())
        assert executor.device == executor.transfers == here
    assert pick_device("auto") == here and Executor(view).device == torch.device("cpu")


def test_a_copy_of_a_block_goes_with_its_turn():
    model = tiny.model("llama")
    before = [p.clone() for p in model.parameters()]
    executor = Executor(ModelView(model), compute_dtype=torch.bfloat16)
    with executor.compute(0) as module:
        assert sum(p.numel() for p in module.parameters()) > 0
    assert not any(p.numel() for p in module.parameters()), "memory that its last user still holds"
    with Executor(ModelView(model)).compute(0) as own:
        assert own is model.model.layers[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_tokens_per_batch_follow_the_device_of_the_run_not_what_the_machine_has(monkeypatch):
    """A run on the CPU of a machine with a GPU takes the CPU's batches, and says the same when it is planned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (target_tokens("cpu"), target_tokens(torch.device("cuda", 1))) == (2048, 16384)
    sequences = [torch.zeros(64, dtype=torch.long)] * 300
    executor = Executor(ModelView(tiny.model("llama")), device="cpu")
    on_cpu = executor.embed(sequences)
    assert [b.size for b in on_cpu.batches()] == [32] * 9 + [12]
    assert [b.size for b in on_cpu.like().batches()] == [32] * 9 + [12]
    on_gpu = Activations(sequences, 4, torch.float32, batch_tokens=target_tokens("cuda"))
    assert [b.size for b in on_gpu.batches()] == [256, 44]
