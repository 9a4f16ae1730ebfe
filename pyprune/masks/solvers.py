"""Masks and layer-wise reconstruction of the matrices that read one input: magnitude, Wanda, SparseGPT's one-sided OBS
sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune import ops
from pyprune.config import ConfigError, PruneConfig
from pyprune.effects import needs_factor
from pyprune.execution.replays import Replays
from pyprune.masks.refit import Refit, damped, exact_refit
from pyprune.masks.statistics import Statistics
from pyprune.ops import guards

DAMPING_TRIES = 4
PANEL_BLOCKS = 4


@dataclass
class Factor:
    """Upper Cholesky factor of the inverse Hessian of one input group."""

    r: Tensor
    """float32 ``[c, c]``, upper, ``RᵀR = H⁻¹``."""
    dead: Tensor
    """bool ``[c]``: columns whose input is always zero."""
    damping: float
    """λ that succeeded, relative to the mean diagonal."""
    failed: Tensor | None = None
    """bool scalar on the device: no factor was found; what is here is the identity's. None where that was looked at."""


@dataclass
class Solved:
    """A pruned matrix, its keep mask, and the damping used (None where no Hessian was needed)."""

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    swept: Tensor | None = None
    """The sweep's weights, where a refit followed it."""
    refit: Refit | None = None
    wrong: dict[str, Tensor] = field(default_factory=dict)
    """By op, whether its result fails its guard: bool scalars on the device."""


def inverse_factor(
    gram: Tensor, count: Tensor | int, damping: float, name: str = "layer", *, look: bool = True
) -> Factor:
    """``R`` with ``RᵀR = H⁻¹``, ``H = G/n + λ·mean(diag G/n)·I``, by one factorisation.

    With J the index reversal and ``J H J = L Lᵀ``, ``R = J L⁻¹ J``. A failed factorisation raises λ tenfold, at most
    to ``DAMPING_TRIES`` values, then ConfigError with the layer's name. Dead columns get ``H_jj = 1``.
    look: ask the device whether the factorisation succeeded, which waits for it; otherwise ``failed`` will tell.
    """
    diagonal = gram.diagonal() / count
    dead = diagonal == 0
    mean = diagonal.mean()
    diagonal = torch.where(dead, 1, diagonal).flip(0)
    flipped = gram.flip(0, 1).div_(count)  # freed as soon as it is factored: wide layers make these matrices large
    for attempt in range(DAMPING_TRIES):
        used = damping * 10**attempt
        flipped.diagonal().copy_(diagonal + used * mean)
        factor, info = torch.linalg.cholesky_ex(flipped)
        if not look:
            failed = info != 0
            factor.masked_fill_(failed, 0).diagonal().masked_fill_(failed, 1)
            del flipped
            return Factor(invert_lower(factor).flip(0, 1), dead, used, failed)
        if int(info) == 0:
            del flipped
            return Factor(invert_lower(factor).flip(0, 1), dead, used)
    raise ConfigError(
        f"the Hessian of {name} has no Cholesky factor with damping up to {used:g} of its mean diagonal; "
        "use more calibration tokens or a larger damping"
    )


def invert_lower(factor: Tensor, leaf: int = 128) -> Tensor:
    """Inverse of a lower triangular matrix ``[n, n]`` by halves, so that nearly all of it is matrix products.

    A triangular solve against the identity does three times the work, most of it on zeros.
    """
    out = torch.zeros_like(factor)
    _invert_lower(factor, out, 0, len(factor), leaf)
    return out


def _invert_lower(factor: Tensor, out: Tensor, start: int, stop: int, leaf: int) -> None:
    # a function of its own: a closure that calls itself is a reference cycle and would keep every factor alive
    if stop - start <= leaf:
        identity = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
        out[start:stop, start:stop] = torch.linalg.solve_triangular(
            factor[start:stop, start:stop], identity, upper=False
        )
        return
    middle = (start + stop) // 2
    _invert_lower(factor, out, start, middle, leaf)
    _invert_lower(factor, out, middle, stop, leaf)
    below = factor[middle:stop, start:middle] @ out[start:middle, start:middle]
    torch.mm(out[middle:stop, middle:stop], below, out=out[middle:stop, start:middle]).neg_()


