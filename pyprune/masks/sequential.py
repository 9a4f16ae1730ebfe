"""One pass over a block in which each group of layers is pruned as soon as all tokens have arrived at it.

The forward passes of all batches stand still before the group until its statistics are complete, it is pruned there
and then, and they go on with its new weights: every product is computed once, and later groups see what the pruned
earlier ones feed them (what GPTQ, arXiv 2210.17323, calls true-sequential).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.execution.executor import Activations, Batch
from pyprune.execution.relay import NoThread, Pass
from pyprune.execution.run import Findings, Run
from pyprune.execution.spilling import Alive, Elsewhere, Spilled
from pyprune.masks.block import prune_block, refuse_non_finite, sink_of
from pyprune.masks.group_order import Group, GroupOrder
from pyprune.masks.statistics import Gathered, Inputs, S, Statistics, reduce_statistics, rows_of
from pyprune.model.blocks import WeightRef
from pyprune.model.watching import Watch


class Declined(Exception):
    """The block cannot be pruned group by group; says why."""


class TooLarge(Exception):
    """What the batches keep alive and what one needs on its way did not fit on the device."""


@dataclass(eq=False)
class Lane:
    """One batch of a stream on its way through the block."""

    source: Activations
    target: Activations | None
    batch: Batch
    sinks: dict[str, Any]
    """Of its stream, by the groups' leaders."""
    fit: bool
    """It belongs to the calibration stream."""
    going: Pass = field(init=False)
    at: Group | None = None
    """The group that it stands before."""
    x: Tensor | None = None
    seen: dict[str, weakref.ref] = field(default_factory=dict)
    """By leader, what the groups behind it have read."""
    alive: Alive | None = None
    """Its storages, where some of the passes spill."""
    spilled: Spilled | None = None
    """Where its memory goes while it stands still; None if it stays."""

    @property
    def tokens(self) -> int:
        return self.batch.size * self.batch.length

    @property
    def phase(self) -> str:
        return "forward" if self.fit else "probe"


