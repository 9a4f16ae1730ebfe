"""LIAR and its baselines against float64 least squares and by known answers, on plain tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from couplings import correlated, heads, neurons, problem

from pyprune.structured.liar import GRID, Problem, repair
from pyprune.structured.moments import Split


def lstsq(x: torch.Tensor, y: torch.Tensor, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    a = x.double().numpy()
    a = np.concatenate([a, np.ones((len(a), 1))], axis=1) if bias else a
    found = np.linalg.lstsq(a, y.double().numpy(), rcond=None)[0]
    return (found[:-1].T, found[-1]) if bias else (found.T, None)


KEPT = torch.arange(0, 24, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_exact_linear_maps_are_reconstructed_exactly(bias):
    """Dropped activations that are linear in the kept ones (affine with a bias slot) lose nothing."""
    g = torch.Generator().manual_seed(3)
    kept = torch.randn(600, 12, generator=g) + 1
    x = torch.empty(600, 24)
    x[:, KEPT] = kept
    x[:, KEPT + 1] = kept @ torch.randn(12, 12, generator=g) / 3 + (0.7 if bias else 0.0)
    p = problem(x, bias=bias)
    done = repair(p, KEPT, damping=1e-7)
    want = x @ p.weight.T + (p.bias if bias else 0)
    got = kept @ done.weight.T + (done.bias if bias else 0)
    assert done.method == "liar"
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert done.errors["liar"] < 1e-6 < 0.05 < done.errors["none"]


@pytest.mark.parametrize("bias", [True, False])
def test_float64_least_squares_on_random_data(bias):
    """λ → 0 is the least-squares regression of the dense output on the kept columns."""
    x = correlated(1500, 24, rank=10)
    p = problem(x, bias=bias)
    done = repair(p, KEPT, damping=1e-7, guard=False)
    weight, shift = lstsq(x[:, KEPT], x @ p.weight.T, bias)
    np.testing.assert_allclose(done.weight.double().numpy(), weight, rtol=1e-3, atol=1e-3)
    if bias:
        np.testing.assert_allclose(done.bias.double().numpy(), p.bias.double().numpy() + shift, rtol=1e-3, atol=2e-3)


def test_damping_to_zero_is_structured_obs():
    """W' = W − W_D (H⁻¹_DD)⁻¹ H⁻¹_D·, in float64, for the same mask."""
    x = correlated(1500, 24, rank=12)
    p = problem(x)
    h = torch.linalg.inv(p.moments.second(True))
    drop = KEPT + 1
    obs = p.weight.double() - p.weight.double()[:, drop] @ torch.linalg.inv(h[drop][:, drop]) @ h[drop]
    assert float(obs[:, drop].abs().max()) < 1e-9
    np.testing.assert_allclose(repair(p, KEPT, damping=1e-7).weight.numpy(), obs[:, KEPT].numpy(), rtol=1e-3, atol=1e-3)


def test_bias_compensation_is_flaps():
    """Q = 0: b' = b + W_D μ_D, weights untouched."""
    x = correlated(700, 24)
    p = problem(x)
    for done in (repair(p, KEPT, "bias"), repair(p, KEPT, "liar", interpolate="bias")):
        assert done.method == "bias" and torch.equal(done.weight, p.weight[:, KEPT])
        want = p.bias.double() + p.weight.double()[:, KEPT + 1] @ x.double().mean(0)[KEPT + 1]
        torch.testing.assert_close(done.bias.double(), want, rtol=1e-5, atol=1e-5)


