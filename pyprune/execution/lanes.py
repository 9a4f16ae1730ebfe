"""The forward passes of all batches through one block, in step: each moves until it stops by itself.

One pass moves at a time (:mod:`pyprune.execution.relay`). When all stand still, whatever they wait for is done, for
instance a weight is pruned, and they go on. Masks and structured pruning say where a pass stops and what is done there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pyprune.execution.executor import Activations, Batch, Executor
from pyprune.execution.relay import NoThread, Pass
from pyprune.execution.run import Findings, Run
from pyprune.execution.spilling import Alive, Elsewhere, Spilled
from pyprune.execution.trust import by_reference, distrust
from pyprune.ops.guards import Verdicts

T = TypeVar("T")


class Declined(Exception):
    """The block cannot be pruned while its passes stand still; says why."""


class TooLarge(Exception):
    """What the passes keep alive and what one needs on its way did not fit on the device."""


class Refuted(Exception):
    """The block is to be passed again: results of these ops failed their guards."""

    def __init__(self, suspects: Set[str] = frozenset(), unfactored: bool = False):
        """unfactored: a factorisation failed, so that each is to be looked at."""
        super().__init__()
        self.suspects, self.unfactored = frozenset(suspects), unfactored


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
    """It belongs to a calibration stream; the others only measure errors."""
    module: nn.Module
    """What it passes: the block, or a copy that stays as it is."""
    going: Pass = field(init=False)
    at: Any = None
    """The :class:`Place` that it stands before."""
    alive: Alive | None = None
    """Its storages, where some of the passes spill."""
    spilled: Spilled | None = None
    """Where its memory goes while it stands still; None if it stays."""

    @property
    def phase(self) -> str:
        return "forward" if self.fit else "probe"


class Lanes:
    """All batches of a run's streams on their way through one block.

    A subclass calls :meth:`halt` from hooks of the block, and has :meth:`arrived` called, outside the pass, for every
    pass that has halted.

    Calibration batches for which there is no room while they stand still spill to the run's store. Those that only
    measure errors stay: what they read is kept until then.
    """

    lane: Callable[..., Any] = Lane
    """Makes a lane."""

    def __init__(self, run: Run, found: Findings, index: int, module: nn.Module, token_bytes: float = 0.0):
        """token_bytes: what a pass that stands still keeps alive for each token, at most (:attr:`Alive.peak`)."""
        self.run, self.found, self.index, self.module = run, found, index, module
        self.lanes: list[Any] = []
        self.streams = 0
        self.moving: Any = None
        """The lane whose pass moves now."""
        self.trouble: Declined | TooLarge | None = None
        self.token_bytes, self.spill = token_bytes, False
        """Whether all calibration batches spill, however much room there seems to be."""
        self.refuted = Refuted()
        """What earlier passes through the block had against it; the reference has the place of the suspects."""
        self.at_fault: Set[str] = frozenset()
        self.passed = Verdicts()
        """Guards of the ops of the first lane's pass."""
        self._reserved: contextlib.ExitStack | None = None

    def add(
        self, source: Activations, target: Activations | None, fit: bool = False, module: nn.Module | None = None
    ) -> None:
        """A stream that takes part; its outputs go to ``target`` (:meth:`send`). module: what it passes in place of the
        block."""
        executor = self.run.executor
        for batch in source.batches(executor.batch_size):
            executor.arguments(self.index, batch.length, batch.size)
            lane = type(self).lane(source, target, batch, self.streams, fit, module or self.module)
            lane.going = Pass(self._forward_of(lane), executor.device)
            self.lanes.append(lane)
        self.streams += 1

    def __call__(self) -> Any:
        """Take all lanes through the block. Raises Declined, TooLarge or Refuted, in all processes, with everything as
        it was."""
        raise NotImplementedError

    def judge(self, wrong: Set[str], unfactored: bool = False) -> None:
        """Called at the end, before anything is sent, with the ops that failed their guards. Raises Refuted where they
        are new suspects; those that the reference does right were at fault."""
        told = self.run.world.everyone((wrong, unfactored))
        wrong = frozenset(op for ops_at_fault, _ in told for op in ops_at_fault)
        unfactored = any(failed for _, failed in told)
        before = self.refuted
        if wrong - before.suspects or (unfactored and not before.unfactored):
            raise Refuted(before.suspects | wrong, before.unfactored or unfactored)
        self.at_fault = before.suspects - wrong

    def arrived(self, lane: Any) -> None:
        """A pass has halted at ``lane.at``."""

    @property
    def batch(self) -> int:
        """Sequences of the largest batch in any process."""
        return max(self.run.world.everyone(max(lane.batch.size for lane in self.lanes)))

    def _forward_of(self, lane: Any) -> Callable:
        executor, source, batch = self.run.executor, lane.source, lane.batch

        def forward():
            with lane.alive or contextlib.nullcontext():
                beside = executor.beside([self.index], source, batch)
                out = executor.forward(self.index, lane.module, source.read(batch), beside)
                return self.leaving(out), beside

        return forward

    def leaving(self, out: Tensor) -> Tensor:
        """Called inside a pass with what the block returns; returns the pass's output."""
        return out

    def going_on(self, lane: Any) -> None:
        """A pass is about to leave the place that it has halted at."""

    @contextlib.contextmanager
    def at_hand(self, lane: Any) -> Iterator[None]:
        """What a pass that stands still keeps is in memory for the duration."""
        if lane.spilled is None:
            yield
            return
        lane.spilled.back()
        yield
        lane.spilled.out(lane.alive)

    def _share_room(self) -> None:
        """Decide which lanes spill; the memory of the others is reserved until all have ended."""
        executor, held = self.run.executor, 0.0
        room = 0 if self.spill else executor.room()
        for lane in sorted(self.lanes, key=lambda lane: lane.fit):
            needed = self.token_bytes * lane.batch.size * lane.batch.length
            if lane.fit and (self.spill or held + needed > room):
                lane.spilled = Spilled(executor.store)
            else:
                held += needed
        if any(lane.spilled for lane in self.lanes):
            for lane in self.lanes:
                lane.alive = Alive()
        self._reserved = contextlib.ExitStack()
        if executor.device.type == "cpu":  # on a GPU they do not take the store's memory
            self._reserved.enter_context(executor.store.reserved(int(held)))

    def halt(self, at: Place) -> None:
        """Called inside the pass that moves: stand still there."""
        self.moving.at = at
        self.moving.going.wait()

    def each(self, lanes: list) -> None:
        """Let passes move to where they halt next, one after the other."""
        if self._reserved is None:
            self._share_room()
        for lane in lanes:
            if self.trouble is not None:
                return
            self.moving = lane
            try:
                with self.found.clock(lane.phase), self._looked_at(lane):
                    if lane.spilled is not None:
                        lane.spilled.back()
                    if lane.at is not None:
                        self.going_on(lane)
                    lane.at = None
                    lane.going.step()
                if lane.at is not None:
                    self.arrived(lane)
                if lane.spilled is not None:
                    with self.found.clock(lane.phase):
                        lane.spilled.out(lane.alive)
            except Declined as declined:
                self.trouble = Declined(str(declined))
            except Elsewhere:
                self.trouble = Declined("one batch's pass uses tensors that another's has made")
            except NoThread as refused:
                self.trouble = Declined(f"its {len(self.lanes)} batches need a thread each ({refused})")
            except torch.OutOfMemoryError:
                self.trouble = TooLarge()
            finally:
                self.moving = None

    @contextlib.contextmanager
    def _looked_at(self, lane: Any) -> Iterator[None]:
        """While the first lane moves, its ops are judged."""
        if lane is not self.lanes[0]:
            yield
            return
        executor, executor.verdicts = self.run.executor, self.passed
        try:
            yield
        finally:
            executor.verdicts = None
        if lane.spilled is not None:  # what was made inside the pass is about to lose its memory
            self.passed.wrong = {op: bad.clone() for op, bad in self.passed.wrong.items()}

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
                self._end(lane)
        return [lane for lane in lanes if lane.target is not None]

    def abandon(self) -> None:
        """End all passes where they stand."""
        for lane in self.lanes:
            if not lane.going.done:
                self._end(lane)
        if self._reserved is not None:
            self._reserved.close()

    def _end(self, lane: Any) -> None:
        lane.going.abandon()
        if lane.spilled is not None:
            lane.spilled.back()  # what the model itself has kept of the pass

    def send(self) -> None:
        """Write the outputs to the streams that take them."""
        executor = self.run.executor
        for lane in self.lanes:
            if lane.target is not None:
                if lane.spilled is not None:
                    lane.spilled.back()
                (out, beside), lane.going.result = lane.going.result, None
                executor.write(lane.target, lane.batch, out, beside)
        executor.drain()


def carried_through(executor: Executor, found: Findings, index: int, make: Callable[[], Lanes]) -> Any:
    """What the lanes of ``make()`` return. Where the device's memory runs out, all calibration batches spill, and then
    batches get smaller; where guards failed, the reference takes the place of the ops at fault. Raises Declined if
    memory runs out with single sequences too."""
    asked, spill, refuted = executor.batch_size, False, Refuted()
    while True:
        try:
            with by_reference(refuted.suspects):  # which passes take over when they are made
                lanes = make()
                lanes.spill, lanes.refuted = spill, refuted
                result = lanes()
            for op in sorted(lanes.at_fault):
                distrust(found.warn, executor.device, index, op)
            return result
        except Refuted as again:
            refuted = again
        except TooLarge:
            batch, device = lanes.batch, executor.device
            executor.free()
            if not spill:
                spill = True
                continue
            if batch == 1:
                executor.batch_size = asked
                raise Declined(f"a single sequence does not fit on {device} beside the block") from None
            executor.batch_size = half = batch // 2
            found.warn(
                f"block {index} ran out of memory on {device} with batches of {batch} sequences: "
                f"batches of {half} from there on; set batch_size={half} to begin with that"
            )


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
