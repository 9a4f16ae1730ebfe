"""The forward passes of all batches through one block, in step: each moves until it stops by itself.

One pass moves at a time (:mod:`pyprune.execution.relay`). When all stand still, whatever they wait for is done, for
instance a weight is pruned, and they go on. Masks and structured pruning say where a pass stops and what is done there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.execution.executor import Activations, Batch, Executor
from pyprune.execution.relay import NoThread, Pass
from pyprune.execution.run import Findings, Run

T = TypeVar("T")


class Declined(Exception):
    """The block cannot be pruned while its passes stand still; says why."""


class TooLarge(Exception):
    """The activations of all batches and what a batch needs on its way did not fit on the device."""


class Place(Protocol):
    """Where passes stop."""

    @property
    def place(self) -> Any:
        """Orders the places as a pass comes to them; the same in all processes."""


@dataclass(eq=False)
class Lane:
    """One batch of a stream on its way through the block."""

    source: Activations
    target: Activations | None
    batch: Batch
    stream: int
    """Number of its stream."""
    fit: bool
    """It belongs to the calibration stream; the others only measure errors."""
    going: Pass
    at: Any = None
    """The :class:`Place` that it stands before."""

    @property
    def phase(self) -> str:
        return "forward" if self.fit else "probe"


class Lanes:
    """All batches of a run's streams on their way through one block.

    A subclass calls :meth:`halt` from hooks of the block, and has :meth:`arrived` called, outside the pass, for every
    pass that has halted.
    """

    lane: Callable[..., Any] = Lane
    """Makes a lane."""

    def __init__(self, run: Run, found: Findings, index: int, module: nn.Module):
        self.run, self.found, self.index, self.module = run, found, index, module
        self.lanes: list[Any] = []
        self.streams = 0
        self.moving: Any = None
        """The lane whose pass moves now."""
        self.trouble: Declined | TooLarge | None = None

    def add(self, source: Activations, target: Activations | None, fit: bool = False) -> None:
        """A stream that takes part; its outputs go to ``target`` (:meth:`send`)."""
        executor = self.run.executor
        for batch in source.batches(executor.batch_size):
            executor.arguments(self.index, batch.length, batch.size)
            going = Pass(self._forward_of(source, batch), executor.device)
            self.lanes.append(type(self).lane(source, target, batch, self.streams, fit, going))
        self.streams += 1

    def __call__(self) -> Any:
        """Take all lanes through the block. Raises Declined or TooLarge, in all processes, with everything as it
        was."""
        raise NotImplementedError

    def arrived(self, lane: Any) -> None:
        """A pass has halted at ``lane.at``."""

    @property
    def batch(self) -> int:
        """Sequences of the largest batch in any process."""
        return max(self.run.world.everyone(max(lane.batch.size for lane in self.lanes)))

    def _forward_of(self, source: Activations, batch: Batch) -> Callable:
        executor = self.run.executor

        def forward():
            beside = executor.beside([self.index], source, batch)
            out = executor.forward(self.index, self.module, source.read(batch), beside)
            return self.leaving(out), beside

        return forward

    def leaving(self, out: Tensor) -> Tensor:
        """Called inside a pass with what the block returns; returns the pass's output."""
        return out

    def halt(self, at: Place) -> None:
        """Called inside the pass that moves: stand still there."""
        self.moving.at = at
        self.moving.going.wait()

    def each(self, lanes: list) -> None:
        """Let passes move to where they halt next, one after the other."""
        for lane in lanes:
            if self.trouble is not None:
                return
            lane.at = None
            self.moving = lane
            try:
                with self.found.clock(lane.phase):
                    lane.going.step()
                if lane.at is not None:
                    self.arrived(lane)
            except Declined as declined:
                self.trouble = Declined(str(declined))
            except NoThread as refused:
                self.trouble = Declined(f"its {len(self.lanes)} batches need a thread each ({refused})")
            except torch.OutOfMemoryError:
                self.trouble = TooLarge()
            finally:
                self.moving = None

    def next_place(self) -> Any:
        """Where the next work is, in all processes: the first place that any pass has halted at; None at the end."""
        waiting = min((lane.at.place for lane in self.lanes if lane.at is not None), default=None)
        told = self.run.world.everyone((waiting, self.trouble))
        for _, trouble in told:
            if trouble is not None:
                raise trouble
        return min((place for place, _ in told if place is not None), default=None)

    def drop(self, lanes: list) -> list:
        """End the passes whose outputs nobody takes; returns those that go on."""
        for lane in lanes:
            if lane.target is None:
                lane.at = None
                lane.going.abandon()
        return [lane for lane in lanes if lane.target is not None]

    def abandon(self) -> None:
        """End all passes where they stand."""
        for lane in self.lanes:
            if not lane.going.done:
                lane.going.abandon()

    def send(self) -> None:
        """Write the outputs to the streams that take them."""
        executor = self.run.executor
        for lane in self.lanes:
            if lane.target is not None:
                (out, beside), lane.going.result = lane.going.result, None
                executor.write(lane.target, lane.batch, out, beside)
        executor.drain()


