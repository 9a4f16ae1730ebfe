"""Training of a window of pruned blocks on reconstruction error, masks fixed (paper R, arXiv 2406.15524).

    minimise over θ   mean (T − f_{i+k}( … f_i(x; θ)))²

``x`` are the window's inputs in the pruned stream and ``T`` dense outputs computed once. BR, GP and CR differ only in
what ``T`` is and how many blocks the window holds (``pyprune.refine``). Every floating parameter of a window trains:
kept weights, biases, norms.

The blocks compute in one type throughout, weights included, so nothing is cast per product; float32 masters beside
them take the optimiser's steps. Masked weights start at zero and their gradients are zeroed, so their AdamW moments and
therefore their updates are exactly zero: no masked copy of a weight is ever made.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyprune.autograd import TrainingMode
from pyprune.config import Reconstruction
from pyprune.model import Arguments, call_block
from pyprune.stream import Activations, Executor

Pairs = list[tuple[Activations, Activations]]
"""(window inputs, targets) for one or more lists of sequences."""


class Student:
    """A window of blocks under training: compute copies in ``dtype``, float32 masters, masks as multipliers."""

    def __init__(self, executor: Executor, indices: list[int], blocks: list[nn.Module],
                 masks: list[dict[str, Tensor]], dtype: torch.dtype):
        """masks: per block, parameter path → bool tensor of the parameter's shape, True where kept."""
        self.executor, self.indices, self.dtype = executor, indices, dtype
        self.modules = [_copy(block, executor.device, dtype) for block in blocks]
        self.params: list[nn.Parameter] = []
        self.masters: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        self.buffers: list[Tensor | None] = []
        self._homes: list[nn.Parameter] = []
        on_cpu = executor.device.type == "cpu"
        for block, module, keep in zip(blocks, self.modules, masks):
            for (path, home), param in zip(block.named_parameters(), module.parameters()):
                if not param.is_floating_point():
                    continue
                master = param if dtype == torch.float32 else home.detach().to(param.device, torch.float32, copy=True)
                mask = keep.get(path)
                # a float factor is twice as fast on a CPU; a GPU saves the memory instead
                scale = None if mask is None else mask.to(param.device, torch.float32 if on_cpu else torch.bool)
                with torch.no_grad():
                    if scale is not None:
                        master.mul_(scale)
                    param.copy_(master)
                self.params.append(param.requires_grad_(True))
                self.masters.append(master)
                self.scales.append(scale)
                # the CPU's linear layers add their gradients to float32 buffers, see pyprune.autograd
                self.buffers.append(torch.zeros_like(param, dtype=torch.float32) if on_cpu and param.ndim == 2
                                    else None)
                self._homes.append(home)
        by_weight = {id(p): b for p, b in zip(self.params, self.buffers) if b is not None}
        self._mode = TrainingMode(by_weight) if on_cpu else contextlib.nullcontext()
        self._arguments: dict[tuple[int, int, int], Arguments] = {}

    def arguments(self, index: int, length: int, size: int) -> Arguments:
        found = self.executor.arguments(index, length, size)
        if self.dtype == self.executor.dtype:
            return found
        if (index, length, size) not in self._arguments:
            self._arguments[index, length, size] = found.to(self.executor.device, self.dtype, {})
        return self._arguments[index, length, size]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Output of the window for ``[batch, tokens, hidden]``."""
        hidden = hidden.to(self.executor.device, self.dtype, non_blocking=True)
        for index, module in zip(self.indices, self.modules):
            arguments = self.arguments(index, hidden.shape[1], hidden.shape[0])
            with self._mode:
                hidden = call_block(module, hidden, arguments)
        return hidden

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After a backward pass: add what it left on low-precision parameters to the float32 sums."""
        for param, master, buffer in zip(self.params, self.masters, self.buffers):
            if param.grad is None or (buffer is None and master is param):
                continue
            if buffer is not None:
                buffer.add_(param.grad)
            elif master.grad is None:
                master.grad = param.grad.to(torch.float32)
            else:
                master.grad.add_(param.grad)
            param.grad = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the collected gradients, take one step, copy the masters to the compute copies."""
        for master, scale, buffer in zip(self.masters, self.scales, self.buffers):
            if buffer is not None:
                master.grad = buffer
            elif master.grad is None:  # an expert that no token of this batch reached
                master.grad = torch.zeros_like(master)
            self.executor.world.sum_(master.grad)
            if scale is not None:
                master.grad.mul_(scale)
        optimizer.step()
        self.publish()
        for master, buffer in zip(self.masters, self.buffers):
            master.grad = None
            if buffer is not None:
                buffer.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the compute copies, after an optimiser step."""
        if self.dtype != torch.float32:
            torch._foreach_copy_(self.params, self.masters)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def restore(self, values: list[Tensor] | None = None) -> None:
        """Back to a snapshot, or to the model's own blocks as they were."""
        if values is not None:
            torch._foreach_copy_([m.data for m in self.masters], values)
        else:
            for home, master, scale in zip(self._homes, self.masters, self.scales):
                master.copy_(home)
                if scale is not None:
                    master.mul_(scale)
        self.publish()

    @torch.no_grad()
    def commit(self) -> None:
        """Write the masters to the model's own blocks, in their type; masked weights stay exact zeros."""
        for home, master in zip(self._homes, self.masters):
            home.copy_(master)


