"""Products and attention of blocks on a CPU, for training and for passes without gradients.

Linear layers: ``y = x Wᵀ``, ``dX = dY W`` and ``dW += dYᵀ X`` through ``ops``, whose float32 products run at about
twice the speed of the torch wheel's; ``dW`` accumulates in a float32 buffer of the caller's, so a bfloat16 block keeps
float32 gradient sums and no copy is made. 6·n·r·c FLOPs, as ever.

Attention without gradients through ``ops.attention``. In bfloat16 training: softmax(Q Kᵀ/√d) V by batched products
over causal row chunks, the probabilities kept for the backward pass; torch's fused kernel recomputes them and runs its
products well below the processor's rate. Scores and softmax are float32, as there: a score of 100 rounded to bfloat16
is off by up to 0.25, its probability by a quarter.

Both replace torch's functions by a function mode, for the duration of a pass, whatever the architecture.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyprune import ops
from pyprune.ops import guards

CHUNK = 128
"""Query rows per chunk of causal attention: 5/8 of the square at 512 tokens."""
MAX_PROBABILITIES = 2**26
"""Probabilities kept for the backward pass; beyond it torch's attention, which keeps none, is left in place."""


class _Linear(torch.autograd.Function):
    """``x Wᵀ + b`` of ``x [rows, in]``; the weight's gradient goes to ``buffer`` (float32, shaped like W), not to
    ``weight.grad``."""

    @staticmethod
    def forward(ctx, x, weight, bias, buffer):
        ctx.save_for_backward(x, weight)
        ctx.buffer, ctx.has_bias = buffer, bias is not None
        return ops.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.contiguous()
        ops.cross_gram_update(ctx.buffer, rows, x)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows @ weight if weight.dtype != torch.float32 else ops.linear(rows, weight.T.contiguous())
        db = rows.sum(0, dtype=torch.float32).to(rows.dtype) if ctx.has_bias else None
        return dx, None, db, None


def _chunks(tokens: int, causal: bool) -> list[tuple[int, int, int]]:
    """``(start, stop, keys)`` of the query chunks: rows start:stop see the first ``keys`` keys."""
    if not causal:
        return [(0, tokens, tokens)]
    return [(s, min(s + CHUNK, tokens), min(s + CHUNK, tokens)) for s in range(0, tokens, CHUNK)]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, kept: list[Tensor]) -> Tensor:
    """Softmax attention of ``q [b, h, t, d]`` on ``k, v [b, h/g, t, d]``, the g query heads of a key head stacked as
    rows of one product; the probabilities of each chunk, in the type of ``v``, are appended to ``kept``."""
    b, h, t, d = q.shape
    heads = k.shape[1]
    group = h // heads
    exact = torch.promote_types(q.dtype, torch.float32)
    q5, k3 = q.to(exact).reshape(b * heads, group, t, d).mul(scale), k.to(exact).reshape(-1, t, d)
    v3 = v.reshape(-1, t, v.shape[-1])
    out = v.new_empty(b * heads, group, t, v.shape[-1])
    for start, stop, keys in _chunks(t, causal):
        rows = q5[:, :, start:stop].reshape(b * heads, -1, d)
        scores = torch.bmm(rows, k3[:, :keys].transpose(1, 2)).view(b * heads, group, stop - start, keys)
        if causal:
            above = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(above, -torch.inf)
        p = scores.softmax(-1).to(v.dtype).view(b * heads, -1, keys)
        out[:, :, start:stop] = torch.bmm(p, v3[:, :keys]).view(b * heads, group, stop - start, -1)
        kept.append(p)
    return out.view(b, h, t, -1)


