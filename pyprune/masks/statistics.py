"""Streaming statistics of the inputs of a block's linear layers.

Layers that read the same tensor (q/k/v, gate/up) share one accumulator: the group is discovered from the identity of
the input in the forward pass. Every accumulator carries its own token count and accumulates in float32 or better.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.config import ConfigError
from pyprune.execution.distributed import World
from pyprune.execution.executor import NO_ROOM, Activations, Batch, Executor
from pyprune.execution.trust import by_reference
from pyprune.model.arguments import Beside
from pyprune.model.blocks import WeightRef
from pyprune.model.recording import Stop
from pyprune.model.routing import expert_lists
from pyprune.model.watching import Watch
from pyprune.ops import guards

AGAIN = "#"
"""Suffix of the name of a weight where its later products in an application of the block are meant, apart from the
first: DeBERTa's query and key also read the relative positions, which its value, with the same first input, does not.
"""
ERROR_TOKENS = 512
"""Inputs a weight's error is measured on; more changes its third digit and costs as much as the solve."""


@dataclass
class Statistics:
    """What is known of one group's input ``X [tokens, c]``: Gram matrix and/or column moments."""

    columns: int
    device: torch.device
    want_gram: bool = True
    want_moments: bool = False
    precision: str = "float32"
    clock: Callable = contextlib.nullcontext
    """Counts the time of the updates as a phase of their own."""
    gram: Tensor = field(init=False)
    """float32 ``[c, c]``, ``XᵀX``; empty where no Gram is wanted."""
    sums: Tensor = field(init=False)
    """float32 ``[c]``, ``Σx``; empty where no Gram is wanted."""
    count: Tensor = field(init=False)
    """int64 scalar: tokens seen."""
    mean: Tensor = field(init=False)
    """float64 ``[c]``; empty where no moments are wanted."""
    m2: Tensor = field(init=False)
    """Centred sum of squares, float64 ``[c]``, merged by Chan's formula; empty where no moments are wanted."""
    cross: Tensor | None = None
    """float32 ``[c, c]``, ``X̄ᵀX`` with the dense stream's inputs X̄, where the layer-wise target is dense (GP)."""
    wrong: dict[str, Tensor] = field(default_factory=dict)
    """By op, bool scalars on the device: whether its first result failed its guard (:mod:`pyprune.ops.guards`)."""
    tokens: int = 0
    """``count``, as the host knows it."""

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """As before the first update."""
        self.tokens, self.cross, self.wrong = 0, None, {}
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        c, moments = self.columns if self.want_gram else 0, self.columns if self.want_moments else 0
        self.gram, self.sums = torch.zeros(c, c, device=self.device), torch.zeros(c, device=self.device)
        self.mean = torch.zeros(moments, dtype=torch.float64, device=self.device)
        self.m2 = torch.zeros(moments, dtype=torch.float64, device=self.device)

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add tokens ``x [tokens, c]``; ``dense`` are the same tokens in the dense stream."""
        self.tokens += len(x)
        with self.clock("statistics"):
            self._update(x)
            if dense is not None:
                if self.cross is None:
                    self.cross = torch.zeros_like(self.gram)
                ops.cross_gram_update(self.cross, dense, x)
                if "cross_gram_update" not in self.wrong:
                    squares = torch.linalg.vector_norm(dense, dim=0, dtype=torch.float32).square()
                    self.wrong["cross_gram_update"] = guards.cross_gram(self.cross, dense, x, squares)

    def _update(self, x: Tensor) -> None:
        if self.want_moments:
            count, mean, m2 = ops.column_moments(x)
            if "column_moments" not in self.wrong:
                self.wrong["column_moments"] = guards.moments(x, count, mean, m2)
            total = (self.count + count).clamp(min=1).double()
            delta = mean.double() - self.mean
            self.m2 += m2.double() + delta.square() * (self.count * count / total)
            self.mean += delta * (count / total)
        if self.want_gram:
            ops.gram_update(self.gram, x, sums=self.sums, count=self.count, precision=self.precision)
            if "gram_update" not in self.wrong:
                self.wrong["gram_update"] = guards.gram(self.gram, x, self.count, self.precision)
        else:
            self.count += x.shape[0]

    def plus(self, other: Statistics) -> Statistics:
        """Statistics of both inputs together."""
        both = copy.copy(self)
        both.tokens = self.tokens + other.tokens
        both.count = self.count + other.count
        both.wrong = {op: bad | other.wrong[op] if op in other.wrong else bad for op, bad in self.wrong.items()}
        both.wrong |= {op: bad for op, bad in other.wrong.items() if op not in self.wrong}
        both.gram, both.sums = self.gram + other.gram, self.sums + other.sums
        if self.cross is not None and other.cross is not None:
            both.cross = self.cross + other.cross
        if self.want_moments:
            share = other.count / both.count.clamp(min=1).double()
            delta = other.mean - self.mean
            both.m2 = self.m2 + other.m2 + delta.square() * (self.count * share)
            both.mean = self.mean + delta * share
        return both

    @property
    def norm(self) -> Tensor:
        """``‖X_·j‖₂`` per column, float32 ``[c]`` (Wanda's scale)."""
        if self.want_moments:
            return (self.m2 + self.count * self.mean.square()).sqrt().float()
        return self.gram.diagonal().clamp(min=0).sqrt()

    def finite(self) -> Tensor:
        """bool scalar on the device."""
        values = self.gram.diagonal() if self.want_gram else self.m2
        return torch.isfinite(values).all()

    def spared(self) -> Tensor:
        """:meth:`finite`, for whoever goes on before it is read: statistics that are not become zero, which no solver
        refuses."""
        finite = self.finite()
        for total in (self.gram, self.sums, self.mean, self.m2, self.cross):
            if total is not None:
                total.masked_fill_(~finite, 0)
        return finite


class Sink(Protocol):
    """What takes the inputs ``[tokens, c]`` of a group; ``dense`` are the same tokens in the dense stream."""

    def update(self, x: Tensor, dense: Tensor | None = None) -> None: ...

    def plus(self: S, other: S) -> S: ...


S = TypeVar("S", bound=Sink)


class Inputs:
    """Keeps a group's inputs themselves: for measuring errors on a few probe sequences."""

    def __init__(self):
        self.chunks: list[Tensor] = []

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        self.chunks.append(x.clone() if x.is_cuda else x)  # on a GPU it may lie in a buffer of the ring

    def plus(self, other: Inputs) -> Inputs:
        """The inputs of both together."""
        both = Inputs()
        both.chunks = self.chunks + other.chunks
        return both

    @property
    def x(self) -> Tensor:
        return torch.cat(self.chunks)


@dataclass(eq=False)
class Gathered(Generic[S]):
    """Sinks of groups of weights that read the same inputs."""

    sinks: dict[str, S] = field(default_factory=dict)
    """By the name of each group's first weight."""
    leader: dict[str, str] = field(default_factory=dict)
    """By a weight's name, that of its group's first."""
    passed: guards.Verdicts = field(default_factory=guards.Verdicts)
    """Of the ops of the first forward pass."""


Call = tuple[int, str, int]
"""A product in a forward pass: which application of its block, the weight's name, how often before in that one."""


class Observer(Gathered[S]):
    """Feeds the inputs of a block's weights to one sink per group while the block runs."""

    def __init__(self, module: nn.Module, refs: list[WeightRef], sink: Callable[[int, torch.device], S]):
        super().__init__()
        self.skip: frozenset[Call] = frozenset()
        """Calls whose sinks have this batch already (it ran out of memory behind them and comes again in halves)."""
        self.updating: str | None = None
        self.batch = 1
        """Sequences of the batch at hand."""
        self.holding = False
        """The pass is the dense stream's: its inputs are held for the cross Gram, none is counted."""
        self.held: dict[Call, Tensor] = {}
        self.calls: list[Call] = []
        """Of the pass at hand, or of the last one."""
        self._times: Counter[tuple[int, str]] = Counter()
        self._recent: list[tuple[str, Tensor]] = []
        self._last: Call | None = None
        self._ends: dict[int, Call | None] = {}
        """By length of the sequences, the call behind which nothing more is to be seen."""
        self._module, self._make = module, sink
        self._names = {ref.name for ref in refs}
        lists = expert_lists(module)
        self._routed = {
            ref.name for ref in refs if ref.expert is not None or any(ref.path.startswith(f"{path}.") for path in lists)
        }
        """Weights that see the tokens routed to them, which the two streams choose differently."""
        self._watch = Watch(module, refs, lambda ref, x: self.see(ref.name, x))
        self.alone = {ref.name for ref in self._watch.shared}
        """Weights of several modules: what one of them reads with its neighbours, another reads without them."""

    def see(self, name: str, x: Tensor) -> None:
        if not x.numel() or (self.holding and name in self._routed):
            return
        step = getattr(self._module, "step", 0)
        self._times[step, name] += 1
        call = (step, name, self._times[step, name] - 1)
        self.calls.append(call)
        key = name + AGAIN if call[2] else name
        if key not in self.leader:
            same = [
                leader
                for leader, seen in self._recent
                if seen is x and not {leader.removesuffix(AGAIN), name} & self.alone
            ]
            self.leader[key] = same[0] if same else key
            if not same:
                self.sinks[key] = self._make(x.shape[-1], x.device)
        if self.leader[key] == key:
            self._recent.append((key, x))
            rows = rows_of(x, self.batch)
            if self.holding:
                self.held[call] = rows
            elif call not in self.skip:
                self.updating = name
                self.sinks[key].update(rows, self.held.get(call))
                self.updating = None
        if call == self._last:
            raise Stop

    def run(self, forward: Callable[[], Tensor], length: int | None = None) -> Tensor | None:
        """One forward pass under observation. With the ``length`` of its sequences it ends before the last observed
        product, from the second pass of that length on, and returns None."""
        self._recent, self.calls, self._times = [], [], Counter()
        self._last = None if length is None else self._ends.get(length)
        try:
            with torch.no_grad():
                out = forward()
        except Stop:
            return None
        if length is not None:
            self._ends[length] = self._end()
        self._check_groups()
        return out

    def _check_groups(self) -> None:
        """Weights with one sink must have read the same in this pass too, as far as counts tell."""
        counts: Counter[tuple[int, str]] = Counter()
        for step, name, again in self.calls:
            counts[step, name + AGAIN if again else name] += 1
        for (step, key), count in counts.items():
            if counts[step, self.leader[key]] != count:
                one, other = (part.removesuffix(AGAIN) for part in (key, self.leader[key]))
                raise ConfigError(
                    f"{one} and {other} read the same input at first, then different ones; name one of "
                    "them among the weights to ignore"
                )

    def _end(self) -> Call | None:
        """The last call of the pass that was just made, if every other pass makes the same calls: no weight has been
        seen twice in an application, none waits for tokens of its own."""
        known = {name for _, name, _ in self.calls} == self._names and not self._routed
        return self.calls[-1] if known and not any(again for _, _, again in self.calls) else None

    def run_dense(self, forward: Callable[[], Tensor]) -> Tensor | None:
        """The dense stream's pass over a batch, before the batch itself."""
        self.held, self.holding = {}, True
        try:
            return self.run(forward)
        finally:
            self.holding, self.calls = False, []  # nothing was counted

    def without(self, calls: frozenset[Call], sinks: set[str]) -> frozenset[Call]:
        """Those of the calls that feed none of these sinks."""
        return frozenset(call for call in calls if self.leader[call[1] + AGAIN if call[2] else call[1]] not in sinks)

    def close(self) -> None:
        self._watch.close()

    def gather(self) -> None:
        """Give weights that are multiplied by several times one sink of all that they read."""
        if not any(name.endswith(AGAIN) for name in self.leader):
            return
        groups: dict[tuple[str, ...], str] = {}
        sinks, leader = {}, {}
        for name in [name for name in self.leader if not name.endswith(AGAIN)]:
            parts = tuple(self.leader[key] for key in (name, name + AGAIN) if key in self.leader)
            leader[name] = groups.setdefault(parts, name)
            if leader[name] == name:
                first, *rest = (self.sinks[part] for part in parts)
                for other in rest:
                    first = first.plus(other)
                sinks[name] = first
        self.sinks, self.leader = sinks, leader


@dataclass(eq=False)
class Review:
    """Of a pass that takes the place of its own inputs, so that it cannot be made again as a whole: after each part of
    it that brought new sinks, their guards, all in one read."""

    distrust: Callable[[str], None]
    """Hears of the ops that failed where the reference does not."""
    suspects: set[str] = field(default_factory=set)
    """Ops for which the reference makes the present part again."""
    _seen: set[str] = field(default_factory=set)

    def backend(self) -> contextlib.AbstractContextManager:
        return by_reference(self.suspects)

    def refused(self, observer: Gathered) -> set[str]:
        """The sinks, emptied, that are to be filled anew from the part that was just passed; none if all is right."""
        new = {key for key in observer.sinks if key not in self._seen}
        if not new:
            return set()
        wrong, _ = look(Gathered({key: observer.sinks[key] for key in new}, passed=observer.passed))
        if wrong and not self.suspects:
            self.suspects = wrong
            observer.passed.wrong.clear()
            for key in new:
                observer.sinks[key].reset()
            return new
        for op in sorted(self.suspects - wrong):
            self.distrust(op)
        self.suspects = set()
        self._seen |= new
        return set()


def look(gathered: Gathered[Statistics]) -> tuple[set[str], bool]:
    """Read from the device in one go what has to be known of statistics: the ops whose results fail their guards, and
    whether all is finite."""
    told = [*gathered.passed.wrong.values()]
    for sink in gathered.sinks.values():
        told += [*sink.wrong.values(), sink.finite()]
    values = torch.stack(told).tolist() if told else []
    flat, finite = iter(values), True
    wrong = {op for op, bad in zip(gathered.passed.wrong, flat) if bad}
    for sink in gathered.sinks.values():
        wrong |= {op for op, bad in zip(sink.wrong, flat) if bad}
        finite &= next(flat)
    return wrong, finite


def rows_of(x: Tensor, batch: int) -> Tensor:
    """Inputs ``[tokens, c]`` of a layer in a pass over ``batch`` sequences."""
    if x.ndim == 3 and len(x) == 1:
        x = x.expand(batch, -1, -1)  # positions that every sequence of the batch reads: a copy for each
    return x.reshape(-1, x.shape[-1])


def observe(
    executor: Executor,
    index: int,
    module: nn.Module,
    refs: list[WeightRef],
    activations: Activations,
    sink: Callable[[int, torch.device], S],
    target: Activations | None = None,
    dense: Activations | None = None,
    review: Review | None = None,
    judge: bool = False,
) -> Observer[S]:
    """Run a block over ``activations`` and return the observer with one filled sink per group.

    The pass ends before the block's last projection unless ``target`` wants the outputs.
    dense: the dense stream of the same sequences. Sinks get its inputs of their group beside their own, but
    for experts, and its outputs take the place of its inputs.
    review: looks at what each part of the pass added to the sinks before the outputs take the place of the inputs.
    judge: the first batch's ops are looked at by their guards, for whoever reads ``passed``.
    """
    observer = Observer(module, refs, sink)

    def both(part: Batch, x: Tensor) -> list[tuple[Activations | None, Tensor | None, Beside]]:
        observer.batch = len(x)
        own = executor.beside([index], activations, part)
        ahead, beyond = None, Beside()
        if dense is not None:
            beyond = executor.beside([index], dense, part)
            ahead = observer.run_dense(lambda: executor.forward(index, module, dense.read(part), beyond))
        out = observer.run(lambda: executor.forward(index, module, x, own), part.length if target is None else None)
        return [(dense, ahead, beyond), (target, out, own)]

    written = False
    try:
        for batch, hidden in executor.stream(activations):
            parts: list[tuple[Batch, Tensor, frozenset[Call]]] = [(batch, hidden, frozenset())]
            while parts:
                part, x, observer.skip = parts.pop(0)
                executor.verdicts = observer.passed if judge and not written else None
                with contextlib.nullcontext() if review is None else review.backend():
                    outs = executor.attempt(functools.partial(both, part, x))
                if outs is NO_ROOM:
                    parts[:0] = _again(executor, index, observer, part, x)
                    continue
                if review is not None and (anew := review.refused(observer)):
                    seen = observer.skip.union(observer.calls)
                    parts = [(p, x, observer.without(skip, anew)) for p, x, skip in [(part, x, seen), *parts]]
                    continue
                written = True
                for stream, out, beside in outs:
                    if stream is not None and out is not None:
                        executor.write(stream, part, out, beside)
        executor.drain()
    finally:
        executor.verdicts = None
        observer.close()
    observer.gather()
    return observer


def _again(
    executor: Executor, index: int, observer: Observer, batch: Batch, hidden: Tensor
) -> list[tuple[Batch, Tensor, frozenset[Call]]]:
    """Halves of a batch that ran out of memory, with the calls whose sinks have seen it."""
    if observer.updating is not None:
        raise ConfigError(
            f"the statistics of {observer.updating} in block {index} do not fit on {executor.device} "
            f"beside a batch of {batch.size} × {batch.length} tokens; set a smaller batch_size, or "
            "device='cpu'"
        )
    seen = observer.skip | set(observer.calls)
    return [(part, x, seen) for part, x in executor.halve(batch, hidden, index)]


def reduce_statistics(world: World, observer: Gathered[Statistics]) -> None:
    """Sum the statistics of all processes' observers; experts that only some processes reached come in too."""
    if world.size == 1:
        return
    known: dict[str, tuple[str, dict]] = {}
    tokens: Counter[str] = Counter()
    for leaders, kinds, counts in world.everyone(
        (
            observer.leader,
            {
                name: {"columns": s.columns, "want_gram": s.want_gram, "want_moments": s.want_moments}
                for name, s in observer.sinks.items()
            },
            {name: s.tokens for name, s in observer.sinks.items()},
        )
    ):
        tokens.update(counts)
        for name, leader in leaders.items():
            known.setdefault(name, (leader, kinds.get(leader, {})))
    device = next(iter(observer.sinks.values())).device if observer.sinks else torch.device("cpu")
    for name, (leader, kind) in known.items():
        observer.leader.setdefault(name, leader)
        if name == leader and name not in observer.sinks:
            observer.sinks[name] = Statistics(device=device, **kind)
    for name in sorted(observer.sinks):
        sink = observer.sinks[name]
        if sink.want_moments:
            # Chan's merge: with the common mean, centred sums of squares add up
            parts = torch.stack([sink.count * sink.mean, sink.count.double().expand_as(sink.mean)])
            world.sum_(parts)
            mean = parts[0] / parts[1].clamp(min=1)
            sink.m2 += sink.count * (sink.mean - mean).square()
            sink.mean = mean
            world.sum_(sink.m2)
        world.sum_(sink.gram, sink.sums, sink.count, sink.cross)
        sink.tokens = tokens[name]


def find_non_finite(
    executor: Executor,
    index: int,
    module: nn.Module,
    refs: list[WeightRef],
    activations: Activations,
    where: Callable[[WeightRef], str],
) -> None:
    """Raise ConfigError naming the first weight whose input holds NaN or infinity, with sequence and token."""
    by_name = {ref.name: ref for ref in refs}
    for batch in activations.batches(1):
        observer = Observer(module, refs, lambda columns, device: Inputs())
        try:
            beside = executor.beside([index], activations, batch)
            observer.run(functools.partial(executor.forward, index, module, activations.read(batch), beside))
        finally:
            observer.close()
        observer.gather()
        for name, sink in observer.sinks.items():
            bad = (~torch.isfinite(sink.x)).nonzero()
            if len(bad):
                token, column = bad[0].tolist()
                sequence = activations.rows[batch.length][batch.start]
                raise ConfigError(
                    f"input of {where(by_name[name])} is {sink.x[token, column].item()} at calibration "
                    f"sequence {sequence}, token {token}, column {column}; the statistics would be "
                    "meaningless: check the checkpoint, or load it in a wider dtype"
                )


def weight_error_sums(x: Tensor, weight: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """``[‖X Wᵀ − X W'ᵀ‖², ‖X Wᵀ‖²]`` on the device, for inputs ``[tokens, c]`` (evenly thinned to ``ERROR_TOKENS``) and
    weights ``[out, c]``, and whether a product failed its guard."""
    x = x[:: max(1, len(x) // ERROR_TOKENS)].float().contiguous()
    sums, wrong = [], torch.zeros((), dtype=torch.bool, device=x.device)
    for factor in (weight.float() - pruned, weight.float()):
        product = ops.linear(x, factor)
        wrong = wrong | guards.product(product, x, factor)
        sums.append(product.square_().sum())
    return torch.stack(sums), wrong


def ratio(lost: float, total: float) -> float:
    """Relative error of two sums of squares; 0 of 0 is 0."""
    return lost / total if total > 0 else (0.0 if lost == 0 else math.inf)
