"""Training of a window of pruned blocks on reconstruction error, masks fixed (arXiv 2406.15524).

    minimise over θ   mean (T − f_{i+k}( … f_i(x; θ)))²

``x`` are the window's inputs in the pruned stream and ``T`` dense outputs computed once. BR, GP and CR differ only in
what ``T`` is and how many blocks the window holds (:mod:`pyprune.reconstruction.windows`). Every floating parameter of
a window trains: kept weights, biases, norms.

A step that runs out of device memory is begun again with half as many sequences at a time; their gradients add up to
the same step.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune.config import Reconstruction
from pyprune.execution.executor import NO_ROOM, Activations, Batch, Executor
from pyprune.masks.statistics import ratio
from pyprune.model.arguments import Beside
from pyprune.reconstruction.trained_window import TrainedWindow

Pairs = list[tuple[Activations, Activations]]
"""(window inputs, targets) for one or more lists of sequences."""


@dataclass
class Trace:
    """What one training did."""

    blocks: list[int]
    steps: int = 0
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)
    """Mean squared error over each epoch's batches, as they were met."""
    held_out: list[float] = field(default_factory=list)
    """Relative held-out error before training and after each epoch, where it was measured."""
    kept: int | None = None
    """Index into ``held_out`` of the state that was kept; None: the last."""
    diverged: bool = False
    """A loss or a weight was not finite; what came before it was kept."""
    micro_batch_size: int | None = None
    """Sequences per forward-backward where fewer fitted than the settings say."""


def schedule(activations: list[Activations], batch_size: int, generator: torch.Generator) -> list[list[tuple]]:
    """One epoch in random order: batches of ``(stream, length, rows)``, every sequence once.

    Sequences of equal length go together as far as possible (nothing is padded); what is left over of each length is
    put together in mixed batches.
    """
    pools: dict[int, list[tuple[int, int]]] = {}
    for s, stream in enumerate(activations):
        for length, (count, _) in stream.span.items():  # the same batches whatever process holds their sequences
            pools.setdefault(length, []).extend((s, row) for row in range(count))
    batches, rest = [], []
    for length, pool in sorted(pools.items()):
        order = torch.randperm(len(pool), generator=generator).tolist()
        items = [(pool[k][0], length, pool[k][1]) for k in order]
        whole = len(items) // batch_size * batch_size
        batches += [items[k : k + batch_size] for k in range(0, whole, batch_size)]
        rest += items[whole:]
    batches += [rest[k : k + batch_size] for k in range(0, len(rest), batch_size)]
    return [_grouped(batches[k]) for k in torch.randperm(len(batches), generator=generator).tolist()]


def _grouped(items: list[tuple]) -> list[tuple]:
    groups: dict[tuple[int, int], list[int]] = {}
    for stream, length, row in items:
        groups.setdefault((stream, length), []).append(row)
    return [(stream, length, rows) for (stream, length), rows in groups.items()]


