"""N:M masks: score, rank inside the group, apply, in one read and one write of w.

A group keeps its n largest ``|w|·scale``; an element's rank is the number of group members below it (ties: the lower
index is below), so M comparisons per element in registers and no sort. Bytes: w read once, written once when applied,
one byte of mask per weight; memory-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels import faults
from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tuning import config, pick

INFINITY_KEY = tl.constexpr(0x7F800000)
"""Keys above it are NaN."""
BEYOND = tl.constexpr(0x7FFFFFFF)
"""Key of what does not exist: above all others."""
CONFIGS = (config(4, TILE=1024), config(4, TILE=2048), config(8, TILE=4096))


@triton.jit
def score_key(b_score):
    """Order of non-negative floats as integers; NaN sorts above infinity, −0.0 equals 0.0."""
    return b_score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def keep_largest(b_score, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Keep mask of groups ``[groups, MP]`` whose first M members exist; everything where a score is NaN, and whether
    there is any."""
    o_m = tl.arange(0, MP)
    b_key = score_key(b_score)
    b_nan = tl.max(((b_key > INFINITY_KEY) & (o_m < M)[None, :]).to(tl.int32), axis=1)
    b_key = tl.where((o_m < M)[None, :], b_key, BEYOND)
    b_mine = b_key[:, :, None]
    b_other = b_key[:, None, :]
    below = (b_other < b_mine) | ((b_other == b_mine) & (o_m[None, None, :] < o_m[None, :, None]))
    # [groups, MP]
    return (tl.sum(below.to(tl.int32), axis=2) >= M - N) | (b_nan != 0)[:, None], tl.max(b_nan, axis=0)


@triton.jit
def nm_kernel(
    w,
    scale,
    keep,
    fault,
    rows,
    c,
    stride_wr,
    stride_wc,
    HAS_SCALE: tl.constexpr,
    APPLY: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    # BC padded columns hold BC / MP groups; for a power of two MP = M and padding vanishes
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_p = tl.program_id(1) * BC + tl.arange(0, BC)
    o_c = o_p // MP * M + o_p % MP
    m_c = (o_p % MP < M) & (o_c < c)
    if MP == M:
        o_c = o_p
        m_c = o_c < c
    m_w = (o_r < rows)[:, None] & m_c[None, :]
    # [BR, BC]
    p_w = w + o_r[:, None] * stride_wr + o_c.to(tl.int64)[None, :] * stride_wc
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    b_score = tl.abs(b_w.to(tl.float32))
    if HAS_SCALE:
        b_score = b_score * tl.load(scale + o_c, mask=m_c, other=0.0)[None, :]
    b_keep, nan = keep_largest(tl.reshape(b_score, [BR * BC // MP, MP]), N, M, MP)
    b_keep = tl.reshape(b_keep, [BR, BC])
    if nan != 0:
        tl.store(fault, 1)
    tl.store(keep + o_r[:, None] * c + o_c[None, :], b_keep.to(tl.uint8), mask=m_w)
    if APPLY:
        tl.store(p_w, tl.where(b_keep, b_w.to(tl.float32), 0.0).to(b_w.dtype), mask=m_w)


def tile(size: int, columns: int, padded: int) -> tuple[int, int]:
    """Columns and rows of a tile; each element of a group of ``padded`` holds that many comparisons in registers."""
    size = size * 4 // max(4, padded)
    bc = min(triton.next_power_of_2(columns), 1024, size)
    return bc, size // bc


def _launch(cfg, w, n, m, scale, apply, keep, fault):
    padded = triton.next_power_of_2(m)
    columns = w.shape[1] // m * padded
    bc, br = tile(cfg["TILE"], columns, padded)
    nm_kernel[(triton.cdiv(w.shape[0], br), triton.cdiv(columns, bc))](
        w,
        w if scale is None else scale,
        keep,
        fault,
        *w.shape,
        *w.stride(),
        HAS_SCALE=scale is not None,
        APPLY=apply,
        N=n,
        M=m,
        MP=padded,
        BR=br,
        BC=bc,
        num_warps=cfg.warps,
        num_stages=cfg.stages,
        enable_fp_fusion=True,
    )


@on_device
def nm_mask(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    if w.numel() == 0:
        return keep
    scale = None if scale is None else scale.contiguous()
    target, fault = keep.view(torch.uint8), faults.word("nm_mask", w.device)
    cfg = pick(
        "nm_mask",
        (*w.shape, n, m, str(w.dtype), apply),
        CONFIGS,
        w.device,
        lambda cfg: _launch(cfg, w.clone() if apply else w, n, m, scale, apply, target, fault),
    )
    _launch(cfg, w, n, m, scale, apply, target, fault)
    faults.after(w.device)
    return keep
