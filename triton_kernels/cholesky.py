"""Batched Cholesky factors and solves of SPD matrices, ``a + damping·I = L Lᵀ``, in blocks of NB columns.

Left-looking: block column k is ``(A_ik − Σ_j L_ij L_kjᵀ) L_kk⁻ᵀ``. The diagonal block is factored and inverted
together, column by column in registers; with its inverse everything else, the substitutions included, is a product.
FLOPs per matrix: n³/3, and 2·n² per right-hand side. Matrices up to ``FUSED`` columns are one program each (one
launch); for larger ones each block column is a launch, a program per block row, each repeating the diagonal block,
which costs less than a launch to share it.

Products are true float32, not tf32 in parts: LIAR's systems have condition numbers of 1e4 and more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tuning import config, pick

FUSED = 256
NB = 32  # wider blocks spill: the factor, its inverse and a product's operands are all in registers
FACTOR = (config(4, NB=NB), config(8, NB=NB))
SOLVE = (config(4, BK=16), config(4, BK=32), config(8, BK=64))
PRECISION = tl.constexpr("ieee")


@triton.jit
def _tile(p, i_r, i_c, stride_r, stride_c, n, NB: tl.constexpr):
    """Block (i_r, i_c) of a matrix with n rows and columns, zero outside: [NB, NB]."""
    o_r = i_r * NB + tl.arange(0, NB)
    o_c = i_c * NB + tl.arange(0, NB)
    return tl.load(
        p + o_r.to(tl.int64)[:, None] * stride_r + o_c.to(tl.int64)[None, :] * stride_c,
        mask=(o_r < n)[:, None] & (o_c < n)[None, :],
        other=0.0,
    )


@triton.jit
def _diagonal_tile(p, i_k, stride_r, stride_c, n, damping, NB: tl.constexpr):
    """Diagonal block from its lower triangle, mirrored, damped, continued by the identity beyond n."""
    o = i_k * NB + tl.arange(0, NB)
    o_low = tl.maximum(o[:, None], o[None, :])
    o_high = tl.minimum(o[:, None], o[None, :])
    b_a = tl.load(p + o_low.to(tl.int64) * stride_r + o_high.to(tl.int64) * stride_c, mask=o_low < n, other=0.0)
    return b_a + tl.where(o[:, None] == o[None, :], tl.where(o < n, damping, 1.0)[:, None], 0.0)


@triton.jit
def _factor(b_a, NB: tl.constexpr):
    """L, L⁻¹ and the order of the first leading minor that is not positive (0: none) of one block."""
    o = tl.arange(0, NB)
    b_l = tl.zeros([NB, NB], dtype=tl.float32)
    b_inverse = tl.where(o[:, None] == o[None, :], 1.0, 0.0)
    failed = 0
    for j in range(NB):
        m_j = o == j
        b_column = tl.sum(tl.where(m_j[None, :], b_a, 0.0), axis=1)
        b_row = tl.sum(tl.where(m_j[:, None], b_a, 0.0), axis=0)
        pivot = tl.sum(tl.where(m_j, b_row, 0.0), axis=0)
        # NaN is not positive either
        failed = tl.where((failed == 0) & ((pivot > 0.0) == 0), j + 1, failed)
        scale = tl.div_rn(1.0, tl.sqrt_rn(pivot))
        b_column = tl.where(o >= j, b_column * scale, 0.0)
        b_a -= b_column[:, None] * (b_row * scale)[None, :]
        b_l = tl.where(m_j[None, :], b_column[:, None], b_l)
        # the same elimination on the identity gives the inverse
        b_done = tl.sum(tl.where(m_j[:, None], b_inverse, 0.0), axis=0) * scale
        b_below = tl.where(o > j, b_column, 0.0)
        b_inverse = tl.where(m_j[:, None], b_done[None, :], b_inverse - b_below[:, None] * b_done[None, :])
    return b_l, b_inverse, failed


@triton.jit
def _block_column(
    a, factor, inverse, damping, i_k, i_first, i_last, n, stride_ar, stride_ac, KEEP_DIAGONAL, NB: tl.constexpr
):
    """Diagonal block i_k and rows i_first … i_last − 1 below it; returns the failed order within the block."""
    b_a = _diagonal_tile(a, i_k, stride_ar, stride_ac, n, damping, NB)
    for i_j in range(i_k):
        b_l = _tile(factor, i_k, i_j, n, 1, n, NB)
        b_a -= tl.dot(b_l, tl.trans(b_l), input_precision=PRECISION)
    b_l, b_inverse, failed = _factor(b_a, NB)
    o = tl.arange(0, NB)
    o_k = i_k * NB + o
    m_k = o_k < n
    if KEEP_DIAGONAL:
        tl.store(factor + o_k.to(tl.int64)[:, None] * n + o_k[None, :], b_l, mask=m_k[:, None] & m_k[None, :])
        tl.store(inverse + i_k * NB * NB + o[:, None] * NB + o[None, :], b_inverse)
    for i_r in range(i_first, i_last):
        b_t = _tile(a, i_r, i_k, stride_ar, stride_ac, n, NB)
        for i_j in range(i_k):
            b_left = _tile(factor, i_r, i_j, n, 1, n, NB)
            b_right = _tile(factor, i_k, i_j, n, 1, n, NB)
            b_t -= tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)
        b_t = tl.dot(b_t, tl.trans(b_inverse), input_precision=PRECISION)
        o_r = i_r * NB + o
        tl.store(factor + o_r.to(tl.int64)[:, None] * n + o_k[None, :], b_t, mask=(o_r < n)[:, None] & m_k[None, :])
    return failed


@triton.jit
def fused_kernel(
    a, damping, factor, inverse, info, n, stride_ab, stride_ar, stride_ac, HAS_DAMPING: tl.constexpr, NB: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n, NB)
    extra = tl.load(damping + i_b) if HAS_DAMPING else 0.0
    order = 0
    for i_k in range(blocks):
        failed = _block_column(
            a + i_b * stride_ab,
            factor + i_b * n * n,
            inverse + i_b * blocks * NB * NB,
            extra,
            i_k,
            i_k + 1,
            blocks,
            n,
            stride_ar,
            stride_ac,
            True,
            NB,
        )
        order = tl.where((order == 0) & (failed > 0), i_k * NB + failed, order)
        # the next block column reads what the other threads of this program have just stored
        tl.debug_barrier()
    tl.store(info + i_b, order)


@triton.jit
def column_kernel(
    a,
    damping,
    factor,
    inverse,
    info,
    i_k,
    n,
    stride_ab,
    stride_ar,
    stride_ac,
    HAS_DAMPING: tl.constexpr,
    NB: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    i_r = i_k + tl.program_id(0)
    blocks = tl.cdiv(n, NB)
    extra = tl.load(damping + i_b) if HAS_DAMPING else 0.0
    failed = _block_column(
        a + i_b * stride_ab,
        factor + i_b * n * n,
        inverse + i_b * blocks * NB * NB,
        extra,
        i_k,
        tl.maximum(i_r, i_k + 1),
        i_r + 1,
        n,
        stride_ar,
        stride_ac,
        i_r == i_k,
        NB,
    )
    if i_r == i_k:
        order = tl.load(info + i_b)
        tl.store(info + i_b, tl.where((order == 0) & (failed > 0), i_k * NB + failed, order))


@triton.jit
def poison_kernel(factor, info, n, BR: tl.constexpr, BC: tl.constexpr):
    """NaN into the lower triangle of every factor that failed."""
    i_b = tl.program_id(2).to(tl.int64)
    if tl.load(info + i_b) != 0:
        o_r = tl.program_id(0) * BR + tl.arange(0, BR)
        o_c = tl.program_id(1) * BC + tl.arange(0, BC)
        tl.store(
            factor + i_b * n * n + o_r.to(tl.int64)[:, None] * n + o_c[None, :],
            tl.full([BR, BC], float("nan"), dtype=tl.float32),
            mask=(o_r < n)[:, None] & (o_c[None, :] <= o_r[:, None]),
        )


@triton.jit
def solve_kernel(
    factor, inverse, info, b, x, n, k, stride_bb, stride_br, stride_bc, NB: tl.constexpr, BK: tl.constexpr
):
    i_b = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(n, NB)
    p_factor = factor + i_b * n * n
    o = tl.arange(0, NB)
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    m_k = (o_k < k)[None, :]
    p_inverse = inverse + i_b * blocks * NB * NB + o[:, None] * NB + o[None, :]
    p_b = b + i_b * stride_bb + o_k.to(tl.int64)[None, :] * stride_bc
    p_x = x + i_b * n * k + o_k[None, :]
    poison = tl.where(tl.load(info + i_b) != 0, float("nan"), 0.0)
    # L y = b, y in the place of x
    for i_r in range(blocks):
        o_r = i_r * NB + o
        m_x = (o_r < n)[:, None] & m_k
        # [NB, BK]
        b_x = tl.load(p_b + o_r.to(tl.int64)[:, None] * stride_br, mask=m_x, other=0.0)
        for i_j in range(i_r):
            b_l = _tile(p_factor, i_r, i_j, n, 1, n, NB)
            o_j = i_j * NB + o
            b_y = tl.load(p_x + o_j.to(tl.int64)[:, None] * k, mask=(o_j < n)[:, None] & m_k, other=0.0)
            b_x -= tl.dot(b_l, b_y, input_precision=PRECISION)
        b_x = tl.dot(tl.load(p_inverse + i_r * NB * NB), b_x, input_precision=PRECISION)
        tl.store(p_x + o_r.to(tl.int64)[:, None] * k, b_x, mask=m_x)
        tl.debug_barrier()
    # Lᵀ x = y
    for i_back in range(blocks):
        i_r = blocks - 1 - i_back
        o_r = i_r * NB + o
        m_x = (o_r < n)[:, None] & m_k
        b_x = tl.load(p_x + o_r.to(tl.int64)[:, None] * k, mask=m_x, other=0.0)
        for i_j in range(i_r + 1, blocks):
            b_l = _tile(p_factor, i_j, i_r, n, 1, n, NB)
            o_j = i_j * NB + o
            b_y = tl.load(p_x + o_j.to(tl.int64)[:, None] * k, mask=(o_j < n)[:, None] & m_k, other=0.0)
            b_x -= tl.dot(tl.trans(b_l), b_y, input_precision=PRECISION)
        b_x = tl.dot(tl.trans(tl.load(p_inverse + i_r * NB * NB)), b_x, input_precision=PRECISION)
        tl.store(p_x + o_r.to(tl.int64)[:, None] * k, b_x + poison, mask=m_x)
        tl.debug_barrier()


def _factorise(a: Tensor, damping: Tensor | None, cfg) -> tuple[Tensor, Tensor, Tensor]:
    """L (not yet poisoned), the inverses of its diagonal blocks, and info."""
    batch, n, _ = a.shape
    blocks = triton.cdiv(n, NB)
    factor = torch.zeros(batch, n, n, device=a.device)
    inverse = torch.empty(batch, blocks, NB, NB, device=a.device)
    info = torch.zeros(batch, dtype=torch.int32, device=a.device)
    damping = None if damping is None else damping.contiguous()
    given = a if damping is None else damping
    options = dict(HAS_DAMPING=damping is not None, **cfg.launch())
    if n <= FUSED:
        fused_kernel[(batch,)](a, given, factor, inverse, info, n, *a.stride(), **options)
    else:
        for i_k in range(blocks):
            column_kernel[(blocks - i_k, batch)](a, given, factor, inverse, info, i_k, n, *a.stride(), **options)
    return factor, inverse, info


def _factor_config(a: Tensor, damping: Tensor | None):
    return pick("cholesky", tuple(a.shape[:2]), FACTOR, a.device, lambda c: _factorise(a, damping, c))


@on_device
def cholesky(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, n, _ = a.shape
    if batch == 0 or n == 0:
        return torch.empty_like(a), torch.zeros(batch, dtype=torch.int32, device=a.device)
    factor, _, info = _factorise(a, damping, _factor_config(a, damping))
    poison_kernel[(triton.cdiv(n, 32), triton.cdiv(n, 128), batch)](factor, info, n, BR=32, BC=128, num_warps=4)
    return factor, info


def _substitute(cfg, factor, inverse, info, b, x):
    batch, n, k = b.shape
    solve_kernel[(triton.cdiv(k, cfg["BK"]), batch)](
        factor, inverse, info, b, x, n, k, *b.stride(), NB=NB, **cfg.launch()
    )


@on_device
def cholesky_solve(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, n, k = b.shape
    x = torch.empty(batch, n, k, device=a.device)
    if batch == 0 or n == 0:
        return x, torch.zeros(batch, dtype=torch.int32, device=a.device)
    factor, inverse, info = _factorise(a, damping, _factor_config(a, damping))
    if k:
        choices = [c for c in SOLVE if c["BK"] <= max(16, triton.next_power_of_2(k))]
        cfg = pick(
            "cholesky_solve",
            (batch, n, k),
            choices[::-1],
            a.device,
            lambda c: _substitute(c, factor, inverse, info, b, x),
        )
        _substitute(cfg, factor, inverse, info, b, x)
    return x, info
