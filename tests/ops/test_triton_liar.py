"""Triton LIAR update, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from pyprune import ops

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize(
    "r, c, d, dtype",
    [(70, 90, 33, torch.float32), (33, 17, 16, torch.bfloat16), (5, 8, 0, torch.float16), (5, 8, 8, torch.float32)],
)
@pytest.mark.parametrize("with_bias, with_mean", [(True, True), (False, True), (True, False), (False, False)])
def test_liar_update_matches_float64(r, c, d, dtype, with_bias, with_mean):
    generator = torch.Generator().manual_seed(c + d)
    weight = torch.randn(c, r, generator=generator).to(dtype).T  # strided
    order = torch.randperm(c, generator=generator)
    drop, keep = order[:d].sort().values, order[d:].sort().values
    q = torch.randn(c - d, d, generator=generator) / 3
    bias = torch.randn(r, generator=generator) if with_bias else None
    mean = torch.randn(c, generator=generator) if with_mean else None
    with ops.backend("triton"):
        updated, new_bias = ops.liar_update(weight, keep, drop, q, bias=bias, mean=mean)
    w = weight.double()
    want = w[:, keep] + w[:, drop] @ q.double().T
    assert updated.dtype == torch.float32 and updated.shape == want.shape
    assert torch.allclose(updated.double(), want, atol=1e-5)
    if mean is None:
        assert new_bias is bias
    else:
        shift = w[:, drop] @ (mean[drop].double() - q.double().T @ mean[keep].double())
        assert torch.allclose(new_bias.double(), shift + (bias.double() if with_bias else 0), atol=1e-5)


def test_output_is_preserved_where_dropped_columns_are_linear_in_kept_ones():
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(200, 12, generator=generator).double()
    true_q = torch.randn(12, 5, generator=generator).double()
    x = torch.cat([kept, kept @ true_q + 2.0], 1)
    weight, bias = torch.randn(9, 17, generator=generator), torch.randn(9, generator=generator)
    with ops.backend("triton"):
        updated, new_bias = ops.liar_update(
            weight, torch.arange(12), torch.arange(12, 17), true_q.float(), bias=bias, mean=x.mean(0).float()
        )
    before = x @ weight.double().T + bias.double()
    after = kept @ updated.double().T + new_bias.double()
    assert torch.allclose(after, before, atol=1e-4)
