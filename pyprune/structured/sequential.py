"""One pass over a block in which heads and neurons are removed as soon as all tokens have arrived at their consumers.

What a consumer gives is taken aside, and what it lands in (the residual sum behind it) is looked at without it: the
passes of all batches stand still there. Inputs, outputs and sums of all tokens are then known, units are chosen and the
consumer is repaired; its new product of the kept inputs is added, and the passes go on as the pruned block would. Heads
are behind the consumers of the blocks before, neurons behind the pruned heads, and every block runs once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyprune.execution.executor import Activations, Batch, Executor
from pyprune.execution.lanes import Declined, Lane, Lanes, Refuted, TooLarge, changed_attribute
from pyprune.execution.spilling import Alive
from pyprune.model.blocks import WeightRef
from pyprune.model.routing import expert_lists
from pyprune.model.watching import Watch
from pyprune.ops.guards import at_fault
from pyprune.structured.block import StructuredRun, pick_units
from pyprune.structured.groups import Coupled
from pyprune.structured.moments import Split
from pyprune.structured.observation import Observed, held_of, sampled, settled_moments, weighting
from pyprune.structured.slicing import Pick, kept_columns


@dataclass(eq=False)
class Product:
    """A consumer's product in one pass."""

    x: Tensor
    """``[tokens, in]``."""
    output: Tensor
    """As the module gives it, then as the repaired one does."""

    @property
    def rows(self) -> Tensor:
        """The output ``[tokens, out]``."""
        return self.output.reshape(-1, self.output.shape[-1])


Waiting = dict[int, Product]
"""By group, the products of one pass that are taken aside."""
Reached = Callable[[tuple[int, ...], Tensor | None], None]


class Aside:
    """While open, takes the products of consumers out of the passes through a block until they are asked for.

    ``waiting()`` tells where to keep those of the pass at hand; None leaves it alone. ``reached(groups, total)`` is
    called where the products of these groups are needed: ``total``, in the residual stream, lacks exactly them, and is
    to be added to in place. Without a total, the one product's ``output`` is what goes on.
    """

    def __init__(
        self, block: nn.Module, groups: list[Coupled], waiting: Callable[[], Waiting | None], reached: Reached
    ):
        self.waiting, self.reached = waiting, reached
        self._places = {group.consumer: i for i, group in enumerate(groups)}
        self._lands: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            if group.consumer.expert is None and group.target is not None:
                self._lands.setdefault(group.target, []).append(i)
        self._landing = {i for places in self._lands.values() for i in places}
        self._watch = Watch(block, self._places, replace=self._take)
        self._handles = [
            block.get_submodule(path).register_forward_pre_hook(self._land(path)) for path in self._lands if path
        ]

    def _take(self, ref: WeightRef, x: Tensor, output: Tensor) -> Tensor:
        waiting, i = self.waiting(), self._places[ref]
        if waiting is None or not x.numel():
            return output
        if i in waiting:
            raise Declined(f"{ref.name} is multiplied by several times in a pass")
        waiting[i] = Product(x.reshape(-1, x.shape[-1]), output)
        if i in self._landing:
            return torch.zeros_like(output)
        self.reached((i,), None)
        return waiting.pop(i).output

    def _arrive(self, path: str, total: Tensor) -> None:
        waiting = self.waiting()
        here = () if waiting is None else tuple(i for i in self._lands[path] if i in waiting)
        if here:
            self.reached(here, total)

    def _land(self, path: str):
        def hook(module, args):
            self._arrive(path, args[0])

        return hook

    def leave(self, out: Tensor) -> Tensor:
        """Called with what the block returns."""
        if "" in self._lands:
            self._arrive("", out)
        if left := self.waiting():
            raise Declined(f"what group {min(left)} gives lands nowhere")
        return out

    def close(self) -> None:
        self._watch.close()
        for handle in self._handles:
            handle.remove()


