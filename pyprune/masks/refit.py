"""Exact refit: the best kept weights of one matrix on a fixed mask, row by row the least-squares solution.

    minimise over w on the support S of its row   (w − w̄)ᵀ H (w − w̄)        w_S = H_SS⁻¹ (H w̄)_S

The OBS sweep only lets later columns make up for a column's error, so its error is about twice this one's. Narrow
matrices: a batch of Cholesky solves. Wide ones: conjugate gradients on all rows at once, one product with H per step,
``2 · out · in²`` FLOPs where the Cholesky factors of all rows would take ``out · in³ / 3``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune import ops
from pyprune.config import ConfigError
from pyprune.ops import guards

NARROW = 128
"""Columns up to which the rows' systems are factored: about there both ways take equally long on a CPU."""
SYSTEM_ELEMENTS = 2**24
"""Elements of the systems that are factored together."""
TOLERANCE = 1e-4
"""The steps end when ``CHECK`` of them together lowered the matrix's objective by less than this part of it."""
CHECK = 8
"""Steps between two looks at the objective, each of which waits for the device."""
MOST_STEPS = 400
USUAL_STEPS = 50
"""Steps that a matrix of a language model takes; what a plan counts with."""


@dataclass
class Refit:
    """A matrix refitted on its mask."""

    weight: Tensor
    """float32 ``[out, in]``, exact zeros off the mask."""
    steps: int = 0
    """Steps of conjugate gradients; 0 where the systems were factored."""
    converged: bool = True
    """False where ``MOST_STEPS`` were not enough for ``TOLERANCE``."""
    wrong: dict[str, Tensor] = field(default_factory=dict)
    """By op, whether its result fails its guard: bool scalars on the device."""


def damped(gram: Tensor, count: Tensor | int, damping: float) -> Tensor:
    """``H = G/n + λ·mean(diag G/n)·I``, dead columns with ``H_jj = 1``, as :func:`pyprune.masks.solvers.inverse_factor`
    factors it."""
    h = gram / count
    diagonal = h.diagonal()
    extra = damping * diagonal.mean()
    diagonal.copy_(torch.where(diagonal == 0, 1, diagonal) + extra)
    return h


def exact_refit(dense: Tensor, mask: Tensor, h: Tensor, start: Tensor) -> Refit:
    """Best weights on a fixed mask for the objective ``tr((W − W̄) H (W − W̄)ᵀ)``.

    dense: W̄ float32 ``[out, in]``; mask bool; h float32 ``[in, in]``, positive definite; start float32 ``[out, in]``:
    zero off the mask, where the search begins (the sweep's result). No row's objective rises.
    """
    if dense.shape[1] <= NARROW:
        return _factored(dense, mask, h)
    return _searched(dense, mask, h, start)


def _factored(dense: Tensor, mask: Tensor, h: Tensor) -> Refit:
    """One system per row, in which the dropped columns are replaced by those of the identity."""
    target = ops.linear(dense, h)
    wrong = {"linear": guards.product(target, dense, h)}
    target.masked_fill_(~mask, 0)
    solutions, infos = [], []
    for keep, right in zip(*(t.split(max(1, SYSTEM_ELEMENTS // h.numel())) for t in (mask, target))):
        system = h * (keep[:, :, None] & keep[:, None, :])
        system.diagonal(dim1=1, dim2=2).add_((~keep).to(h.dtype))
        solution, info = ops.cholesky_solve(system, right[:, :, None].contiguous())
        solutions.append(solution[:, :, 0].masked_fill(~keep, 0))
        infos.append(info)
    info = torch.cat(infos)
    if bool(info.any()):
        raise ConfigError(f"the refit of row {int(info.argmax())} is singular; use a larger damping")
    return Refit(torch.cat(solutions), wrong=wrong)


def _searched(dense: Tensor, mask: Tensor, h: Tensor, start: Tensor) -> Refit:
    """Conjugate gradients, preconditioned by the diagonal; every row has step lengths of its own."""
    inverse = 1 / h.diagonal()
    weight, delta = start.clone(), dense - start
    residual = ops.linear(delta, h)
    objective = (delta * residual).sum().double()
    del delta
    residual.masked_fill_(~mask, 0)
    first = (residual * inverse.sqrt()).norm(dim=1)
    direction = residual * inverse
    size = (residual * direction).sum(1, keepdim=True)
    lowered = torch.zeros_like(objective)
    converged = False
    for step in range(1, MOST_STEPS + 1):
        product = ops.linear(direction, h)
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, size / curvature, 0)
        weight.addcmul_(direction, length)
        residual.addcmul_(product.masked_fill_(~mask, 0), length, value=-1)
        lowered += (length * size).sum()
        before, ahead = size, residual * inverse
        size = (residual * ahead).sum(1, keepdim=True)
        direction.mul_(torch.where(before > 0, size / before, 0)).add_(ahead)
        if step % CHECK == 0:
            objective -= lowered
            converged = bool(lowered <= TOLERANCE * objective)
            if converged:
                break
            lowered.zero_()
    wrong = {"linear": guards.refitted(dense, weight, mask, h, residual, first)}
    return Refit(weight, step, converged, wrong)
