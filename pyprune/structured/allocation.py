"""How many units each block keeps, and which: one sparsity, uniform or spent where it costs least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.structured.groups import Coupled

TOLERANCE = 0.02
"""A larger difference between the sparsity that was asked for and the one achieved is worth a warning."""


def _expert_width(kept: int, dense: int) -> int:
    """Grouped expert products want rows of whole 16 bytes: a width divisible by 8, or by 4 where the dense one is."""
    step = next((m for m in (8, 4) if dense % m == 0), 1)
    return min(dense, max(step, round(kept / step) * step))


@dataclass(eq=False)
class Member:
    """One coupled group with its place, its scores and the size of a unit."""

    block: int
    group: Coupled
    scores: Tensor
    unit_size: int = 1


def _pools(group: Coupled) -> list[Tensor]:
    return [(group.pools == p).nonzero()[:, 0] for p in group.pools.unique()]


def uniform_count(group: Coupled, sparsity: float) -> int:
    """Units kept at a fraction ``sparsity`` dropped: the same from every pool, at least one each."""
    pools = group.pools.unique()
    each = group.units // len(pools)
    kept = max(1, each - round(sparsity * each))
    if group.consumer.expert is not None:
        kept = _expert_width(kept, each)
    return kept * len(pools)


def reachable(group: Coupled) -> list[float]:
    """Every share of the units that :func:`uniform_count` can drop, ascending, without none."""
    each = group.units // len(group.pools.unique())
    found = {1 - uniform_count(group, k / each) / group.units for k in range(1, each)}
    return sorted(share for share in found if share > 0)


def removed(groups: list[list[Coupled]], counts: list[list[int]]) -> dict[str, float]:
    """Share of the units of each kind that a choice of units to keep (per block and group) drops."""
    units: dict[str, int] = {}
    kept: dict[str, int] = {}
    for block, numbers in zip(groups, counts):
        for group, count in zip(block, numbers):
            units[group.kind] = units.get(group.kind, 0) + group.units
            kept[group.kind] = kept.get(group.kind, 0) + count
    return {kind: 1 - kept[kind] / units[kind] for kind in units}


def shortfalls(
    groups: list[list[Coupled]], counts: list[list[int]], wanted: list[list[float]], by_name: bool = False
) -> list[str]:
    """A sentence for each kind of which clearly more or less is dropped than was asked for.

    wanted: the sparsity of each group. Raises ConfigError if nothing at all would be dropped, or where sparsities were
    given by name nothing of one of them, with those that can be reached.
    """
    first: dict[tuple[str, float], Coupled] = {}
    units: dict[tuple[str, float], int] = {}
    kept: dict[tuple[str, float], int] = {}
    for block, numbers, sparsities in zip(groups, counts, wanted):
        for group, count, sparsity in zip(block, numbers, sparsities):
            key = group.kind, sparsity
            first.setdefault(key, group)
            units[key] = units.get(key, 0) + group.units
            kept[key] = kept.get(key, 0) + count
    got = {key: 1 - kept[key] / units[key] for key in units}
    steps = {key: f"{key[0]} go in steps of one in {_pool(g)}, {_offer(reachable(g))}" for key, g in first.items()}
    idle = [key for key, share in got.items() if key[1] and not share]
    if idle and (by_name or not any(got.values())):
        amounts = sorted({sparsity for _, sparsity in idle})
        raise ConfigError(
            f"sparsity {' and '.join(f'{s:g}' for s in amounts)} would remove nothing: "
            + "; ".join(dict.fromkeys(steps[key] for key in idle))
        )
    return [
        f"sparsity {key[1]:g} was asked for, {share:.3g} of the {key[0]} are removed: they"
        + steps[key].removeprefix(key[0])
        for key, share in got.items()
        if abs(share - key[1]) > TOLERANCE
    ]


def _pool(group: Coupled) -> int:
    return group.units // len(group.pools.unique())


def _offer(values: list[float]) -> str:
    """The sparsities that can be reached, all of a few, else the first ones and the last."""
    if not values:
        return "so none of them can go"
    shown = [f"{value:.3g}" for value in values]
    if len(shown) > 12:
        shown = [*shown[:3], "…", shown[-1]]
    return "so these sparsities can be reached: " + ", ".join(shown)


def choose(group: Coupled, scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest scores, equally many from every pool; ties keep the lower index. int64, ascending."""
    pools = _pools(group)
    kept = []
    for pool in pools:
        order = scores[pool].sort(descending=True, stable=True).indices[: count // len(pools)]
        kept.append(pool[order])
    return torch.cat(kept).sort().values


def global_counts(members: list[Member], sparsity: float) -> list[int]:
    """Units kept per member so that a fraction ``sparsity`` of all prunable parameters goes (FLAP's AL-AM).

    Scores are standardised within each member (arXiv 2312.11983) and units of all of them dropped in ascending order,
    each counting its parameters, heads and neurons alike. A step drops one unit from every pool of a member, and from
    every expert of a layer, so that their sizes stay equal; each keeps at least one.
    """
    stacks: dict[tuple, list[int]] = {}
    for i, member in enumerate(members):
        stacks.setdefault((member.block, member.group.consumer.path), []).append(i)
    steps = []  # score, size, stack
    for key, rows in stacks.items():
        standard, size = [], 0
        for i in rows:
            member = members[i]
            scores = member.scores.double()
            z = (scores - scores.mean()) / scores.std().clamp(min=1e-12) if len(scores) > 1 else scores * 0
            standard += [z[pool].sort().values for pool in _pools(member.group)]
            size += member.unit_size * len(_pools(member.group))
        tiers = torch.stack(standard).mean(0)[:-1]
        steps += [(float(z), size, key) for z in tiers]
    total = sum(m.unit_size * m.group.units for m in members)
    dropped, gone = dict.fromkeys(stacks, 0), 0
    for _, size, key in sorted(steps, key=lambda s: s[0]):
        if gone + size / 2 > sparsity * total:
            break
        dropped[key] += 1
        gone += size
    counts = []
    for member in members:
        group, pools = member.group, len(_pools(member.group))
        each = group.units // pools
        kept = each - dropped[member.block, group.consumer.path]
        if group.consumer.expert is not None:
            kept = _expert_width(kept, each)
        counts.append(kept * pools)
    return counts
