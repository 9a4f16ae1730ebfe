"""Triton's RMSNorm, rotary embedding and gate, interpreted, against the same written out in PyTorch."""

from __future__ import annotations

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference

pytestmark = pytest.mark.usefixtures("interpreter")


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same roundings, so the same 16-bit numbers but for a few at the middle between two."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.dtype == torch.float32:
        assert torch.allclose(got, want, rtol=2e-6, atol=1e-7)
    else:
        assert (got != want).float().mean() < 0.01 and torch.allclose(got, want, rtol=0.01)


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("form", ops.NORM_FORMS)
@pytest.mark.parametrize("rows, columns", [(3, 1), (5, 63), (2, 1200)])
def test_rms_norm(rows, columns, form, dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, rows, columns + 3) * 10)[..., 2 : 2 + columns].to(dtype)
    weight = torch.randn(columns).to(dtype)
    with ops.backend("triton"):
        agree(ops.rms_norm(x, weight, 1e-5, form=form), reference.rms_norm(x, weight, 1e-5, form=form).contiguous())


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("shape, shared", [((2, 7, 3, 64), True), ((2, 5, 1, 80), False), ((1, 1, 2, 6), True)])
def test_rotary(shape, shared, dtype):
    torch.manual_seed(0)
    batch, tokens, _, d = shape
    x = torch.randn(shape).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1 if shared else batch, tokens, d).to(dtype)
    with ops.backend("triton"):
        got = ops.rotary(x, cos, sin)
    agree(got, reference.rotary(x, cos, sin))
    assert got.stride() == x.stride()


@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_swiglu(dtype):
    gate = (torch.randn(3, 700, generator=torch.Generator().manual_seed(0)) * 18).to(dtype)
    up = torch.linspace(-3, 3, 2100).view(700, 3).T.to(dtype)
    with ops.backend("triton"):
        agree(ops.swiglu(gate, up), reference.swiglu(gate, up.contiguous()))
        assert ops.swiglu(gate[:0], up[:0]).shape == (0, 700)