class SequentialPass:
    """All batches of a run's streams through one block."""

    def __init__(
        self, run: Run, found: Findings, index: int, module: nn.Module, order: GroupOrder, spill: bool = False
    ):
        """spill: calibration batches that stand still keep nothing on the device; else as many do as there is room
        for."""
        self.run, self.found, self.index, self.module, self.order = run, found, index, module, order
        self.spill = spill
        self.refs = run.selected[index]
        self.block = run.view.blocks[index]
        self.group = {ref.name: group for group in order.groups for ref in group.refs}
        self.lanes: list[Lane] = []
        self.streams: list[dict[str, Inputs]] = []
        self.moving: Lane | None = None
        self.pruned: set[str] = set()
        self.dense: dict[WeightRef, Tensor] = {}
        self.masks: dict[WeightRef, Tensor] = {}
        self.trouble: Declined | TooLarge | None = None
        self._make = sink_of(run, found, index, once=True)

    def add(self, source: Activations, target: Activations | None, fit: bool = False) -> None:
        """A stream that takes part; its outputs go to ``target``. Statistics come from that with ``fit`` alone, the
        others' inputs are kept until their group's errors are measured."""
        executor = self.run.executor
        sinks: dict[str, Any] = {}
        self.streams += [] if fit else [sinks]
        for batch in source.batches(executor.batch_size):
            executor.arguments(self.index, batch.length, batch.size)
            lane = Lane(source, target, batch, sinks, fit)
            lane.going = Pass(self._forward_of(lane), executor.device)
            self.lanes.append(lane)

    def __call__(self) -> dict[WeightRef, Tensor]:
        """Prune the block; returns its keep masks. Raises Declined or TooLarge, in all processes, with block, findings
        and streams as they were."""
        rows, warnings = len(self.found.weights), list(self.found.warnings)
        watch = Watch(self.module, self.refs, lambda ref, x: self.arrive(ref.name, x))
        try:
            with self._places():
                self._go()
                self._solve([ref for ref in self.refs if ref not in self.masks], Gathered[Statistics](), [])
                self._send()
        except (Declined, TooLarge):
            self._abandon()
            for ref, weight in self.dense.items():
                self._write(ref, weight)
            del self.found.weights[rows:]
            self.found.warnings[:] = warnings
            raise
        finally:
            self._abandon()
            watch.close()
        place = {self.run.view.name(self.index, ref): k for k, ref in enumerate(self.refs)}
        self.found.weights[rows:] = sorted(self.found.weights[rows:], key=lambda row: place[row["name"]])
        return self.masks

    @property
    def batch(self) -> int:
        """Sequences of the largest batch in any process."""
        return max(self.run.world.everyone(max(lane.batch.size for lane in self.lanes)))

    # ---- the passes --------------------------------------------------------------------------------------------

    def _forward_of(self, lane: Lane) -> Callable:
        executor, source, batch = self.run.executor, lane.source, lane.batch

        def forward():
            with lane.alive or contextlib.nullcontext():
                beside = executor.beside([self.index], source, batch)
                return executor.forward(self.index, self.module, source.read(batch), beside), beside

        return forward

    @contextlib.contextmanager
    def _places(self) -> Iterator[None]:
        """Decide which passes spill: those of calibration batches that the room does not suffice for. The inputs of
        error probes are kept until their errors are measured, so their passes stay."""
        executor, store = self.run.executor, self.run.executor.store
        room, held = 0 if self.spill else executor.room(), 0.0
        for lane in sorted(self.lanes, key=lambda lane: lane.fit):
            needed = self.order.token_bytes * lane.tokens
            if lane.fit and held + needed > room:
                lane.spilled = Spilled(store)
            else:
                held += needed
        if any(lane.spilled for lane in self.lanes):
            for lane in self.lanes:
                lane.alive = Alive()
        with store.reserved(int(held)) if executor.device.type == "cpu" else contextlib.nullcontext():
            yield

    def _go(self) -> None:
        self._each(self.lanes)
        while (group := self._next()) is not None:
            self._prune(group)
            here = [lane for lane in self.lanes if lane.at is group]
            if group is self.order.groups[-1]:
                for lane in here:
                    if lane.target is None:
                        lane.at = None
                        self._end(lane)
                here = [lane for lane in here if lane.target is not None]
            self._each(here)

    def _each(self, lanes: list[Lane]) -> None:
        """Let passes move to their next group, one after the other, and take what they find there."""
        for lane in lanes:
            if self.trouble is not None:
                return
            lane.at = lane.x = None
            self.moving = lane
            try:
                with self.found.clock(lane.phase):
                    if lane.spilled is not None:
                        lane.spilled.back()
                    lane.going.step()
                if lane.at is not None and lane.x is not None:
                    self._take(lane, lane.at.leader, lane.x)
                with self.found.clock(lane.phase):
                    if lane.spilled is not None and lane.alive is not None:
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

    def _take(self, lane: Lane, leader: str, x: Tensor) -> None:
        rows = rows_of(x, lane.batch.size)
        if leader not in lane.sinks:
            lane.sinks[leader] = self._make(rows.shape[-1], rows.device) if lane.fit else Inputs()
        lane.sinks[leader].update(rows)
        lane.x = None

    def _next(self) -> Group | None:
        """The group that all processes prune now: the first that any pass waits at."""
        waiting = min((lane.at.place for lane in self.lanes if lane.at is not None), default=None)
        told = self.run.world.everyone((waiting, self.trouble))
        for _, trouble in told:
            if trouble is not None:
                raise trouble
        place = min((place for place, _ in told if place is not None), default=None)
        return next((group for group in self.order.groups if group.place == place), None)

    def _abandon(self) -> None:
        for lane in self.lanes:
            if not lane.going.done:
                self._end(lane)

    def _end(self, lane: Lane) -> None:
        lane.going.abandon()
        if lane.spilled is not None:
            lane.spilled.back()  # what the model itself has kept of the pass

    def _send(self) -> None:
        executor = self.run.executor
        for lane in self.lanes:
            if lane.target is not None:
                if lane.spilled is not None:
                    lane.spilled.back()
                (out, beside), lane.going.result = lane.going.result, None
                executor.write(lane.target, lane.batch, out, beside)
        executor.drain()

    # ---- where they stand still --------------------------------------------------------------------------------

    def arrive(self, name: str, x: Tensor) -> None:
        """The moving pass is about to multiply ``x`` by a weight: it waits if that is the first of its group."""
        lane = self.moving
        if lane is None or not x.numel():
            return
        group = self.group.get(name)
        if group is None:
            raise Declined(f"{name} is not used by every sequence")
        if group.leader in lane.seen:
            if lane.seen[group.leader]() is not x:
                raise Declined(f"{name} does not read the same in every pass, or is multiplied by several times")
            return
        if group.leader in self.pruned:
            raise Declined(f"{name} is not reached in the same order by every sequence")
        lane.seen[group.leader] = weakref.ref(x)
        lane.at, lane.x = group, x
        lane.going.wait()

    # ---- pruning -----------------------------------------------------------------------------------------------

    def _prune(self, group: Group) -> None:
        fit: dict[str, Statistics] = next((lane.sinks for lane in self.lanes if lane.fit), {})
        sink = fit.pop(group.leader, None)
        if sink is None:
            sink = self._make(group.refs[0].view(self.block).shape[1], self.run.executor.device)
        gathered = self._gathered(group, sink)
        reduce_statistics(self.run.world, gathered)
        if not sink.finite():
            self._abandon()
            refuse_non_finite(self.run, self.index, self.module, list(group.refs), self.lanes[0].source)
        if not sink.tokens:
            gathered = Gathered()  # an expert that only sequences which measure errors reach
        self._solve(
            group.refs,
            gathered,
            [
                self._gathered(group, sinks.pop(group.leader)) if group.leader in sinks else Gathered()
                for sinks in self.streams
            ],
        )
        self.pruned.add(group.leader)

    def _gathered(self, group: Group, sink: S) -> Gathered[S]:
        return Gathered({group.leader: sink}, {ref.name: group.leader for ref in group.refs})

    def _solve(
        self,
        refs: list[WeightRef] | tuple[WeightRef, ...],
        gathered: Gathered[Statistics],
        inputs: list[Gathered[Inputs]],
    ) -> None:
        if not refs:
            return
        self.dense |= {ref: ref.view(self.block).clone() for ref in refs}
        with self.found.clock("solve"):
            self.masks |= prune_block(self.run, self.found, self.index, self.module, gathered, inputs, only=refs)

    def _write(self, ref: WeightRef, weight: Tensor) -> None:
        ref.view(self.block).copy_(weight)
        if self.module is not self.block:
            ref.view(self.module).copy_(weight)
