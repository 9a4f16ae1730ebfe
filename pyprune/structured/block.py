"""One block of a structured run: observe the consumers' inputs, score, choose, repair and slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.execution.executor import Activations, Batch, moved, named_tensors
from pyprune.execution.residency import sent
from pyprune.execution.run import Clock, Findings, Run
from pyprune.execution.trust import distrust
from pyprune.model.blocks import WeightRef
from pyprune.ops import guards
from pyprune.structured.allocation import choose
from pyprune.structured.criteria import Scored, needs_moments, score
from pyprune.structured.groups import Coupled
from pyprune.structured.liar import Problem, Repair, repair
from pyprune.structured.moments import Split, to_device
from pyprune.structured.observation import observe_moments
from pyprune.structured.slicing import Pick, slice_block
from pyprune.structured.taps import Taps

T = TypeVar("T")


@dataclass(eq=False)
class Target:
    """One sparsity: the model it becomes and how."""

    sparsity: float
    """As it was asked for; of several by name the mean over the units."""
    model: nn.Module
    blocks: nn.ModuleList
    counts: list[list[int]]
    """Units kept, per block and group."""
    padded: list[list[int]] | None = None
    edits: dict | None = None
    """Config edits that make it a standard checkpoint; None if it is none."""
    reason: str | None = None
    """Why it is none."""
    layout: dict | None = None
    """What ``pyprune.load`` needs where a config does not say it."""
    rows: list[dict] = field(default_factory=list)
    attributes: list[dict] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Preparation:
    """What is known before the first pass."""

    groups: list[list[Coupled]]
    gradients: list[list[Tensor]] | None
    flags: dict[str, str]
    """``{kind: config flag}`` of biases that are added."""
    notes: list[str]
    biases: list[list[str]]
    """Per block, biases that the flags add to its other layers, which stay zero."""
    selected: list[list[WeightRef]]
    """Per block, the weights that belong to a group."""
    coverage: dict
    """What of the dense model that is."""
    rules: list[list[str]] | None = None
    """By block and group the key of ``sparsity`` that counts, where that is a mapping."""


@dataclass(frozen=True, eq=False)
class StructuredRun:
    """One structured run: what it is, what it finds, what was prepared, and the models it makes."""

    run: Run
    found: Findings
    prepared: Preparation
    targets: list[Target]

    @property
    def clock(self) -> Clock:
        return self.found.clock


def _dense_pass(
    run: Run, index: int, module: nn.Module, groups: list[Coupled], stream: Activations, sums: list[Activations | None]
) -> None:
    """Advance the dense stream by one block and keep what each consumer's output should add up to."""
    taps = Taps(module, groups)

    def keep(batch: Batch, _) -> None:
        for i, store in enumerate(sums):
            if store is not None and store is not stream:
                run.executor.write(store, batch, taps.sums[i].reshape(stream.read(batch).shape))

    try:
        run.executor.run(index, module, stream, stream, keep, taps.run)
    finally:
        taps.close()


def dealt(run: Run, costs: list[float], work: Callable[[int], T], turn: int = 0) -> list[tuple[int, T]]:
    """``work(k)`` for every k, each done by one of the processes and known to all; with the process that did it.

    turn: which process comes first, for pieces that are dealt out one by one.
    """
    owners = [(owner + turn) % run.world.size for owner in run.world.deal(costs)]
    own = {k: work(k) for k, owner in enumerate(owners) if owner == run.world.rank}
    found = {k: value for part in run.world.everyone(own) for k, value in part.items()}
    return [(owner, found[k]) for k, owner in enumerate(owners)]


def score_group(work: StructuredRun, index: int, i: int, split: Split | None) -> Tensor:
    """Scores float32 ``[units]`` of one group: the least important first to go."""
    run, prepared = work.run, work.prepared
    group, block = prepared.groups[index][i], run.view.blocks[index]
    criterion = run.config.criterion
    if needs_moments(criterion) and (split is None or split.count == 0):
        criterion = "magnitude"
        work.found.warn(f"{run.view.path}.{index}.{group.name} saw no calibration token: chosen by magnitude")
    layer = Scored(
        group,
        _consumer_weight(run, group, block),
        split,
        centred=has_slot(work, index, group),
        block=block,
        seed=hash((run.config.seed, index, i)) % 2**31,
        gradients=None if prepared.gradients is None else prepared.gradients[index][i],
    )
    with work.clock("score"):
        return score(criterion, layer, f"{run.view.path}.{index}.{group.name}")


