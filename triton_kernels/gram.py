"""Gram matrix ``gram += xᵀx`` with column sums and token count in the same pass, and ``cross += yᵀx``.

Work: ``tokens·c·(c + BC)`` FLOPs (lower tiles only, mirrored on store), ``2·tokens·cy·cx`` for the cross form.
Bytes: x once per row of tiles, from L2; gram read once in its lower half and written in full.

Tokens are split over programs when there are too few tiles to fill the chip; each split has its own partial tile and a
second kernel adds them in order, so the result does not depend on scheduling. One accumulator never sees more than
``TOKENS_PER_ACCUMULATOR`` tokens: tensor cores truncate when they add, which biases the diagonal (−3.5e-4 over 262 K
tokens, −1e-5 over 8 K).

float32 inputs are split into two bfloat16 parts, h + m, and three products are summed (h·m, m·h, h·h): what is left
out is below 2⁻¹⁷ of a product, about 1e-6 of the sum. tf32 would keep 1e-3 and wants the other memory order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels import gram_persistent
from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tiles import lower_tile
from pyprune.triton_kernels.tuning import config, multiprocessors, pick

TOKENS_PER_ACCUMULATOR = {torch.bfloat16: 16384, torch.float16: 16384, torch.float32: 8192}
L2_GROUP = 8  # tile rows walked together, so that a wave of programs reads few column panels of x

WIDE = (config(8, 3, BT=64, BC=128), config(8, 4, big=True, BT=64, BC=128))
NARROW = (config(4, 4, BT=32, BC=64), config(4, 3, BT=64, BC=64))
NARROW_CROSS = NARROW[:1]  # the other one spills two registers on sm_100
FLOAT32 = (config(8, 3, BT=32, BC=128), config(4, 2, BT=32, BC=64))
REDUCE = config(8)


@triton.jit
def multiply_add(b_acc, b_at, b_b, PARTS: tl.constexpr):
    """b_acc + b_at b_b for tiles [BC, BT] and [BT, BC]; PARTS = 2 or 3 splits float32 tiles into
    bfloat16 h + m (+ l): three products, error about 1e-6, or six, error of float32 itself."""
    if PARTS == 1:
        b_acc = tl.dot(b_at, b_b, b_acc)
    else:
        b_ah = b_at.to(tl.bfloat16)
        b_bh = b_b.to(tl.bfloat16)
        b_am = (b_at - b_ah.to(tl.float32)).to(tl.bfloat16)
        b_bm = (b_b - b_bh.to(tl.float32)).to(tl.bfloat16)
        if PARTS == 3:
            b_al = (b_at - b_ah.to(tl.float32) - b_am.to(tl.float32)).to(tl.bfloat16)
            b_bl = (b_b - b_bh.to(tl.float32) - b_bm.to(tl.float32)).to(tl.bfloat16)
            b_acc = tl.dot(b_ah, b_bl, b_acc)
            b_acc = tl.dot(b_al, b_bh, b_acc)
            b_acc = tl.dot(b_am, b_bm, b_acc)
        b_acc = tl.dot(b_ah, b_bm, b_acc)
        b_acc = tl.dot(b_am, b_bh, b_acc)
        b_acc = tl.dot(b_ah, b_bh, b_acc)
    return b_acc


@triton.jit
def _counted(mask, o_t, tokens, HAS_MASK: tl.constexpr):
    """Which tokens count: [BT]."""
    m_t = o_t < tokens
    if HAS_MASK:
        m_t = m_t & (tl.load(mask + o_t, mask=m_t, other=0) != 0)
    return m_t


@triton.jit
def _tokens(x, o_t, m_t, o_c, c, stride_xt, stride_xc, ROUND: tl.constexpr):
    """Tile [BT, BC] of x, zero where the token does not count."""
    p_x = x + o_t.to(tl.int64)[:, None] * stride_xt + o_c.to(tl.int64)[None, :] * stride_xc
    b_x = tl.load(p_x, mask=m_t[:, None] & (o_c < c)[None, :], other=0.0)
    return b_x.to(tl.bfloat16) if ROUND else b_x


@triton.jit
def _columns(x, o_t, m_t, o_c, c, stride_xt, stride_xc, ROUND: tl.constexpr):
    """The same tile as [BC, BT]: loaded that way round, because only then is the copy of a left operand asynchronous
    where the product is not Hopper's."""
    p_x = x + o_c.to(tl.int64)[:, None] * stride_xc + o_t.to(tl.int64)[None, :] * stride_xt
    b_x = tl.load(p_x, mask=(o_c < c)[:, None] & m_t[None, :], other=0.0)
    return b_x.to(tl.bfloat16) if ROUND else b_x


