"""Criteria for neurons and heads: closed forms, brute force in float64, what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from couplings import correlated, heads, neurons, problem

from pyprune.config import ConfigError
from pyprune.structured import criteria
from pyprune.structured.criteria import Scored, greedy_order, score
from pyprune.structured.moments import Split


def scored(x, group=None, out=12, **more) -> Scored:
    p = problem(x, out=out, group=group)
    return Scored(p.group, p.weight, p.moments, **more)


def test_closed_form_criteria():
    x = correlated(600, 24)
    s = scored(x)
    w = s.weight.double()
    variance = x.double().var(0, correction=0)
    torch.testing.assert_close(score("wifv", s), variance * w.square().sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        score("activation", s), w.norm(dim=0) * x.double().square().mean(0).sqrt(), rtol=1e-4, atol=1e-5
    )
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


def test_a_function_of_the_users_is_checked():
    s = scored(correlated(60, 12))
    own = lambda layer: layer.known().variance.float()  # noqa: E731
    assert torch.equal(score(own, s), s.moments.variance.float().double())
    wrong = {
        r"a tensor of shape \[12, 1\]": lambda layer: torch.ones(12, 1),
        "a list": lambda layer: [0.0] * 12,
        "2 scores that are not finite": lambda layer: torch.tensor([torch.nan, torch.inf, *[0.0] * 10]),
        "a tensor of torch.complex64": lambda layer: torch.ones(12, dtype=torch.complex64),
    }
    for what, function in wrong.items():
        function.__name__ = "mine"
        with pytest.raises(ConfigError, match=rf"criterion mine returned {what} for layers\.3\.mlp; .*\[12\]"):
            score(function, s, "layers.3.mlp")
