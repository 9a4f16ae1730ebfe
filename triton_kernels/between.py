"""What a block does between its products: RMSNorm, rotary embedding, the gate of a gated layer, one pass each.

``y = x / sqrt(mean x² + eps) · w``; ``y = x · cos + (−x₂, x₁) · sin``; ``y = silu(gate) · up``. Written out operator by
operator they read and write every number three to eight times. Bytes: each operand once; FLOPs: a few per number.
Sums and products are float32, rounded to the tensors' type where PyTorch rounds when the same is written out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyprune.triton_kernels.guard import on_device
from pyprune.triton_kernels.tuning import Config, config

WIDEST = 32768
"""Columns of a row that a program keeps in registers."""
TILE = 4096
"""Numbers of a program that takes several rows."""
FORMS = {"narrow": 0, "wide": 1, "offset": 2}
ROTARY = config(4, BR=32)
GATE = config(4, BLOCK=1024)


def norm_config(columns: int) -> Config:
    """Several narrow rows per program; the more warps, the wider a row."""
    bc = triton.next_power_of_2(columns)
    return config(4 if bc <= 4096 else 8 if bc <= 8192 else 16, BR=max(1, TILE // 4 // bc), BC=bc)


@triton.jit
def rms_norm_kernel(x, weight, out, rows, c, stride_x, eps, FORM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_c = o_c < c
    m_x = (o_r < rows)[:, None] & m_c[None, :]
    # [BR, BC]
    b_x = tl.load(x + o_r[:, None] * stride_x + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x * b_x, axis=1) / c
    b_y = b_x * tl.div_rn(1.0, tl.sqrt_rn(b_mean + eps))[:, None]
    if FORM == 0:
        b_y = b_y.to(out.dtype.element_ty).to(tl.float32)
    if FORM == 2:
        b_w += 1.0
    tl.store(out + o_r[:, None] * c + o_c[None, :], (b_y * b_w[None, :]).to(out.dtype.element_ty), mask=m_x)


@triton.jit
def rotary_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    heads,
    tokens,
    half,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_cb,
    stride_ct,
    stride_sb,
    stride_st,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    # a row is a head of a token; the heads of a token are neighbours, and share its angles
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BH)
    i_h = o_r % heads
    i_t = (o_r // heads) % tokens
    i_b = o_r // heads // tokens
    m_x = (o_r < rows)[:, None] & (o_d < half)[None, :]
    p_x = x + (i_b * stride_xb + i_h * stride_xh + i_t * stride_xt)[:, None] + o_d[None, :]
    p_c = cos + (i_b * stride_cb + i_t * stride_ct)[:, None] + o_d[None, :]
    p_s = sin + (i_b * stride_sb + i_t * stride_st)[:, None] + o_d[None, :]
    p_o = out + (i_b * stride_ob + i_h * stride_oh + i_t * stride_ot)[:, None] + o_d[None, :]
    # [BR, BH]
    b_first = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + half, mask=m_x, other=0.0).to(tl.float32)
    b_a = (b_first * tl.load(p_c, mask=m_x, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    b_b = (b_second * tl.load(p_s, mask=m_x, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    b_c = (b_second * tl.load(p_c + half, mask=m_x, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    b_d = (b_first * tl.load(p_s + half, mask=m_x, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(p_o, (b_a.to(tl.float32) - b_b.to(tl.float32)).to(out.dtype.element_ty), mask=m_x)
    tl.store(p_o + half, (b_c.to(tl.float32) + b_d.to(tl.float32)).to(out.dtype.element_ty), mask=m_x)


@triton.jit
def swiglu_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_gate = tl.load(gate + o, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(up + o, mask=m, other=0.0).to(tl.float32)
    b_silu = tl.div_rn(b_gate, 1.0 + tl.exp(-b_gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + o, (b_silu * b_up).to(out.dtype.element_ty), mask=m)


@on_device
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: str = "narrow") -> Tensor:
    c = x.shape[-1]
    if c > WIDEST:
        raise ValueError(f"the Triton RMSNorm takes at most {WIDEST} columns, got {c}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    rows = x.reshape(x.numel() // c, c)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    cfg = norm_config(c)
    rms_norm_kernel[(triton.cdiv(len(rows), cfg["BR"]),)](
        rows, weight.contiguous(), out, len(rows), c, rows.stride(0), eps, FORM=FORMS[form], **cfg.launch()
    )
    return out


@on_device
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    out = torch.empty_like(x)
    batch, heads, tokens, d = x.shape
    rows = batch * heads * tokens
    if not out.numel():
        return out
    shared = [stride if len(t) > 1 or i else 0 for t in (cos, sin) for i, stride in enumerate(t.stride()[:2])]
    rotary_kernel[(triton.cdiv(rows, ROTARY["BR"]),)](
        x,
        cos,
        sin,
        out,
        rows,
        heads,
        tokens,
        d // 2,
        *x.stride()[:3],
        *out.stride()[:3],
        *shared,
        BH=triton.next_power_of_2(d // 2),
        **ROTARY.launch(),
    )
    return out


@on_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        n = gate.numel()
        swiglu_kernel[(triton.cdiv(n, GATE["BLOCK"]),)](gate, up, out, n, **GATE.launch())
    return out
