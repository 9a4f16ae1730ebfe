"""Weighted tokens: weighted least squares in float64, exact counts for integer weights, the rule that turns them on."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from couplings import correlated, neurons

import pyprune
from pyprune.config import TOKEN_WEIGHTS, ConfigError, Structured
from pyprune.model.blocks import ModelView
from pyprune.structured.groups import find_groups
from pyprune.structured.liar import GRID, Problem, choose_damping, repair, start_of
from pyprune.structured.moments import Split, balanced_weights, token_weights
from pyprune.structured.observation import mean_powers

KEPT = torch.arange(0, 24, 2)


def weighted(x, w, e=None, held_every: int = 5) -> Split:
    split = Split.make(x.shape[1], 0 if e is None else e.shape[1])
    held = torch.arange(len(x)) % held_every == held_every - 1
    for rows in torch.arange(len(x)).chunk(3):
        split.update(x[rows], held[rows], None if e is None else e[rows], w[rows])
    return split


def matrix(out: int = 12, c: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(out, c, generator=g), torch.randn(out, generator=g)


@pytest.mark.parametrize("with_error", [False, True])
def test_weighted_repair_is_weighted_least_squares(with_error):
    x = correlated(1500, 24, rank=10)
    g = torch.Generator().manual_seed(7)
    w = torch.rand(1500, generator=g) ** 4 + 1e-3
    e = 0.3 * correlated(1500, 12, seed=4) if with_error else None
    weight, shift = matrix()
    done = repair(Problem(weight, shift, neurons(24), weighted(x, w, e)), KEPT, damping=1e-7, guard=False)
    root = w.double().sqrt().numpy()[:, None]
    y = (x @ weight.T + (0 if e is None else e)).double().numpy()
    a = np.concatenate([x[:, KEPT].double().numpy(), np.ones((1500, 1))], axis=1)
    found = np.linalg.lstsq(root * a, root * y, rcond=None)[0]
    np.testing.assert_allclose(done.weight.double().numpy(), found[:-1].T, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(done.bias.double().numpy(), shift.double().numpy() + found[-1], rtol=2e-3, atol=3e-3)


def test_a_weight_of_three_is_the_token_three_times():
    x, e = correlated(400, 24), correlated(400, 12, seed=5)
    times = torch.randint(1, 4, (400,), generator=torch.Generator().manual_seed(2))
    held = torch.arange(400) % 5 == 4
    split = weighted(x, times.float(), e)
    many = Split.make(24, 12)
    many.update(x.repeat_interleave(times, 0), held.repeat_interleave(times), e.repeat_interleave(times, 0))
    for centred in (True, False):
        torch.testing.assert_close(split.second(centred), many.second(centred), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.mean, many.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.mean_e, many.mean_e, rtol=1e-5, atol=1e-6)
    weight, shift = matrix()
    a, b = (repair(Problem(weight, shift, neurons(24), s), KEPT, damping=0.01) for s in (split, many))
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-3, atol=1e-4)
    assert a.errors == pytest.approx(b.errors, rel=1e-3)


def test_criteria_of_plain_activations_ignore_the_weights():
    x = correlated(700, 24)
    split = weighted(x, torch.rand(700, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(split.variance, x.double().var(0, correction=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(split.mean_square, x.double().square().mean(0), rtol=1e-4, atol=1e-6)


def test_weights_move_with_the_shift():
    x, e = correlated(300, 8) + 5, correlated(300, 3, seed=5)
    w = torch.rand(300, generator=torch.Generator().manual_seed(3)) + 0.1
    split = weighted(x, w, e)
    before = split.second(True), split.mean, split.variance, split.mean_e
    for part in (split.fit, split.held):
        part.move(torch.full((8,), 3.0), torch.full((3,), -1.0))
    for a, b in zip(before, (split.second(True), split.mean, split.variance, split.mean_e)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def loud(tokens: int = 4000, every: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a neuron (1) that is 300 on every 21st token, else silent; a kept one hints at it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 10, generator=g) @ torch.randn(10, 24, generator=g) + torch.randn(tokens, 24, generator=g)
    special = torch.arange(tokens) % every == 0
    x[:, 1] = torch.where(special, 300.0, 0.0)
    x[:, 0] += 20.0 * special
    return x, special


def test_a_neuron_loud_on_few_tokens_does_not_spoil_the_others():
    """Plain least squares rebuilds it and ruins ordinary tokens; weights repair these as if it were not there."""
    x, special = loud()
    weight, shift = matrix()
    y = x @ weight.T
    w = token_weights(y.square().sum(1), x.square() @ weight.square().sum(0))

    def error(split) -> float:
        done = repair(Problem(weight, shift, neurons(24), split), KEPT)
        got = x[~special][:, KEPT] @ done.weight.T + done.bias - shift
        return float((got - y[~special]).square().sum() / y[~special].square().sum())

    quiet = weighted(x[~special], torch.ones(int((~special).sum())))
    plain, relative, ideal = error(weighted(x, torch.ones(len(x)))), error(weighted(x, w)), error(quiet)
    sliced = (x[~special][:, KEPT + 1] @ weight[:, KEPT + 1].T).square().sum() / y[~special].square().sum()
    assert plain > 2 * float(sliced), "the case must be one that plain least squares loses"
    assert relative < 1.3 * ideal < 0.5 * float(sliced)


def test_token_weights():
    w = token_weights(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([100.0, 100.0, 0.0]))
    torch.testing.assert_close(w, torch.tensor([1 / 5, 1.0, 0.0]))
    w = balanced_weights(torch.tensor([4.0, 0.0, 1.0]), torch.tensor(2.0))
    torch.testing.assert_close(w, torch.tensor([3 / 4, 1 / 2, 3 / 2]))
    assert torch.isfinite(balanced_weights(torch.zeros(2), torch.tensor(0.0))).all()


def test_balanced_is_the_sum_of_both_relative_errors():
    """Least squares under these weights minimises mean of ``‖e‖²/‖s‖²`` plus ``Σ‖e‖²/Σ‖s‖²``."""
    x, _ = loud()
    weight, shift = matrix()
    y = x @ weight.T
    power = (y + 3).square().sum(1)  # of the stream that y lands in
    w = balanced_weights(power, power.mean())
    split = weighted(x, w, held_every=10**9)
    done = repair(Problem(weight, shift, neurons(24), split), KEPT, damping=1e-9, guard=False)

    def objective(change: float, seed: int = 0) -> float:
        g = torch.Generator().manual_seed(seed)
        moved = done.weight.double() * (1 + change * torch.randn(done.weight.shape, generator=g))
        e = (x[:, KEPT].double() @ moved.T + done.bias.double() - shift.double() - y.double()).square().sum(1)
        return float((e / power).mean() + e.sum() / power.sum())

    assert all(objective(change, seed) > objective(0) for change in (-1e-2, 1e-2) for seed in range(5))


@pytest.mark.parametrize(
    "architecture, normed",
    [("bert", True), ("roberta", True), ("llama", False), ("gpt2", False), ("gpt_neox", False), ("gemma2", False)],
)
def test_post_norm_is_what_divides_the_size_away(architecture, normed):
    for group in find_groups(ModelView(tiny.model(architecture)), "structured", "groups")[0]:
        assert group.normed is normed


@pytest.mark.parametrize("inputs", ["dense", "propagated"])
@pytest.mark.parametrize("architecture, same", [("bert", "relative"), ("llama", "balanced"), ("qwen3_moe", "uniform")])
def test_weights_are_automatic_by_architecture(architecture, same, inputs):
    def pruned(weights):
        result = pyprune.prune(
            tiny.model(architecture),
            pattern="neurons",
            sparsity=0.5,
            inputs=inputs,
            reconstruct="liar",
            calibration=tiny.ids(20, 24, seed=5),
            progress=False,
            evaluation={"enabled": False},
            structured={"token_weights": weights},
        )
        return torch.cat([p.detach().flatten() for p in result.model.parameters()])

    found = {w: pruned(w) for w in TOKEN_WEIGHTS}
    alike = [w for w in TOKEN_WEIGHTS[1:] if torch.equal(found["auto"], found[w])]
    assert alike == (["balanced", "uniform"] if architecture == "qwen3_moe" else [same])
    assert not torch.equal(found["relative"], found["uniform"])


def test_balanced_weights_depend_on_no_batch():
    """The mean power is that of the first sequences, whatever comes in one batch and in what order lengths come."""
    sequences = [*tiny.ids(10, 24, seed=5), *tiny.ids(10, 17, seed=6)]

    def pruned(size):
        return pyprune.prune(
            tiny.model("llama"),
            pattern="neurons",
            sparsity=0.5,
            reconstruct="liar",
            calibration={"source": sequences, "num_samples": 20, "held_out": 0},
            progress=False,
            evaluation={"enabled": False},
            batch_size=size,
            inputs="dense",
            structured={"token_weights": "balanced"},
        ).model

    one, other = (pruned(size).state_dict() for size in (1, 7))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_mean_power_is_that_of_the_first_sequences(monkeypatch):
    """Of 32 sequences two: the stream behind the block, worked out by hand."""
    seen = []

    def noted(*arguments):
        seen.append((arguments[1], mean_powers(*arguments), arguments[0].data.sequences))
        return seen[-1][1]

    monkeypatch.setattr("pyprune.structured.observation.mean_powers", noted)
    model = tiny.model("llama")
    sequences = [*tiny.ids(16, 24, seed=5), *tiny.ids(16, 17, seed=6)]
    pyprune.prune(
        model,
        pattern="neurons",
        sparsity=0.5,
        reconstruct="liar",
        progress=False,
        inputs="dense",
        calibration={"source": sequences, "num_samples": 32, "held_out": 0},
        evaluation={"enabled": False},
    )
    sequences = seen[0][2]
    outputs = []
    handle = model.model.layers[1].register_forward_hook(
        lambda _, __, y: outputs.append((y if torch.is_tensor(y) else y[0]).reshape(-1, model.config.hidden_size))
    )
    with torch.no_grad():
        for ids in sequences[:2]:
            model(ids[None])
    handle.remove()
    assert [index for index, *_ in seen] == [0, 1, 2] and len(sequences) == 32
    torch.testing.assert_close(seen[1][1], torch.cat(outputs).square().sum(1).mean()[None], rtol=1e-4, atol=0)


def test_unknown_weights_are_refused():
    with pytest.raises(ConfigError, match="token_weights"):
        Structured(token_weights="loud")


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
@pytest.mark.parametrize("best", range(len(GRID)))
def test_the_walk_finds_the_best_damping(best, tokens):
    """For every place of the minimum, wherever it begins; no candidate is tried twice."""
    a, b, tried = torch.eye(3), torch.ones(3, 1), []

    def error(solution):
        tried.append(round(float(1 / solution[0, 0] - 1), 6))
        return (torch.log10(1 / solution[0, 0] - 1) - np.log10(GRID[best])).abs()

    assert choose_damping(a, b, None, error, tokens=tokens)[0] == GRID[best]
    edge = best in (0, len(GRID) - 1)  # there is nothing beyond it to try
    assert len(tried) == len(set(tried)) <= 3 + abs(start_of(tokens, 3) - best) - edge


def test_the_walk_begins_where_noise_would_have_it():
    """Eight columns per token, within the grid."""
    assert [GRID[start_of(tokens, 100)] for tokens in (1, 800, 8_000, 80_000, 10**9)] == [3.0, 1.0, 0.1, 0.01, 3e-3]