def multiply(
    executor: Executor, product: Product, columns: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What a consumer of this weight ``[out, columns]`` gives, in the shape of its output; columns: those of its input
    that are left."""
    x = product.x if columns is None else product.x.index_select(1, columns.to(product.x.device))
    with executor.mode():
        rows = functional.linear(x, weight, bias)
    return rows.view(product.output.shape)


def put(waiting: Waiting, i: int, total: Tensor | None, output: Tensor) -> None:
    """Let a pass go on with this output of group i."""
    if total is None:
        waiting[i].output = output
    else:
        total.add_(output.view_as(total))
        del waiting[i]


@dataclass(frozen=True)
class Stop:
    """Where the passes stand still for some groups, that are settled there one after the other."""

    place: tuple[int, int]
    """Orders stops as a pass comes to them: experts by their number."""
    groups: tuple[int, ...]


@dataclass(frozen=True)
class StopOrder:
    """What is known of all blocks of one structure."""

    stops: tuple[Stop, ...] = ()
    token_bytes: float = 0.0
    """Bytes that a pass which stands still keeps alive for each token, at most."""
    trouble: str | None = None
    """Why such blocks cannot be pruned in one pass."""


@torch.no_grad()
def record(executor: Executor, index: int, module: nn.Module, groups: list[Coupled], source: Activations) -> StopOrder:
    """Run a block over one sequence of a stream, the longest: plainly, with the consumers' products taken aside and put
    back, and without them. Only where putting back makes up for taking away can the block be pruned so."""
    lists = tuple(f"{path}." for path in expert_lists(module))
    for group in groups:
        if group.consumer.path.startswith(lists):
            return StopOrder(trouble=f"{group.name} is not reached by every sequence")
    batch = Batch(max(source.rows), 0, 1)
    executor.arguments(index, batch.length, 1)
    waiting: Waiting = {}
    order: list[tuple[int, ...]] = []
    back, alive = True, Alive()

    def reached(here: tuple[int, ...], total: Tensor | None) -> None:
        alive.update()
        order.append(here)
        for i in here:
            ref = groups[i].consumer
            weight, bias = ref.view(module), None
            if ref.expert is None:
                bias = getattr(module.get_submodule(ref.module_path), "bias", None)
            output = multiply(executor, waiting[i], None, weight, bias)
            put(waiting, i, total, output if back else torch.zeros_like(output))

    def forward() -> Tensor:
        beside = executor.beside([index], source, batch)
        return executor.forward(index, module, source.read(batch), beside)

    plain = forward()
    aside = Aside(module, groups, lambda: waiting, reached)
    outs: list[Tensor] = []

    def aside_pass() -> None:
        with alive:
            outs.append(aside.leave(forward()))

    try:
        changed = changed_attribute(module, aside_pass)
        met = list(order)
        back = False
        waiting.clear()
        outs.append(aside.leave(forward()))
    except Declined as declined:
        return StopOrder(trouble=str(declined))
    finally:
        aside.close()
    if changed is not None:
        return StopOrder(trouble=changed)
    wrong, effect = (float((out.float() - plain.float()).norm()) for out in outs)
    if not wrong <= 0.01 * effect:
        return StopOrder(trouble="what its heads or neurons give goes other ways than to the residual sum")
    return _stops(groups, met, alive.peak / batch.length)


def _stops(groups: list[Coupled], met: list[tuple[int, ...]], token_bytes: float) -> StopOrder:
    stops: list[Stop] = []
    experts: dict[str, int] = {}
    for position, here in enumerate(met):
        ref = groups[here[0]].consumer
        if ref.expert is None:
            stops.append(Stop((position, 0), here))
        else:
            experts.setdefault(ref.path, position)
    for i, group in enumerate(groups):
        ref = group.consumer
        if ref.expert is not None and ref.path in experts:
            stops.append(Stop((experts[ref.path], ref.expert), (i,)))
        elif ref.expert is None and not any(i in here for here in met):
            return StopOrder(trouble=f"{group.name} is not reached by every sequence")
    return StopOrder(tuple(sorted(stops, key=lambda stop: stop.place)), token_bytes)


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
