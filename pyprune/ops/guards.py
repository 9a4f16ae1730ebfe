"""Watches over the ops of a run: cheap proofs, on the run's own data, that a result is right.

A kernel that passed its trials can still fail at a size, a stride or a moment that they did not have. Each function
looks at an op's result and returns a bool scalar on the device, True if it is wrong; nothing waits for it here. What
cannot be judged because the data themselves are not finite is not called wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from pyprune.ops import reference

ROWS = 4
"""Rows of a weight that are looked at where looking at all of them would cost as much as the op."""
HEADS = 8
"""Heads of an attention that are looked at."""
GRAM, MOMENTS, SWEEP, SOLVE, ATTENTION, ROUNDING = 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-5
"""Relative errors allowed; right kernels stay thirty times below and more."""


class Verdicts:
    """Collects what guards say of ops, on the device."""

    def __init__(self) -> None:
        self.wrong: dict[str, Tensor] = {}

    def add(self, op: str, bad: Tensor) -> None:
        self.wrong[op] = self.wrong[op] | bad if op in self.wrong else bad


def at_fault(told: Iterable[dict[str, Tensor]]) -> set[str]:
    """Ops that any of these verdicts calls wrong; waits for the device once."""
    flat = [(op, bad) for wrong in told for op, bad in wrong.items()]
    return {op for (op, _), bad in zip(flat, torch.stack([bad for _, bad in flat]).tolist()) if bad} if flat else set()


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


def summed(sums: Tensor, x: Tensor, squares: Tensor) -> Tensor:
    """``sums`` is to be ``Σ x`` over tokens; squares: ``Σ x²``, the diagonal of the Gram matrix."""
    wide = x.float()
    far = (sums - wide.new_ones(len(wide)) @ wide).abs() > GRAM * (len(wide) * squares).sqrt()
    return squares.isfinite().all() & (far.any() | ~sums.isfinite().all())


def cross_gram(total: Tensor, y: Tensor, x: Tensor, squares: Tensor) -> Tensor:
    """``total`` is to be ``yᵀx``: a random vector v goes through it and through ``yᵀ(xv)``, columns weighed by their
    own norms; squares: ``Σ y²``."""
    y, x = y.float(), x.float()
    norms = (x.new_ones(len(x)) @ x.square()).sqrt()
    v = _signs(x.shape[1], x.device) / norms.clamp(min=1e-30)
    through = x @ v
    close = ((total @ v - through @ y).abs() <= GRAM * squares.sqrt() * through.norm()).all()
    return through.isfinite().all() & squares.isfinite().all() & ~close


def product(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out [rows, n]`` is to be ``x wᵀ + bias``, all float32: a few rows are multiplied again."""
    rows = _some(len(x), ROWS, x.device)
    part = x[rows]
    want = part @ w.T if bias is None else torch.addmm(bias, part, w.T)
    allowed = ROUNDING * part.norm(dim=1)[:, None] * torch.linalg.vector_norm(w, dim=1)
    close = ((out[rows] - want).abs() <= allowed + ROUNDING * want.abs()).all()
    return want.isfinite().all() & ~close


def _far(got: Tensor, want: Tensor, size: Tensor) -> Tensor:
    """Whether numbers of one type differ by more than roundings to it of what is ``size`` large."""
    allowed = (ROUNDING + 4 * (torch.finfo(want.dtype).eps if want.dtype != torch.float32 else 0)) * size.float()
    return want.isfinite().all() & ~((got.float() - want.float()).abs() <= allowed).all()


