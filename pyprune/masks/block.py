"""One block's statistics, its keep masks, and its weights after the layer-wise step."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.config import ConfigError
from pyprune.effects import needs_factor, needs_sequences
from pyprune.execution.executor import Activations
from pyprune.execution.run import Clock, Findings, Run
from pyprune.masks.solvers import inverse_factor, solve
from pyprune.masks.statistics import (
    Gathered,
    Inputs,
    Observer,
    Statistics,
    find_non_finite,
    observe,
    ratio,
    reduce_statistics,
    weight_error_sums,
)
from pyprune.model.blocks import WeightRef

ERRORS = ("error", "error_sweep", "error_held_out", "error_held_out_sweep")
"""Relative errors in a weight's row of the report: of the weights it ended with, and of the sweep's before a refit, on
calibration and on held-out inputs."""


def gather(run: Run, clock: Clock, index: int, module: nn.Module, refs: list[WeightRef], fit: Activations,
           target: Activations | None = None, dense: Activations | None = None) -> Observer[Statistics]:
    """Statistics pass over one block; finite or a ConfigError that names weight, sequence and token.

    target: takes the block's outputs, which the pass otherwise does not finish (with dense inputs, ``fit`` itself).
    dense: the dense stream, for the cross Gram of GP; it moves on to the block's outputs.
    """
    observer = observe(run.executor, index, module, refs, fit, sink_of(run, clock), dense=dense,
                       target=fit if run.config.inputs == "dense" else target)
    reduce_statistics(run.world, observer)
    if not all(s.finite() for s in observer.sinks.values()):
        refuse_non_finite(run, index, module, refs, fit)
    return observer


def sink_of(run: Run, clock: Clock) -> Callable[[int, torch.device], Statistics]:
    """Makes what a run gathers of each group's inputs, from their number of columns and device."""
    gram = needs_factor(run.config)
    return functools.partial(Statistics, want_gram=gram, want_moments=run.config.method == "wanda" and not gram,
                             precision="bfloat16" if run.executor.dtype == torch.bfloat16 else "float32", clock=clock)


def refuse_non_finite(run: Run, index: int, module: nn.Module, refs: list[WeightRef], fit: Activations) -> NoReturn:
    """Raise the ConfigError that says where statistics which are not finite came from."""
    find_non_finite(run.executor, index, module, refs, fit, lambda ref: run.view.name(index, ref))
    raise ConfigError(f"the statistics of block {index} are not finite" + (
        f" (process {run.world.rank} of {run.world.size} holds none of the sequences at fault; see the others' "
        "messages)" if run.world.size > 1 else ": the inputs overflow float32 when squared"))


