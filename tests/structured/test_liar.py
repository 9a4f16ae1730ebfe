"""The mathematics of structured pruning (arXiv 2407.13331) against float64 and known answers, on plain tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyprune.config import ConfigError
from pyprune.model.blocks import WeightRef
from pyprune.structured import criteria
from pyprune.structured.allocation import Member, choose, global_counts, uniform_count
from pyprune.structured.criteria import Scored, greedy_order, score
from pyprune.structured.groups import Coupled
from pyprune.structured.liar import GRID, Problem, repair
from pyprune.structured.moments import Moments, Split, held_out_tokens


def neurons(c: int) -> Coupled:
    return Coupled("neurons", WeightRef("down.weight"), torch.arange(c)[:, None], (), torch.zeros(c, dtype=torch.long))


def heads(count: int, width: int, pools: int = 1) -> Coupled:
    return Coupled("heads", WeightRef("o.weight"), torch.arange(count * width).reshape(count, width), (),
                   torch.arange(count) * pools // count, count, count)


def correlated(tokens: int, c: int, seed: int = 0, rank: int | None = None, mean: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rank = rank or c
    return torch.randn(tokens, rank, generator=g) @ torch.randn(rank, c, generator=g) / rank**0.5 \
        + 0.3 * torch.randn(tokens, c, generator=g) + mean * torch.randn(c, generator=g)


def split_of(x: torch.Tensor, e: torch.Tensor | None = None, held_every: int = 5, batches: int = 3) -> Split:
    out = Split.make(x.shape[1], 0 if e is None else e.shape[1])
    held = torch.arange(len(x)) % held_every == held_every - 1
    for rows in torch.arange(len(x)).chunk(batches):
        out.update(x[rows], held[rows], None if e is None else e[rows])
    return out


def problem(x, e=None, out: int = 12, bias: bool = True, seed: int = 1, group=None) -> Problem:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, x.shape[1], generator=g)
    shift = torch.randn(out, generator=g) if bias else None
    return Problem(weight, shift, group or neurons(x.shape[1]), split_of(x, e))


def lstsq(x: torch.Tensor, y: torch.Tensor, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    a = x.double().numpy()
    a = np.concatenate([a, np.ones((len(a), 1))], axis=1) if bias else a
    found = np.linalg.lstsq(a, y.double().numpy(), rcond=None)[0]
    return (found[:-1].T, found[-1]) if bias else (found.T, None)


KEPT = torch.arange(0, 24, 2)


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
            assert about.square == pytest.approx(float(b.square().sum() / len(a)), rel=1e-4)


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
    assert float((narrow.about(zero, None).second - wide.about(zero, None).second).norm()
                 / wide.about(zero, None).second.norm()) < 3e-3


def test_held_out_tokens():
    assert held_out_tokens(5, 2, 0, 20).tolist() == [False] * 8 + [True] * 2
    assert held_out_tokens(1, 10, 0, 1).tolist() == [False] * 8 + [True] * 2
    assert held_out_tokens(2, 5, 0, 2).tolist() == [False, False, False, False, True] * 2


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
    torch.testing.assert_close(repair(enough, KEPT, interpolate_weights=True).weight, repair(enough, KEPT).weight,
                               rtol=1e-3, atol=1e-3)
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


def scored(x, group=None, out=12, **more) -> Scored:
    p = problem(x, out=out, group=group)
    return Scored(p.group, p.weight, p.moments, **more)


def test_closed_form_criteria():
    x = correlated(600, 24)
    s = scored(x)
    w = s.weight.double()
    variance = x.double().var(0, correction=0)
    torch.testing.assert_close(score("wifv", s), variance * w.square().sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score("activation", s), w.norm(dim=0) * x.double().square().mean(0).sqrt(), rtol=1e-4,
                               atol=1e-5)
    h = scored(x, heads(6, 4))
    torch.testing.assert_close(score("wifv", h), score("wifv", s).reshape(6, 4).sum(1))
    assert torch.equal(score("random", s), score("random", scored(x))) and len(score("random", h)) == 6


def test_first_order_criteria_from_mask_gradients():
    g = torch.tensor([[1.0, -2.0, 0.0], [-3.0, -2.0, 0.5]])
    s = Scored(neurons(3), torch.ones(2, 3), gradients=g)
    assert score("taylor", s).tolist() == [2.0, 2.0, 0.25]
    assert score("fisher", s).tolist() == [5.0, 4.0, 0.125]


def damped(split: Split) -> torch.Tensor:
    h = split.second(True)
    return h + criteria.OBS_DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def loss_without(w, h, gone) -> float:
    """min over the others of tr(ΔW H ΔWᵀ) when columns ``gone`` become zero, by definition."""
    keep = [j for j in range(len(h)) if j not in gone]
    d = w[:, gone]
    schur = h[gone][:, gone] - h[gone][:, keep] @ torch.linalg.solve(h[keep][:, keep], h[keep][:, gone])
    return float((d @ schur * d).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_obs_is_the_error_left_after_compensation(width):
    group = neurons(12) if width == 1 else heads(4, 3)
    s = scored(correlated(400, 12, rank=6), group)
    h = damped(s.moments)
    want = [loss_without(s.weight.double(), h, group.columns[u].tolist()) for u in range(group.units)]
    np.testing.assert_allclose(score("obs", s).numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_greedy_obs_is_brute_force(width):
    """Every removal is the cheapest one given all before it, with a refactorisation per removal as the truth."""
    group = neurons(12) if width == 1 else heads(4, 3)
    s = scored(correlated(400, 12, rank=6), group)
    h, gone, order = damped(s.moments), [], []
    for _ in range(group.units - 1):
        left = [u for u in range(group.units) if u not in order]
        losses = [loss_without(s.weight.double(), h, gone + group.columns[u].tolist()) for u in left]
        order.append(left[int(np.argmin(losses))])
        gone += group.columns[order[-1]].tolist()
    found, _ = greedy_order(s.weight.double(), torch.linalg.inv(h), group)
    assert found.tolist()[:-1] == order


def test_blocks_of_removals_equal_one_at_a_time():
    s = scored(correlated(3000, 200, rank=60))
    inverse = torch.linalg.inv(damped(s.moments))
    many, cost = criteria._greedy_columns(s.weight.double(), inverse.clone())
    one, single = criteria._greedy_columns(s.weight.double(), inverse.clone(), pool=200, block=1)
    assert many[:150].tolist() == one[:150].tolist()
    np.testing.assert_allclose(cost[:150].numpy(), single[:150].numpy(), rtol=1e-6)


def test_of_two_equal_columns_greedy_drops_one():
    """One-shot OBS sees both as free; greedy knows the second is not once the first is gone."""
    x = correlated(2000, 12)
    x[:, 5] = x[:, 4] * 1.001
    order, _ = greedy_order((s := scored(x)).weight.double(), torch.linalg.inv(damped(s.moments)), s.group)
    assert len({4, 5} & set(order[:6].tolist())) == 1
    assert {4, 5} <= set(score("obs", s).argsort()[:2].tolist())


def test_non_finite_scores_are_an_error():
    with pytest.raises(ConfigError, match="not finite"):
        score("taylor", Scored(neurons(3), torch.ones(2, 3), gradients=torch.full((1, 3), torch.nan)))


def test_choice_is_exact_and_even_over_pools():
    group = heads(8, 2, pools=2)
    scores = torch.tensor([9, 8, 7, 6, 1, 2, 3, 4.0])
    assert choose(group, scores, 4).tolist() == [0, 1, 6, 7]
    assert choose(neurons(8), torch.ones(8), 3).tolist() == [0, 1, 2]  # ties keep the lower index
    assert [uniform_count(neurons(10), s) for s in (0.0, 0.25, 0.5, 0.99)] == [10, 8, 5, 1]
    assert uniform_count(group, 0.9) == 2  # one head stays in every pool


def test_global_allocation_spends_the_budget_where_it_is_cheap():
    """Standardised scores of both kinds in one ranking, each unit counting its parameters."""
    flat, spread = torch.arange(100.0), torch.cat([torch.arange(50.0), 1000 + torch.arange(50.0)])
    members = [Member(0, neurons(100), flat, 3), Member(1, neurons(100), spread, 3),
               Member(1, heads(10, 4), torch.arange(10.0), 40)]
    for sparsity in (0.1, 0.3, 0.5, 0.7):
        counts = global_counts(members, sparsity)
        dropped = sum((m.group.units - n) * m.unit_size for m, n in zip(members, counts))
        assert abs(dropped / 1000 - sparsity) <= 0.02 and min(counts) >= 1
    z = [(s - s.mean()) / s.std() for s in (flat, spread, torch.arange(10.0))]
    counts = global_counts(members, 0.3)
    cut = max(float(v.sort().values[len(v) - n - 1]) for v, n in zip(z, counts) if n < len(v))
    assert all(float(v.sort().values[len(v) - n]) >= cut for v, n in zip(z, counts))