@triton.jit
def _add_symmetric(gram, b_acc, i_row, i_col, c, BC: tl.constexpr, DIAGONAL: tl.constexpr):
    """Add a tile of the lower triangle to the symmetric gram, and its mirror image to the upper one."""
    o_row = i_row * BC + tl.arange(0, BC)
    o_col = i_col * BC + tl.arange(0, BC)
    p_lower = gram + o_row.to(tl.int64)[:, None] * c + o_col[None, :]
    m_lower = (o_row < c)[:, None] & (o_col < c)[None, :]
    if DIAGONAL:
        # tensor cores need not round both halves alike: the upper one is a copy
        b_acc = tl.where(o_row[:, None] >= o_col[None, :], b_acc, tl.trans(b_acc))
        tl.store(p_lower, tl.load(p_lower, mask=m_lower, other=0.0) + b_acc, mask=m_lower)
    else:
        b_sum = tl.load(p_lower, mask=m_lower, other=0.0) + b_acc
        tl.store(p_lower, b_sum, mask=m_lower)
        p_upper = gram + o_col.to(tl.int64)[:, None] * c + o_row[None, :]
        tl.store(p_upper, tl.trans(b_sum), mask=(o_col < c)[:, None] & (o_row < c)[None, :])


@triton.jit
def _store_partial(partial, b_acc, i_split, i_row, i_col, c, BC: tl.constexpr):
    n_tiles = tl.cdiv(c, BC)
    i_tile = i_split.to(tl.int64) * (n_tiles * (n_tiles + 1) // 2) + i_row * (i_row + 1) // 2 + i_col
    o_in = tl.arange(0, BC)
    tl.store(partial + i_tile * BC * BC + o_in[:, None] * BC + o_in[None, :], b_acc)


@triton.jit
def gram_kernel(
    x,
    mask,
    gram,
    sums,
    count,
    partial,
    partial_sums,
    tokens,
    c,
    stride_xt,
    stride_xc,
    per_split,
    HAS_MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_row, i_col = lower_tile(tl.program_id(0), GROUP)
    if i_row * BC >= c:
        return
    i_split = tl.program_id(1)
    start = i_split * per_split
    stop = tl.minimum(start + per_split, tokens)
    o_row = i_row * BC + tl.arange(0, BC)
    o_col = i_col * BC + tl.arange(0, BC)
    b_acc = tl.zeros([BC, BC], dtype=tl.float32)
    if i_row == i_col:
        # a diagonal tile needs one load per step, and it is the one that sums its columns
        b_sum = tl.zeros([BC], dtype=tl.float32)
        b_count = tl.zeros([BT], dtype=tl.int32)
        for t in range(start, stop, BT):
            o_t = t + tl.arange(0, BT)
            m_t = _counted(mask, o_t, stop, HAS_MASK)
            # [BC, BT]
            b_x = _columns(x, o_t, m_t, o_row, c, stride_xt, stride_xc, ROUND)
            b_acc = multiply_add(b_acc, b_x, tl.trans(b_x), PARTS)
            if HAS_SUMS:
                b_sum += tl.sum(b_x.to(tl.float32), axis=1)
            if HAS_COUNT:
                b_count += m_t.to(tl.int32)
        if HAS_SUMS:
            m_c = o_row < c
            if SPLIT:
                tl.store(partial_sums + i_split.to(tl.int64) * c + o_row, b_sum, mask=m_c)
            else:
                tl.store(sums + o_row, tl.load(sums + o_row, mask=m_c, other=0.0) + b_sum, mask=m_c)
        if HAS_COUNT:
            if i_row == 0:
                # integers: the order of the additions does not matter
                tl.atomic_add(count, tl.sum(b_count, axis=0).to(tl.int64))
        if SPLIT:
            _store_partial(partial, b_acc, i_split, i_row, i_col, c, BC)
        else:
            _add_symmetric(gram, b_acc, i_row, i_col, c, BC, True)
    else:
        for t in range(start, stop, BT):
            o_t = t + tl.arange(0, BT)
            m_t = _counted(mask, o_t, stop, HAS_MASK)
            b_at = _columns(x, o_t, m_t, o_row, c, stride_xt, stride_xc, ROUND)
            b_b = _tokens(x, o_t, m_t, o_col, c, stride_xt, stride_xc, ROUND)
            b_acc = multiply_add(b_acc, b_at, b_b, PARTS)
        if SPLIT:
            _store_partial(partial, b_acc, i_split, i_row, i_col, c, BC)
        else:
            _add_symmetric(gram, b_acc, i_row, i_col, c, BC, False)


@triton.jit
def gram_reduce_kernel(gram, sums, partial, partial_sums, c, splits, HAS_SUMS: tl.constexpr, BC: tl.constexpr):
    i_row, i_col = lower_tile(tl.program_id(0), 1)
    o_row = i_row * BC + tl.arange(0, BC)
    o_in = tl.arange(0, BC)
    p_tile = partial + tl.program_id(0).to(tl.int64) * BC * BC + o_in[:, None] * BC + o_in[None, :]
    b_acc = tl.zeros([BC, BC], dtype=tl.float32)
    for _ in range(splits):
        b_acc += tl.load(p_tile)
        p_tile += tl.num_programs(0).to(tl.int64) * BC * BC
    if i_row != i_col:
        _add_symmetric(gram, b_acc, i_row, i_col, c, BC, False)
    else:
        _add_symmetric(gram, b_acc, i_row, i_col, c, BC, True)
        if HAS_SUMS:
            m_c = o_row < c
            b_sum = tl.load(sums + o_row, mask=m_c, other=0.0)
            p_sum = partial_sums + o_row
            for _ in range(splits):
                b_sum += tl.load(p_sum, mask=m_c, other=0.0)
                p_sum += c
            tl.store(sums + o_row, b_sum, mask=m_c)


@triton.jit
def cross_kernel(
    y,
    x,
    mask,
    cross,
    partial,
    tokens,
    cy,
    cx,
    stride_yt,
    stride_yc,
    stride_xt,
    stride_xc,
    per_split,
    HAS_MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    # GROUP rows of tiles at a time, column by column
    n_cols = tl.cdiv(cx, BC)
    i_first = tl.program_id(0) // (GROUP * n_cols) * GROUP
    n_rows = tl.minimum(tl.cdiv(cy, BC) - i_first, GROUP)
    i_rest = tl.program_id(0) % (GROUP * n_cols)
    i_row = i_first + i_rest % n_rows
    i_col = i_rest // n_rows
    i_split = tl.program_id(1)
    start = i_split * per_split
    stop = tl.minimum(start + per_split, tokens)
    o_row = i_row * BC + tl.arange(0, BC)
    o_col = i_col * BC + tl.arange(0, BC)
    b_acc = tl.zeros([BC, BC], dtype=tl.float32)
    for t in range(start, stop, BT):
        o_t = t + tl.arange(0, BT)
        m_t = _counted(mask, o_t, stop, HAS_MASK)
        b_yt = _columns(y, o_t, m_t, o_row, cy, stride_yt, stride_yc, False)
        b_x = _tokens(x, o_t, m_t, o_col, cx, stride_xt, stride_xc, False)
        b_acc = multiply_add(b_acc, b_yt, b_x, PARTS)
    m_out = (o_row < cy)[:, None] & (o_col < cx)[None, :]
    o_out = o_row.to(tl.int64)[:, None] * cx + o_col[None, :]
    if SPLIT:
        tl.store(partial + i_split.to(tl.int64) * cy * cx + o_out, b_acc, mask=m_out)
    else:
        tl.store(cross + o_out, tl.load(cross + o_out, mask=m_out, other=0.0) + b_acc, mask=m_out)


@triton.jit
def cross_reduce_kernel(cross, partial, size, splits, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_acc = tl.load(cross + o, mask=m, other=0.0)
    p_part = partial + o
    for _ in range(splits):
        b_acc += tl.load(p_part, mask=m, other=0.0)
        p_part += size
    tl.store(cross + o, b_acc, mask=m)


def _splits(x: Tensor, tiles: int, block: int) -> tuple[int, int]:
    """Splits per launch and tokens per split: two programs for each multiprocessor, at least four steps each."""
    tokens = len(x)
    wanted = triton.cdiv(2 * multiprocessors(x.device), tiles)
    splits = max(1, min(wanted, triton.cdiv(tokens, 4 * block)))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), block) * block
    per_split = min(per_split, TOKENS_PER_ACCUMULATOR[x.dtype])
    return min(splits, triton.cdiv(tokens, per_split)), per_split


def configs(c: int, dtype: torch.dtype):
    """Hand-picked list for a width and an input type; the first is the default."""
    if dtype == torch.float32:
        return FLOAT32 if c > 512 else FLOAT32[1:]
    return WIDE if c > 512 else NARROW


def _launch_gram(cfg, gram, x, sums, count, mask, rounded):
    if "BM" in dict(cfg.blocks):
        gram_persistent.launch_gram(cfg, gram, x, sums, count)
        return
    tokens, c = x.shape
    tiles = triton.cdiv(c, cfg["BC"])
    group = L2_GROUP if tiles > L2_GROUP else 1
    last = triton.cdiv(tiles, group) * group
    splits, per_split = _splits(x, tiles * (tiles + 1) // 2, cfg["BT"])
    partial = partial_sums = gram
    if splits > 1:
        partial = gram.new_empty(splits, tiles * (tiles + 1) // 2, cfg["BC"], cfg["BC"])
        partial_sums = gram.new_empty(splits, c)
    flags = dict(HAS_SUMS=sums is not None)
    for start in range(0, tokens, splits * per_split):
        part = x[start : start + splits * per_split]
        used = triton.cdiv(len(part), per_split)
        gram_kernel[(last * (last + 1) // 2, used)](
            part,
            part if mask is None else mask[start : start + len(part)],
            gram,
            gram if sums is None else sums,
            gram if count is None else count,
            partial,
            partial_sums,
            len(part),
            c,
            *part.stride(),
            per_split,
            HAS_MASK=mask is not None,
            HAS_COUNT=count is not None,
            SPLIT=splits > 1,
            PARTS=2 if x.dtype == torch.float32 and not rounded else 1,
            ROUND=rounded,
            GROUP=group,
            **flags,
            **cfg.launch(),
        )
        if splits > 1:
            gram_reduce_kernel[(tiles * (tiles + 1) // 2,)](
                gram,
                gram if sums is None else sums,
                partial,
                partial_sums,
                c,
                used,
                BC=cfg["BC"],
                **flags,
                **REDUCE.launch(),
            )


@on_device
def gram_update(
    gram: Tensor,
    x: Tensor,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str = "float32",
) -> None:
    if x.numel() == 0:
        if count is not None:
            count += len(x) if mask is None else mask.sum()
        return
    rounded = precision == "bfloat16" and x.dtype == torch.float32
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    shape = (triton.next_power_of_2(len(x)), x.shape[1], str(x.dtype), rounded, mask is not None)
    choices = configs(x.shape[1], x.dtype) + gram_persistent.configs(x, mask)
    cfg = pick(
        "gram_update",
        shape,
        choices,
        x.device,
        lambda c: _launch_gram(
            c,
            torch.empty_like(gram),
            x,
            None if sums is None else sums.clone(),
            None if count is None else count.clone(),
            mask,
            rounded,
        ),
    )
    _launch_gram(cfg, gram, x, sums, count, mask, rounded)


def _launch_cross(cfg, cross, y, x, mask):
    tokens, (cy, cx) = len(x), cross.shape
    rows, cols = triton.cdiv(cy, cfg["BC"]), triton.cdiv(cx, cfg["BC"])
    splits, per_split = _splits(x, rows * cols, cfg["BT"])
    partial = cross.new_empty(splits, cy, cx) if splits > 1 else cross
    for start in range(0, tokens, splits * per_split):
        part_y, part_x = y[start : start + splits * per_split], x[start : start + splits * per_split]
        used = triton.cdiv(len(part_x), per_split)
        cross_kernel[(rows * cols, used)](
            part_y,
            part_x,
            part_x if mask is None else mask[start : start + len(part_x)],
            cross,
            partial,
            len(part_x),
            cy,
            cx,
            *part_y.stride(),
            *part_x.stride(),
            per_split,
            HAS_MASK=mask is not None,
            SPLIT=splits > 1,
            PARTS=2 if x.dtype == torch.float32 else 1,
            GROUP=L2_GROUP,
            **cfg.launch(),
        )
        if splits > 1:
            cross_reduce_kernel[(triton.cdiv(cy * cx, 1024),)](
                cross, partial, cy * cx, used, BLOCK=1024, num_warps=4, enable_fp_fusion=True
            )


@on_device
def cross_gram_update(cross: Tensor, y: Tensor, x: Tensor, *, mask: Tensor | None = None) -> None:
    if len(x) == 0 or cross.numel() == 0:
        return
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    shape = (triton.next_power_of_2(len(x)), *cross.shape, str(x.dtype), mask is not None)
    choices = configs(max(cross.shape), x.dtype)
    cfg = pick(
        "cross_gram_update",
        shape,
        NARROW_CROSS if choices is NARROW else choices,
        x.device,
        lambda c: _launch_cross(c, torch.empty_like(cross), y, x, mask),
    )
    _launch_cross(cfg, cross, y, x, mask)
