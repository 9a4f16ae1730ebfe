"""One block's statistics, its keep masks, and its weights after the layer-wise step."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.config import ConfigError, PruneConfig
from pyprune.effects import needs_factor, needs_sequences
from pyprune.execution.executor import Activations
from pyprune.execution.run import Findings, Run
from pyprune.execution.trust import by_reference, distrust
from pyprune.masks.solvers import inverse_factor, recordable, solve
from pyprune.masks.statistics import (
    Gathered,
    Inputs,
    Observer,
    Review,
    Statistics,
    find_non_finite,
    look,
    observe,
    ratio,
    reduce_statistics,
    weight_error_sums,
)
from pyprune.model.blocks import WeightRef

ERRORS = ("error", "error_sweep", "error_held_out", "error_held_out_sweep")
"""Relative errors in a weight's row of the report: of the weights it ended with, and of the sweep's before a refit, on
calibration and on held-out inputs."""


def gather(
    run: Run,
    found: Findings,
    index: int,
    module: nn.Module,
    refs: list[WeightRef],
    fit: Activations,
    target: Activations | None = None,
    dense: Activations | None = None,
) -> Observer[Statistics]:
    """Statistics pass over one block; finite or a ConfigError that names weight, sequence and token.

    target: takes the block's outputs, which the pass otherwise does not finish (with dense inputs, ``fit`` itself).
    dense: the dense stream, for the cross Gram of GP; it moves on to the block's outputs.
    """
    target = fit if run.config.inputs == "dense" else target
    once = target is fit or dense is not None  # the pass takes the place of its own inputs
    sink = sink_of(run, found)
    review = Review(functools.partial(distrust, found.warn, run.executor.device, index)) if once else None

    def watched() -> Observer[Statistics]:
        return observe(
            run.executor, index, module, refs, fit, sink, dense=dense, target=target, review=review, judge=True
        )

    observer = watched()
    wrong, finite = look(observer)
    if not once and wrong:
        with by_reference(wrong):
            observer = watched()
        still, finite = look(observer)
        for op in () if still else wrong:
            distrust(found.warn, run.executor.device, index, op)
    if run.world.size > 1:
        reduce_statistics(run.world, observer)
        _, finite = look(observer)
    if not finite:
        refuse_non_finite(run, index, module, refs, fit)
    return observer


def sink_of(run: Run, found: Findings) -> Callable[[int, torch.device], Statistics]:
    """Makes what a run gathers of each group's inputs, from their number of columns and device."""
    gram = needs_factor(run.config)
    return functools.partial(
        Statistics,
        want_gram=gram,
        want_moments=run.config.method == "wanda" and not gram,
        precision="bfloat16" if run.executor.dtype == torch.bfloat16 else "float32",
        clock=found.clock,
    )


def refuse_non_finite(run: Run, index: int, module: nn.Module, refs: list[WeightRef], fit: Activations) -> NoReturn:
    """Raise the ConfigError that says where statistics which are not finite came from."""
    find_non_finite(run.executor, index, module, refs, fit, lambda ref: run.view.name(index, ref))
    raise ConfigError(
        f"the statistics of block {index} are not finite"
        + (
            f" (process {run.world.rank} of {run.world.size} holds none of the sequences at fault; see the others' "
            "messages)"
            if run.world.size > 1
            else ": the inputs overflow float32 when squared"
        )
    )


def prune_block(
    run: Run,
    found: Findings,
    index: int,
    module: nn.Module,
    observer: Gathered[Statistics] | None,
    inputs: Sequence[Gathered[Inputs]],
) -> dict[WeightRef, Tensor]:
    """Solve the selected weights of a block; each input group is factored once. Writes block and compute copy, and
    returns the keep masks."""
    executor = run.executor
    share = Share.of(run, index, run.selected[index], observer)
    own = _solve(run, found, index, share.mine, observer, inputs, module)
    told = own.read()
    if told.unfactored:
        own = _solve(run, found, index, share.mine, observer, inputs, module, look=True)
        told = own.read()
    if told.wrong:
        with ops.backend("reference"):
            own = _solve(run, found, index, share.mine, observer, inputs, module, look=True)
        still = own.read().wrong
        for op in () if still else told.wrong:
            distrust(found.warn, executor.device, index, op)
    ops.raise_faults(executor.device)
    masks = write(run, index, module, own, share)
    if any(ref.view(run.view.blocks[index]).device != executor.device for ref in own.solved):
        executor.drain()
    report(run, found, index, own)
    return masks


