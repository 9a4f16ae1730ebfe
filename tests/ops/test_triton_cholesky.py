"""Triton Cholesky kernels, interpreted, against float64 and LAPACK's conventions."""

from __future__ import annotations

import importlib

import pytest
import torch

from pyprune import ops

module = importlib.import_module("pyprune.triton_kernels.cholesky")  # the package exports a function of that name
pytestmark = pytest.mark.usefixtures("interpreter")


def systems(batch, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2 * n + 3, n, generator=generator) * torch.logspace(-1, 0.5, n)
    return x.mT @ x / (2 * n + 3)


@pytest.fixture(params=["fused", "columns"])
def path(request, monkeypatch):
    if request.param == "columns":
        monkeypatch.setattr(module, "FUSED", 0)


@pytest.mark.parametrize("batch, n", [(3, 1), (2, 31), (2, 64), (1, 150)])
def test_factor_reproduces_the_matrix_and_reads_only_the_lower_triangle(path, batch, n):
    a = systems(batch, n)
    damping = torch.linspace(0.1, 0.3, batch)
    given = a.tril() + torch.ones(n, n).triu(1) * 1e9
    with ops.backend("triton"):
        factor, info = ops.cholesky(given, damping=damping)
    want = a.double() + damping.double()[:, None, None] * torch.eye(n)
    assert not info.any() and info.dtype == torch.int32
    assert torch.equal(factor, factor.tril())
    assert ((factor.double() @ factor.double().mT - want).norm() / want.norm()) < 1e-6
    assert torch.allclose(factor.double(), torch.linalg.cholesky(want), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch, n, k", [(2, 1, 1), (3, 20, 5), (1, 130, 70), (2, 64, 16)])
def test_solution_matches_float64(path, batch, n, k):
    a = systems(batch, n)
    b = torch.randn(batch, k, n, generator=torch.Generator().manual_seed(1)).mT  # strided
    damping = torch.full((batch,), 0.05)
    with ops.backend("triton"):
        x, info = ops.cholesky_solve(a.mT, b, damping=damping)
    matrix = a.double() + 0.05 * torch.eye(n)
    want = torch.linalg.solve(matrix, b.double())
    assert not info.any()
    assert ((x - want).norm() / want.norm()) < 1e-4
    assert ((matrix @ x.double() - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("n, bad", [(10, 0), (70, 66)])
def test_failures_are_reported_per_matrix_as_lapack_does(path, n, bad):
    a = systems(3, n)
    a[1, bad, bad] = -1.0
    a[2, bad, bad] = float("nan")
    _, want = torch.linalg.cholesky_ex(a[:2])
    with ops.backend("triton"):
        factor, info = ops.cholesky(a)
        x, solved = ops.cholesky_solve(a, torch.ones(3, n, 2))
    assert info.tolist() == [*want.tolist(), bad + 1] and torch.equal(info, solved)
    assert torch.isfinite(factor[0]).all() and torch.isfinite(x[0]).all()
    lower = torch.ones(n, n, dtype=torch.bool).tril()
    assert torch.isnan(factor[1:, lower]).all() and not factor[1:, ~lower].any()
    assert torch.isnan(x[1:]).all()


def test_damping_rescues_a_singular_matrix_and_grids_share_a_batch():
    column = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    a = (column.T @ column).expand(3, 12, 12)
    with ops.backend("triton"):
        x, info = ops.cholesky_solve(a, torch.ones(3, 12, 1), damping=torch.tensor([0.0, 1e-2, 1.0]))
    assert info[0] > 0 and not info[1:].any()
    for i, damping in ((1, 1e-2), (2, 1.0)):
        want = torch.linalg.solve(a[i].double() + damping * torch.eye(12), torch.ones(12, 1).double())
        assert torch.allclose(x[i].double(), want, rtol=1e-3)


def test_empty_batches_and_no_right_hand_sides():
    with ops.backend("triton"):
        assert ops.cholesky(torch.empty(0, 4, 4))[0].shape == (0, 4, 4)
        x, info = ops.cholesky_solve(torch.eye(3).expand(2, 3, 3), torch.empty(2, 3, 0))
    assert x.shape == (2, 3, 0) and info.tolist() == [0, 0]
