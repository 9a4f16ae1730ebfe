"""What structured pruning decides before its first pass: gradients, sizes, biases, edits of the configuration."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.execution.run import Findings, Run
from pyprune.model.blocks import block_list
from pyprune.model.watching import expert_loop
from pyprune.structured import config_edits
from pyprune.structured.allocation import Member, global_counts, shortfalls
from pyprune.structured.block import Preparation, StructuredRun, Target, dealt, score_group
from pyprune.structured.criteria import needs_gradients, needs_moments
from pyprune.structured.groups import Coupled
from pyprune.structured.moments import Split
from pyprune.structured.observation import observe_moments
from pyprune.structured.taps import gradient_sequences, mask_gradients
from pyprune.structured.units import Units, edits_of, mean_of, paths_of, stock_edits, uniform_counts, wanted_of


def prepare(run: Run, found: Findings, units: Units) -> StructuredRun:
    """Gradients, sizes and whether they can be said in a stock config; nothing is changed yet."""
    config, view = run.config, run.view
    groups, rules, flags, notes = units.groups, units.rules, units.flags, [*units.notes]
    selected = [[r for r in refs if r.path in paths_of(block)] for block, refs in zip(groups, run.selected)]
    gradients = None
    if needs_gradients(config.criterion):
        with found.clock("gradients"):
            gradients = _gradients(run, groups)
    if (
        config.reconstruct == "none"
        and config.criterion in ("wifv", "obs", "obs_greedy")
        and any(g.kind == "heads" for block in groups for g in block)
    ):
        notes.append(
            f"{config.criterion} chooses heads for a repair that takes up their mean; without reconstruction "
            "it can be worse than random"
        )
    prepared = Preparation(
        groups, gradients, flags, notes, _biases(run, flags), selected, view.coverage(selected), rules
    )
    wanted = wanted_of(groups, config, rules)
    targets = []
    for amounts, counts in zip(wanted, _allocate(StructuredRun(run, found, prepared, []), wanted)):
        model = view.model if len(wanted) == 1 else twin(view.model, view.path)
        target = Target(mean_of(groups, amounts), model, block_list(model, view.path), counts)
        if config.structured.allocation == "uniform":  # global widths differ from block to block by design
            found_notes = shortfalls(groups, counts, amounts, rules is not None)
            notes += [text for text in found_notes if text not in notes]
        _decide(run, prepared, target)
        targets.append(target)
    return StructuredRun(run, found, prepared, targets)


def _gradients(run: Run, groups: list[list[Coupled]]) -> list[list[Tensor]]:
    """Mask gradients of every sequence; each process differentiates its own."""
    chosen = gradient_sequences(run.data.sequences)
    alone = len(chosen) < run.world.size
    first, stop = (0, len(chosen)) if alone else run.world.span(len(chosen))
    own = mask_gradients(
        run.view,
        groups,
        chosen[first:stop],
        first,
        dtype=run.executor.dtype,
        device=next(run.view.model.parameters()).device,
        seed=run.config.seed,
    )
    parts = [own] if alone else run.world.everyone(own)
    return [[torch.cat([part[i][j] for part in parts]) for j in range(len(block))] for i, block in enumerate(groups)]


def _biases(run: Run, flags: dict[str, str]) -> list[list[str]]:
    """Per block, biases that a model with these flags has and the model at hand has not."""
    out: list[list[str]] = [[] for _ in run.view.blocks]
    if flags:
        shell = config_edits.empty_like(run.view.model, dict.fromkeys(flags.values(), True))
        for names, block, dense in zip(out, block_list(shell, run.view.path), run.view.blocks):
            have = {name for name, _ in dense.named_parameters()}
            names += [name for name, _ in block.named_parameters() if name.endswith("bias") and name not in have]
    return out


def _allocate(work: StructuredRun, wanted: list[list[list[float]]]) -> list[list[list[int]]]:
    """Units kept per sparsity, block and group. wanted: the sparsity of each."""
    run, groups = work.run, work.prepared.groups
    if run.config.structured.allocation == "uniform":
        return [uniform_counts(groups, amounts) for amounts in wanted]
    flat: list[Member] = []

    def scored(index: int, splits: Sequence[Split | None], i: int) -> Tensor:
        return score_group(work, index, i, splits[i])

    with work.clock("allocation"), expert_loop(run.view.model.config), torch.no_grad():
        looks = needs_moments(run.config.criterion) and len(run.data.sequences) > 0
        stream = run.executor.embed(run.data.sequences, shared=True) if looks else None
        for index, block in enumerate(groups):
            sizes = [g.unit_size(run.view.blocks[index]) for g in block]
            with run.executor.compute(index) as module:
                splits: Sequence[Split | None] = [None] * len(block)
                if stream is not None:
                    splits = observe_moments(run, work.found, index, module, block, stream, target=stream)
                scores = dealt(run, [float(g.units) for g in block], functools.partial(scored, index, splits))
            flat += [Member(index, g, found, size) for g, (_, found), size in zip(block, scores, sizes)]
            run.executor.release(index)
    out = []
    for amounts in wanted:
        counts = iter(global_counts(flat, next(s for row in amounts for s in row)))
        out.append([[next(counts) for _ in block] for block in groups])
    return out


def twin(model: nn.Module, path: str) -> nn.Module:
    """A copy of the model that shares every parameter outside the blocks."""
    blocks = model.get_submodule(path)
    inside = {id(p) for p in blocks.parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in inside})


def _decide(run: Run, prepared: Preparation, target: Target) -> None:
    """Whether a stock config can say the target's sizes; refuse, pad or go on as the configuration asks."""
    config, view, groups, flags = run.config, run.view, prepared.groups, prepared.flags
    mode = config.structured.nonstandard
    if mode == "refuse":
        target.edits = stock_edits(view, config, groups, target.counts, flags, target.sparsity)
        return
    try:
        target.edits = edits_of(view, groups, target.counts, flags)
        return
    except ConfigError as error:
        target.reason = str(error)
    if mode == "save":
        return
    widest = {
        k: max(c for b, cs in zip(groups, target.counts) for g, c in zip(b, cs) if g.kind == k)
        for k in {g.kind for b in groups for g in b}
    }
    dense = {g.kind: g.units for b in groups for g in b}
    tries = [widest, *({**widest, kind: dense[kind]} for kind in ("heads", "neurons") if kind in dense), dense]
    for sizes in tries:
        padded = [[sizes[g.kind] for g in block] for block in groups]
        try:
            target.edits = edits_of(view, groups, padded, flags)
        except ConfigError:
            continue
        target.padded = padded
        return
    raise ConfigError(f"even zero-padded sizes do not fit a stock config: {target.reason}")