def prune_group(
    run: Run,
    found: Findings,
    index: int,
    module: nn.Module,
    refs: Sequence[WeightRef],
    gathered: Gathered[Statistics],
    inputs: Sequence[Gathered[Inputs]],
    look: bool,
) -> tuple[Own, dict[WeightRef, Tensor]]:
    """The same for weights that read one input, in a block that is pruned group by group: processes share them out one
    by one, and nothing is read from the device. Returns what is still to be read, and the keep masks; the weights in
    host memory are there after ``executor.drain()``. look: of :func:`_solve`."""
    share = Share.of(run, index, refs, gathered, apart=True)
    own = _solve(run, found, index, share.mine, gathered, inputs, module, look)
    return own, write(run, index, module, own, share)


def report(run: Run, found: Findings, index: int, own: Own) -> None:
    """Put the rows of a block's weights, and what was found on the way, into the report of every process."""
    rows = {row["name"]: row for part in run.world.everyone(own.rows) for row in part}
    found.weights += [rows[run.view.name(index, ref)] for ref in run.selected[index]]
    found.share_warnings(run.world)


@dataclass(frozen=True, eq=False)
class Share:
    """Which process solves what."""

    owners: list[int]
    pieces: list[list[WeightRef]]
    """By owner."""
    mine: dict[str | None, list[WeightRef]]
    """By leader, what this process solves."""

    @staticmethod
    def of(
        run: Run, index: int, refs: Sequence[WeightRef], gathered: Gathered[Statistics] | None, apart: bool = False
    ) -> Share:
        """apart: weights that read one input need not go to one process."""
        groups: dict[str | None, list[WeightRef]] = {}
        for ref in refs:
            groups.setdefault(gathered.leader.get(ref.name) if gathered else None, []).append(ref)
        pieces = list(groups.items())
        if apart:
            pieces = [(leader, [ref]) for leader, members in pieces for ref in members]
        owners = run.world.deal([solve_cost(run.view.blocks[index], members) for _, members in pieces])
        mine: dict[str | None, list[WeightRef]] = {}
        for owner, (leader, members) in zip(owners, pieces):
            if owner == run.world.rank:
                mine.setdefault(leader, []).extend(members)
        return Share(owners, [members for _, members in pieces], mine)


def write(run: Run, index: int, module: nn.Module, own: Own, share: Share) -> dict[WeightRef, Tensor]:
    """Give block and compute copy, in every process, the weights that were solved; returns the keep masks."""
    block = run.view.blocks[index]
    masks: dict[WeightRef, Tensor] = {}
    for ref, (weight, mask) in own.solved.items():
        run.executor.put(ref.view(block), weight)
        if module is not block:
            ref.view(module).copy_(weight)
        masks[ref] = mask
    if run.world.size > 1:
        run.executor.drain()
        exchange_solved(run, module, block, share.owners, share.pieces, masks)
    return masks


@dataclass(frozen=True)
class Told:
    """What was read of a block from the device."""

    wrong: set[str]
    """Ops whose results failed their guards."""
    unfactored: bool
    """A factorisation failed that was not looked at: nothing of the block holds."""
    finite: list[bool]


