"""Products and attention under training on a CPU, and their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyprune import ops
from pyprune.execution.cpu_forward import ForwardMode, TrainingMode, _Attention


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients_equal_float64(bias):
    torch.manual_seed(0)
    x, w, dy = torch.randn(3, 50, 24, requires_grad=True), nn.Parameter(torch.randn(40, 24)), torch.randn(3, 50, 40)
    b = nn.Parameter(torch.randn(40)) if bias else None
    buffer = torch.zeros(40, 24)
    with TrainingMode({id(w): buffer}):
        nn.functional.linear(x, w, b).backward(dy)
    wide = [t.detach().double().requires_grad_() if t is not None else None for t in (x, w, b)]
    nn.functional.linear(*wide).backward(dy.double())
    assert w.grad is None, "the weight's gradient belongs in the buffer"
    for got, want in [(x.grad, wide[0].grad), (buffer, wide[1].grad), *([(b.grad, wide[2].grad)] if bias else [])]:
        assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, keys, tokens", [(4, 4, 40), (6, 2, 300)])
def test_attention_and_gradients_equal_float64(causal, heads, keys, tokens):
    torch.manual_seed(0)
    parts = [torch.randn(2, h, tokens, 16, dtype=torch.float64, requires_grad=True) for h in (heads, keys, keys)]
    dy = torch.randn(2, heads, tokens, 16, dtype=torch.float64)
    want = nn.functional.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
    wanted = torch.autograd.grad(want, parts, dy)
    got = _Attention.apply(*parts, causal, 0.25)
    assert torch.allclose(got, want, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, parts, dy), wanted):
        assert torch.allclose(a, b, atol=1e-5)  # key and value gradients are summed in float32
    half = [p.detach().bfloat16().requires_grad_() for p in parts]
    with TrainingMode({}):
        out = nn.functional.scaled_dot_product_attention(*half, is_causal=causal, enable_gqa=True)
    assert type(out.grad_fn).__name__ == "_AttentionBackward"
    for a, b in zip([out, *torch.autograd.grad(out, half, dy.bfloat16())], [want, *wanted]):
        assert (a.double() - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("largest", [45, 120])
def test_bfloat16_attention_is_as_exact_as_the_fused_kernel_at_large_logits(largest):
    """Scores rounded to bfloat16 before the softmax gave 1 to 2 % here."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 300, 64), torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    logits = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 8
    q, k, v = (q * (largest / logits.abs().max())).bfloat16(), k.bfloat16(), v.bfloat16()
    want = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    fused = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    least = (fused.double() - want).norm() / want.norm()
    with ForwardMode(), ops.backend("cpu"):
        forward = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for found in (forward, _Attention.apply(q, k, v, True, 0.125)):
        error = (found.double() - want).norm() / want.norm()
        assert error < 0.003 and error < 1.5 * least


def test_the_forward_mode_takes_what_attention_takes_and_leaves_the_rest_to_torch(monkeypatch):
    taken = []
    monkeypatch.setattr(ops, "attention", lambda *tensors, **options: taken.append(options) or tensors[0])
    attend = nn.functional.scaled_dot_product_attention
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    shown = torch.ones(6, 6, dtype=torch.bool)
    with ForwardMode():
        attend(q, k, k, is_causal=True, enable_gqa=True)
        attend(q, q, value=q, attn_mask=shown, scale=0.5)
        first, second = taken
        assert (first["causal"], first["mask"], first["scale"]) == (True, None, None)
        assert (second["causal"], second["mask"] is shown, second["scale"]) == (False, True, 0.5)
        attend(q, q, q, dropout_p=0.5)
        attend(q[0], q[0], q[0])
        attend(q.double(), q.double(), q.double())
    assert len(taken) == 2