def _consumer_weight(run: Run, group: Coupled, block: nn.Module) -> Tensor:
    """float32 ``[out, c]``, where it is solved."""
    weight, device = group.consumer.view(block), run.executor.device
    there = sent({"": weight}, device)
    return (there[""] if there else weight.to(device)).float()


def has_bias(block: nn.Module, group: Coupled) -> bool:
    if group.consumer.expert is not None:
        return False
    return getattr(block.get_submodule(group.consumer.module_path), "bias", None) is not None


def has_slot(work: StructuredRun, index: int, group: Coupled) -> bool:
    """Whether the pruned model can hold a bias at the group's consumer."""
    flagged = group.kind in work.prepared.flags and group.consumer.expert is None
    return flagged or has_bias(work.run.view.blocks[index], group)


def repair_group(
    work: StructuredRun, target: Target, index: int, i: int, split: Split | None, scores: Tensor
) -> tuple[Pick, dict]:
    """Choose and repair one consumer for one sparsity; with its row of the target's report."""
    run = work.run
    config, block = run.config, run.view.blocks[index]
    group, count = work.prepared.groups[index][i], target.counts[index][i]
    weight = _consumer_weight(run, group, block).contiguous()
    bias = None
    if has_slot(work, index, group):
        own = getattr(block.get_submodule(group.consumer.module_path), "bias", None)
        bias = torch.zeros(len(weight), device=weight.device) if own is None else own.data.to(weight.device).float()
    kept = choose(group, scores, count)
    name = run.view.name(index, group.consumer)
    if guards.units(kept, group.pools, count):
        raise RuntimeError(f"{len(kept)} units of {name} were chosen where {count} are to stay: {kept.tolist()}")
    s = config.structured

    def repaired() -> Repair:
        if split is None:
            columns = to_device(group.columns_of(kept), weight.device)
            return Repair(weight[:, columns], bias, "none")
        return repair(
            Problem(weight, bias, group, split),
            kept,
            config.reconstruct or "none",
            damping=s.damping,
            interpolate=s.interpolate,
            interpolate_weights=s.interpolate_weights,
        )

    with work.clock("solve"):
        done = repaired()
        if wrong := done.wrong:
            with ops.backend("reference"):
                done = repaired()
            for op in sorted(wrong - done.wrong):
                distrust(work.found.warn, run.executor.device, index, op)
    for warning in done.warnings:
        work.found.warn(f"{name} {warning}")
    row = {
        "name": name,
        "block": index,
        "shape": list(weight.shape),
        "kind": group.kind,
        "units": group.units,
        "kept": count,
        "method": done.method,
        "damping": done.damping,
        "error_held_out": done.error,
        "error": None,
        "errors": done.errors,
        "norm_ratio": done.norm_ratio,
        "warnings": done.warnings,
        "tokens": 0 if split is None else split.count,
        "sparsity": 1 - count / group.units,
        **asked_in(work, index, i),
    }
    # a bias that was a slot only stays absent where nothing was put in it
    return Pick(group, kept, done.weight, done.bias, None if target.padded is None else target.padded[index][i]), row


def asked_in(work: StructuredRun, index: int, i: int) -> dict[str, float | str]:
    """What a row says of a sparsity given by name: how much was asked for, and by which key."""
    if (rules := work.prepared.rules) is None:
        return {}
    key = rules[index][i]
    return {"asked": work.run.config.sparsity_by_name[key], "asked_by": key}


def refresh(block: nn.Module, module: nn.Module) -> None:
    """Give a compute copy the sliced block's sizes and values."""
    if module is block:
        return
    like = next(p for p in module.parameters() if p.is_floating_point())
    arrived = sent(named_tensors(block), like.device, like.dtype)
    module.__dict__.update(moved(block, like.device, like.dtype, arrived).__dict__)