class _Attention(torch.autograd.Function):
    """:func:`attention` with its backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        kept: list[Tensor] = []
        result = attention(q, k, v, causal, scale, kept)
        b, _, t, d = q.shape
        n = b * k.shape[1]
        q5, k3, v3 = q.reshape(n, -1, t, d), k.reshape(-1, t, d), v.reshape(-1, t, v.shape[-1])
        out = result.view(n, -1, t, v.shape[-1])
        ctx.save_for_backward(q5, k3, v3, out, *kept)
        ctx.causal, ctx.scale, ctx.shapes = causal, scale, (q.shape, k.shape, v.shape)
        return result

    @staticmethod
    def backward(ctx, grad):
        q5, k3, v3, out, *kept = ctx.saved_tensors
        n, group, t, d = q5.shape
        do5 = grad.reshape(out.shape)
        delta = (do5.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        dq = torch.empty_like(q5)
        dk, dv = torch.zeros_like(k3, dtype=torch.float32), torch.zeros_like(v3, dtype=torch.float32)
        for p, (start, stop, keys) in zip(kept, _chunks(t, ctx.causal)):
            do = do5[:, :, start:stop].reshape(n, group * (stop - start), -1)
            dv[:, :keys] += torch.bmm(p.transpose(1, 2), do)
            ds = torch.bmm(do, v3[:, :keys].transpose(1, 2))
            ds = ds.sub_(delta[:, :, start:stop].reshape(n, -1, 1)).mul_(p).mul_(ctx.scale)
            dq[:, :, start:stop] = torch.bmm(ds, k3[:, :keys]).view(n, group, stop - start, d)
            dk[:, :keys] += torch.bmm(ds.transpose(1, 2), q5[:, :, start:stop].reshape(n, -1, d))
        shapes = ctx.shapes
        return dq.view(shapes[0]), dk.to(q5.dtype).view(shapes[1]), dv.to(q5.dtype).view(shapes[2]), None, None


class TrainingMode(TorchFunctionMode):
    """Routes linear layers whose weight has a gradient buffer, and plain bfloat16 attention, to the functions above."""

    def __init__(self, buffers: dict[int, Tensor]):
        """buffers: ``id(weight)`` → float32 tensor of the weight's shape that receives its gradient."""
        super().__init__()
        self.buffers = buffers

    def __torch_function__(self, func, types, args: tuple = (), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs.keys() - {"bias"} and id(args[1]) in self.buffers:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            x = args[0]
            # shaped out here: what a function returns as a view may not be changed in place, as DeBERTa does
            out = _Linear.apply(x.reshape(-1, x.shape[-1]), args[1], bias, self.buffers[id(args[1])])
            return out.view(*x.shape[:-1], len(args[1]))
        if (
            func is functional.scaled_dot_product_attention
            and len(args) == 3
            and _plain_attention(*args, **kwargs)
            and ops.taken("forward_bfloat16", "cpu") == "pyprune"
        ):
            scale = kwargs.get("scale") or args[0].shape[-1] ** -0.5
            return _Attention.apply(*args, bool(kwargs.get("is_causal")), scale)
        return func(*args, **kwargs)


def forward_mode(dtype: torch.dtype, verdicts: guards.Verdicts | None = None) -> contextlib.AbstractContextManager:
    """What a forward pass in ``dtype`` on a CPU runs under: :class:`ForwardMode` where it is the faster one here."""
    op = "forward_bfloat16" if dtype == torch.bfloat16 else "forward_float32"
    return ForwardMode(verdicts) if ops.taken(op, "cpu") == "pyprune" else contextlib.nullcontext()


class ForwardMode(TorchFunctionMode):
    """The same for passes without gradients: float32 linear layers through ``ops.linear``, attention through
    ``ops.attention``."""

    def __init__(self, verdicts: guards.Verdicts | None = None):
        """verdicts: takes the guards of the ops' results."""
        super().__init__()
        self.verdicts = verdicts

    def __torch_function__(self, func, types, args: tuple = (), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and args[0].dtype == torch.float32 == args[1].dtype:
            out = ops.linear(*args)
            if self.verdicts is not None and out.numel():
                x, weight, *bias = args
                flat = x.reshape(-1, x.shape[-1])
                self.verdicts.add("linear", guards.product(out.reshape(len(flat), -1), flat, weight, *bias))
            return out
        if func is functional.scaled_dot_product_attention:
            given = _inference(*args, **kwargs)
            return func(*args, **kwargs) if given is None else self._attention(*given)
        return func(*args, **kwargs)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None):
        out = ops.attention(q, k, v, mask=mask, causal=causal, scale=scale)
        if self.verdicts is not None and ops.taken_for("attention", q) != "reference":
            self.verdicts.add("attention", guards.attended(out, q, k, v, mask, causal, scale))
        return out


def _inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float | None] | None:
    """What ``ops.attention`` is given in place of torch's function, whose arguments these are: queries, keys, values,
    mask, causal and scale; None where it does not take them."""
    shapes = query.shape, key.shape, value.shape
    fits = (
        not dropout_p
        and all(len(shape) == 4 and 0 not in shape for shape in shapes)
        and query.dtype in ops.FLOATS
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and (scale is None or scale > 0)
        and (attn_mask is None or (attn_mask.dtype in (torch.bool, query.dtype) and attn_mask.ndim <= 4))
        and not (is_causal and attn_mask is not None)
    )
    return (query, key, value, attn_mask, is_causal, scale) if fits else None


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    return (
        q.dtype == torch.bfloat16
        and attn_mask is None
        and not dropout_p
        and q.ndim == 4
        and q.shape[-2] == k.shape[-2]
        and (q.shape[1] == k.shape[1] or enable_gqa)
        and q.shape[:-1].numel() * k.shape[-2] <= MAX_PROBABILITIES
    )