def prune_block(run: Run, found: Findings, index: int, module: nn.Module, observer: Gathered[Statistics] | None,
                inputs: Sequence[Gathered[Inputs]],
                only: Sequence[WeightRef] | None = None) -> dict[WeightRef, Tensor]:
    """Solve the selected weights of a block; each input group is factored once. Writes block and compute copy, and
    returns the keep masks.

    only: the weights of one group, in a block that is pruned group by group; processes share them out one by one.
    """
    config, block = run.config, run.view.blocks[index]
    masks: dict[WeightRef, Tensor] = {}
    selected = run.selected[index] if only is None else only
    groups: dict[str | None, list[WeightRef]] = {}
    for ref in selected:
        groups.setdefault(observer.leader.get(ref.name) if observer else None, []).append(ref)
    pieces = list(groups.items())
    if only is not None:
        pieces = [(leader, [ref]) for leader, refs in pieces for ref in refs]
    owners = run.world.deal([solve_cost(block, refs) for _, refs in pieces])
    own: list[dict] = []
    sums: list[Tensor] = []
    factor, factored = None, None
    for owner, (leader, refs) in zip(owners, pieces):
        if owner != run.world.rank:
            continue
        statistics = observer.sinks[leader] if observer and leader else None
        group_config = config
        if statistics is None and needs_sequences(config):
            # an expert that no token reached has no statistics: magnitude is all there is, and it is said
            group_config = copy.copy(config)  # not replace(): its other fields need have no effect here
            group_config.method, group_config.reconstruct = "magnitude", "none"
            for ref in refs:
                found.warn(f"{run.view.name(index, ref)} saw no calibration token: pruned by magnitude")
        if leader != factored:
            factor, factored = None, leader
        if factor is None and statistics is not None and needs_factor(group_config):
            name = run.view.name(index, groups[leader][0])
            factor = inverse_factor(statistics.gram, statistics.count, config.damping, name)
            if factor.damping != config.damping:
                found.warn(f"{name}: damping raised to {factor.damping:g} for the factorisation to succeed")
        for ref in refs:
            weight = ref.view(block)
            if ref.expert is not None and statistics is not None and statistics.count < weight.shape[1]:
                found.warn(f"{run.view.name(index, ref)} saw {int(statistics.count)} calibration tokens, fewer than "
                           f"its {weight.shape[1]} inputs: what is chosen there rests on too little data")
            before = weight.to(run.executor.device)
            solved = solve(before, group_config, statistics, factor)
            row = {"name": run.view.name(index, ref), "block": index, "shape": list(weight.shape),
                   "damping": solved.damping}
            results = {"": solved.weight} if solved.swept is None else {"": solved.weight, "_sweep": solved.swept}
            errors = {key + step: weight_error_sums(probe.sinks[probe.leader[ref.name]].x, before, result)
                      for probe, key in zip(inputs, ("error", "error_held_out")) if ref.name in probe.leader
                      for step, result in results.items()}
            weight.copy_(solved.weight)
            if module is not block:
                ref.view(module).copy_(weight)
            if solved.refit and not solved.refit.converged:
                found.warn(f"{row['name']}: the refit was stopped after {solved.refit.steps} steps, before its "
                           "tolerance")
            sums += [torch.count_nonzero(solved.weight.to(weight.dtype)), *errors.values()]
            own.append(row | dict.fromkeys(errors))
            masks[ref] = solved.mask
    _fill(own, sums)
    ops.raise_faults(run.executor.device)
    exchange_solved(run, module, block, owners, [refs for _, refs in pieces], masks)
    rows = {row["name"]: row for part in run.world.everyone(own) for row in part}
    found.weights += [rows[run.view.name(index, ref)] for ref in selected]
    found.share_warnings(run.world)
    return masks


def _fill(rows: list[dict], sums: list[Tensor]) -> None:
    """What a block's rows say of it, read from the device in one go: ``sums`` are, per row, the non-zeros and the two
    sums of each of its errors."""
    flat = iter(torch.cat([t.double().reshape(-1) for t in sums]).tolist() if sums else [])
    for row in rows:
        row["sparsity"] = 1 - int(next(flat)) / math.prod(row["shape"])
        for key in ERRORS:
            if key in row:
                row[key] = ratio(next(flat), next(flat))


def solve_cost(block: nn.Module, refs: list[WeightRef]) -> float:
    """FLOPs of one group: a factorisation and inverse of its Gram, and a sweep of each of its matrices."""
    columns = refs[0].view(block).shape[1]
    return columns**3 + sum(ref.view(block).shape[0] * columns**2 for ref in refs)


def exchange_solved(run: Run, module: nn.Module, block: nn.Module, owners: list[int], groups: list[list[WeightRef]],
                    masks: dict[WeightRef, Tensor]) -> None:
    """Give every process the weights and masks that others solved."""
    if run.world.size == 1:
        return
    for owner, refs in zip(owners, groups):
        for ref in refs:
            weight = ref.view(block)
            mask = masks.setdefault(ref, torch.empty(weight.shape, dtype=torch.bool, device=run.executor.device))
            run.world.send_(weight, owner)
            run.world.send_(mask, owner)
            if module is not block:
                ref.view(module).copy_(weight)
