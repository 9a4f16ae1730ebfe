"""Moments of activations against float64: large means, any batches, bfloat16, held-out tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from couplings import correlated, split_of

from pyprune.structured.moments import Moments, held_out_tokens


def test_moments_survive_a_mean_a_thousand_times_the_spread():
    x = correlated(4000, 16) + 1000
    split = split_of(x, batches=7)
    truth = torch.from_numpy(np.cov(x.double().numpy().T, bias=True))
    assert float((split.second(True) - truth).norm() / truth.norm()) < 1e-5
    torch.testing.assert_close(split.variance, truth.diagonal(), rtol=1e-4, atol=0)
    torch.testing.assert_close(split.mean, x.double().mean(0), rtol=1e-9, atol=0)
    uncentred = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(split.second(False), uncentred, rtol=1e-7, atol=0)


def test_views_are_moments_about_one_point():
    x, e = correlated(500, 8), correlated(500, 3, seed=5)
    split = split_of(x, e)
    fit = torch.arange(500) % 5 != 4
    for centred in (True, False):
        p = x[fit].double().mean(0) if centred else torch.zeros(8, dtype=torch.float64)
        q = e[fit].double().mean(0) if centred else torch.zeros(3, dtype=torch.float64)
        view = split.view(centred)
        for rows, about in ((fit, view.fit), (~fit, view.held)):
            a, b = x[rows].double() - p, e[rows].double() - q
            torch.testing.assert_close(about.second.double(), a.T @ a / len(a), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(about.cross.double(), a.T @ b / len(a), rtol=1e-4, atol=1e-5)
            assert float(about.square) == pytest.approx(float(b.square().sum() / len(a)), rel=1e-4)


def test_moments_do_not_depend_on_batches():
    x = correlated(1000, 8)
    one, many = split_of(x, batches=1), split_of(x, batches=37)
    torch.testing.assert_close(one.second(True), many.second(True), rtol=1e-5, atol=1e-6)


def test_bfloat16_products_stay_within_its_rounding():
    x = correlated(2000, 8)
    narrow = Moments(8, precision="bfloat16")
    narrow.update(x)
    wide = Moments(8)
    wide.update(x)
    zero = torch.zeros(8, dtype=torch.float64)
    assert (
        float(
            (narrow.about(zero, None).second - wide.about(zero, None).second).norm()
            / wide.about(zero, None).second.norm()
        )
        < 3e-3
    )


def test_held_out_tokens():
    assert held_out_tokens(5, 2, 0, 20).tolist() == [False] * 8 + [True] * 2
    assert held_out_tokens(1, 10, 0, 1).tolist() == [False] * 8 + [True] * 2
    assert held_out_tokens(2, 5, 0, 2).tolist() == [False, False, False, False, True] * 2
