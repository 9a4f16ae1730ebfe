"""Keep masks that drop exactly the k lowest scores ``|w|·scale``, per row or per matrix, without a sort.

Scores are non-negative floats, so their bits order them. A row of at most ``ROW_LIMIT`` columns stays in registers: its
k-th key is found bit by bit by counting (31 rounds), and so is the column up to which ties go. Longer rows and matrices
take a radix select in global memory: three histograms (11, 10, 10 bits) narrow the k-th key down, ties are counted per
block, and the mask is written; five reads of w, integer counts only, so the result does not depend on scheduling.

``apply`` stores zeros where the mask is False, in the pass that makes the mask. NaN scores are reported (``faults``)
and their row, or the whole matrix, is left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels import faults
from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.nm import BEYOND, INFINITY_KEY, score_key

ROW_LIMIT = 16384
PASSES = ((20, 11), (10, 10), (0, 10))  # lowest bit and number of bits of each histogram, from the top
TILE = 2048


@triton.jit
def _keys(w, scale, o_r, o_c, rows, c, stride_wr, stride_wc, HAS_SCALE: tl.constexpr):
    """Integer keys of the scores of a tile [BR, BC], and which of them exist."""
    m_w = (o_r < rows)[:, None] & (o_c < c)[None, :]
    b_score = tl.abs(
        tl.load(w + o_r[:, None] * stride_wr + o_c.to(tl.int64)[None, :] * stride_wc, mask=m_w, other=0.0).to(
            tl.float32
        )
    )
    if HAS_SCALE:
        b_score = b_score * tl.load(scale + o_c, mask=o_c < c, other=0.0)[None, :]
    return score_key(b_score), m_w


@triton.jit
def row_kernel(
    w,
    scale,
    keep,
    fault,
    k,
    rows,
    c,
    stride_wr,
    stride_wc,
    HAS_SCALE: tl.constexpr,
    APPLY: tl.constexpr,
    BC: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    b_key, m_w = _keys(w, scale, i_r + tl.arange(0, 1), o_c, rows, c, stride_wr, stride_wc, HAS_SCALE)
    nan = tl.max(tl.max(((b_key > INFINITY_KEY) & m_w).to(tl.int32), axis=1), axis=0)
    if nan != 0:
        tl.store(fault, 1)
    # [BC]; what is beyond the row sorts above everything
    b_key = tl.reshape(tl.where(m_w, b_key, BEYOND), [BC])
    # the key of rank k is the largest value with at most k keys below it, found bit by bit
    value = 0
    for i_bit in range(31):
        trial = value + (1 << (30 - i_bit))
        below = tl.sum((b_key < trial).to(tl.int32), axis=0)
        value = tl.where(below <= k, trial, value)
    value = tl.where(nan != 0, 0, value)  # nothing is below zero, and no tie is spare
    spare = tl.where(nan != 0, 0, k - tl.sum((b_key < value).to(tl.int32), axis=0))
    # ties in front of this column go; searched like the key, because a prefix sum would spill
    cut = BC
    if tl.sum((b_key == value).to(tl.int32), axis=0) > spare:
        cut = 0
        unit = BC // 2
        while unit > 0:
            before = tl.sum(((b_key == value) & (o_c < cut + unit)).to(tl.int32), axis=0)
            cut = tl.where(before <= spare, cut + unit, cut)
            unit = unit // 2
    b_drop = (b_key < value) | ((b_key == value) & (o_c < cut))
    m_c = o_c < c
    tl.store(keep + i_r * c + o_c, (b_drop == 0).to(tl.uint8), mask=m_c)
    if APPLY:
        tl.store(
            w + i_r * stride_wr + o_c.to(tl.int64) * stride_wc,
            tl.zeros([BC], dtype=w.dtype.element_ty),
            mask=b_drop & m_c,
        )


@triton.jit
def histogram_kernel(
    w,
    scale,
    state,
    histogram,
    nans,
    fault,
    rows,
    c,
    stride_wr,
    stride_wc,
    PER_ROW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_segment = i_r * PER_ROW
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_key, m_w = _keys(w, scale, i_r * BR + tl.arange(0, BR), o_c, rows, c, stride_wr, stride_wc, HAS_SCALE)
    prefix = tl.load(state + i_segment * 2)
    m_in = m_w
    if SHIFT + BITS < 31:
        m_in = m_w & ((b_key >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS)))
    else:
        nan = tl.max(tl.max(((b_key > INFINITY_KEY) & m_w).to(tl.int32), axis=1), axis=0)
        if nan != 0:
            tl.store(nans + i_segment, 1)
            tl.store(fault, 1)
    b_digit = tl.reshape((b_key >> SHIFT) & ((1 << BITS) - 1), [BR * BC])
    b_count = tl.histogram(b_digit, 1 << BITS, mask=tl.reshape(m_in, [BR * BC]))
    tl.atomic_add(histogram + i_segment * (1 << BITS) + tl.arange(0, 1 << BITS), b_count, mask=b_count > 0)


@triton.jit
def digit_kernel(state, histogram, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Fold one histogram into the state (key prefix, how many of the rest to drop) and clear it."""
    i_segment = tl.program_id(0).to(tl.int64)
    p_bins = histogram + i_segment * (1 << BITS) + tl.arange(0, 1 << BITS)
    b_count = tl.load(p_bins)
    rank = tl.load(state + i_segment * 2 + 1)
    b_upto = tl.cumsum(b_count, axis=0)
    taken = b_upto <= rank
    digit = tl.minimum(tl.sum(taken.to(tl.int32), axis=0), (1 << BITS) - 1)
    below = tl.max(tl.where(taken, b_upto, 0), axis=0)
    tl.store(state + i_segment * 2, tl.load(state + i_segment * 2) | (digit << SHIFT))
    tl.store(state + i_segment * 2 + 1, rank - below)
    tl.store(p_bins, tl.zeros([1 << BITS], dtype=tl.int32))