def dense_block(work: StructuredRun, index: int, module: nn.Module, stream: Activations | None) -> None:
    """Prune one block for every target, on the inputs that the dense model gives it."""
    groups = work.prepared.groups[index]
    splits: list = [None] * len(groups)
    if stream is not None:
        splits = observe_moments(work.run, work.found, index, module, groups, stream, target=stream)
    picks = pick_units(work, index, range(len(groups)), splits)
    for target, chosen in zip(work.targets, picks):
        with work.clock("slice"):
            target.attributes.append(slice_block(target.blocks[index], chosen))


def dense_sums(
    work: StructuredRun, index: int, module: nn.Module, dense: Activations | None
) -> list[Activations | None]:
    """By group, what its consumer's output adds up to in the dense stream, which moves on to the block's outputs; None
    for experts, and where there is no dense stream."""
    groups = work.prepared.groups[index]
    if dense is None:
        return [None] * len(groups)
    own = [g.consumer.expert is None for g in groups]
    sums = [None if not o else dense if g.target == "" else dense.like() for g, o in zip(groups, own)]
    with work.clock("forward"):
        _dense_pass(work.run, index, module, groups, dense, sums)
    return sums


def propagated_block(
    work: StructuredRun, index: int, module: nn.Module, pruned: Activations | None, sums: list[Activations | None]
) -> None:
    """Heads, then neurons, each on the input that the pruned prefix and the pruned attention leave them."""
    groups, target = work.prepared.groups[index], work.targets[0]
    attributes: dict[str, dict] = {}
    for kind in ("heads", "neurons"):
        stage = [i for i, g in enumerate(groups) if g.kind == kind]
        if not stage:
            continue
        splits: list = [None] * len(stage)
        if pruned is not None:
            splits = observe_moments(
                work.run, work.found, index, module, [groups[i] for i in stage], pruned, dense=[sums[i] for i in stage]
            )
        [picks] = pick_units(work, index, stage, splits)
        with work.clock("slice"):
            for path, values in slice_block(target.blocks[index], picks).items():
                attributes.setdefault(path, {}).update(values)
            refresh(target.blocks[index], module)
    target.attributes.append(attributes)


def pick_units(
    work: StructuredRun, index: int, stage: Sequence[int], splits: Sequence[Split | None], turn: int = 0
) -> list[list[Pick]]:
    """What every target keeps of the groups ``stage``; each group is scored and solved by one of the processes, by that
    of number ``turn`` first."""
    run, targets = work.run, work.targets
    block, groups = run.view.blocks[index], work.prepared.groups[index]
    solved: dict[tuple[int, int], Pick] = {}

    def solve(k: int) -> list[tuple]:
        scores = score_group(work, index, stage[k], splits[k])
        told = []
        for t, target in enumerate(targets):
            pick, row = repair_group(work, target, index, stage[k], splits[k], scores)
            solved[k, t] = pick
            told.append((pick.kept, pick.weight is not None, pick.bias is not None, row))
        return told

    costs = [float(groups[i].consumer.view(block).shape[1]) ** 3 for i in stage]
    device = run.executor.device
    for k, (owner, told) in enumerate(dealt(run, costs, solve, turn)):
        for t, (kept, weighs, biased, row) in enumerate(told):
            target, group = targets[t], groups[stage[k]]
            target.rows.append(row)
            if run.world.size == 1:
                continue
            rows = group.consumer.view(block).shape[0]
            if (k, t) not in solved:
                padded = None if target.padded is None else target.padded[index][stage[k]]
                solved[k, t] = Pick(group, kept, padded_to=padded)
            pick = solved[k, t]
            if weighs:
                pick.weight = run.world.share(pick.weight, (rows, len(kept) * group.width), owner, device)
            if biased:
                pick.bias = run.world.share(pick.bias, (rows,), owner, device)
    work.found.share_warnings(run.world)
    return [[solved[k, t] for k in range(len(stage))] for t in range(len(targets))]