def test_propagated_target_is_a_regression_of_the_missing_output():
    """With an error e between dense target and present output: least squares of W x + e on the kept columns."""
    x = correlated(1500, 24, rank=10)
    g = torch.Generator().manual_seed(8)
    e = x @ torch.randn(24, 12, generator=g) * 0.2 + torch.randn(1500, 12, generator=g) + 0.5
    p = problem(x, e)
    done = repair(p, KEPT, damping=1e-7)
    weight, shift = lstsq(x[:, KEPT], x @ p.weight.T + e, True)
    np.testing.assert_allclose(done.weight.double().numpy(), weight, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(done.bias.double().numpy(), p.bias.double().numpy() + shift, rtol=2e-3, atol=3e-3)


@pytest.mark.parametrize("method", ["liar", "bias", "mask_tuning"])
@pytest.mark.parametrize("with_error", [False, True])
def test_held_out_errors_from_moments_are_the_measured_ones(method, with_error):
    """No forward pass was made for them, so they are compared with one here."""
    x = correlated(400, 24, rank=10)
    e = 0.3 * correlated(400, 12, seed=4) if with_error else None
    p = problem(x, e)
    # a solution fitted on the fitted part alone, so that it can be held against the held-out part
    fit = torch.arange(400) % 5 != 4
    alone = Split.make(24, 12 if with_error else 0)
    alone.update(x[fit], torch.zeros(int(fit.sum()), dtype=torch.bool), None if e is None else e[fit])
    refit = repair(Problem(p.weight, p.bias, p.group, alone), KEPT, method, damping=0.1, guard=False)
    want = x[~fit] @ p.weight.T + p.bias + (0 if e is None else e[~fit])
    got = x[~fit][:, KEPT] @ refit.weight.T + refit.bias
    power = float((x[~fit] @ p.weight.T).square().sum())
    measured = float((got - want).square().sum()) / power
    assert repair(p, KEPT, method, damping=0.1, guard=False).errors[method] == pytest.approx(measured, rel=2e-3)
    sliced = float((x[~fit][:, KEPT] @ p.weight[:, KEPT].T + p.bias - want).square().sum()) / power
    assert repair(p, KEPT, "liar", guard=False).errors["none"] == pytest.approx(sliced, rel=2e-3)


def test_damping_is_chosen_where_it_matters():
    """As many tokens as kept columns, the worst point: the held-out choice is near the best, a tiny λ is not."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(40, 64, generator=g)
    x, test = (torch.randn(n, 40, generator=g) @ base + 2 * torch.randn(n, 64, generator=g) for n in (40, 3000))
    kept = torch.arange(32)
    p = problem(x, out=24)
    want = test @ p.weight.T + p.bias

    def measured(**options):
        done = repair(p, kept, **options)
        return float((test[:, kept] @ done.weight.T + done.bias - want).square().sum() / want.square().sum()), done

    auto, done = measured()
    fixed = [measured(damping=v, guard=False)[0] for v in GRID]
    tiny, _ = measured(damping=1e-7, guard=False)
    assert done.damping in GRID and auto < 1.1 * min(fixed) and tiny > 2 * auto


@pytest.mark.parametrize("damping", [None, 0.0, 1e-3])
@pytest.mark.parametrize("tokens", [3, 12, 40])
def test_fewer_tokens_than_columns_and_singular_grams(tokens, damping):
    x = correlated(tokens, 64)
    x[:, 7] = 0
    x[:, 9] = x[:, 8]
    done = repair(problem(x), torch.arange(32), damping=damping)
    assert bool(torch.isfinite(done.weight).all()) and bool(torch.isfinite(done.bias).all())
    assert done.method != "liar" or any("tokens" in w for w in done.warnings)


def test_no_tokens_at_all():
    done = repair(Problem(torch.ones(3, 4), None, neurons(4), Split.make(4)), torch.tensor([0, 1]))
    assert done.method == "none" and torch.equal(done.weight, torch.ones(3, 2)) and "no calibration" in done.warnings[0]


def test_falls_back_where_held_out_tokens_say_so():
    """Fitted and held-out tokens with opposite correlations: bias compensation is better, and is used and named."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 24, generator=g)
    held = torch.arange(1000) % 5 == 4
    x[:, KEPT + 1] = torch.where(held[:, None], -x[:, KEPT], x[:, KEPT])
    p = problem(x)
    done = repair(p, KEPT, damping=1e-3)
    assert done.method in ("bias", "none") and "held-out error" in done.warnings[0]
    assert torch.equal(done.weight, p.weight[:, KEPT])
    assert done.errors[done.method] < done.errors["liar"] == repair(p, KEPT, damping=1e-3, guard=False).error


def test_norm_ratio_warns_of_a_rebuilt_outlier():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 24, generator=g)
    x[:, 1] = 100 * x[:, 0] + x[:, 2]
    done = repair(problem(x), KEPT)
    assert done.norm_ratio > 3 and any("norm grew" in w for w in done.warnings)
    healthy = repair(problem(correlated(4000, 24, rank=12)), KEPT)
    assert healthy.method == "liar" and 1 <= healthy.norm_ratio < 2 and not healthy.warnings


def test_interpolated_weights_are_redundant_when_there_are_columns_enough():
    """P is exact for at least as many kept columns as outputs, lossy otherwise."""
    x = correlated(1500, 24, rank=12)
    enough, few = problem(x, out=8), problem(x, out=20)
    torch.testing.assert_close(
        repair(enough, KEPT, interpolate_weights=True).weight, repair(enough, KEPT).weight, rtol=1e-3, atol=1e-3
    )
    assert float((repair(few, KEPT, interpolate_weights=True).weight - repair(few, KEPT).weight).norm()) > 0.1


def test_weight_only_leaves_the_bias():
    p = problem(correlated(1500, 24, rank=12))
    done = repair(p, KEPT, interpolate="weight", damping=1e-7)
    assert torch.equal(done.bias, p.bias)
    x = correlated(1500, 24, rank=12)
    weight, _ = lstsq(x[:, KEPT], x @ p.weight.T, False)
    np.testing.assert_allclose(done.weight.double().numpy(), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [1, 4])
def test_mask_tuning_is_one_scale_a_unit(width):
    x = correlated(1500, 24, rank=12)
    units = 24 // width
    group = neurons(24) if width == 1 else heads(units, width)
    p = problem(x, out=30, group=group)
    kept = torch.arange(0, units, 2)
    done = repair(p, kept, "mask_tuning", damping=1e-7)
    columns = group.columns_of(kept)
    parts = torch.stack([(x[:, group.columns[u]] @ p.weight[:, group.columns[u]].T).flatten() for u in kept], 1)
    scales = np.linalg.lstsq(parts.double().numpy(), (x @ p.weight.T).double().flatten().numpy(), rcond=None)[0]
    want = p.weight[:, columns] * torch.from_numpy(scales).float().repeat_interleave(width)
    torch.testing.assert_close(done.weight, want, rtol=2e-3, atol=2e-3)
    heavy = repair(p, kept, "mask_tuning", damping=1e6, guard=False)
    torch.testing.assert_close(heavy.weight, p.weight[:, columns], rtol=1e-4, atol=1e-5)  # damped towards 1


def test_bias_without_a_slot_is_said():
    done = repair(problem(correlated(200, 24), bias=False), KEPT, "bias")
    assert done.method == "none" and done.bias is None and "no bias slot" in done.warnings[0]