def _copy(block: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    module = copy.deepcopy(block).to(device, dtype).eval()
    for part in module.modules():
        part.__dict__.pop("forward", None)  # an executor's replacement for passes without gradients
    return module


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
        batches += [items[k:k + batch_size] for k in range(0, whole, batch_size)]
        rest += items[whole:]
    batches += [rest[k:k + batch_size] for k in range(0, len(rest), batch_size)]
    return [_grouped(batches[k]) for k in torch.randperm(len(batches), generator=generator).tolist()]


def _grouped(items: list[tuple]) -> list[tuple]:
    groups: dict[tuple[int, int], list[int]] = {}
    for stream, length, row in items:
        groups.setdefault((stream, length), []).append(row)
    return [(stream, length, rows) for (stream, length), rows in groups.items()]


def _micro_batches(pairs: Pairs, batch: list[tuple], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of one optimiser step on the host, ``size`` sequences of one length at a time."""
    by_length: dict[int, list[tuple]] = {}
    for stream, length, rows in batch:
        by_length.setdefault(length, []).append((stream, rows))
    for length, parts in by_length.items():
        x, target = (torch.cat([pairs[s][k].data[length][rows] for s, rows in parts]) for k in (0, 1))
        yield from zip(x.split(size), target.split(size))


def _prefetch(batches: Iterator, device: torch.device) -> Iterator:
    """The same micro-batches on ``device``, each copied while its predecessor is computed with."""
    if device.type != "cuda":
        yield from batches
        return
    stream, ready = torch.cuda.Stream(device), None
    for x, target, *rest in batches:
        with torch.cuda.stream(stream):
            copied = [t if t is None else t.pin_memory().to(device, non_blocking=True) for t in (x, target)]
        event = stream.record_event()
        if ready is not None:
            yield ready
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for t in copied:
            if t is not None:
                t.record_stream(current)
        ready = (*copied, *rest)
    if ready is not None:
        yield ready


def _epoch(pairs: Pairs, settings: Reconstruction, generator: torch.Generator) -> Iterator[tuple]:
    """``(x, target, share, last)`` of every micro-batch: its part of the step's tokens, whether it ends the step."""
    micro = settings.micro_batch_size or settings.batch_size
    for batch in schedule([x for x, _ in pairs], settings.batch_size, generator):
        tokens = sum(length * len(rows) for _, length, rows in batch)
        parts = list(_micro_batches(pairs, _own(pairs, batch), micro)) or [(None, None)]
        for k, (x, target) in enumerate(parts):
            yield x, target, 0 if x is None else x.shape[0] * x.shape[1] / tokens, k == len(parts) - 1


def _own(pairs: Pairs, batch: list[tuple]) -> list[tuple]:
    """The rows of a batch that this process holds, by their places here."""
    found = []
    for s, length, rows in batch:
        first, here = pairs[s][0].span[length][1], len(pairs[s][0].rows.get(length, ()))
        if own := [row - first for row in rows if first <= row < first + here]:
            found.append((s, length, own))
    return found


def steps_of(pairs: Pairs, settings: Reconstruction) -> int:
    """Optimiser steps that :func:`train` takes."""
    generator = torch.Generator()
    return settings.epochs * len(schedule([x for x, _ in pairs], settings.batch_size, generator))


def train(student: Student, pairs: Pairs, settings: Reconstruction, *, seed: int = 0,
          held_out: Pairs | None = None) -> Trace:
    """Minimise the mean squared error of the window's outputs; the student's masters hold the result.

    AdamW, linear decay to zero, ``settings.epochs`` passes in seeded random order. With ``held_out`` pairs the relative
    held-out error is measured before training and after each epoch; ``settings.select == "validation"`` keeps the state
    where it was lowest, ``settings.early_stop`` ends when an epoch did not lower it. A loss that is not finite ends the
    training and restores the state before it, said in the trace.
    """
    started = time.perf_counter()
    trace = Trace(list(student.indices))
    total = steps_of(pairs, settings)
    if total == 0:
        return trace
    device = student.executor.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + student.indices[0] * 1009 + len(student.indices))
    optimizer = torch.optim.AdamW(student.masters, lr=settings.lr, betas=settings.betas,
                                  weight_decay=settings.weight_decay, fused=True)
    watch = held_out if settings.select == "validation" or settings.early_stop else None
    best = None
    if watch:
        trace.held_out.append(relative_error(student, watch))
        trace.kept = 0
    step = 0
    for _ in range(settings.epochs):
        loss_sum = torch.zeros((), device=device)
        batches = 0
        for x, target, share, last in _prefetch(_epoch(pairs, settings, generator), device):
            if x is not None:  # else the step's sequences are with other processes
                with torch.enable_grad():
                    out = student(x)
                    loss = (out.float() - target.float()).square().mean() * share
                    loss.backward()
                loss_sum += loss.detach()  # a number only once an epoch: no synchronisation per step
                student.collect_gradients()
            if last:
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * (1 - step / total)
                student.step(optimizer)
                step += 1
                batches += 1
        student.executor.world.sum_(loss_sum)
        trace.loss.append(loss_sum.item() / batches)
        if not math.isfinite(trace.loss[-1]):
            student.restore()
            trace.diverged, trace.kept = True, 0 if watch else None
            break
        if watch:
            trace.held_out.append(relative_error(student, watch))
            if trace.held_out[-1] < trace.held_out[trace.kept]:
                trace.kept = len(trace.held_out) - 1
                best = student.snapshot() if settings.select == "validation" else best
            elif settings.early_stop:
                break
    if settings.select == "validation" and watch and trace.kept != len(trace.held_out) - 1:
        student.restore(best)
    if settings.select != "validation":
        trace.kept = None if not trace.diverged else trace.kept
    trace.steps, trace.seconds = step, time.perf_counter() - started
    return trace


@torch.no_grad()
def relative_error(student: Student, pairs: Pairs) -> float:
    """``‖T − f(x)‖² / ‖T‖²`` over all pairs."""
    lost = total = 0.0
    for inputs, targets in pairs:
        for batch in inputs.batches(student.executor.batch_size):
            target = targets.read(batch).to(student.executor.device).float()
            out = student(inputs.read(batch)).float()
            lost += (target - out).square().sum().item()
            total += target.square().sum().item()
    return lost / total if total else 0.0
