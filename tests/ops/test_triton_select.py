"""Triton selection and OBS sweep, interpreted: exact counts, ties, NaN, and equality with the reference."""

from __future__ import annotations

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from pyprune.triton_kernels import select

pytestmark = pytest.mark.usefixtures("interpreter")


def weights(*shape, dtype=torch.float32, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(-levels, levels + 1, shape, generator=generator).to(dtype)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("limit", [select.ROW_LIMIT, 0], ids=["registers", "memory"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("dtype, levels", [(torch.float32, None), (torch.bfloat16, 3), (torch.float16, None)])
def test_exactly_the_k_lowest_go(monkeypatch, limit, scope, dtype, levels):
    monkeypatch.setattr(select, "ROW_LIMIT", limit)
    w = weights(5, 63, dtype=dtype, levels=levels)
    scale = torch.rand(63, generator=torch.Generator().manual_seed(1)) + 0.1
    size = 63 if scope == "row" else w.numel()
    for k in (0, size // 2, size) if limit else (1, size // 2):
        pruned, expected = w.clone(), w.clone()
        want = reference.select_mask(expected, k, scale=scale, scope=scope, apply=True)
        with ops.backend("triton"):
            keep = ops.select_mask(pruned, k, scale=scale, scope=scope, apply=True)
        assert torch.equal(keep, want) and torch.equal(pruned, expected)
        assert int((~keep).sum()) == (k * 5 if scope == "row" else k)


def test_ties_go_by_index_across_blocks_and_zeros_of_both_signs_are_equal(monkeypatch):
    monkeypatch.setattr(select, "TILE", 64)
    w = weights(9, 100, levels=1)
    w[0, :50:2] = -0.0
    for k in (7, 333, 600):
        with ops.backend("triton"):
            keep = ops.select_mask(w, k, scope="matrix")
        assert torch.equal(keep, reference.select_mask(w, k, scope="matrix"))


def test_wide_rows_with_extreme_values_and_strides(monkeypatch):
    monkeypatch.setattr(select, "ROW_LIMIT", 100)
    monkeypatch.setattr(select, "TILE", 128)
    wide = weights(300, 7)
    wide[:4] = torch.tensor([0.0, 1e-42, float("inf"), 3e38])[:, None]
    w = wide.T
    before = wide.clone()
    with ops.backend("triton"):
        keep = ops.select_mask(w, 150)
        matrix = ops.select_mask(w, 1000, scope="matrix")
    assert torch.equal(keep, reference.select_mask(w, 150))
    assert torch.equal(matrix, reference.select_mask(w, 1000, scope="matrix"))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("scope, limit", [("row", select.ROW_LIMIT), ("row", 0), ("matrix", 0)])
def test_nan_is_refused_and_what_has_it_is_left_alone(monkeypatch, scope, limit):
    monkeypatch.setattr(select, "ROW_LIMIT", limit)
    w = weights(4, 20)
    w[2, 3] = float("nan")
    before = w.clone()
    with ops.backend("triton"), pytest.raises(ValueError, match="NaN"):
        ops.select_mask(w, 5, scope=scope, apply=True)
    alone = slice(2, 3) if scope == "row" else slice(None)
    assert torch.equal(w[alone].nan_to_num(7.0), before[alone].nan_to_num(7.0))


def factor(b, seed=0):
    """Upper factor of an inverse Hessian, well conditioned."""
    x = weights(4 * b, b, seed=seed).double()
    h = x.T @ x / (4 * b) + 0.1 * torch.eye(b).double()
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()


CHOICES = [dict(mask=True), dict(k=True), dict(nm=(2, 4)), dict(nm=(1, 3)), dict(nm=(9, 20))]


@pytest.mark.parametrize("rows, b", [(5, 60), (17, 120), (1, 1)])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_sweep_equals_reference(rows, b, choice):
    if "nm" in choice and b % choice["nm"][1]:
        pytest.skip("the group does not divide this width")
    check_sweep(rows, b, choice)


@pytest.mark.parametrize("choice", [dict(mask=True), dict(nm=(2, 5))], ids=str)
def test_sweep_of_a_wide_block_runs_in_sub_blocks(choice):
    check_sweep(3, 150, choice)


def check_sweep(rows, b, choice):
    w, r = weights(rows, b, seed=5), factor(b)
    if "mask" in choice:
        choice = dict(mask=weights(rows, b, seed=6) > 0)
    if "k" in choice:
        choice = dict(k=rows * b // 2)
    wide = torch.full((rows, b + 7), 9.0)
    got, want = wide[:, 3 : 3 + b], w.clone()
    got.copy_(w)
    with ops.backend("triton"):
        keep, error, loss = ops.obs_sweep(got, r, **choice)
    want_keep, want_error, want_loss = reference.obs_sweep(want, r, **choice)
    assert torch.equal(keep, want_keep)
    assert torch.allclose(got, want, atol=2e-5) and torch.allclose(error, want_error, atol=2e-5)
    assert torch.allclose(loss, want_loss, rtol=1e-4)
    assert not got[~keep].any() and (wide[:, :3] == 9).all() and (wide[:, 3 + b :] == 9).all()


def test_sweep_beats_dropping_without_compensation():
    w, r = weights(6, 64, seed=2), factor(64)
    h = torch.linalg.inv(r.double().T @ r.double())
    swept = w.clone()
    with ops.backend("triton"):
        keep, _, loss = ops.obs_sweep(swept, r, nm=(2, 4))
    delta, naive = (swept - w).double(), (w * ~reference.nm_mask(w, 2, 4)).double()
    objective = torch.einsum("ri,ij,rj->r", delta, h, delta)
    # the accumulated loss is the objective of the update, exactly in exact arithmetic
    assert torch.allclose(loss.double(), objective, rtol=1e-3)
    assert objective.sum() < torch.einsum("ri,ij,rj->r", naive, h, naive).sum()


@pytest.mark.parametrize("b", [12, 140])
@pytest.mark.parametrize("bad", ["zero pivot", "nan pivot", "infinite entry"])
def test_sweep_refuses_a_bad_factor_and_leaves_w(b, bad):
    w, r = weights(5, b, seed=5), factor(b)
    value = {"zero": 0.0, "nan": float("nan"), "infinite": float("inf")}[bad.split()[0]]
    r[(3, 3) if "pivot" in bad else (3, 7)] = value
    before = w.clone()
    with ops.backend("triton"), pytest.raises(ValueError, match="finite"):
        ops.obs_sweep(w, r, mask=weights(5, b, seed=6) > 0)
    assert torch.equal(w, before)


def test_sweep_refuses_weights_that_are_not_finite():
    w = weights(5, 12, seed=5)
    w[1, 4] = float("inf")
    before = w.clone()
    with ops.backend("triton"), pytest.raises(ValueError, match="finite"):
        ops.obs_sweep(w, factor(12), nm=(2, 4))
    assert torch.equal(w[1], before[1])
