"""One pass over a block in which heads and neurons are removed as soon as all tokens have arrived at their consumers.

What a consumer gives is taken aside, and what it lands in (the residual sum behind it) is looked at without it: the
passes of all batches stand still there. Inputs, outputs and sums of all tokens are then known, units are chosen and the
consumer is repaired; its new product of the kept inputs is added, and the passes go on as the pruned block would. Heads
are behind the consumers of the blocks before, neurons behind the pruned heads, and every block runs once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyprune.execution.executor import Activations, Executor
from pyprune.execution.lanes import Declined, Lane, Lanes, Refuted, TooLarge
from pyprune.ops.guards import at_fault
from pyprune.structured.block import StructuredRun, pick_units
from pyprune.structured.consumers import Aside, Product, Waiting, multiply, put
from pyprune.structured.moments import Split
from pyprune.structured.observation import Observed, held_of, sampled, settled_moments, weighting
from pyprune.structured.slicing import Pick, kept_columns
from pyprune.structured.stop_order import Stop, StopOrder


@dataclass(eq=False)
class ConsumerLane(Lane):
    """One batch on its way from consumer to consumer."""

    waiting: Waiting = field(default_factory=dict)
    total: Tensor | None = None
    """The residual sum without the products that wait; None where the one product itself goes on."""
    due: list[tuple[int, Replacement]] = field(default_factory=list)
    """Groups that are repaired, whose new products the pass has still to be given."""


class SequentialBlock(Lanes):
    """All batches of a run's streams through one block; moments come from the stream that was added with ``fit``."""

    lane = ConsumerLane

    def __init__(
        self, work: StructuredRun, index: int, module: nn.Module, order: StopOrder, sums: list[Activations | None]
    ):
        """sums: by group, what the consumer's output should add up to, of the dense stream; None: no errors are
        taken."""
        super().__init__(work.run, work.found, index, module, order.token_bytes)
        self.work, self.order, self.sums = work, order, sums
        self.groups = work.prepared.groups[index]
        self.stop = {stop.groups: stop for stop in order.stops}
        self.picks: dict[int, Pick] = {}
        self._aside: Aside | None = None

    def __call__(self) -> list[Pick]:
        """What is kept of every group. Raises Declined, TooLarge or Refuted, in all processes, with block, findings and
        streams as they were."""
        [target] = self.work.targets
        rows, warnings = len(target.rows), list(self.found.warnings)
        self._aside = Aside(self.module, self.groups, self._waiting, self._reached)
        try:
            self.each(self.lanes)
            while (place := self.next_place()) is not None:
                stop = next(stop for stop in self.order.stops if stop.place == place)
                self._settle(stop)
                here = [lane for lane in self.lanes if lane.at is stop]
                self.each(self.drop(here) if stop is self.order.stops[-1] else here)
            self.judge(at_fault([self.passed.wrong]))
        except (Declined, TooLarge, Refuted):
            del target.rows[rows:]
            self.found.warnings[:] = warnings
            raise
        finally:
            self.abandon()
            self._aside.close()
            self._aside = None  # it knows this object: a circle would keep all activations
        for i in range(len(self.groups)):
            if i not in self.picks:  # an expert that no token reached
                self._choose(i, Observed.make(self.run, self.index, self.groups[i]).split)
        place = {self.run.view.name(self.index, group.consumer): i for i, group in enumerate(self.groups)}
        target.rows[rows:] = sorted(target.rows[rows:], key=lambda row: place[row["name"]])
        self.send()
        return [self.picks[i] for i in range(len(self.groups))]

    def _waiting(self) -> Waiting | None:
        return None if self.moving is None else self.moving.waiting

    def leaving(self, out: Tensor) -> Tensor:
        assert self._aside is not None
        return self._aside.leave(out)

    def _reached(self, here: tuple[int, ...], total: Tensor | None) -> None:
        name = self.groups[here[0]].name
        if here not in self.stop:
            raise Declined(f"{name} does not land where it does in every sequence")
        if here[0] in self.picks:
            raise Declined(f"{name} is not reached in the same order by every sequence")
        self.moving.total = total
        self.halt(self.stop[here])

    def _settle(self, stop: Stop) -> None:
        here = [lane for lane in self.lanes if lane.at is stop]
        for i in stop.groups:
            fit = [lane for lane in here if lane.fit]
            mean_power = self._mean_power(i, fit)
            gather = functools.partial(self._observe, i, fit, mean_power)
            [split] = settled_moments(self.run, self.found, self.index, [self.groups[i]], gather, again=True)
            self._choose(i, split)
            replacement = Replacement.of(self.work, self.index, self.picks[i])
            for lane in here:
                lane.due.append((i, replacement))

    def _observe(self, i: int, fit: list[ConsumerLane], mean_power: Tensor | None) -> list[Split]:
        """Moments of a group's inputs, of the passes that stand still."""
        observed = Observed.make(self.run, self.index, self.groups[i], self.sums[i], mean_power)
        with self.found.clock("statistics"):
            for lane in fit:
                with self.at_hand(lane):
                    self._pay(lane)
                    product, held = lane.waiting[i], held_of(self.run, lane.source, lane.batch)
                    power = product.rows.float().square().sum(1) if observed.column_powers is not None else None
                    observed.add(lane.batch, product.x, held, self._sums(lane, i), power)
        return [observed.split]

    def going_on(self, lane: ConsumerLane) -> None:
        self._pay(lane)

    def _pay(self, lane: ConsumerLane) -> None:
        """Give a pass, whose tensors are at hand, the new products that it is due."""
        with self.found.clock(lane.phase):
            for i, replacement in lane.due:
                put(lane.waiting, i, lane.total, replacement(lane.waiting[i]))
        lane.due = []

    def _sums(self, lane: ConsumerLane, i: int) -> Tensor | None:
        """What the dense consumer's output adds up to in this batch, ``[tokens, out]``; None for an expert."""
        if self.groups[i].consumer.expert is not None:
            return None
        if lane.total is None:
            return lane.waiting[i].rows
        total = lane.total.reshape(-1, lane.total.shape[-1])
        for other in lane.at.groups:
            if other in lane.waiting:  # those before it are in the total already
                total = total + lane.waiting[other].rows
        return total

    def _mean_power(self, i: int, fit: list[ConsumerLane]) -> Tensor | None:
        """:func:`pyprune.structured.observation.mean_powers` of one group, of the passes that stand still."""
        group = self.groups[i]
        if weighting(self.run.config.structured.token_weights, group) != "balanced":
            return None
        told = torch.zeros(2, device=self.run.executor.device)
        for lane in fit if self.run.world.leads else []:
            rows = lane.source.rows[lane.batch.length][lane.batch.start : lane.batch.stop]
            count = sum(row < sampled(self.run) for row in rows)  # in order, the first ones
            if not count:
                continue
            with self.at_hand(lane):
                self._pay(lane)
                sums = self._sums(lane, i)
                if sums is not None:
                    told[0] += sums[: count * lane.batch.length].float().square().sum()
                    told[1] += count * lane.batch.length
        self.run.world.send_(told, 0)
        return told[0] / told[1].clamp(min=1)

    def _choose(self, i: int, split: Split) -> None:
        expert = self.groups[i].consumer.expert or 0
        [[self.picks[i]]] = pick_units(self.work, self.index, [i], [split], turn=expert)


