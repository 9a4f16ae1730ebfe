"""Streaming statistics of the inputs of a block's linear layers.

Layers that read the same tensor (q/k/v, gate/up) share one accumulator: the group is discovered from the identity of
the input in the forward pass. Every accumulator carries its own token count and accumulates in float32 or better.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune import ops
from pyprune.config import ConfigError
from pyprune.model import WeightRef, _Stop
from pyprune.stream import NO_ROOM, Activations, Batch, Executor

AGAIN = "#"
"""Ends the name of a layer's second call in a pass (DeBERTa's query and key also read the relative positions)."""
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
    """Charges the updates to a phase of their own."""
    gram: Tensor | None = None
    """float32 ``[c, c]``, ``XᵀX``."""
    sums: Tensor | None = None
    """float32 ``[c]``, ``Σx``."""
    count: Tensor = field(init=False)
    """int64 scalar: tokens seen."""
    mean: Tensor | None = None
    m2: Tensor | None = None
    """Centred sum of squares, float64 ``[c]``, merged by Chan's formula."""
    cross: Tensor | None = None
    """float32 ``[c, c]``, ``X̄ᵀX`` with the dense stream's inputs X̄, where the layer-wise target is dense (GP)."""

    def __post_init__(self):
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.want_gram:
            self.gram = torch.zeros(self.columns, self.columns, device=self.device)
            self.sums = torch.zeros(self.columns, device=self.device)
        if self.want_moments:
            self.mean = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
            self.m2 = torch.zeros(self.columns, dtype=torch.float64, device=self.device)

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add tokens ``x [tokens, c]``; ``dense`` are the same tokens in the dense stream."""
        with self.clock("statistics"):
            self._update(x)
            if dense is not None:
                if self.cross is None:
                    self.cross = torch.zeros_like(self.gram)
                ops.cross_gram_update(self.cross, dense, x)

    def _update(self, x: Tensor) -> None:
        if self.want_moments:
            count, mean, m2 = ops.column_moments(x)
            total = (self.count + count).clamp(min=1).double()
            delta = mean.double() - self.mean
            self.m2 += m2.double() + delta.square() * (self.count * count / total)
            self.mean += delta * (count / total)
        if self.want_gram:
            ops.gram_update(self.gram, x, sums=self.sums, count=self.count, precision=self.precision)
        else:
            self.count += x.shape[0]

    def plus(self, other: Statistics) -> Statistics:
        """Statistics of both inputs together."""
        both = copy.copy(self)
        both.count = self.count + other.count
        for name in ("gram", "sums", "cross"):
            if getattr(self, name) is not None:
                setattr(both, name, getattr(self, name) + getattr(other, name))
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

    @property
    def tokens(self) -> int:
        return int(self.count)

    def finite(self) -> bool:
        values = self.m2 if self.gram is None else self.gram.diagonal()
        return bool(torch.isfinite(values).all())


class Inputs:
    """Keeps a group's inputs themselves: for measuring errors on a few probe sequences."""

    def __init__(self):
        self.chunks: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.chunks.append(x.clone() if x.is_cuda else x)  # on a GPU it may lie in a buffer of the ring

    def plus(self, other: Inputs) -> Inputs:
        """Both inputs together."""
        both = Inputs()
        both.chunks = self.chunks + other.chunks
        return both

    @property
    def x(self) -> Tensor:
        return torch.cat(self.chunks)