def with_smaller_batches(executor: Executor, found: Findings, index: int, make: Callable[[], Lanes]) -> Any:
    """What the lanes of ``make()`` return, with smaller batches where memory runs out. Raises Declined if it does so
    with single sequences too."""
    asked = executor.batch_size
    while True:
        lanes = make()
        try:
            return lanes()
        except TooLarge:
            batch, device = lanes.batch, executor.device
            executor.free()
            if batch == 1:
                executor.batch_size = asked
                raise Declined(f"the activations of all sequences do not fit on {device} at once") from None
            executor.batch_size = half = batch // 2
            found.warn(
                f"block {index} ran out of memory on {device} with batches of {batch} sequences: "
                f"batches of {half} from there on; set batch_size={half} to begin with that"
            )


def no_room(run: Run, token_bytes: float, tokens: int) -> str | None:
    """Why the passes of so many tokens cannot stand still in memory together, the same in all processes; None if they
    can."""
    world, needed, room = run.world, token_bytes * tokens, run.executor.room()
    if not world.any(needed > room):
        return None
    needed, room = max((pair for pair in world.everyone((needed, room))), key=lambda pair: pair[0] - pair[1])
    return (
        f"its {tokens} tokens would keep {needed / 1e9:.2g} GB of activations at once, and "
        f"there is room for {room / 1e9:.2g} GB (memory_budget_gb)"
    )


class Alive(TorchDispatchMode):
    """Bytes of the tensors made since it was entered that are still alive; :meth:`update`, called where a pass is to
    pause, takes their peak."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {StorageWeakRef(t.untyped_storage()) for t in _tensors([args, kwargs or {}])}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = StorageWeakRef(storage)
            if key not in given:  # a view, also of a parameter, makes nothing
                self._made[key] = storage.nbytes()
        return out

    def update(self, rows: Tensor | None = None, dense: Tensor | None = None) -> None:
        self._made = {key: size for key, size in self._made.items() if not key.expired()}
        self.peak = max(self.peak, sum(self._made.values()))


def _tensors(tree) -> list[Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []


def changed_attribute(module: nn.Module, work: Callable[[], object]) -> str | None:
    """Why passes that take turns would disturb each other, seen in ``work()``, one pass through ``module``: an
    attribute of a part that changes; None if none does."""
    before = _attributes(module)
    work()
    changed = [name for name, value in _attributes(module).items() if not _same(before.get(name), value)]
    if not changed:
        return None
    return f"{changed[0]} changes during a pass, which passes that take turns would change for each other"


def _attributes(module: nn.Module) -> dict[str, object]:
    return {
        f"{path}.{name}".lstrip("."): value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
    }


def _same(a, b) -> bool:
    return a is b or (isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b)
