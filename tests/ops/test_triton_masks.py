"""Triton mask kernels, interpreted: N:M, 2:4 compression, column moments; exact equality with the reference."""

from __future__ import annotations

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from pyprune.triton_kernels import nm_compress_24

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(*shape, dtype=torch.float32, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels:  # few distinct magnitudes: ties everywhere
        return (torch.randint(-levels, levels + 1, shape, generator=generator)).to(dtype)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 3), (1, 2), (7, 16), (2, 5)])
@pytest.mark.parametrize("levels", [None, 2])
def test_nm_mask_equals_reference(n, m, levels):
    dtype = DTYPES[m % 3]
    w = weights(13, 9 * m, dtype=dtype, levels=levels)
    scale = torch.rand(9 * m, generator=torch.Generator().manual_seed(1)) if m % 2 else None
    expected = w.clone()
    want = reference.nm_mask(expected, n, m, scale=scale, apply=True)
    with ops.backend("triton"):
        got = ops.nm_mask(w, n, m, scale=scale, apply=True)
    assert torch.equal(got, want) and torch.equal(w, expected)
    assert (got.reshape(13, 9, m).sum(-1) == n).all()
    assert not torch.signbit(w[~got].float()).any()


def test_nm_mask_of_strided_weights_leaves_the_rest_alone():
    wide = weights(40, 66)
    before = wide.clone()
    for w in (wide.T[:64, :36], wide[1::2, 2:66:2]):
        source = w.clone()
        with ops.backend("triton"):
            keep = ops.nm_mask(w, 2, 4, apply=True)
        assert torch.equal(keep, reference.nm_mask(source, 2, 4))
        assert torch.equal(w, source * keep)
        w.copy_(source)
    assert torch.equal(wide, before)


def test_nm_mask_without_apply_does_not_touch_w_and_accepts_empty():
    w = weights(3, 8)
    before = w.clone()
    with ops.backend("triton"):
        ops.nm_mask(w, 2, 4)
        assert ops.nm_mask(torch.empty(0, 8), 2, 4).shape == (0, 8)
    assert torch.equal(w, before)


@pytest.mark.parametrize("shape, dtype", [((32, 32), torch.bfloat16), ((64, 160), torch.float16)])
def test_compress_24_is_torchs_layout_bit_for_bit(shape, dtype):
    w = weights(*shape, dtype=dtype)
    reference.nm_mask(w, 2, 4, apply=True)
    w[:4, ::3] = 0  # groups with fewer than two non-zeros
    w[5] = 0
    w[6, 0] = -0.0
    want_values, want_meta = reference.compress_24(w)
    with ops.backend("triton"):
        values, meta = ops.compress_24(w)
        assert torch.equal(values, want_values) and torch.equal(meta, want_meta)
        assert torch.equal(ops.expand_24(values, meta), w)


@pytest.mark.parametrize("apply", [True, False])
def test_fused_choice_and_compression(apply):
    w = weights(96, 32, dtype=torch.bfloat16, seed=3).T.contiguous()
    scale = torch.rand(96, generator=torch.Generator().manual_seed(1))
    pruned = w.clone()
    want = reference.nm_mask(pruned, 2, 4, scale=scale, apply=True)
    given = w.clone()
    keep, values, meta = nm_compress_24(given, scale=scale, apply=apply)
    assert torch.equal(keep, want)
    assert torch.equal(given, pruned if apply else w)
    assert all(torch.equal(a, b) for a, b in zip((values, meta), reference.compress_24(pruned)))


def test_nan_scores_too_dense_groups_and_bad_metadata_are_refused():
    w = weights(32, 32, dtype=torch.bfloat16)
    with ops.backend("triton"), pytest.raises(ValueError, match="more than 2"):
        ops.compress_24(w)
    w[3, 5] = float("nan")
    before = w.clone()
    with ops.backend("triton"), pytest.raises(ValueError, match="NaN"):
        ops.nm_mask(w, 2, 4, apply=True)
    assert torch.equal(w[3, 4:8].nan_to_num(7.0), before[3, 4:8].nan_to_num(7.0))
    with ops.backend("triton"), pytest.raises(ValueError, match="metadata"):
        ops.expand_24(torch.ones(32, 16, dtype=torch.bfloat16), torch.zeros(32, 2, dtype=torch.int16))


def test_compress_24_refuses_what_the_layout_cannot_hold():
    with ops.backend("triton"), pytest.raises(ValueError, match="columns % 32"):
        ops.compress_24(torch.zeros(32, 48, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, c, masked", [(1, 5, False), (333, 130, True), (700, 3, False)])
def test_column_moments_survive_a_large_mean(dtype, tokens, c, masked):
    offset = 1000.0 if dtype == torch.float32 else 30.0
    x = (weights(tokens, c) + offset).to(dtype)
    mask = torch.arange(tokens) % 3 != 1 if masked else None
    if masked:
        x[~mask] = float("nan")
    with ops.backend("triton"):
        count, mean, m2 = ops.column_moments(x.T.contiguous().T, mask=mask)
    kept = (x if mask is None else x[mask]).double()
    assert count.item() == len(kept) and count.dtype == torch.int64
    assert torch.allclose(mean.double(), kept.mean(0), rtol=1e-6)
    want = (kept - kept.mean(0)).square().sum(0)
    assert torch.allclose(m2.double(), want, rtol=1e-4, atol=1e-6 * offset)


def test_column_moments_of_nothing_are_zero():
    with ops.backend("triton"):
        for x, mask in ((torch.empty(0, 4), None), (torch.ones(5, 4), torch.zeros(5, dtype=torch.bool))):
            count, mean, m2 = ops.column_moments(x, mask=mask)
            assert count.item() == 0 and not mean.any() and not m2.any()
