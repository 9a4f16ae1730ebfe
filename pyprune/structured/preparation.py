"""What structured pruning decides before its first pass: groups, sizes, bias slots, whether stock tools can load it.

:func:`find_units` refuses what can be told before anything is measured; :func:`prepare` begins the work.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ATTENTION, MLP, ConfigError, PruneConfig, sparsity_text
from pyprune.execution.executor import Resident
from pyprune.execution.run import Findings, Run
from pyprune.model.attributes import embedding_device, vocabulary_size
from pyprune.model.blocks import ModelView, WeightRef, block_list
from pyprune.model.sparsities import rules as rules_for
from pyprune.model.watching import expert_loop
from pyprune.structured import config_edits, slicing
from pyprune.structured.allocation import Member, choose, global_counts, removed, shortfalls, uniform_count
from pyprune.structured.block import Preparation, StructuredRun, Target, dealt, has_bias, score_group
from pyprune.structured.criteria import needs_gradients, needs_moments
from pyprune.structured.groups import PROBE_TOKENS, Coupled, find_groups
from pyprune.structured.moments import Split
from pyprune.structured.observation import observe_moments
from pyprune.structured.slicing import Pick, slice_block
from pyprune.structured.taps import gradient_sequences, mask_gradients

KIND = {"heads": ATTENTION, "neurons": MLP}
"""What the two kinds of units are called where a sparsity is given by name."""


@dataclass(frozen=True)
class Units:
    """The neurons and heads that a run chooses from."""

    groups: list[list[Coupled]]
    """Per block, the groups that are selected whole."""
    rules: list[list[str]] | None
    """Of sparsities by name, the key that counts for each group."""
    flags: dict[str, str]
    """``{kind: config flag}`` of biases that the reconstruction adds."""
    notes: list[str]
    """What that means for the other biases."""


def find_units(
    view: ModelView, selected: list[list[WeightRef]], config: PruneConfig, weights: Resident | None = None
) -> Units:
    """The units of a model. Raises ConfigError for a run that would remove nothing, that needs gradients where there
    are none, whose blocks cannot be made smaller, or whose result stock tools could not load though they have to.

    view: the model with its weights, of which those of a few blocks are read; selected: per block, the weights that
    ``targets`` and ``ignore`` leave; weights: where blocks are streamed from (None: they are in memory). Widths that
    depend on scores are known too late for this: :func:`prepare`.
    """
    groups, rules = groups_to_prune(view, selected, config, weights)
    if needs_gradients(config.criterion) and any(g.consumer.expert is not None for block in groups for g in block):
        raise ConfigError(f"criterion {config.criterion_name!r} does not see fused experts; choose wifv or obs")
    uniform = config.structured.allocation == "uniform"
    if uniform:
        foreseen(groups, config, rules)
    _verify(view, groups, weights or Resident())
    flags, notes = _flags(view, config, groups)
    if uniform and config.structured.nonstandard == "refuse":
        for wanted in wanted_of(groups, config, rules):
            _stock_edits(view, config, groups, _uniform_counts(groups, wanted), flags, _mean(groups, wanted))
    return Units(groups, rules, flags, notes)


def groups_to_prune(
    view: ModelView, selected: list[list[WeightRef]], config: PruneConfig, weights: Resident | None
) -> tuple[list[list[Coupled]], list[list[str]] | None]:
    """Per block the groups that are selected whole, and of sparsities by name the key of each, as
    :func:`groups_and_keys`. Raises ConfigError if there are none, or one that cannot lose a unit."""
    groups = find_groups(view, config.pattern, config.structured.head_scope, weights)
    groups = [[g for g in block if _selected(g, refs)] for block, refs in zip(groups, selected)]
    groups, rules = groups_and_keys(view, groups, config)
    if not any(groups):
        raise ConfigError(
            f"targets and ignore leave no whole {config.pattern} to prune: a group goes only if its "
            "consumer and all its producers are selected"
        )
    for block in groups:
        for g in block:
            if len(g.pools.unique()) == g.units:
                raise ConfigError(_single(g))
    return groups, rules


def prepare(run: Run, found: Findings, units: Units) -> StructuredRun:
    """Gradients, sizes and whether they can be said in a stock config; nothing is changed yet."""
    config, view = run.config, run.view
    groups, rules, flags, notes = units.groups, units.rules, units.flags, [*units.notes]
    selected = [[r for r in refs if r.path in _paths(block)] for block, refs in zip(groups, run.selected)]
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
        target = Target(_mean(groups, amounts), model, block_list(model, view.path), counts)
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


def group_paths(groups: list[list[Coupled]]) -> set[str]:
    """Parameters, by their path in a block, that a structured run would make smaller."""
    return set().union(*map(_paths, groups))


def groups_and_keys(
    view: ModelView, groups: list[list[Coupled]], config: PruneConfig
) -> tuple[list[list[Coupled]], list[list[str]] | None]:
    """The groups that a key of ``sparsity`` names, and the key of each; all of them, and None, where it is no mapping.

    A group goes by its consumer's name and its kind: heads are attention, neurons mlp. Raises ConfigError for a key
    that decides nothing.
    """
    asked = config.sparsity_by_name
    if not asked:
        return groups, None
    names = {view.name(i, g.consumer): KIND[g.kind] for i, block in enumerate(groups) for g in block}
    keys = rules_for(asked, names)
    kept = [[g for g in block if view.name(i, g.consumer) in keys] for i, block in enumerate(groups)]
    return kept, [[keys[view.name(i, g.consumer)] for g in block] for i, block in enumerate(kept)]


def wanted_of(
    groups: list[list[Coupled]], config: PruneConfig, rules: list[list[str]] | None
) -> list[list[list[float]]]:
    """Per model that the run makes, the sparsity of each group. rules: of :func:`groups_and_keys`."""
    if rules is not None:
        return [[[config.sparsity_by_name[key] for key in block] for block in rules]]
    return [[[s for _ in block] for block in groups] for s in config.sparsities if not isinstance(s, dict)]


def _mean(groups: list[list[Coupled]], wanted: list[list[float]]) -> float:
    """The sparsity that is asked for, of several the mean over the units."""
    found = {s for block in wanted for s in block}
    if len(found) == 1:
        return found.pop()
    units = sum(g.units for block in groups for g in block)
    return sum(g.units * s for block, row in zip(groups, wanted) for g, s in zip(block, row)) / units


def foreseen(groups: list[list[Coupled]], config: PruneConfig, rules: list[list[str]] | None = None) -> list[dict]:
    """Per sparsity what was ``asked``, what would be ``removed`` of each kind, and ``notes`` where the two differ;
    ``removed`` is empty where the widths depend on scores. Raises ConfigError if nothing would go."""
    if config.structured.allocation != "uniform":
        return [{"asked": s, "removed": {}, "notes": []} for s in config.sparsities]
    rows = []
    for asked, wanted in zip(config.sparsities, wanted_of(groups, config, rules)):
        counts = _uniform_counts(groups, wanted)
        notes = shortfalls(groups, counts, wanted, rules is not None)
        rows.append({"asked": asked, "removed": removed(groups, counts), "notes": notes})
    return rows


def _uniform_counts(groups: list[list[Coupled]], wanted: list[list[float]]) -> list[list[int]]:
    return [[uniform_count(g, s) for g, s in zip(block, row)] for block, row in zip(groups, wanted)]


def _paths(block: list[Coupled]) -> set[str]:
    return {g.consumer.path for g in block} | {s.path for g in block for s in g.slots}


def _selected(group: Coupled, refs: list) -> bool:
    chosen = {r.path for r in refs}
    matrices = {s.path for s in group.slots if not s.path.endswith("bias")}
    return group.consumer.path in chosen and matrices <= chosen


def _single(group: Coupled) -> str:
    if group.heads and group.units == group.heads and group.groups == group.heads:
        return "head_scope='queries' needs several query heads a group; this model has one, use head_scope='groups'"
    return (
        f"{group.name} has a single key/value group, which cannot be dropped; use head_scope='queries' to drop "
        "query heads inside it"
    )


def _verify(view: ModelView, groups: list[list[Coupled]], weights: Resident) -> None:
    """Raise ConfigError where slicing one of the blocks is not masking it; blocks of equal structure are tried once."""
    ids = (torch.arange(PROBE_TOKENS)[None] * 5 + 2) % vocabulary_size(view.model)
    hidden, arguments = view.record(ids.to(embedding_device(view.model)))
    seen = set()
    with expert_loop(view.model.config):
        for index, (block, found) in enumerate(zip(view.blocks, groups)):
            if found and id(found[0].columns) not in seen:
                seen.add(id(found[0].columns))
                weights.acquire(index)
                slicing.verify(block, found, hidden, arguments[index], f"{view.path}.{index}")
                weights.release(index)


def _flags(view: ModelView, config: PruneConfig, groups: list[list[Coupled]]) -> tuple[dict[str, str], list[str]]:
    """Bias flags to set, and notes on kinds without a slot."""
    wants = config.reconstruct == "bias" or (config.reconstruct == "liar" and config.structured.interpolate != "weight")
    if not wants:
        return {}, []
    index = next(i for i, block in enumerate(groups) if block)
    dense = config_edits.dense_groups(groups[index])
    flags = config_edits.bias_flags(
        view.model,
        {
            kind: config_edits.consumer_path(view.path, index, g.consumer)
            for kind, g in dense.items()
            if g.consumer.expert is None
        },
    )
    notes = []
    for kind, group in dense.items():
        if kind in flags:
            notes.append(
                f"{flags[kind]}=True gives {group.name} the bias of the reconstruction; the other biases it "
                "adds are zeros"
            )
        elif not has_bias(view.blocks[index], group):
            notes.append(
                f"{type(view.model).__name__} has no bias slot at {group.name}: the bias-free solution on "
                "uncentred moments is used"
            )
    return flags, notes


def _allocate(work: StructuredRun, wanted: list[list[list[float]]]) -> list[list[list[int]]]:
    """Units kept per sparsity, block and group. wanted: the sparsity of each."""
    run, groups = work.run, work.prepared.groups
    if run.config.structured.allocation == "uniform":
        return [_uniform_counts(groups, amounts) for amounts in wanted]
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
        target.edits = _stock_edits(view, config, groups, target.counts, flags, target.sparsity)
        return
    try:
        target.edits = _edits(view, groups, target.counts, flags)
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
            target.edits = _edits(view, groups, padded, flags)
        except ConfigError:
            continue
        target.padded = padded
        return
    raise ConfigError(f"even zero-padded sizes do not fit a stock config: {target.reason}")


def _stock_edits(
    view: ModelView,
    config: PruneConfig,
    groups: list[list[Coupled]],
    counts: list[list[int]],
    flags: dict[str, str],
    sparsity: float,
) -> dict:
    """:func:`_edits`; where there are none, a ConfigError with what else can be done. sparsity: the one, or mean, that
    was asked for."""
    try:
        return _edits(view, groups, counts, flags)
    except ConfigError as error:
        shown = sparsity_text(config.sparsity_by_name or sparsity)
        raise ConfigError(
            f"sparsity {shown} makes a model that stock tools cannot load: {error}. "
            "Set nonstandard='save' (pyprune.load loads it) or nonstandard='pad' (zeros: stock tools load it, it is "
            "no smaller), or choose another sparsity or pattern"
        ) from None


def _edits(view: ModelView, groups: list[list[Coupled]], counts: list[list[int]], flags: dict[str, str]) -> dict:
    """Config edits for these sizes, checked on a weightless model that is sliced like the real one."""
    model = view.model
    units: dict[str, int] = {}
    for kind in sorted({g.kind for block in groups for g in block}):
        sizes = {n for block, kept in zip(groups, counts) for g, n in zip(block, kept) if g.kind == kind}
        some_dense = any(all(g.kind != kind for g in block) for block in groups)
        if len(sizes) > 1 or some_dense:
            shown = ", ".join(map(str, sorted(sizes)[:4])) + (", others dense" if some_dense else "")
            raise ConfigError(
                f"a {type(model.config).__name__} has one size for all blocks, these differ in {kind} ({shown})"
            )
        units[kind] = sizes.pop()
    shell = config_edits.empty_like(model, {})
    for block, found, widths in zip(block_list(shell, view.path), groups, counts):
        slice_block(block, [Pick(g, choose(g, -torch.arange(g.units).double(), n)) for g, n in zip(found, widths)])
    dense = config_edits.dense_groups(next(b for b in groups if b))
    return config_edits.standard_edits(shell, dense, units, dict.fromkeys(flags.values(), True))
