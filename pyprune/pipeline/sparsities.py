"""Sparsities by name, ``{"mlp": 0.6, "*": 0.4}``, as a run that chooses masks applies them to its weights."""

from __future__ import annotations

from pyprune.config import KINDS, ConfigError, PruneConfig
from pyprune.execution.executor import Resident
from pyprune.model.blocks import ModelView, WeightRef
from pyprune.model.kinds import kinds_of
from pyprune.model.sparsities import rules

Selected = list[list[WeightRef]]
Rules = list[dict[WeightRef, str]]


def check_patterns(view: ModelView, selected: Selected, config: PruneConfig) -> None:
    """Refuse a pattern among the keys that names no selected weight; needs no weights."""
    names = {view.name(i, ref): None for i, refs in enumerate(selected) for ref in refs}
    rules(config.sparsity_by_name, names, told=False)


def weights_and_keys(
    view: ModelView, selected: Selected, config: PruneConfig, kinds: list[dict[str, str]]
) -> tuple[Selected, Rules | None]:
    """The weights that a key names, per block, and the key that counts for each; all of them, and None, where a number
    is asked for. kinds: :func:`kinds_for`. Raises ConfigError for a key that decides nothing."""
    asked = config.sparsity_by_name
    if not asked or config.is_structured:
        return selected, None
    names = {view.name(i, ref): kinds[i].get(ref.path) for i, refs in enumerate(selected) for ref in refs}
    keys = rules(asked, names)
    found = [
        {ref: keys[view.name(i, ref)] for ref in refs if view.name(i, ref) in keys} for i, refs in enumerate(selected)
    ]
    return [list(block) for block in found], found


def kinds_for(view: ModelView, config: PruneConfig, weights: Resident) -> list[dict[str, str]]:
    """Per block, the kind of each parameter, found out where a key asks for one."""
    if config.is_structured or not set(config.sparsity_by_name) & set(KINDS):
        return [{} for _ in view.blocks]
    return kinds_of(view, weights)


def check_removes(view: ModelView, selected: Selected, config: PruneConfig, rules: Rules | None) -> None:
    """Refuse a sparsity above 0 that rounds to no zero in any weight that has it."""
    rows = config.method == "wanda"  # whose zeros are counted row by row
    sizes: dict[str | None, list[int]] = {}
    for i, (block, refs) in enumerate(zip(view.blocks, selected)):
        for ref in refs:
            weight = ref.view(block)
            sizes.setdefault(rules[i][ref] if rules else None, []).append(weight.shape[1] if rows else weight.numel())
    for key, found in sizes.items():
        for sparsity in config.sparsities if key is None else (config.sparsity_by_name[key],):
            assert not isinstance(sparsity, dict)  # those have keys
            if sparsity and not any(round(sparsity * size) for size in found):
                raise ConfigError(
                    f"sparsity {'' if key is None else f'{key}='}{sparsity:g} would remove nothing: "
                    f"{'a row' if rows else 'the largest matrix'} has {max(found)} weights, of which one is sparsity "
                    f"{1 / max(found):.3g}"
                )
