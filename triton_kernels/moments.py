"""Column count, mean and centred sum of squares of ``x [tokens, c]`` in one pass.

Each program sums a tile of tokens, then its squares about the tile's own mean, and merges the two into its running
values by Chan's formula, so nothing cancels; a second kernel merges the programs in order. Bytes: x once.
FLOPs: about 5 per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tuning import config, multiprocessors, pick

CONFIGS = (config(4, BT=32, BC=128), config(8, BT=64, BC=128))
BC_MERGE = 128


@triton.jit
def _merge(n_a, b_mean_a, b_m2_a, n_b, b_mean_b, b_m2_b):
    """Chan's merge of two (count, mean, centred sum of squares)."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    b_delta = b_mean_b - b_mean_a
    return n, b_mean_a + b_delta * share, b_m2_a + b_m2_b + b_delta * b_delta * (n_a * share)


@triton.jit
def moments_kernel(
    x,
    mask,
    counts,
    means,
    squares,
    tokens,
    c,
    stride_xt,
    stride_xc,
    per_split,
    HAS_MASK: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_split = tl.program_id(1)
    start = i_split * per_split
    stop = tl.minimum(start + per_split, tokens)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < c
    n = 0.0
    b_mean = tl.zeros([BC], dtype=tl.float32)
    b_m2 = tl.zeros([BC], dtype=tl.float32)
    for t in range(start, stop, BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < stop
        if HAS_MASK:
            m_t = m_t & (tl.load(mask + o_t, mask=m_t, other=0) != 0)
        m_x = m_t[:, None] & m_c[None, :]
        # [BT, BC]
        b_x = tl.load(
            x + o_t.to(tl.int64)[:, None] * stride_xt + o_c.to(tl.int64)[None, :] * stride_xc, mask=m_x, other=0.0
        ).to(tl.float32)
        n_tile = tl.sum(m_t.to(tl.float32), axis=0)
        b_tile_mean = tl.sum(b_x, axis=0) / tl.maximum(n_tile, 1.0)
        b_off = tl.where(m_x, b_x - b_tile_mean[None, :], 0.0)
        n, b_mean, b_m2 = _merge(n, b_mean, b_m2, n_tile, b_tile_mean, tl.sum(b_off * b_off, axis=0))
    o_out = i_split.to(tl.int64) * c + o_c
    tl.store(means + o_out, b_mean, mask=m_c)
    tl.store(squares + o_out, b_m2, mask=m_c)
    if tl.program_id(0) == 0:
        tl.store(counts + i_split, n)


@triton.jit
def moments_merge_kernel(counts, means, squares, count, mean, m2, c, splits, BC: tl.constexpr):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < c
    n = 0.0
    total = tl.zeros([1], dtype=tl.int64)
    b_mean = tl.zeros([BC], dtype=tl.float32)
    b_m2 = tl.zeros([BC], dtype=tl.float32)
    p_count = counts + tl.arange(0, 1)
    p_mean = means + o_c
    p_m2 = squares + o_c
    for _ in range(splits):
        b_n = tl.load(p_count)
        n_part = tl.sum(b_n, axis=0)
        total += b_n.to(tl.int64)
        n, b_mean, b_m2 = _merge(
            n, b_mean, b_m2, n_part, tl.load(p_mean, mask=m_c, other=0.0), tl.load(p_m2, mask=m_c, other=0.0)
        )
        p_count += 1
        p_mean += c
        p_m2 += c
    tl.store(mean + o_c, b_mean, mask=m_c)
    tl.store(m2 + o_c, b_m2, mask=m_c)
    if tl.program_id(0) == 0:
        tl.store(count + tl.arange(0, 1), total)


def _launch(cfg, x, mask):
    tokens, c = x.shape
    blocks = triton.cdiv(c, cfg["BC"])
    splits = max(1, min(triton.cdiv(8 * multiprocessors(x.device), blocks), triton.cdiv(tokens, 4 * cfg["BT"])))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), cfg["BT"]) * cfg["BT"]
    splits = triton.cdiv(tokens, per_split)
    empty = dict(dtype=torch.float32, device=x.device)
    counts, parts = torch.empty(splits, **empty), torch.empty(2, splits, c, **empty)
    count, out = torch.empty((), dtype=torch.int64, device=x.device), torch.empty(2, c, **empty)
    moments_kernel[(blocks, splits)](
        x,
        x if mask is None else mask,
        counts,
        parts[0],
        parts[1],
        tokens,
        c,
        *x.stride(),
        per_split,
        HAS_MASK=mask is not None,
        **cfg.launch(),
    )
    moments_merge_kernel[(triton.cdiv(c, BC_MERGE),)](
        counts, parts[0], parts[1], count, out[0], out[1], c, splits, BC=BC_MERGE, num_warps=4, enable_fp_fusion=True
    )
    return count, out[0], out[1]


@on_device
def column_moments(x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        count = torch.tensor(len(x), device=x.device) if mask is None else mask.sum()
        return count, *torch.zeros(2, x.shape[1], device=x.device)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    cfg = pick(
        "column_moments",
        (triton.next_power_of_2(len(x)), x.shape[1], str(x.dtype)),
        CONFIGS,
        x.device,
        lambda cfg: _launch(cfg, x, mask),
    )
    return _launch(cfg, x, mask)
