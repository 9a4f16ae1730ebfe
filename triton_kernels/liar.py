"""LIAR's gather-and-update (arXiv 2407.13331): ``W' = W_K + W_D Qᵀ``, ``b' = b + W_D (μ_D − Qᵀ μ_K)``.

Kept and dropped columns are gathered inside the product, so neither W_K nor W_D exists in memory. FLOPs:
2·r·|K|·|D|; bytes: the dropped columns once per block of kept ones, Q once per block of rows, W' once.
Products are six of bfloat16 parts on tensor cores, as accurate as float32's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels.gram import multiply_add
from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tuning import config, pick

CONFIGS = (config(8, 1, BR=64, BK=64, BD=32), config(4, 2, BR=32, BK=64, BD=32))
SHIFT = config(4, BK=64, BD=64)


@triton.jit
def shift_kernel(mean, keep, drop, q, shift, k, d, stride_qk, stride_qd, BK: tl.constexpr, BD: tl.constexpr):
    """shift = μ_D − Qᵀ μ_K, [d]."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < d
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_k in range(0, k, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < k
        b_mean = tl.load(mean + tl.load(keep + o_k, mask=m_k, other=0), mask=m_k, other=0.0)
        # [BK, BD]
        b_q = tl.load(
            q + o_k.to(tl.int64)[:, None] * stride_qk + o_d.to(tl.int64)[None, :] * stride_qd,
            mask=m_k[:, None] & m_d[None, :],
            other=0.0,
        )
        b_sum += tl.sum(b_q * b_mean[:, None], axis=0)
    b_mean = tl.load(mean + tl.load(drop + o_d, mask=m_d, other=0), mask=m_d, other=0.0)
    tl.store(shift + o_d, b_mean - b_sum, mask=m_d)


@triton.jit
def liar_kernel(
    w,
    keep,
    drop,
    q,
    shift,
    bias,
    updated,
    new_bias,
    r,
    k,
    d,
    stride_wr,
    stride_wc,
    stride_qk,
    stride_qd,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    i_k = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_k = i_k * BK + tl.arange(0, BK)
    m_r = o_r < r
    m_k = o_k < k
    p_row = w + o_r.to(tl.int64)[:, None] * stride_wr
    b_acc = tl.zeros([BR, BK], dtype=tl.float32)
    b_bias = tl.zeros([BR], dtype=tl.float32)
    for i_d in range(0, d, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < d
        i_column = tl.load(drop + o_d, mask=m_d, other=0)
        # [BR, BD]
        b_w = tl.load(p_row + i_column[None, :] * stride_wc, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        # [BD, BK]
        b_q = tl.load(
            q + o_k.to(tl.int64)[None, :] * stride_qk + o_d.to(tl.int64)[:, None] * stride_qd,
            mask=m_d[:, None] & m_k[None, :],
            other=0.0,
        )
        b_acc = multiply_add(b_acc, b_w, b_q, 3)
        if HAS_SHIFT:
            b_bias += tl.sum(b_w * tl.load(shift + o_d, mask=m_d, other=0.0)[None, :], axis=1)
    i_column = tl.load(keep + o_k, mask=m_k, other=0)
    m_out = m_r[:, None] & m_k[None, :]
    b_acc += tl.load(p_row + i_column[None, :] * stride_wc, mask=m_out, other=0.0).to(tl.float32)
    tl.store(updated + o_r.to(tl.int64)[:, None] * k + o_k[None, :], b_acc, mask=m_out)
    if HAS_SHIFT:
        if i_k == 0:
            if HAS_BIAS:
                b_bias += tl.load(bias + o_r, mask=m_r, other=0.0)
            tl.store(new_bias + o_r, b_bias, mask=m_r)


def _launch(cfg, weight, keep, drop, q, shift, bias, updated, new_bias):
    r, k, d = len(weight), len(keep), len(drop)
    # the first column of programs makes the bias even where nothing is kept
    grid = (triton.cdiv(r, cfg["BR"]), max(1, triton.cdiv(k, cfg["BK"])))
    liar_kernel[grid](
        weight,
        keep,
        drop,
        q,
        updated if shift is None else shift,
        updated if bias is None else bias,
        updated,
        updated if new_bias is None else new_bias,
        r,
        k,
        d,
        *weight.stride(),
        *q.stride(),
        HAS_SHIFT=shift is not None,
        HAS_BIAS=bias is not None,
        **cfg.launch(),
    )


@on_device
def liar_update(
    weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, *, bias: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    r, k, d = len(weight), len(keep), len(drop)
    keep, drop = keep.contiguous(), drop.contiguous()
    updated = torch.empty(r, k, dtype=torch.float32, device=weight.device)
    shift = new_bias = None
    if mean is not None:
        mean, bias = mean.contiguous(), None if bias is None else bias.contiguous()
        shift = torch.empty(d, dtype=torch.float32, device=weight.device)
        new_bias = torch.empty(r, dtype=torch.float32, device=weight.device)
        if d:
            grid = (triton.cdiv(d, SHIFT["BD"]),)
            shift_kernel[grid](mean, keep, drop, q, shift, k, d, *q.stride(), **SHIFT.launch())
    arguments = weight, keep, drop, q, shift, bias, updated, new_bias
    if r and (k or mean is not None):
        cfg = pick(
            "liar_update", (r, k, d, str(weight.dtype)), CONFIGS, weight.device, lambda c: _launch(c, *arguments)
        )
        _launch(cfg, *arguments)
    return updated, bias if mean is None else new_bias