@dataclass(eq=False)
class Own:
    """What this process solved of a block."""

    solved: dict[WeightRef, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Weight and keep mask."""
    rows: list[dict] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    """Per row the non-zeros and the two sums of each of its errors; on the device."""
    wrong: list[tuple[str, Tensor]] = field(default_factory=list)
    """Op, and whether its guard found it wrong; on the device."""
    failed: list[Tensor] = field(default_factory=list)
    """Whether a factorisation that was not looked at failed; on the device."""
    finite: list[Tensor] = field(default_factory=list)
    """Whether statistics are finite that were not looked at; on the device."""

    def take(self, other: Own) -> None:
        """Add what was solved of another group."""
        self.solved |= other.solved
        self.rows += other.rows
        self.sums += other.sums
        self.wrong += other.wrong
        self.failed += other.failed

    def read(self) -> Told:
        """Read all of it from the device in one go, and fill the rows."""
        told = [*self.sums, *(bad for _, bad in self.wrong), *self.failed, *self.finite]
        values = torch.cat([t.double().reshape(-1) for t in told]).tolist() if told else []
        flat = iter(values)
        for row in self.rows:
            row["sparsity"] = 1 - int(next(flat)) / math.prod(row["shape"])
            for key in ERRORS:
                if key in row:
                    row[key] = ratio(next(flat), next(flat))
        wrong = {op for op, _ in self.wrong if next(flat)}
        unfactored = sum(next(flat) for _ in self.failed) > 0
        return Told(wrong, unfactored, [bool(value) for value in flat])


def _solve(
    run: Run,
    found: Findings,
    index: int,
    groups: dict[str | None, list[WeightRef]],
    observer: Gathered[Statistics] | None,
    inputs: Sequence[Gathered[Inputs]],
    module: nn.Module,
    look: bool = False,
) -> Own:
    """Solve groups of weights; block and ``module`` stay as they are. look: ask of each factorisation whether it
    succeeded, and do what is to be done where it did not; otherwise :meth:`Own.read` tells."""
    config, block, own = run.config, run.view.blocks[index], Own()
    replays = run.executor.replays if recordable(run.executor.replays) else None
    for leader, refs in groups.items():
        statistics = observer.sinks[leader] if observer and leader else None
        group_config = config
        if statistics is None and needs_sequences(config):
            # an expert that no token reached has no statistics: magnitude is all there is, and it is said
            group_config = copy.copy(config)  # not replace(): its other fields need have no effect here
            group_config.method, group_config.reconstruct = "magnitude", "none"
            for ref in refs:
                found.warn(f"{run.view.name(index, ref)} saw no calibration token: pruned by magnitude")
        factor = None
        if statistics is not None and needs_factor(group_config):
            name = run.view.name(index, refs[0])
            factor = inverse_factor(statistics.gram, statistics.count, config.damping, name, look=look)
            own.failed += [] if factor.failed is None else [factor.failed]
            if factor.damping != config.damping:
                found.warn(f"{name}: damping raised to {factor.damping:g} for the factorisation to succeed")
        dense = [dense_weight(run, block, module, ref) for ref in refs]
        if refs[0].expert is not None and statistics is not None and statistics.tokens < dense[0].shape[1]:
            for ref in refs:
                found.warn(
                    f"{run.view.name(index, ref)} saw {statistics.tokens} calibration tokens, fewer than "
                    f"its {dense[0].shape[1]} inputs: what is chosen there rests on too little data"
                )
        configs = [with_sparsity(group_config, run, index, ref) for ref in refs]
        for ref, before, solved in zip(refs, dense, solve(dense, configs, statistics, factor, replays)):
            row = {
                "name": run.view.name(index, ref),
                "block": index,
                "shape": list(before.shape),
                "damping": solved.damping,
                **asked_in(run, index, ref),
            }
            results = {"": solved.weight} if solved.swept is None else {"": solved.weight, "_sweep": solved.swept}
            errors = {
                key + step: weight_error_sums(probe.sinks[probe.leader[ref.name]].x, before, result)
                for probe, key in zip(inputs, ("error", "error_held_out"))
                if ref.name in probe.leader
                for step, result in results.items()
            }
            if solved.refit and not solved.refit.converged:
                found.warn(
                    f"{row['name']}: the refit was stopped after {solved.refit.steps} steps, before its tolerance"
                )
            written = solved.weight.to(ref.view(block).dtype, copy=replays is not None)
            own.solved[ref] = written, solved.mask
            own.sums += [torch.count_nonzero(written.bool()), *(sums for sums, _ in errors.values())]
            own.rows.append(row | dict.fromkeys(errors))
            own.wrong += [*solved.wrong.items(), *(("linear", bad) for _, bad in errors.values())]
    return own


def dense_weight(run: Run, block: nn.Module, module: nn.Module, ref: WeightRef) -> Tensor:
    """A weight as it is before it is pruned, where blocks are computed."""
    weight, copy_of = ref.view(block), ref.view(module)
    if copy_of.device == run.executor.device and copy_of.dtype == weight.dtype:
        weight = copy_of  # the same, and there already
    return weight.to(run.executor.device)


def with_sparsity(config: PruneConfig, run: Run, index: int, ref: WeightRef) -> PruneConfig:
    """The configuration of a weight that has a sparsity of its own; any other as it is."""
    if run.rules is None:
        return config
    own = copy.copy(config)
    own.sparsity = run.sparsity_of(index, ref)
    return own


def asked_in(run: Run, index: int, ref: WeightRef) -> dict[str, float | str]:
    """What a weight's row says of a sparsity that it has by name: how much was asked for, and by which key."""
    if run.rules is None:
        return {}
    return {"asked": run.sparsity_of(index, ref), "asked_by": run.rules[index][ref]}


def solve_cost(block: nn.Module, refs: list[WeightRef]) -> float:
    """FLOPs of one group: a factorisation and inverse of its Gram, and a sweep of each of its matrices."""
    columns = refs[0].view(block).shape[1]
    return columns**3 + sum(ref.view(block).shape[0] * columns**2 for ref in refs)


def exchange_solved(
    run: Run,
    module: nn.Module,
    block: nn.Module,
    owners: list[int],
    groups: list[list[WeightRef]],
    masks: dict[WeightRef, Tensor],
) -> None:
    """Give every process the weights and masks that others solved."""
    for owner, refs in zip(owners, groups):
        for ref in refs:
            weight = ref.view(block)
            mask = masks.setdefault(ref, torch.empty(weight.shape, dtype=torch.bool, device=run.executor.device))
            run.world.send_(weight, owner)
            run.world.send_(mask, owner)
            if module is not block:
                ref.view(module).copy_(weight)
