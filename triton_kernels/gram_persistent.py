"""Gram matrix of 16-bit inputs for wide layers: tiles of 128 × 256 by programs that stay, one a multiprocessor.

Against gram.py: 1.33 times the products per byte from L2 (64·128·256 multiply-adds for 48 KB per step), and on compute
capability 9 and 10 loads by TMA descriptors, which take no registers and no address arithmetic. A tile is computed
where any part of it is on or below the diagonal, so half of c/256 tiles is wasted: 6 % at c = 4096.

The accumulator leaves no registers for adding to gram and mirroring, so tiles go to a scratch buffer of half gram's
size, and a second kernel adds them: 5 % of the time of 16,384 tokens at the memory's rate. It adds the parts of a tile
that was split over tokens too, in order, so the result does not depend on scheduling. Column sums are a pass of their
own, by torch.

Work: ``tokens·c·(c + BN)`` FLOPs; bytes: x once per row of tiles, from L2; the scratch written and read, gram read once
in its lower half and written in full.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

from pyprune.triton_kernels.tiles import lower_tile
from pyprune.triton_kernels.tuning import Config, config, multiprocessors

MOST_TOKENS = 16384  # one accumulator's, as in gram.py
MIN_COLUMNS = 512
L2_GROUP = 4  # rows of 256 × 256 squares walked together

TMA = (config(8, 4, big=True, BT=64, BM=128, BN=256), config(8, 3, BT=32, BM=128, BN=256))
POINTERS = (config(8, 4, big=True, BT=64, BM=128, BN=256), config(8, 4, BT=32, BM=128, BN=256))
ADD = config(8, BR=32)


@triton.jit
def gram_persistent_kernel(
    x,
    x_rows,
    x_columns,
    partial,
    tokens,
    c,
    stride_xt,
    per_split,
    units,
    walked,
    squares,
    USE_TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # units: (split, square, half), the half fastest; BN = 2·BM. walked: squares with those beyond the matrix
    for i_unit in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        i_split = i_unit // (2 * walked)
        i_square, i_col = lower_tile(i_unit % (2 * walked) // 2, GROUP)
        i_row = 2 * i_square + i_unit % 2
        if i_row * BM < c:
            start = i_split * per_split
            stop = tl.minimum(start + per_split, tokens)
            o_row = i_row * BM + tl.arange(0, BM)
            o_col = i_col * BN + tl.arange(0, BN)
            b_acc = tl.zeros([BM, BN], dtype=tl.float32)
            for t in range(start, stop, BT):
                if USE_TMA:
                    # [BT, BM] and [BT, BN]; zeros past the end
                    b_x = x_rows.load([t, i_row * BM])
                    b_y = x_columns.load([t, i_col * BN])
                    b_acc = tl.dot(tl.trans(b_x), b_y, b_acc)
                else:
                    o_t = t + tl.arange(0, BT)
                    p_x = x + o_row[:, None] + o_t.to(tl.int64)[None, :] * stride_xt
                    p_y = x + o_t.to(tl.int64)[:, None] * stride_xt + o_col[None, :]
                    b_xt = tl.load(p_x, mask=(o_row < c)[:, None] & (o_t < stop)[None, :], other=0.0)
                    b_y = tl.load(p_y, mask=(o_t < stop)[:, None] & (o_col < c)[None, :], other=0.0)
                    b_acc = tl.dot(b_xt, b_y, b_acc)
            i_tile = (i_split * squares + i_square * (i_square + 1) // 2 + i_col) * 2 + i_unit % 2
            p_part = partial + i_tile.to(tl.int64) * BM * BN
            tl.store(p_part + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], b_acc)


@triton.jit
def gram_persistent_add_kernel(gram, partial, c, squares, splits, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """Add BR rows of a tile, on and below the diagonal, to the symmetric gram, and write their mirror image."""
    i_square, i_col = lower_tile(tl.program_id(0) // 2, 1)
    i_part = tl.program_id(1)
    o_row = (2 * i_square + tl.program_id(0) % 2) * BM + i_part * BR + tl.arange(0, BR)
    o_col = i_col * BN + tl.arange(0, BN)
    m_lower = (o_row < c)[:, None] & (o_row[:, None] >= o_col[None, :])
    i_tile = (i_square * (i_square + 1) // 2 + i_col) * 2 + tl.program_id(0) % 2
    p_part = (
        partial
        + i_tile.to(tl.int64) * BM * BN
        + (i_part * BR + tl.arange(0, BR))[:, None] * BN
        + tl.arange(0, BN)[None, :]
    )
    b_sum = tl.zeros([BR, BN], dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_part, mask=m_lower, other=0.0)
        p_part += squares.to(tl.int64) * 2 * BM * BN
    p_lower = gram + o_row.to(tl.int64)[:, None] * c + o_col[None, :]
    b_sum += tl.load(p_lower, mask=m_lower, other=0.0)
    tl.store(p_lower, b_sum, mask=m_lower)
    p_upper = gram + o_col.to(tl.int64)[:, None] * c + o_row[None, :]
    tl.store(p_upper, tl.trans(b_sum), mask=(o_row < c)[None, :] & (o_row[None, :] > o_col[:, None]))


def with_tma(device: torch.device) -> bool:
    """Whether tiles are loaded through descriptors on ``device``; the interpreter knows them too.

    12.x has TMA, but its products take operands from registers, as 8.x's do, and Triton 3.6 needs a stack there.
    """
    return TensorDescriptor is not None and (
        device.type != "cuda" or 9 <= torch.cuda.get_device_capability(device)[0] < 12
    )


def configs(x: Tensor, mask: Tensor | None) -> tuple[Config, ...]:
    """What this kernel can be launched with for ``x``; nothing where it cannot."""
    if x.element_size() != 2 or mask is not None or x.shape[1] <= MIN_COLUMNS or x.stride(1) != 1:
        return ()
    if with_tma(x.device) and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0:
        return TMA
    return POINTERS


def splits_of(tiles: int, steps: int, programs: int) -> int:
    """Parts of the tokens that share a tile: what fills the last wave of programs, at 5 % for each part's scratch."""

    def cost(splits: int) -> float:
        return -(-tiles * splits // programs) / splits + 0.05 * splits * tiles / programs

    return min((s for s in (1, 2, 3, 4) if s == 1 or steps >= 8 * s), key=cost)


def launch_gram(cfg: Config, gram: Tensor, x: Tensor, sums: Tensor | None, count: Tensor | None) -> None:
    """``gram += xᵀx``, ``sums += Σx``, ``count += tokens``, with a configuration of :func:`configs`."""
    c, bt, bm, bn = x.shape[1], cfg["BT"], cfg["BM"], cfg["BN"]
    rows = triton.cdiv(c, bn)
    squares = rows * (rows + 1) // 2
    programs = multiprocessors(x.device)
    use_tma = with_tma(x.device) and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0
    group = L2_GROUP if rows > L2_GROUP else 1
    walked = triton.cdiv(rows, group) * group
    walked = walked * (walked + 1) // 2
    for part in x.split(MOST_TOKENS):
        splits = splits_of(2 * squares, triton.cdiv(len(part), bt), programs)
        per_split = triton.cdiv(triton.cdiv(len(part), splits), bt) * bt
        splits = triton.cdiv(len(part), per_split)
        partial = gram.new_empty(splits, 2 * squares, bm, bn)
        views = [TensorDescriptor.from_tensor(part, [bt, width]) for width in (bm, bn)] if use_tma else [part, part]
        units = 2 * walked * splits
        gram_persistent_kernel[(min(programs, units),)](
            part,
            *views,
            partial,
            len(part),
            c,
            part.stride(0),
            per_split,
            units,
            walked,
            squares,
            USE_TMA=use_tma,
            GROUP=group,
            **cfg.launch(),
        )
        add = ADD.launch() | dict(BR=min(ADD["BR"], bm))
        gram_persistent_add_kernel[(2 * squares, bm // add["BR"])](
            gram, partial, c, squares, splits, BM=bm, BN=bn, **add
        )
    if sums is not None:
        sums += x.sum(0, dtype=torch.float32)
    if count is not None:
        count += len(x)
