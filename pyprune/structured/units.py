"""The heads and neurons that a run chooses from: which of a model, at which sparsity, and whether stock tools can load
what is left. All of it is known before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyprune.config import ATTENTION, MLP, ConfigError, PruneConfig, sparsity_text
from pyprune.execution.executor import Resident
from pyprune.model.attributes import embedding_device, vocabulary_size
from pyprune.model.blocks import ModelView, WeightRef, block_list
from pyprune.model.sparsities import rules as rules_for
from pyprune.model.watching import expert_loop
from pyprune.structured import config_edits, slicing
from pyprune.structured.allocation import choose, removed, shortfalls, uniform_count
from pyprune.structured.block import has_bias
from pyprune.structured.criteria import needs_gradients
from pyprune.structured.groups import PROBE_TOKENS, Coupled, find_groups
from pyprune.structured.slicing import Pick, slice_block

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
    elif config.structured.nonstandard == "refuse" and sum(map(bool, groups)) > 1:
        raise ConfigError(
            "allocation='global' gives every block a width of its own, and a stock configuration has one for all: "
            "set nonstandard='save' (pyprune.load loads it) or nonstandard='pad' (zeros: stock tools load it, it is no "
            "smaller)"
        )
    _verify(view, groups, weights or Resident())
    flags, notes = _flags(view, config, groups)
    if uniform and config.structured.nonstandard == "refuse":
        for wanted in wanted_of(groups, config, rules):
            stock_edits(view, config, groups, uniform_counts(groups, wanted), flags, mean_of(groups, wanted))
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


def group_paths(groups: list[list[Coupled]]) -> set[str]:
    """Parameters, by their path in a block, that a structured run would make smaller."""
    return set().union(*map(paths_of, groups))


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


def mean_of(groups: list[list[Coupled]], wanted: list[list[float]]) -> float:
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
        counts = uniform_counts(groups, wanted)
        notes = shortfalls(groups, counts, wanted, rules is not None)
        rows.append({"asked": asked, "removed": removed(groups, counts), "notes": notes})
    return rows


def uniform_counts(groups: list[list[Coupled]], wanted: list[list[float]]) -> list[list[int]]:
    return [[uniform_count(g, s) for g, s in zip(block, row)] for block, row in zip(groups, wanted)]


def paths_of(block: list[Coupled]) -> set[str]:
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


def stock_edits(
    view: ModelView,
    config: PruneConfig,
    groups: list[list[Coupled]],
    counts: list[list[int]],
    flags: dict[str, str],
    sparsity: float,
) -> dict:
    """:func:`edits_of`; where there are none, a ConfigError with what else can be done. sparsity: the one, or the mean,
    that was asked for."""
    try:
        return edits_of(view, groups, counts, flags)
    except ConfigError as error:
        shown = sparsity_text(config.sparsity_by_name or sparsity)
        raise ConfigError(
            f"sparsity {shown} makes a model that stock tools cannot load: {error}. "
            "Set nonstandard='save' (pyprune.load loads it) or nonstandard='pad' (zeros: stock tools load it, it is "
            "no smaller), or choose another sparsity or pattern"
        ) from None


def edits_of(view: ModelView, groups: list[list[Coupled]], counts: list[list[int]], flags: dict[str, str]) -> dict:
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