@dataclass(frozen=True, eq=False)
class Replacement:
    """A repaired consumer's product, as the pruned block computes it."""

    executor: Executor
    columns: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(work: StructuredRun, index: int, pick: Pick) -> Replacement:
        executor, ref = work.run.executor, pick.group.consumer
        block = work.run.view.blocks[index]
        own = ref.parameter(block).dtype
        weight = kept_columns(block, pick).to(executor.device, executor.dtype)
        bias = pick.bias
        if bias is None and ref.expert is None:
            bias = getattr(block.get_submodule(ref.module_path), "bias", None)
        if bias is not None:
            bias = bias.detach().to(own).to(executor.device, executor.dtype)
        return Replacement(executor, pick.group.columns_of(pick.kept), weight, bias)

    def __call__(self, product: Product) -> Tensor:
        return multiply(self.executor, product, self.columns, self.weight, self.bias)


def replay(work: StructuredRun, index: int, module: nn.Module, picks: list[Pick], streams: list[Activations]) -> None:
    """Pass streams through a block that is still dense as :class:`SequentialBlock` passed them, bit for bit: what is
    kept of every group is known already."""
    executor = work.run.executor
    waiting: Waiting = {}
    replacements = [Replacement.of(work, index, pick) for pick in picks]

    def reached(here: tuple[int, ...], total: Tensor | None) -> None:
        for i in here:
            put(waiting, i, total, replacements[i](waiting[i]))

    aside = Aside(module, [pick.group for pick in picks], lambda: waiting, reached)
    try:
        for stream in streams:
            executor.run(index, module, stream, stream, through=lambda forward: aside.leave(forward()))
    finally:
        aside.close()