@triton.jit
def tie_kernel(
    w,
    scale,
    state,
    ties,
    rows,
    c,
    stride_wr,
    stride_wc,
    PER_ROW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_key, m_w = _keys(w, scale, i_r * BR + tl.arange(0, BR), o_c, rows, c, stride_wr, stride_wc, HAS_SCALE)
    b_tie = ((b_key == tl.load(state + i_r * PER_ROW * 2)) & m_w).to(tl.int32)
    tl.store(ties + i_r * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(b_tie, axis=1), axis=0))


@triton.jit
def mask_kernel(
    w,
    scale,
    state,
    before,
    nans,
    keep,
    rows,
    c,
    stride_wr,
    stride_wc,
    PER_ROW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    APPLY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_key, m_w = _keys(w, scale, o_r, o_c, rows, c, stride_wr, stride_wc, HAS_SCALE)
    value = tl.load(state + i_r * PER_ROW * 2)
    spare = tl.load(state + i_r * PER_ROW * 2 + 1) - tl.load(before + i_r * tl.num_programs(1) + tl.program_id(1))
    nan = tl.load(nans + i_r * PER_ROW)
    value = tl.where(nan != 0, 0, value)  # nothing is below zero, and no tie is spare
    spare = tl.where(nan != 0, 0, spare)
    b_tie = (b_key == value) & m_w
    # row-major order: a tile has one row, or all columns of its rows
    b_order = tl.reshape(tl.cumsum(tl.reshape(b_tie.to(tl.int32), [BR * BC]), axis=0), [BR, BC])
    b_drop = (b_key < value) | (b_tie & (b_order <= spare))
    tl.store(keep + o_r[:, None] * c + o_c[None, :], (b_drop == 0).to(tl.uint8), mask=m_w)
    if APPLY:
        tl.store(
            w + o_r[:, None] * stride_wr + o_c.to(tl.int64)[None, :] * stride_wc,
            tl.zeros([BR, BC], dtype=w.dtype.element_ty),
            mask=b_drop & m_w,
        )


def _select_in_memory(
    w: Tensor, k: int, scale: Tensor | None, keep: Tensor, per_row: bool, apply: bool, fault: Tensor
) -> None:
    """Radix select of each row (``per_row``) or of the matrix."""
    rows, c = w.shape
    bc = min(triton.next_power_of_2(c), TILE)
    # one row a tile where ranks are per row or rows are wider than a tile: the order inside a tile must be row-major
    br = 1 if per_row or c > bc else TILE // bc
    grid = (triton.cdiv(rows, br), triton.cdiv(c, bc))
    segments = rows if per_row else 1
    given = w if scale is None else scale
    state = torch.zeros(segments, 2, dtype=torch.int32, device=w.device)
    state[:, 1].fill_(k)  # a tensor of numbers from the host would wait for the device
    histogram = torch.zeros(segments, 2048, dtype=torch.int32, device=w.device)
    nans = torch.zeros(segments, dtype=torch.int32, device=w.device)
    ties = torch.empty(grid, dtype=torch.int32, device=w.device)
    shape = dict(PER_ROW=int(per_row), HAS_SCALE=scale is not None, BR=br, BC=bc, num_warps=8)
    for shift, bits in PASSES:
        histogram_kernel[grid](
            w, given, state, histogram, nans, fault, rows, c, *w.stride(), SHIFT=shift, BITS=bits, **shape
        )
        digit_kernel[(segments,)](state, histogram, SHIFT=shift, BITS=bits, num_warps=4)
    tie_kernel[grid](w, given, state, ties, rows, c, *w.stride(), **shape)
    flat = ties if per_row else ties.reshape(1, -1)
    before = (flat.cumsum(1, dtype=torch.int32) - flat).reshape(grid)
    mask_kernel[grid](w, given, state, before, nans, keep, rows, c, *w.stride(), APPLY=apply, **shape)


@on_device
def select_mask(w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row", apply: bool = False) -> Tensor:
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    if w.numel() == 0:
        return keep
    if w.numel() >= 2**31:
        raise ValueError(f"select_mask counts in int32: at most 2^31 - 1 weights, got {w.numel()}")
    rows, c = w.shape
    scale = None if scale is None else scale.contiguous()
    target, fault = keep.view(torch.uint8), faults.word("select_mask", w.device)
    if scope == "row" and c <= ROW_LIMIT:
        block = triton.next_power_of_2(c)
        row_kernel[(rows,)](
            w,
            w if scale is None else scale,
            target,
            fault,
            k,
            rows,
            c,
            *w.stride(),
            HAS_SCALE=scale is not None,
            APPLY=apply,
            BC=block,
            num_warps=row_warps(block),
        )
    else:
        _select_in_memory(w, k, scale, target, scope == "row", apply, fault)
    faults.after(w.device)
    return keep


def row_warps(block: int) -> int:
    """At most 32 keys per thread, from one warp to 16."""
    return max(1, min(16, block // 512))
