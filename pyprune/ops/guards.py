"""Watches over the ops of a run: cheap proofs, on the run's own data, that a result is right.

A kernel that passed its trials can still fail at a size, a stride or a moment that they did not have. Each function
looks at an op's result and returns a bool scalar on the device, True if it is wrong; nothing waits for it here. What
cannot be judged because the data themselves are not finite is not called wrong.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROWS = 4
"""Rows of a weight that are looked at where looking at all of them would cost as much as the op."""
GRAM, MOMENTS, SWEEP, ROUNDING = 1e-3, 1e-3, 1e-3, 1e-5
"""Relative errors allowed; right kernels stay thirty times below and more."""


@functools.lru_cache(maxsize=64)
def _signs(columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return (torch.randint(0, 2, (columns,), generator=generator) * 2.0 - 1).to(device)


def _some(count: int, wanted: int, device: torch.device) -> Tensor:
    """Places spread over ``count``."""
    return torch.arange(min(wanted, count), device=device) * count // max(1, min(wanted, count))


def gram(total: Tensor, x: Tensor, count: Tensor, precision: str = "float32") -> Tensor:
    """``total`` is to be ``xᵀx`` and ``count`` the tokens: a random vector v goes through it and through ``xᵀ(xv)``.

    Columns are weighed by their own norms, so that one loud column hides no other.
    """
    wide = (x.to(torch.bfloat16) if precision == "bfloat16" else x).float()
    diagonal = total.diagonal()
    size = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    v = _signs(x.shape[1], x.device) * size
    through = wide @ v
    want, got = (through @ wide) * size, (total @ v) * size
    close = ((got - want).abs() <= GRAM * through.norm()).all()
    return want.isfinite().all() & ~(close & (count == len(x)))


def moments(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """They are to be those of ``x``: a few columns in float64."""
    columns = _some(x.shape[1], 2 * ROWS, x.device)
    wide = x[:, columns].double()
    true, square = wide.mean(0), wide.square().mean(0)
    centred = (wide - true).square().sum(0)
    close = ((mean[columns] - true).abs() <= MOMENTS * square.sqrt()).all() & (
        (m2[columns] - centred).abs() <= MOMENTS * len(x) * square
    ).all()
    return square.isfinite().all() & ~(close & (count == len(x)))


def _disordered(score: Tensor, keep: Tensor) -> Tensor:
    """Whether a row of ``score`` keeps a lower one than it drops."""
    dropped = score.masked_fill(keep, -1).amax(1)
    kept = score.masked_fill(~keep, torch.inf).amin(1)
    return (dropped > kept * (1 + 1e-5)).any()


def chosen(
    w: Tensor,
    keep: Tensor,
    scale: Tensor | None,
    *,
    nm: tuple[int, int] | None = None,
    per_row: int = 0,
    total: int | None = None,
) -> Tensor:
    """``keep`` is to have the largest ``|w| · scale`` of every m, a row or all: exactly ``per_row`` or ``total``."""
    if not w.numel():
        return torch.zeros((), dtype=torch.bool, device=w.device)
    if total is not None:
        score = w.abs() if scale is None else w.abs() * scale
        return (torch.count_nonzero(keep) != total) | _disordered(score.reshape(1, -1), keep.reshape(1, -1))
    rows = _some(len(w), 16 * ROWS, w.device)
    score, part = w[rows].abs(), keep[rows]
    score = score if scale is None else score * scale
    if nm is None:
        return (keep.sum(1) != per_row).any() | _disordered(score, part)
    return _disordered(score.reshape(-1, nm[1]), part.reshape(-1, nm[1]))


def counted(keep: Tensor, nm: tuple[int, int]) -> Tensor:
    """``keep`` is to have n in every m consecutive columns."""
    n, m = nm
    if m == 4:  # four bytes are one integer, whose bytes add up in the highest by one product
        return (((keep.view(torch.int32) * 0x01010101) >> 24) != n).any()
    return (keep.view(torch.uint8).view(-1, m).sum(1, dtype=torch.uint8) != n).any()


def swept(start: Tensor, weight: Tensor, keep: Tensor, r: Tensor, dead: Tensor | None = None) -> Tensor:
    """``weight`` is to be what the OBS sweep makes of ``start`` on this mask: zero where it drops, and of a few rows
    the change is ``e r`` with an e that is zero where the mask keeps. There is one such weight. Columns that are
    ``dead`` count as zero from the start."""
    rows = _some(len(start), ROWS, start.device)
    before = start[rows] if dead is None else start[rows].masked_fill(dead, 0)
    change = before - weight[rows]
    error = torch.linalg.solve_triangular(r, change, upper=True, left=False)
    rest = (error * keep[rows]) @ r
    made_up = (change * keep[rows]).norm(dim=1)
    far = ~(rest.norm(dim=1) <= SWEEP * made_up + ROUNDING * before.norm(dim=1)).all()
    return far | weight.ne(0).gt(keep).any()