def _micro_batches(pairs: Pairs, batch: list[tuple], size: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """One optimiser step's ``(stream, row)`` of this process, at most ``size`` of one length at a time."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for s, length, rows in batch:
        first, here = pairs[s][0].span[length][1], len(pairs[s][0].rows.get(length, ()))
        if own := [(s, row - first) for row in rows if first <= row < first + here]:
            by_length.setdefault(length, []).extend(own)
    return [(length, items[k : k + size]) for length, items in by_length.items() for k in range(0, len(items), size)]


def _host_batch(streams: list[dict[int, Tensor]], length: int, items: list[tuple[int, int]], pin: bool) -> Tensor:
    """Rows of each stream's tensors by length, ``[items, …]``, copied once."""
    source = streams[items[0][0]][length]
    out = torch.empty(len(items), *source.shape[1:], dtype=source.dtype, pin_memory=pin)
    for s in dict.fromkeys(s for s, _ in items):
        places = [k for k, item in enumerate(items) if item[0] == s]
        rows = torch.tensor([items[k][1] for k in places])
        # the items of a stream lie side by side: a step's rows come stream by stream
        torch.index_select(streams[s][length], 0, rows, out=out[places[0] : places[-1] + 1])
    return out


def _host_beside(
    window: TrainedWindow, inputs: list[Activations], length: int, items: list[tuple[int, int]], pin: bool
) -> Beside:
    """What belongs to the sequences of a micro-batch beside their hidden states."""
    first, beside = inputs[items[0][0]], Beside()
    if first.beside:
        for n in window.executor.view.tokenwise.numbers(window.indices):
            beside.tensors[n] = _host_batch([a.beside.get(n, {}) for a in inputs], length, items, pin)
    for key in first.left:
        beside.left[key] = _host_batch([a.left.get(key, {}) for a in inputs], length, items, pin)
    return beside


def _parts(window: TrainedWindow, pairs: Pairs, batches: list[list[tuple]], size: int, pin: bool) -> Iterator[tuple]:
    """``(x, target, beside, share, last)`` of every micro-batch: its part of the step's tokens, whether it ends the
    step."""
    inputs, targets = ([pair[k] for pair in pairs] for k in (0, 1))
    for batch in batches:
        tokens = sum(length * len(rows) for _, length, rows in batch)
        micro = _micro_batches(pairs, batch, size)
        for k, (length, items) in enumerate(micro):
            x, target = (_host_batch([s.data for s in streams], length, items, pin) for streams in (inputs, targets))
            beside = _host_beside(window, inputs, length, items, pin)
            yield x, target, beside, len(items) * length / tokens, k == len(micro) - 1
        if not micro:  # the step's sequences are with other processes
            yield None, None, Beside(), 0, True


def _prefetch(parts: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """The same micro-batches on ``device``, each copied while its predecessor is computed with."""
    if device.type != "cuda":
        yield from parts
        return
    stream, ready = torch.cuda.Stream(device), None
    for x, target, beside, *rest in parts:
        with torch.cuda.stream(stream):
            copied = [t if t is None else t.to(device, non_blocking=True) for t in (x, target)]
            beside = beside.map(lambda t: t.to(device, non_blocking=True))
        event = stream.record_event()
        if ready is not None:
            yield ready
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for t in (*copied, *beside.tensors.values(), *beside.left.values()):
            if t is not None:
                t.record_stream(current)
        ready = (*copied, beside, *rest)
    if ready is not None:
        yield ready


def _halved(window: TrainedWindow, pairs: Pairs, batch: list[tuple], size: int) -> int:
    """Micro-batch size after a step of ``size`` at a time ran out of memory. Raises ConfigError below one sequence."""
    parts = _micro_batches(pairs, batch, size)
    most = max(len(items) for _, items in parts)
    length = max(length for length, items in parts if len(items) == most)
    if most == 1:
        raise window.too_long(length)
    device = window.executor.device
    window.executor.warn(
        f"training of blocks {window.indices} ran out of memory on {device} with {most} sequences "
        f"of {length} tokens: {most // 2} at a time from there on, the steps are the same; set "
        f"micro_batch_size={most // 2} to begin with that"
    )
    return most // 2


def _epoch(
    window: TrainedWindow,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    batches: list[list[tuple]],
    rates: list[float],
    size: int,
) -> tuple[float, int]:
    """One step per batch at the rate beside it, ``size`` sequences at a time; returns the sum of the losses, read from
    the device at the end only, and the size that fitted."""
    executor = window.executor
    total = torch.zeros((), device=executor.device)
    done, parts = 0, None
    while done < len(batches):
        if parts is None:
            pin = executor.device.type == "cuda"
            parts = _prefetch(_parts(window, pairs, batches[done:], size, pin), executor.device)
        loss = executor.attempt(functools.partial(window.accumulate, parts))
        if loss is NO_ROOM:
            window.forget()
            size, parts = _halved(window, pairs, batches[done], size), None
            continue
        total += loss
        for group in optimizer.param_groups:
            group["lr"] = rates[done]
        with window.fits():
            window.step(optimizer)
        done += 1
    executor.world.sum_(total)
    return total.item(), size


def steps_of(pairs: Pairs, settings: Reconstruction) -> int:
    """Optimiser steps that :func:`train` takes."""
    generator = torch.Generator()
    return settings.epochs * len(schedule([x for x, _ in pairs], settings.batch_size, generator))


def train(
    window: TrainedWindow, pairs: Pairs, settings: Reconstruction, *, seed: int = 0, held_out: Pairs | None = None
) -> Trace:
    """Minimise the mean squared error of the window's outputs; its masters hold the result.

    AdamW, linear decay to zero, ``settings.epochs`` passes in seeded random order. With ``held_out`` pairs the relative
    held-out error is measured before training and after each epoch; ``settings.select == "validation"`` keeps the state
    where it was lowest, ``settings.early_stop`` ends when an epoch did not lower it. A loss or weight that is not
    finite ends the training and, unless an earlier state is kept anyway, undoes it; the trace says so.
    Raises ConfigError where the window, or a single sequence in it, does not fit the device.
    """
    started = time.perf_counter()
    trace = Trace(list(window.indices))
    total = steps_of(pairs, settings)
    if total == 0:
        return trace
    executor = window.executor
    generator = torch.Generator().manual_seed(seed * 1_000_003 + window.indices[0] * 1009 + len(window.indices))
    optimizer = window.optimizer(settings)
    chooses = settings.select == "validation"
    watch = held_out if chooses or settings.early_stop else None
    best = None
    if watch:
        trace.held_out.append(executor.world.same(relative_error(window, watch)))
        trace.kept = 0
    size = settings.micro_batch_size or settings.batch_size
    for _ in range(settings.epochs):
        batches = schedule([x for x, _ in pairs], settings.batch_size, generator)
        rates = [settings.lr * (1 - (trace.steps + k) / total) for k in range(len(batches))]
        loss, size = _epoch(window, optimizer, pairs, batches, rates, size)
        trace.steps += len(batches)
        trace.loss.append(loss / len(batches))
        trace.diverged = not (math.isfinite(loss) and window.finite())
        if trace.diverged:
            break
        if watch:
            trace.held_out.append(executor.world.same(relative_error(window, watch)))
            if trace.kept is None or trace.held_out[-1] < trace.held_out[trace.kept]:
                trace.kept = len(trace.held_out) - 1
                best = window.snapshot() if chooses else best
            elif settings.early_stop:
                break
    if trace.diverged or chooses and watch and trace.kept != len(trace.held_out) - 1:
        window.restore(best)
    if not chooses:
        trace.kept = 0 if trace.diverged and watch else None
    if size < (settings.micro_batch_size or settings.batch_size):
        trace.micro_batch_size = size
    trace.seconds = time.perf_counter() - started
    return trace


@torch.no_grad()
def relative_error(window: TrainedWindow, pairs: Pairs) -> float:
    """``‖T − f(x)‖² / ‖T‖²`` over all pairs."""
    sums = [window_error_sums(window.executor, window.indices, window, *pair) for pair in pairs]
    return ratio(*torch.stack(sums).sum(0).tolist())


@torch.no_grad()
def window_error_sums(
    executor: Executor,
    indices: list[int],
    forward: Callable[[Tensor, Beside], Tensor],
    inputs: Activations,
    targets: Activations,
) -> Tensor:
    """``[‖T − f(x)‖², ‖T‖²]`` of a stream through the blocks of a window, float64, on the device; a batch that does not
    fit is halved."""

    def measured(part: Batch, x: Tensor) -> Tensor:
        out = forward(x, executor.beside(indices, inputs, part)).float()
        target = targets.read(part).to(executor.device, non_blocking=True).float()
        return torch.stack([(target - out).square().sum(), target.square().sum()]).double()

    sums = torch.zeros(2, dtype=torch.float64, device=executor.device)
    for _, found in executor.in_parts(inputs, indices[0], measured):
        sums += found
    return sums
