"""Triton products with packed weights, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from pyprune import ops
from pyprune.ops.packed import pack_bitmask

pytestmark = pytest.mark.usefixtures("interpreter")

# Relative Frobenius error: rounding of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("tokens, rows, columns", [(1, 9, 131), (1, 3, 300), (3, 37, 70), (16, 5, 8), (19, 9, 129)])
def test_sparse_linear_matches_float64(tokens, rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(rows, columns, generator=generator)
    w[torch.rand(rows, columns, generator=generator) < 0.6] = 0
    w[0], w[-1] = 0, 2
    w = w.to(dtype)
    x = torch.randn(columns, tokens, generator=generator).to(dtype).T  # strided
    bias = torch.randn(rows, generator=generator).to(dtype)
    packed = pack_bitmask(w)
    for b in (None, bias):
        with ops.backend("triton"):
            value = ops.sparse_linear(x, packed, b)
        want = x.double() @ w.double().T + (0 if b is None else b.double())
        assert value.dtype == dtype and value.shape == want.shape
        assert (value.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