class Observer:
    """Feeds the inputs of a block's weights to one sink a group while the block runs."""

    def __init__(self, module: nn.Module, refs: list[WeightRef], sink: Callable[[int, torch.device], object]):
        self.sinks: dict[str, object] = {}
        self.leader: dict[str, str] = {}
        self.last: str | None = None
        self._order: list[str] = []
        self._recent: list[tuple[str, Tensor]] = []
        self.skip: frozenset[str] = frozenset()
        """Names whose sinks have this batch already (it ran out of memory behind them and comes again in halves)."""
        self.updating: str | None = None
        self.batch = 1
        """Sequences of the batch at hand."""
        self.holding = False
        """The pass is the dense stream's: its inputs are held for the cross Gram, none is counted."""
        self.held: dict[str, Tensor] = {}
        self._end: str | None = None
        self._plain = {ref.name for ref in refs if ref.expert is None}
        self._make = sink
        self._handles = []
        modules = dict(module.named_modules())
        self._experts: dict[int, tuple[Tensor, dict[int, str]]] = {}
        for ref in refs:
            if ref.expert is None:
                hook = _hook(self, ref.name)
                self._handles.append(modules[ref.module_path].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                parameter = ref.parameter(module)
                self._experts.setdefault(parameter.data_ptr(), (parameter, {}))[1][ref.expert] = ref.name
        if self._experts:
            # entered by the block itself, hence inside whatever modes the pass runs under: the innermost sees a product
            # first, and one of those outside may well not pass it on
            mode = _ExpertMode(self)
            self._handles += [
                module.register_forward_pre_hook(lambda *_: mode.__enter__() and None, prepend=True),
                module.register_forward_hook(lambda *_: mode.__exit__(None, None, None), always_call=True)]

    def see(self, name: str, x: Tensor) -> None:
        if self.holding and name not in self._plain:
            return  # the two streams send different tokens to an expert
        while name in self._order:
            name += AGAIN
        if name not in self.leader:
            same = [leader for leader, seen in self._recent if seen is x]
            self.leader[name] = same[0] if same else name
            if not same:
                self.sinks[name] = self._make(x.shape[-1], x.device)
        if self.leader[name] == name:
            self._recent.append((name, x))
            if x.ndim == 3 and len(x) == 1:
                x = x.expand(self.batch, -1, -1)  # positions that every sequence of the batch reads: a copy for each
            rows = x.reshape(-1, x.shape[-1])
            if self.holding:
                self.held[name] = rows
            elif name not in self.skip:
                self.updating = name
                self.sinks[name].update(rows, *([self.held[name]] if name in self.held else []))
                self.updating = None
        self._order.append(name)
        if name == self.last:
            raise _Stop

    def run(self, forward: Callable[[], Tensor], stop_early: bool) -> Tensor | None:
        """One forward pass under observation; with ``stop_early`` it ends before the last observed product (from the
        second pass on, when the order is known) and returns None."""
        self._recent, self._order = [], []
        self.last = self._end if stop_early else None
        try:
            with torch.no_grad():
                out = forward()
        except _Stop:
            return None
        if not self._experts and self._order:
            self._end = self._order[-1]
        return out

    def run_dense(self, forward: Callable[[], Tensor]) -> Tensor:
        """The dense stream's pass over a batch, before the batch itself."""
        self.held, self.holding = {}, True
        try:
            return self.run(forward, stop_early=False)
        finally:
            self.holding, self._order = False, []  # nothing was counted

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def gather(self) -> None:
        """Give layers that a pass calls several times one sink of all that they read."""
        if not any(name.endswith(AGAIN) for name in self.leader):
            return
        groups: dict[tuple[str, ...], str] = {}
        sinks, leader = {}, {}
        for name in [name for name in self.leader if not name.endswith(AGAIN)]:
            calls = [name]
            while calls[-1] + AGAIN in self.leader:
                calls.append(calls[-1] + AGAIN)
            parts = tuple(self.leader[call] for call in calls)
            leader[name] = groups.setdefault(parts, name)
            if leader[name] == name:
                first, *rest = (self.sinks[part] for part in parts)
                sinks[name] = functools.reduce(lambda one, other: one.plus(other), rest, first)
        self.sinks, self.leader = sinks, leader


def _hook(observer: Observer, name: str):
    def hook(module, args, kwargs):
        observer.see(name, args[0] if args else kwargs["input"])
    return hook


class _ExpertMode(TorchFunctionMode):
    """Sees ``F.linear(x, experts[e])``: the weight is a slice of a 3-D parameter, so its address tells the expert."""

    def __init__(self, observer: Observer):
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            for start, (parameter, names) in self.observer._experts.items():
                stride = parameter.stride(0) * parameter.element_size()
                expert, rest = divmod(weight.data_ptr() - start, stride)
                if rest == 0 and expert in names and weight.shape == parameter.shape[1:]:
                    self.observer.see(names[expert], x)
        return func(*args, **(kwargs or {}))


def observe(executor: Executor, index: int, module: nn.Module, refs: list[WeightRef], activations: Activations,
            sink: Callable[[int, torch.device], object], target: Activations | None = None,
            dense: Activations | None = None) -> Observer:
    """Run a block over ``activations`` and return the observer with one filled sink a group.

    The pass ends before the block's last projection unless ``target`` wants the outputs.
    dense: the dense stream of the same sequences. Sinks get its inputs of their group beside their own, but
    for experts, and its outputs take the place of its inputs.
    """
    observer = Observer(module, refs, sink)

    def both(part: Batch, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        observer.batch = len(x)
        ahead = None if dense is None else observer.run_dense(
            lambda: executor.forward(index, module, dense.read(part)))
        return ahead, observer.run(lambda: executor.forward(index, module, x), stop_early=target is None)

    try:
        for batch, hidden in executor.stream(activations):
            parts = [(batch, hidden, frozenset())]
            while parts:
                part, x, observer.skip = parts.pop(0)
                outs = executor.attempt(functools.partial(both, part, x))
                if outs is NO_ROOM:
                    parts[:0] = _again(executor, index, observer, part, x)
                    continue
                for stream, out in ((dense, outs[0]), (target, outs[1])):
                    if stream is not None:
                        executor.write(stream, part, out)
        executor.drain()
    finally:
        observer.close()
    observer.gather()
    return observer


def _again(executor: Executor, index: int, observer: Observer, batch: Batch, hidden: Tensor) -> list[tuple]:
    """Halves of a batch that ran out of memory, with the names whose sinks have seen it."""
    if observer.updating is not None:
        raise ConfigError(f"the statistics of {observer.updating} in block {index} do not fit on {executor.device} "
                          f"beside a batch of {batch.size} × {batch.length} tokens; set a smaller batch_size, or "
                          "device='cpu'")
    seen = observer.skip | set(observer._order)
    return [(part, x, seen) for part, x in executor.halve(batch, hidden, index)]


def find_non_finite(executor: Executor, index: int, module: nn.Module, refs: list[WeightRef], activations: Activations,
                    where: Callable[[WeightRef], str]) -> None:
    """Raise ConfigError naming the first weight whose input holds NaN or infinity, with sequence and token."""
    by_name = {ref.name: ref for ref in refs}
    for batch in activations.batches(1):
        observer = Observer(module, refs, lambda columns, device: Inputs())
        try:
            observer.run(functools.partial(executor.forward, index, module, activations.read(batch)), stop_early=False)
        finally:
            observer.close()
        observer.gather()
        for name, sink in observer.sinks.items():
            bad = (~torch.isfinite(sink.x)).nonzero()
            if len(bad):
                token, column = bad[0].tolist()
                sequence = activations.rows[batch.length][batch.start]
                raise ConfigError(f"input of {where(by_name[name])} is {sink.x[token, column].item()} at calibration "
                                  f"sequence {sequence}, token {token}, column {column}; the statistics would be "
                                  "meaningless: check the checkpoint, or load it in a wider dtype")


def error_sums(x: Tensor, weight: Tensor, pruned: Tensor) -> Tensor:
    """``[‖X Wᵀ − X W'ᵀ‖², ‖X Wᵀ‖²]`` on the device, for inputs ``[tokens, c]`` (evenly thinned to ``ERROR_TOKENS``) and
    weights ``[out, c]``."""
    x = x[::max(1, len(x) // ERROR_TOKENS)].float().contiguous()
    weight = weight.float()
    lost = ops.linear(x, weight - pruned).square_().sum()
    return torch.stack([lost, ops.linear(x, weight).square_().sum()])


def ratio(lost: float, total: float) -> float:
    """Relative error of two sums of squares; 0 of 0 is 0."""
    return lost / total if total > 0 else (0.0 if lost == 0 else math.inf)
