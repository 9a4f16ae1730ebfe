"""One pass over a block in which each group of layers is pruned as soon as all tokens have arrived at it.

The forward passes of all batches stand still before the group until its statistics are complete, it is pruned there
and then, and they go on with its new weights: every product is computed once, and later groups see what the pruned
earlier ones feed them (what GPTQ, arXiv 2210.17323, calls true-sequential).
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pyprune import ops
from pyprune.execution.executor import Activations
from pyprune.execution.lanes import Declined, Lane, Lanes, Refuted, TooLarge
from pyprune.execution.run import Findings, Run
from pyprune.masks.block import Own, prune_group, refuse_non_finite, report, sink_of
from pyprune.masks.group_order import Group, GroupOrder
from pyprune.masks.statistics import Gathered, Inputs, S, Statistics, reduce_statistics, rows_of
from pyprune.model.blocks import WeightRef
from pyprune.model.routing import expert_lists
from pyprune.model.watching import Watch


@dataclass(eq=False)
class GroupLane(Lane):
    """One batch on its way from group to group."""

    x: Tensor | None = None
    """What the group that it stands before reads."""
    seen: dict[str, weakref.ref] = field(default_factory=dict)
    """By leader, what the groups behind it have read."""
    ahead: GroupLane | None = None
    """The same sequences in the dense stream, which come to every place just before it."""
    is_ahead: bool = False


class SequentialPass(Lanes):
    """All batches of a run's streams through one block.

    Statistics come from the stream that was added with ``fit`` alone, the others' inputs are kept until their group's
    errors are measured.
    """

    lane = GroupLane

    def __init__(self, run: Run, found: Findings, index: int, module: nn.Module, order: GroupOrder):
        super().__init__(run, found, index, module, order.token_bytes)
        self.order = order
        self.refs = run.selected[index]
        self.block = run.view.blocks[index]
        self.group = {ref.name: group for group in order.groups for ref in group.refs}
        self.sinks: dict[int, dict[str, Any]] = {}
        """By stream and the groups' leaders."""
        self.pruned: set[str] = set()
        self.dense: dict[WeightRef, Tensor] = {}
        self.masks: dict[WeightRef, Tensor] = {}
        self.own = Own()
        self.looked_at: list[Group] = []
        """Groups whose statistics ``own.finite`` is about."""
        lists = tuple(f"{path}." for path in expert_lists(module))
        self.routed = {ref.name for ref in self.refs if ref.expert is not None or ref.path.startswith(lists)}
        """Weights that see the tokens routed to them, which two streams choose differently."""
        self._make = sink_of(run, found)

    def add_towards(
        self, dense: Activations, source: Activations, dense_target: Activations | None, target: Activations | None
    ) -> None:
        """The calibration stream, whose layer-wise targets are the dense stream's (GP of arXiv 2406.15524): that one
        goes ahead of it, through a copy of the block that stays dense."""
        before = len(self.lanes)
        self.add(dense, dense_target, fit=True, module=copy.deepcopy(self.module))
        self.add(source, target, fit=True)
        added = self.lanes[before:]
        pairs = list(zip(added[: len(added) // 2], added[len(added) // 2 :], strict=True))
        for ahead, lane in pairs:
            ahead.is_ahead, lane.ahead = True, ahead
        self.lanes[before:] = [lane for pair in pairs for lane in pair]

    def __call__(self) -> dict[WeightRef, Tensor]:
        """Prune the block; returns its keep masks. Raises Declined, TooLarge or Refuted, in all processes, with block,
        findings and streams as they were."""
        warnings = list(self.found.warnings)
        watches = [
            Watch(module, self.refs, lambda ref, x: self.arrive(ref.name, x))
            for module in {id(lane.module): lane.module for lane in self.lanes}.values()
        ]
        try:
            self.each(self.lanes)
            while (place := self.next_place()) is not None:
                group = next(group for group in self.order.groups if group.place == place)
                self._prune(group)
                here = [lane for lane in self.lanes if lane.at is group]
                self.each(self.drop(here) if group is self.order.groups[-1] else here)
            self._solve([ref for ref in self.refs if ref not in self.masks], Gathered[Statistics](), [])
            self._read()
        except (Declined, TooLarge, Refuted):
            self.abandon()
            self._undo(self.dense)
            self.found.warnings[:] = warnings
            raise
        finally:
            self.abandon()
            for watch in watches:
                watch.close()
        report(self.run, self.found, self.index, self.own)
        self.send()
        return self.masks

    def arrived(self, lane: GroupLane) -> None:
        leader = lane.at.leader
        if lane.is_ahead:
            return  # what it brings is read by the one behind it
        assert lane.x is not None
        sinks = self.sinks.setdefault(lane.stream, {})
        if leader not in sinks:
            sinks[leader] = self._make(lane.x.shape[-1], lane.x.device) if lane.fit else Inputs()
        self._feed(sinks[leader], lane)

    def _feed(self, sink: Any, lane: GroupLane) -> None:
        """Give a sink what a pass brings to the place that it stands at, and the dense stream with it."""
        assert lane.x is not None
        rows = rows_of(lane.x, lane.batch.size)
        ahead = None if lane.at.leader in self.routed else lane.ahead
        if ahead is None:
            sink.update(rows)
        elif ahead.at is not lane.at or ahead.x is None:
            raise Declined(f"{lane.at.leader} is not reached where the dense stream reaches it")
        else:
            with self.at_hand(ahead):
                sink.update(rows, rows_of(ahead.x, lane.batch.size))

    def arrive(self, name: str, x: Tensor) -> None:
        """The moving pass is about to multiply ``x`` by a weight: it waits if that is the first of its group."""
        lane = self.moving
        if lane is None or not x.numel():
            return
        group = self.group.get(name)
        if lane.is_ahead and name in self.routed:
            return
        if group is None:
            raise Declined(f"{name} is not used by every sequence")
        if group.leader in lane.seen:
            if lane.seen[group.leader]() is not x:
                raise Declined(f"{name} does not read the same in every pass, or is multiplied by several times")
            return
        if group.leader in self.pruned:
            raise Declined(f"{name} is not reached in the same order by every sequence")
        lane.seen[group.leader] = weakref.ref(x)
        lane.x = x
        self.halt(group)

    def _prune(self, group: Group) -> None:
        measured = {lane.stream for lane in self.lanes if not lane.is_ahead}
        fit = {lane.stream for lane in self.lanes if lane.fit and not lane.is_ahead}
        sinks = {stream: self.sinks.get(stream, {}).pop(group.leader, None) for stream in sorted(measured)}
        sink = next((sinks.pop(stream) for stream in fit), None)
        if sink is None:
            sink = self._make(group.refs[0].view(self.block).shape[1], self.run.executor.device)
        gathered = self._gathered(group, sink)
        for lane in self.lanes:
            if lane.at is group:
                lane.x = None
        self.own.wrong += sink.wrong.items()
        reduce_statistics(self.run.world, gathered)
        self.own.finite.append(sink.spared())
        self.looked_at.append(group)
        if not sink.tokens:
            gathered = Gathered()  # an expert that only sequences which measure errors reach
        self._solve(
            group.refs,
            gathered,
            [Gathered() if inputs is None else self._gathered(group, inputs) for inputs in sinks.values()],
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
            look = self.refuted.unfactored
            own, masks = prune_group(self.run, self.found, self.index, self.module, refs, gathered, inputs, look)
        self.own.take(own)
        self.masks |= masks

    def _read(self) -> None:
        """What has to be known of the whole block, in one reading of the device."""
        self.own.wrong += self.passed.wrong.items()
        told = self.own.read()
        self.judge(told.wrong, told.unfactored and all(told.finite))
        if not all(told.finite):
            first = told.finite.index(False)
            group = self.looked_at[first]
            self.abandon()
            self._undo({ref: self.dense[ref] for later in self.looked_at[first:] for ref in later.refs})
            refuse_non_finite(self.run, self.index, self.module, list(group.refs), self.lanes[0].source)
        ops.raise_faults(self.run.executor.device)

    def _undo(self, weights: dict[WeightRef, Tensor]) -> None:
        self.run.executor.drain()  # what is on its way to the host comes first
        for ref, weight in weights.items():
            ref.view(self.block).copy_(weight)
            if self.module is not self.block:
                ref.view(self.module).copy_(weight)