def normed(out: Tensor, x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """``out`` is to be the RMSNorm of ``x [..., c]`` in one of its forms: a few rows by the reference."""
    rows = _some(x.shape[:-1].numel(), ROWS, x.device)
    part, got = x.reshape(-1, x.shape[-1])[rows], out.reshape(-1, x.shape[-1])[rows]
    want = reference.rms_norm(part, weight, eps, form=form)
    return _far(got, want, want.abs())


def turned(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``out [batch, heads, tokens, d]`` is to be ``x`` under the rotary embedding: all heads of a few tokens."""
    batch, tokens = x.shape[0], x.shape[2]
    place, token = torch.arange(ROWS, device=x.device) % batch, _last(tokens, ROWS, x.device)
    part, got = x[place, :, token][:, :, None], out[place, :, token][:, :, None]  # [rows, heads, 1, d]
    c, s = (table.expand(batch, -1, -1)[place, token][:, None] for table in (cos, sin))
    size = reference.rotary(part, c, 0 * s).abs() + reference.rotary(part, 0 * c, s).abs()
    return _far(got, reference.rotary(part, c, s), size)


def gated(out: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """``out`` is to be ``silu(gate) · up``, ``[..., c]``: a few rows by the reference."""
    rows = _some(gate.shape[:-1].numel(), ROWS, gate.device)
    part, other, got = (t.reshape(-1, t.shape[-1])[rows] for t in (gate, up, out))
    want = reference.swiglu(part, other)
    return _far(got, want, want.abs())


def _last(count: int, wanted: int, device: torch.device) -> Tensor:
    """Places spread over ``count``, the last one first."""
    return count - 1 - torch.arange(wanted, device=device) * count // max(1, wanted)


def attended(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``out [b, h, t, e]`` is to be the attention that :func:`pyprune.ops.attention` describes: by the formula, in
    float32, the last query row and another one of each of some heads, of batch elements in turn."""
    batch, heads, tokens, d = q.shape
    some = _some(heads, HEADS, q.device)
    head, last = some.repeat(2), torch.full_like(some, tokens - 1)
    place, token = (
        torch.arange(len(head), device=q.device) % batch,
        torch.cat([last, _last(tokens, len(some), q.device)]),
    )
    of_keys = head * k.shape[1] // heads
    scores = torch.einsum("rsd,rd->rs", k[place, of_keys].float(), q[place, head, token].float())
    scores = scores * (d**-0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > token[:, None], -torch.inf)
    if mask is not None:
        seen = mask.expand(batch, heads, tokens, k.shape[2])[place, head, token]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen.float()
    none = scores.amax(1, keepdim=True) == -torch.inf
    weights = scores.masked_fill(none, 0).softmax(1).masked_fill(none, 0)
    values = v[place, of_keys].float()
    want, size = (torch.einsum("rs,rse->re", weights, t) for t in (values, values.abs()))
    allowed = ATTENTION + 2 * (torch.finfo(q.dtype).eps if q.dtype != torch.float32 else 0)
    off = (out[place, head, token].float() - want).norm(dim=1)
    return want.isfinite().all() & ~(off <= allowed * size.norm(dim=1)).all()


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
        score = w.float().abs() if scale is None else w.float().abs() * scale
        return (torch.count_nonzero(keep) != total) | _disordered(score.reshape(1, -1), keep.reshape(1, -1))
    rows = _some(len(w), 16 * ROWS, w.device)
    score, part = w[rows].float().abs(), keep[rows]
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
    before = start[rows].float()
    before = before if dead is None else before.masked_fill(dead, 0)
    change = before - weight[rows]
    error = torch.linalg.solve_triangular(r, change, upper=True, left=False)
    rest = (error * keep[rows]) @ r
    made_up = (change * keep[rows]).norm(dim=1)
    far = ~(rest.norm(dim=1) <= SWEEP * made_up + ROUNDING * before.norm(dim=1)).all()
    return far | (torch.count_nonzero(weight.bool() > keep) > 0)


def refitted(dense: Tensor, weight: Tensor, mask: Tensor, h: Tensor, residual: Tensor, first: Tensor) -> Tensor:
    """``residual`` is to be ``(dense − weight) h`` where the mask keeps, of which a few rows are computed again.

    Columns are weighed by the diagonal of h, so that a loud one hides no other. first: the residual's norms, so
    weighed, when the search began to update it product by product.
    """
    rows, size = _some(len(dense), ROWS, dense.device), h.diagonal().rsqrt()
    off = residual[rows] - ((dense[rows] - weight[rows]) @ h) * mask[rows]
    allowed = SWEEP * first[rows] + ROUNDING * len(h) ** 0.5 * (dense[rows] / size).norm(dim=1)
    return h.isfinite().all() & ~((off * size).norm(dim=1) <= allowed).all()


def solved(a: Tensor, b: Tensor, damping: Tensor, solution: Tensor, good: Tensor) -> Tensor:
    """``solution [n, k]`` is to be ``(a + λI)⁻¹ b``, and ``good`` (bool scalar) what its op said of it; damping: λ, a
    float64 scalar.

    A few of its columns, and a random combination of all, are solved again in float64 and compared in the norm of the
    system; every column is at most ``‖b‖/λ`` long.
    """
    columns, v = _some(b.shape[1], ROWS, b.device), _signs(b.shape[1], b.device).double()
    want, got = (torch.cat([t[:, columns].double(), (t.double() @ v)[:, None]], 1) for t in (b, solution))
    system = a.double()
    system.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(system)
    true = torch.cholesky_solve(want, factor)
    off, size = ((factor.T @ t).norm(dim=0) for t in (got - true, true))
    # rounding grows with the root of the condition, which the damping bounds; where it leaves nothing, no one is wrong
    condition, eps = system.diagonal().sum() / damping.clamp(min=1e-30), torch.finfo(torch.float32).eps
    allowed = SOLVE + 32 * eps * condition.sqrt()
    longest = 1.01 * torch.linalg.vector_norm(b, dim=0) / damping.clamp(min=1e-30)
    right = (off <= allowed * size).all() & (torch.linalg.vector_norm(solution, dim=0) <= longest).all() & good
    return (info == 0) & want.isfinite().all() & (condition * eps < 0.5) & ~right


def interpolated(weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, updated: Tensor) -> Tensor:
    """``updated [r, K]`` is to be ``W_K + W_D Qᵀ``: a random vector goes through both."""
    v = _signs(len(keep), weight.device)
    kept, dropped = weight[:, keep].float(), weight[:, drop].float()
    change = dropped @ (q.T @ v)
    allowed = ROUNDING * (kept.norm(dim=1) + dropped.norm(dim=1) * q.norm()) * v.norm()
    close = ((updated @ v - kept @ v - change).abs() <= allowed).all()
    return change.isfinite().all() & ~close


def units(kept: Tensor, pools: Tensor, count: int) -> bool:
    """Whether ``kept`` (int64, on the host) is not ``count`` units in ascending order, equally many of every pool."""
    names = pools.unique()
    ascending = bool((kept[1:] > kept[:-1]).all())
    even = all(int((pools[kept] == pool).sum()) == count // len(names) for pool in names)
    return not (len(kept) == count and ascending and even)