def obs_prune(
    stack: Tensor,
    factor: Factor,
    *,
    sparsity: float | Sequence[float] | None = None,
    nm: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    rows: Sequence[int] | None = None,
    column_block: int = 128,
) -> Tensor:
    """SparseGPT's sweep over whole matrices that read one input, in place; returns the keep mask (arXiv 2301.00774).

    One-sided: columns go from left to right, and a column's error is made up for by later columns only. The best
    weights on the same mask are :func:`pyprune.masks.refit.exact_refit`'s.
    stack: float32 ``[out, in]``, the matrices' rows below each other; rows: of each of them, of one alone if None.
    Exactly one of ``sparsity`` (of all matrices or of each; chosen per matrix and column block), ``nm`` and ``mask``
    (of the stack).
    Column blocks come in panels of ``PANEL_BLOCKS``: a block's errors update the rest of its panel, a panel's the
    columns right of it by one product, so that these are read and written once per panel.
    """
    rows, columns = [len(stack)] if rows is None else list(rows), stack.shape[1]
    stack.masked_fill_(factor.dead, 0)  # an index by a bool mask would wait for the device
    if nm is not None:
        column_block = max(nm[1], column_block // nm[1] * nm[1])
    panel = PANEL_BLOCKS * column_block
    scale, counts = 1 / factor.r.diagonal(), []
    if sparsity is not None:
        asked = sparsity if isinstance(sparsity, Sequence) else [sparsity] * len(rows)
        counts = [drop_counts(own, count, columns, column_block) for own, count in zip(asked, rows, strict=True)]
    kept: list[Tensor] = []
    errors: list[Tensor] = []
    for number, start in enumerate(range(0, columns, column_block)):
        stop = min(start + column_block, columns)
        first = start // panel * panel
        last = min(first + panel, columns)
        own, block = slice(start, stop), stack[:, start:stop]
        choice: dict = {"nm": nm}
        if nm is None:
            choice = {"mask": mask[:, own] if mask is not None else select(block, rows, counts, number, scale[own])}
        chosen, error, _ = ops.obs_sweep(block, factor.r[own, own], **choice)
        kept.append(chosen if nm is not None else choice["mask"])
        errors = [error] if start == first else [*errors, error]
        if stop < last:
            ops.trailing_update(stack[:, stop:last], error, factor.r[own, stop:last])
        elif stop < columns:
            ops.trailing_update(stack[:, stop:], torch.cat(errors, 1), factor.r[first:stop, stop:])
    return torch.cat(kept, 1) if kept else torch.empty(stack.shape, dtype=torch.bool, device=stack.device)


def select(block: Tensor, rows: list[int], counts: list[list[int]], number: int, scale: Tensor) -> Tensor:
    """Keep mask of a column block, the lowest ``|w| / r_jj`` of each matrix dropped, as many as ``counts`` says."""
    masks = [
        ops.select_mask(part, own[number], scale=scale, scope="matrix") for part, own in zip(block.split(rows), counts)
    ]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def drop_counts(sparsity: float, rows: int, columns: int, column_block: int) -> list[int]:
    """How many weights each column block drops: the running total stays the matrix's whatever the blocks round to."""
    counts: list[int] = []
    for start in range(0, columns, column_block):
        stop = min(start + column_block, columns)
        counts.append(min(round(sparsity * rows * stop) - sum(counts), rows * (stop - start)))
    return counts


def sweep_guards(start: Tensor, weight: Tensor, keep: Tensor, factor: Factor, config: PruneConfig) -> dict[str, Tensor]:
    """Guards of the sweep of one matrix, which chose its mask or was given one: its weights, its count, its first
    choice. start: what it began with, in any type."""
    wrong = guards.swept(start, weight, keep, factor.r, factor.dead)
    if config.method != "sparsegpt" or not start.numel():
        return {"obs_sweep": wrong}
    scale = torch.where(factor.dead, 0, 1 / factor.r.diagonal())
    if config.nm:
        first = slice(0, config.nm[1])
        wrong = (
            wrong
            | guards.counted(keep, config.nm)
            | guards.chosen(start[:, first], keep[:, first].contiguous(), scale[first], nm=config.nm)
        )
        return {"obs_sweep": wrong}
    rows, columns = start.shape
    counts = drop_counts(config.one_sparsity, rows, columns, config.column_block)
    first = slice(0, min(config.column_block, columns))
    chosen = guards.chosen(start[:, first], keep[:, first], scale[first], total=keep[:, first].numel() - counts[0])
    return {"obs_sweep": wrong, "select_mask": chosen | (torch.count_nonzero(keep) != keep.numel() - sum(counts))}


def mask_guards(weight: Tensor, mask: Tensor, config: PruneConfig, statistics: Statistics | None) -> dict[str, Tensor]:
    """Guards of :func:`score_mask`."""
    wanda = config.method == "wanda"
    scale = statistics.norm if wanda and statistics is not None else None
    if config.nm:
        return {"nm_mask": guards.counted(mask, config.nm) | guards.chosen(weight, mask, scale, nm=config.nm)}
    size = weight.shape[1] if wanda else weight.numel()
    kept = size - round(config.one_sparsity * size)
    if wanda:
        return {"select_mask": guards.chosen(weight, mask, scale, per_row=kept)}
    return {"select_mask": guards.chosen(weight, mask, scale, total=kept)}


def score_mask(weight: Tensor, config: PruneConfig, statistics: Statistics | None) -> Tensor:
    """Keep mask by magnitude (whole matrix) or Wanda (per output row), unstructured or N:M."""
    wanda = config.method == "wanda"
    if wanda and statistics is None:
        raise ValueError("Wanda's scores need the statistics of the weight's inputs")
    scale = statistics.norm if wanda and statistics is not None else None
    if config.nm:
        return ops.nm_mask(weight, *config.nm, scale=scale)
    size = weight.shape[1] if wanda else weight.numel()
    return ops.select_mask(weight, round(config.one_sparsity * size), scale=scale, scope="row" if wanda else "matrix")


def dense_target_start(weight: Tensor, statistics: Statistics, factor: Factor) -> Tensor:
    """Best dense weights for ``X̄ Wᵀ ≈ X W'ᵀ``: ``W' = W + W (C − G) (G + λ)⁻¹``, ``C = X̄ᵀX`` (GP of arXiv 2406.15524).

    The sweep that starts from W' fits the dense stream's outputs. The ridge pulls towards W, so equal streams give W.
    """
    if statistics.cross is None:
        raise ValueError("dense targets need the cross Gram of the two streams")
    difference = (statistics.cross - statistics.gram) / statistics.count
    return weight + (weight @ difference) @ factor.r.T @ factor.r


def replayed(stack: Tensor, factor: Factor, replays: Replays, *, mask: Tensor | None = None, **choice) -> Tensor:
    """:func:`obs_prune` of a stack that lies in its room, as a GPU has recorded it for an earlier block."""
    shape = stack.shape
    r, dead = replays.room("factor", factor.r.shape), replays.room("dead", factor.dead.shape, torch.bool)
    keep = replays.room("keep", shape, torch.bool)
    r.copy_(factor.r)
    dead.copy_(factor.dead)
    if mask is not None:
        choice["mask"] = keep.copy_(mask)

    def sweep() -> None:
        keep.copy_(obs_prune(stack, Factor(r, dead, factor.damping), **choice))

    told = {name: tuple(value) if isinstance(value, list) else value for name, value in choice.items()}
    taken = [ops.taken(op, stack.device.type) for op in SWEPT_BY]
    replays((shape, mask is None, *taken, *(told | {"mask": None}).items()), sweep)
    return keep.clone()


SWEPT_BY = ("obs_sweep", "select_mask/matrix", "trailing_update")
"""What a sweep runs through."""


def recordable(replays: Replays) -> bool:
    """Whether a sweep is a few kernels per column block: the reference's are a few per column, too many to record."""
    kind = replays.device.type
    return not replays.off and all(ops.taken(op, kind) != "reference" for op in SWEPT_BY[:2])


def solve(
    weights: Sequence[Tensor],
    configs: Sequence[PruneConfig],
    statistics: Statistics | None,
    factor: Factor | None,
    replays: Replays | None = None,
) -> Iterator[Solved]:
    """Prune the matrices ``[out, in]`` of one input group as their configurations say, which differ in the sparsity
    alone; the input tensors are left alone. They are swept together: a group costs the launches of one matrix.

    factor: of the statistics' Gram; None where scores alone choose and nothing is solved. replays: where the sweep is
    recorded; weights are then overwritten by the next group's.
    """
    config = configs[0]
    if factor is None or statistics is None or not needs_factor(config):
        for weight, own in zip(weights, configs):
            yield scored(weight.float().contiguous(), own, statistics)
        return
    rows = [len(weight) for weight in weights]
    shape = sum(rows), weights[0].shape[1]
    stack = torch.empty(shape, device=weights[0].device) if replays is None else replays.room("stack", shape)
    for part, weight in zip(stack.split(rows), weights):
        part.copy_(weight)
    choice: dict = {"nm": config.nm} if config.nm else {"sparsity": [own.one_sparsity for own in configs]}
    wrong: list[dict[str, Tensor]] = [{} for _ in weights]
    if config.method != "sparsegpt":
        masks = [score_mask(part, own, statistics) for part, own in zip(stack.split(rows), configs)]
        wrong = [mask_guards(*each, statistics) for each in zip(stack.split(rows), masks, configs)]
        choice = {"mask": torch.cat(masks)}
    starts = list(weights)
    if statistics.cross is not None:
        starts = [dense_target_start(part, statistics, factor) for part in stack.split(rows)]
        torch.cat(starts, out=stack)
    choice |= {"rows": rows, "column_block": config.column_block}
    keep = obs_prune(stack, factor, **choice) if replays is None else replayed(stack, factor, replays, **choice)
    h = damped(statistics.gram, statistics.count, factor.damping) if config.reconstruct == "refit" else None
    for k, (updated, mask) in enumerate(zip(stack.split(rows), keep.split(rows))):
        wrong[k] |= sweep_guards(starts[k], updated, mask, factor, configs[k])
        if config.reconstruct == "none":
            updated = masked(weights[k].float(), mask)
        solved = Solved(updated, mask, factor.damping, wrong=wrong[k])
        yield solved if h is None else refitted(solved, starts[k].float().masked_fill(factor.dead, 0), h)


def scored(weight: Tensor, config: PruneConfig, statistics: Statistics | None) -> Solved:
    """A matrix whose mask comes from scores, its other weights as they were. weight: float32 ``[out, in]``."""
    mask = score_mask(weight, config, statistics)
    return Solved(masked(weight, mask), mask, wrong=mask_guards(weight, mask, config, statistics))


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """A float32 matrix with 0 where the mask drops; by its bits, in a fifth of the time of ``masked_fill`` on a CPU."""
    return mask.to(torch.int32).neg_().bitwise_and_(weight.view(torch.int32)).view(torch.float32)


def refitted(swept: Solved, dense: Tensor, h: Tensor) -> Solved:
    """A swept matrix with the best weights on its mask towards ``dense``; h: the damped Hessian."""
    found = exact_refit(dense, swept.mask, h, swept.weight)
    return Solved(found.weight, swept.mask, swept.damping, swept.weight, found, swept.wrong | found.wrong)
