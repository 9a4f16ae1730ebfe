"""Products with packed weights: ``y = x Wᵀ + bias``, W ``[out, in]`` as a bitmask and its non-zero values.

A program expands ``[BR, BC]`` of W in registers: the place of a value is the row's running count plus the bits before
it, a prefix sum along the row; the values of a row lie one behind the other, so the gather reads whole sectors, each
once. One token is multiplied and summed; up to ``BT`` tokens meet the tile in a tensor core product. For more tokens
the weight is expanded once into memory and the product is the library's.
Bytes: the packed weight. FLOPs: 2 · tokens · out · in, and about ten integer operations per weight.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tuning import config, pick

ONE = (config(4, BR=8, BC=128), config(4, BR=4, BC=256), config(8, BR=16, BC=128))
FEW = (config(4, BR=32, BC=64), config(8, BR=64, BC=64))
EXPAND = config(4, BR=8, BC=128)
BT = 16  # the least that a tensor core product takes


@triton.jit
def _expand(mask, values, b_at, o_r, o_c, m_r, columns, width):
    """[BR, BC] of W as float of its own type, and how many values each row has in it."""
    p_byte = mask + o_r.to(tl.int64)[:, None] * width + (o_c // 8)[None, :]
    b_byte = tl.load(p_byte, mask=m_r[:, None] & (o_c < columns)[None, :], other=0).to(tl.int32)
    b_bit = (b_byte >> (o_c % 8)[None, :]) & 1
    b_place = b_at[:, None] + (tl.cumsum(b_bit, axis=1) - b_bit)
    return tl.load(values + b_place, mask=b_bit != 0, other=0.0), tl.sum(b_bit, axis=1)


@triton.jit
def one_token_kernel(
    x,
    mask,
    values,
    offsets,
    bias,
    out,
    rows,
    columns,
    width,
    HAS_BIAS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < rows
    b_at = tl.load(offsets + o_r, mask=m_r, other=0)
    b_sum = tl.zeros([BR, BC], dtype=tl.float32)
    for c in range(0, columns, BC):
        o_c = c + tl.arange(0, BC)
        b_w, b_count = _expand(mask, values, b_at, o_r, o_c, m_r, columns, width)
        b_at += b_count
        b_x = tl.load(x + o_c, mask=o_c < columns, other=0.0).to(tl.float32)
        b_sum += b_w.to(tl.float32) * b_x[None, :]
    b_out = tl.sum(b_sum, axis=1)
    if HAS_BIAS:
        b_out += tl.load(bias + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(out + o_r, b_out.to(out.dtype.element_ty), mask=m_r)


@triton.jit
def few_tokens_kernel(
    x,
    mask,
    values,
    offsets,
    bias,
    out,
    tokens,
    rows,
    columns,
    width,
    stride_xt,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_t = tl.arange(0, BT)
    m_r, m_t = o_r < rows, o_t < tokens
    b_at = tl.load(offsets + o_r, mask=m_r, other=0)
    b_sum = tl.zeros([BR, BT], dtype=tl.float32)
    for c in range(0, columns, BC):
        o_c = c + tl.arange(0, BC)
        b_w, b_count = _expand(mask, values, b_at, o_r, o_c, m_r, columns, width)
        b_at += b_count
        # [BC, BT]
        p_x = x + o_t.to(tl.int64)[None, :] * stride_xt + o_c[:, None]
        b_x = tl.load(p_x, mask=(o_c < columns)[:, None] & m_t[None, :], other=0.0)
        b_sum = tl.dot(b_w, b_x, b_sum, input_precision="ieee")
    if HAS_BIAS:
        b_sum += tl.load(bias + o_r, mask=m_r, other=0.0).to(tl.float32)[:, None]
    p_out = out + o_t.to(tl.int64)[None, :] * rows + o_r[:, None]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_r[:, None] & m_t[None, :])


@triton.jit
def expand_kernel(mask, values, offsets, out, rows, columns, width, BR: tl.constexpr, BC: tl.constexpr):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < rows
    b_at = tl.load(offsets + o_r, mask=m_r, other=0)
    for c in range(0, columns, BC):
        o_c = c + tl.arange(0, BC)
        b_w, b_count = _expand(mask, values, b_at, o_r, o_c, m_r, columns, width)
        b_at += b_count
        p_out = out + o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
        tl.store(p_out, b_w, mask=m_r[:, None] & (o_c < columns)[None, :])


def _launch(cfg, x, packed, bias, out):
    rows, columns = packed.shape
    grid = (triton.cdiv(rows, cfg["BR"]),)
    tensors = x, packed.mask, packed.values, packed.offsets, x if bias is None else bias, out
    sizes, flags = (rows, columns, packed.mask.shape[1]), dict(HAS_BIAS=bias is not None, **cfg.launch())
    if len(x) == 1:
        one_token_kernel[grid](*tensors, *sizes, **flags)
    else:
        few_tokens_kernel[grid](*tensors, len(x), *sizes, x.stride(0), BT=BT, **flags)


def _expanded(packed):
    rows, columns = packed.shape
    dense = torch.empty((rows, columns), dtype=packed.dtype, device=packed.device)
    grid = (triton.cdiv(rows, EXPAND["BR"]),)
    expand_kernel[grid](
        packed.mask, packed.values, packed.offsets, dense, rows, columns, packed.mask.shape[1], **EXPAND.launch()
    )
    return dense


@on_device
def sparse_linear(x, packed, bias=None):
    """``packed`` is a :class:`pyprune.ops.packed.Packed`, checked."""
    rows, columns = packed.shape
    tokens = math.prod(x.shape[:-1])
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if tokens > BT or columns == 0:
        return torch.nn.functional.linear(x, _expanded(packed), bias)
    flat = x.reshape(tokens, columns)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    bias = None if bias is None else bias.contiguous()
    configs = ONE if tokens == 1 else FEW
    key = (tokens == 1, rows, columns, str(x.dtype), round(4 * packed.density))
    cfg = pick("sparse_linear", key, configs, x.device, lambda cfg: _launch(cfg, flat, packed, bias, out))
    _launch(cfg, flat, packed, bias, out)
    return out
