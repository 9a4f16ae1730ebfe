"""2:4 matrices to and from torch's semi-structured layout, and the N:M choice fused with the compression.

Values are the two kept weights of every four, ``[r, c/2]``. A metadata word (int16) holds four groups, four bits each:
the index of the first kept weight, then of the second; words are stored in the order CUTLASS reads them
(``torch.sparse._semi_structured_conversions`` is the oracle). Bytes: 2 per weight read, 1 + 1/8 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels import faults
from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.nm import keep_largest
from pyprune.triton_kernels.tuning import config

COMPRESS = config(4, BR=32, BC=64)
EXPAND = config(4, BR=32, BC=64)


@triton.jit
def _meta_offset(o_r, o_c, rows):
    """Where CUTLASS keeps metadata word (row, column): rows interleaved by 4 in 32, 2×2 blocks swizzled, columns in
    pairs."""
    o_r = o_r[:, None]
    o_c = o_c[None, :]
    o_row = o_r // 32 * 32 + (o_r % 8) * 4 + (o_r % 32) // 8
    o_shift = ((o_row % 2 == 0) & (o_c % 2 == 1)).to(tl.int32) - ((o_row % 2 == 1) & (o_c % 2 == 0)).to(tl.int32)
    o_row = o_row + o_shift
    o_col = o_c - o_shift
    return (o_col // 2).to(tl.int64) * rows * 2 + o_row * 2 + o_col % 2


@triton.jit
def compress_kernel(
    w,
    scale,
    keep,
    values,
    meta,
    fault,
    rows,
    c,
    stride_wr,
    stride_wc,
    CHOOSE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    APPLY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < c
    # [BR, BC]
    p_w = w + o_r.to(tl.int64)[:, None] * stride_wr + o_c.to(tl.int64)[None, :] * stride_wc
    m_w = (o_r < rows)[:, None] & m_c[None, :]
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    dtype = b_w.dtype
    b_f = b_w.to(tl.float32)
    if CHOOSE:
        b_score = tl.abs(b_f)
        if HAS_SCALE:
            b_score = b_score * tl.load(scale + o_c, mask=m_c, other=0.0)[None, :]
        b_keep, nan = keep_largest(tl.reshape(b_score, [BR * BC // 4, 4]), 2, 4, 4)
        b_keep = tl.reshape(b_keep, [BR, BC])
        if nan != 0:
            tl.store(fault, 1)
        tl.store(keep + o_r.to(tl.int64)[:, None] * c + o_c[None, :], b_keep.to(tl.uint8), mask=m_w)
        b_f = tl.where(b_keep, b_f, 0.0)
        if APPLY:
            tl.store(p_w, b_f.to(dtype), mask=m_w)
    # four members of each group, [BR, BC / 4] each
    b_even, b_odd = tl.split(tl.reshape(b_f, [BR, BC // 4, 2, 2]))
    b_w0, b_w2 = tl.split(b_even)
    b_w1, b_w3 = tl.split(b_odd)
    # which two: torch's minimised formula, which also fixes the choice where fewer (or more) than two are non-zero
    m0 = (b_w0 != 0).to(tl.int32)
    m1 = (b_w1 != 0).to(tl.int32)
    m3 = (b_w3 != 0).to(tl.int32)
    if CHOOSE == 0:
        b_count = m0 + m1 + (b_w2 != 0).to(tl.int32) + m3
        if tl.max(tl.max(b_count, axis=1), axis=0) > 2:
            tl.store(fault, 1)
    only1 = (1 - m0) & m1
    neither = (1 - m0) & (1 - m1)
    i_a = only1 | (neither << 1)
    i_b = ((m0 & m1) | neither | m3) | ((only1 | (1 - m1)) << 1)
    b_va = tl.where(i_a == 0, b_w0, tl.where(i_a == 1, b_w1, b_w2))
    b_vb = tl.where(i_b == 1, b_w1, tl.where(i_b == 2, b_w2, b_w3))
    # [BR, BC / 2]
    b_values = tl.reshape(tl.join(b_va, b_vb), [BR, BC // 2])
    o_v = tl.program_id(1) * (BC // 2) + tl.arange(0, BC // 2)
    tl.store(
        values + o_r.to(tl.int64)[:, None] * (c // 2) + o_v[None, :],
        b_values.to(dtype),
        mask=(o_r < rows)[:, None] & (o_v < c // 2)[None, :],
    )
    # [BR, BC / 16]
    o_q = tl.arange(0, 4) * 4
    b_bits = tl.reshape(i_a | (i_b << 2), [BR, BC // 16, 4]) << o_q[None, None, :]
    b_meta = tl.sum(b_bits, axis=2)
    o_m = tl.program_id(1) * (BC // 16) + tl.arange(0, BC // 16)
    tl.store(
        meta + _meta_offset(o_r, o_m, rows), b_meta.to(tl.int16), mask=(o_r < rows)[:, None] & (o_m < c // 16)[None, :]
    )


@triton.jit
def expand_kernel(values, meta, dense, fault, rows, c, stride_vr, stride_vc, BR: tl.constexpr, BC: tl.constexpr):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_v = tl.program_id(1) * (BC // 2) + tl.arange(0, BC // 2)
    # [BR, BC / 2]
    b_v = tl.load(
        values + o_r.to(tl.int64)[:, None] * stride_vr + o_v.to(tl.int64)[None, :] * stride_vc,
        mask=(o_r < rows)[:, None] & (o_v < c // 2)[None, :],
        other=0.0,
    )
    b_va, b_vb = tl.split(tl.reshape(b_v.to(tl.float32), [BR, BC // 4, 2]))
    o_m = tl.program_id(1) * (BC // 16) + tl.arange(0, BC // 16)
    b_meta = tl.load(
        meta + _meta_offset(o_r, o_m, rows), mask=(o_r < rows)[:, None] & (o_m < c // 16)[None, :], other=0
    ).to(tl.int32)
    o_q = tl.arange(0, 4) * 4
    # [BR, BC / 4]
    b_bits = tl.reshape(b_meta[:, :, None] >> o_q[None, None, :], [BR, BC // 4])
    i_a = b_bits & 3
    i_b = (b_bits >> 2) & 3
    m_bits = (o_r < rows)[:, None] & (tl.program_id(1) * (BC // 4) + tl.arange(0, BC // 4) < c // 4)[None, :]
    if tl.max(tl.max(((i_a >= i_b) & m_bits).to(tl.int32), axis=1), axis=0) != 0:
        tl.store(fault, 1)
    b_w0 = tl.where(i_a == 0, b_va, tl.where(i_b == 0, b_vb, 0.0))
    b_w1 = tl.where(i_a == 1, b_va, tl.where(i_b == 1, b_vb, 0.0))
    b_w2 = tl.where(i_a == 2, b_va, tl.where(i_b == 2, b_vb, 0.0))
    b_w3 = tl.where(i_a == 3, b_va, tl.where(i_b == 3, b_vb, 0.0))
    b_w = tl.reshape(tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3)), [BR, BC])
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    tl.store(
        dense + o_r.to(tl.int64)[:, None] * c + o_c[None, :],
        b_w.to(b_v.dtype),
        mask=(o_r < rows)[:, None] & (o_c < c)[None, :],
    )


def _compress(w: Tensor, scale: Tensor | None, keep: Tensor | None, apply: bool) -> tuple[Tensor, Tensor]:
    rows, c = w.shape
    if c % 32:
        # CUTLASS stores metadata columns in pairs; torch's own converter scatters out of bounds here
        raise ValueError(f"2:4 compression needs columns % 32 == 0, got {tuple(w.shape)}")
    values = torch.empty(rows, c // 2, dtype=w.dtype, device=w.device)
    meta = torch.empty(rows, c // 16, dtype=torch.int16, device=w.device)
    if w.numel():
        grid = (triton.cdiv(rows, COMPRESS["BR"]), triton.cdiv(c, COMPRESS["BC"]))
        fault = faults.word("compress_24" if keep is None else "nm_mask", w.device)
        compress_kernel[grid](
            w,
            w if scale is None else scale.contiguous(),
            meta if keep is None else keep,
            values,
            meta,
            fault,
            rows,
            c,
            *w.stride(),
            CHOOSE=keep is not None,
            HAS_SCALE=scale is not None,
            APPLY=apply,
            **COMPRESS.launch(),
        )
        faults.after(w.device)
    return values, meta


@on_device
def compress_24(w: Tensor) -> tuple[Tensor, Tensor]:
    return _compress(w, None, None, False)


@on_device
def nm_compress_24(w: Tensor, *, scale: Tensor | None = None, apply: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``nm_mask(w, 2, 4)`` and ``compress_24`` of the result in one read of w.

    w: bfloat16 or float16 ``[r, c]``, r and c multiples of 32, any strides; scale: float32 ``[c]`` or None;
    ``apply`` zeroes w too. Returns the keep mask ``[r, c]``, values ``[r, c/2]`` and metadata int16 ``[r, c/16]``.
    Raises ``ValueError`` for other shapes.
    """
    if w.ndim != 2 or w.shape[0] % 32:
        raise ValueError(f"2:4 compression needs a matrix with rows % 32 == 0, got {tuple(w.shape)}")
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    values, meta = _compress(w, scale, keep.view(torch.uint8), apply)
    return keep, values, meta


@on_device
def expand_24(values: Tensor, meta: Tensor) -> Tensor:
    rows, c = values.shape[0], 2 * values.shape[1]
    if c % 32:
        raise ValueError(f"2:4 metadata needs columns % 32 == 0, got {c} of values {tuple(values.shape)}")
    dense = torch.empty(rows, c, dtype=values.dtype, device=values.device)
    if dense.numel():
        grid = (triton.cdiv(rows, EXPAND["BR"]), triton.cdiv(c, EXPAND["BC"]))
        expand_kernel[grid](
            values,
            meta.contiguous(),
            dense,
            faults.word("expand_24", values.device),
            rows,
            c,
            *values.stride(),
            **EXPAND.launch(),
        )
        faults.after(values.device)
    return dense
