"""OBS sweep of one column block, everything in registers: choose, quantise to zero, propagate, account.

For columns j left to right ``e = (w_j − keep·w_j) / r_jj``, ``w[:, j:] −= e·r[j, j:]`` (SparseGPT, arXiv 2301.00774).
Rows are independent, so a program takes a few rows and loops over at most ``BLOCK`` columns; wider blocks are swept in
sub-blocks with one product between them. FLOPs: rows·b²; bytes: w read once, w, e and mask written once, the factor's
block from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels import faults
from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.nm import score_key
from pyprune.triton_kernels.select import select_mask
from pyprune.triton_kernels.tuning import config, pick

BLOCK = 128
CONFIGS = (config(1, BR=1), config(4, BR=8), config(4, BR=16))


@triton.jit
def _choose(b_w, b_scale, b_keep, o_b, j, n_drop, GROUP: tl.constexpr):
    """Keep mask with the N:M group that starts at column j decided on the weights as updated so far."""
    b_key = score_key(tl.abs(b_w) * b_scale[None, :])
    b_rank = tl.zeros(b_w.shape, dtype=tl.int32)
    for i in range(GROUP):
        # [BR, 1]; one member of the group against all columns
        b_other = tl.max(tl.where((o_b == j + i)[None, :], b_key, 0), axis=1)[:, None]
        b_rank += ((b_other < b_key) | ((b_other == b_key) & (o_b > j + i)[None, :])).to(tl.int32)
    m_group = ((o_b >= j) & (o_b < j + GROUP))[None, :]
    return tl.where(m_group, (b_rank >= n_drop).to(tl.int32), b_keep)


@triton.jit
def sweep_kernel(
    w,
    r,
    mask,
    keep,
    error,
    loss,
    fault,
    rows,
    b,
    stride_w,
    stride_r,
    stride_m,
    stride_k,
    n_drop,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
):
    # GROUP = 0: the mask is given; else it is chosen per group of GROUP columns
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_b = tl.arange(0, BB)
    m_r = o_r < rows
    m_b = o_b < b
    m_w = m_r[:, None] & m_b[None, :]
    # [BR, BB]
    p_w = w + o_r[:, None] * stride_w + o_b[None, :]
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    b_first = b_w
    b_diagonal = tl.load(r + o_b * (stride_r + 1), mask=m_b, other=1.0)
    sound = tl.min(((b_diagonal > 0) & (b_diagonal < float("inf"))).to(tl.int32), axis=0)
    b_scale = tl.div_rn(1.0, b_diagonal)
    if GROUP == 0:
        b_keep = tl.load(mask + o_r[:, None] * stride_m + o_b[None, :], mask=m_w, other=1).to(tl.int32)
    else:
        b_keep = tl.full([BR, BB], 1, dtype=tl.int32)
    b_e = tl.zeros([BR, BB], dtype=tl.float32)
    b_next = tl.load(r + o_b, mask=m_b, other=0.0)
    next_diagonal = tl.load(r)
    for j in range(b):
        if GROUP > 0:
            if j % GROUP == 0:
                b_keep = _choose(b_w, b_scale, b_keep, o_b, j, n_drop, GROUP)
        # row j of the factor; the next one is fetched while this one works
        b_row = b_next
        diagonal = next_diagonal
        i_next = tl.minimum(j + 1, b - 1)
        b_next = tl.load(r + i_next * stride_r + o_b, mask=m_b, other=0.0)
        next_diagonal = tl.load(r + i_next * (stride_r + 1))
        m_j = (o_b == j)[None, :]
        # [BR]
        b_pruned = tl.sum(tl.where(m_j & (b_keep == 0), b_w, 0.0), axis=1)
        b_ej = tl.div_rn(b_pruned, diagonal)
        b_w = tl.where((o_b > j)[None, :], b_w - b_ej[:, None] * b_row[None, :], b_w)
        b_e = tl.where(m_j, b_ej[:, None], b_e)
    # whatever is not finite in w or in the factor has reached the row by now; such a row keeps its weights
    b_finite = tl.min((tl.abs(b_w) < float("inf")).to(tl.int32), axis=1)
    b_sound = ((b_finite & sound) != 0)[:, None]
    if tl.min(b_finite, axis=0) + sound < 2:
        tl.store(fault, 1)
    b_e = tl.where(b_sound, b_e, 0.0)
    b_w = tl.where(b_sound, tl.where(b_keep == 0, 0.0, b_w), b_first)
    tl.store(p_w, b_w, mask=m_w)
    tl.store(keep + o_r[:, None] * stride_k + o_b[None, :], (b_keep != 0).to(tl.uint8), mask=m_w)
    tl.store(error + o_r[:, None] * stride_k + o_b[None, :], b_e, mask=m_w)
    p_loss = loss + o_r
    tl.store(p_loss, tl.load(p_loss, mask=m_r, other=0.0) + tl.sum(b_e * b_e, axis=1), mask=m_r)


def _launch(cfg, w, r, mask, nm, keep, error, loss, fault):
    rows, b = w.shape
    given = keep if mask is None else mask
    n, m = nm or (0, 0)
    sweep_kernel[(triton.cdiv(rows, cfg["BR"]),)](
        w,
        r,
        given,
        keep,
        error,
        loss,
        fault,
        rows,
        b,
        w.stride(0),
        r.stride(0),
        given.stride(0),
        keep.stride(0),
        m - n,
        GROUP=m,
        BB=max(16, triton.next_power_of_2(b)),
        **cfg.launch(),
    )


@on_device
def obs_sweep(
    w: Tensor, r: Tensor, *, mask: Tensor | None = None, k: int | None = None, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, b = w.shape
    if nm is not None and nm[1] > BLOCK:
        raise ValueError(f"the Triton sweep chooses groups of at most {BLOCK} columns, got {nm[0]}:{nm[1]}")
    r = r if r.stride(1) == 1 else r.contiguous()
    if k is not None:
        mask = select_mask(w, k, scale=1 / r.diagonal(), scope="matrix")
    keep = torch.empty(rows, b, dtype=torch.bool, device=w.device)
    error = torch.empty(rows, b, dtype=torch.float32, device=w.device)
    loss = torch.zeros(rows, dtype=torch.float32, device=w.device)
    if w.numel() == 0:
        return keep, error, loss
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    out = keep.view(torch.uint8)
    fault = faults.word("obs_sweep", w.device)
    # a group must not straddle two sub-blocks
    step = BLOCK if nm is None else BLOCK // nm[1] * nm[1]
    head = slice(0, min(step, b))
    if b > step:  # a bad factor must not reach w by the products either: its zero diagonal stops every sub-block
        r = torch.where(r.isfinite().all() & (r.diagonal() > 0).all(), r, 0)
    cfg = pick(
        "obs_sweep",
        (rows, b, nm),
        CONFIGS,
        w.device,
        lambda c: _launch(
            c,
            w[:, head].clone(),
            r[head, head],
            None if mask is None else mask[:, head],
            nm,
            torch.empty_like(out[:, head]),
            torch.empty_like(error[:, head]),
            loss.clone(),
            fault,
        ),
    )
    for start in range(0, b, step):
        own, right = slice(start, min(start + step, b)), slice(min(start + step, b), b)
        given = None if mask is None else mask[:, own]
        _launch(cfg, w[:, own], r[own, own], given, nm, out[:, own], error[:, own], loss, fault)
        if right.start < b:
            w[:, right].addmm_(error[:, own], r[own, right], alpha=-1)
    faults.after(w.device)
    return keep, error, loss
