"""Masks and OBS sweep against independent truth: float64, brute force, bounds, exact counts."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import tiny
import torch
from objective import DAMPING, hessian, inputs, objective, statistics
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune import ops
from pyprune.config import ConfigError, Evaluation, PruneConfig
from pyprune.masks.refit import damped, exact_refit
from pyprune.masks.solvers import Factor, dense_target_start, inverse_factor, obs_prune, solve
from pyprune.ops import native
from pyprune.pipeline.prune import prune


def sparsegpt_float64(weight, h, sparsity=None, nm=None, column_block=128):
    """The published algorithm, column by column in float64, inverse then Cholesky."""
    w = weight.double().clone()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    dropped = 0
    for start in range(0, w.shape[1], column_block):
        stop = min(start + column_block, w.shape[1])
        if sparsity is not None:
            score = (w[:, start:stop] / u.diagonal()[start:stop]).square().flatten()
            k = round(sparsity * w.shape[0] * stop) - dropped
            dropped += k
            mask = torch.ones_like(score, dtype=torch.bool)
            mask[score.argsort(stable=True)[:k]] = False
            keep[:, start:stop] = mask.reshape(-1, stop - start)
        for j in range(start, stop):
            if nm and j % nm[1] == 0:
                score = (w[:, j : j + nm[1]] / u.diagonal()[j : j + nm[1]]).square()
                drop = score.argsort(dim=1, stable=True)[:, : nm[1] - nm[0]]
                keep[:, j : j + nm[1]] = torch.ones_like(score, dtype=torch.bool).scatter(1, drop, False)
            e = torch.where(keep[:, j], 0, w[:, j]) / u[j, j]
            w[:, j:] -= e[:, None] * u[j, j:]
            w[:, j].masked_fill_(~keep[:, j], 0)
    return w, keep


def test_inverse_factor_is_the_upper_factor_of_the_inverse():
    x = inputs()
    factor = inverse_factor(statistics(x).gram, len(x), DAMPING)
    truth = torch.linalg.cholesky(torch.linalg.inv(hessian(x)), upper=True)
    assert (factor.r.double() - truth).norm() / truth.norm() < 1e-4
    assert torch.equal(factor.r, factor.r.triu())


@pytest.mark.parametrize("choice", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"nm": (2, 4)}, {"nm": (4, 8)}])
@pytest.mark.parametrize("column_block", [16, 128])
def test_sweep_equals_the_published_algorithm_in_float64(choice, column_block):
    x, weight = inputs(), torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    factor = inverse_factor(statistics(x).gram, len(x), DAMPING)
    ours = weight.clone()
    keep = obs_prune(ours, factor, column_block=column_block, **choice)
    truth, truth_keep = sparsegpt_float64(weight, hessian(x), column_block=column_block, **choice)
    assert (keep == truth_keep).float().mean() >= 0.99
    assert torch.equal(ours == 0, ~keep)
    h = hessian(x)
    assert objective(ours - weight, h) == pytest.approx(objective(truth - weight, h), rel=1e-3)
    if torch.equal(keep, truth_keep):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-4)


def test_sweep_lies_between_the_exact_refit_and_no_update():
    x, weight = inputs(), torch.randn(24, 48, generator=torch.Generator().manual_seed(2))
    s, h = statistics(x), hessian(x)
    swept = weight.clone()
    keep = obs_prune(swept, inverse_factor(s.gram, s.count, DAMPING), sparsity=0.6)
    refit = exact_refit(weight, keep, damped(s.gram, len(x), DAMPING), swept).weight
    best, ours, none = (objective(w - weight, h) for w in (refit, swept, weight * keep))
    assert best <= ours * (1 + 1e-6) and ours < 0.8 * none


def test_one_column_is_chosen_as_brute_force_chooses():
    """Dropping one weight of a row: the OBS saliency with the exact inverse picks the best single removal."""
    x = inputs(columns=6)
    h = hessian(x)
    inverse = torch.linalg.inv(h)
    weight = torch.randn(1, 6, generator=torch.Generator().manual_seed(5))
    losses = []
    for j in range(6):
        keep = torch.ones(1, 6, dtype=torch.bool)
        keep[0, j] = False
        refit = exact_refit(weight, keep, damped(statistics(x).gram, len(x), DAMPING), weight * keep)
        losses.append(objective(refit.weight - weight, h))
        assert losses[-1] == pytest.approx((weight[0, j].double().square() / inverse[j, j]).item(), rel=1e-3)
    assert min(range(6), key=losses.__getitem__) == int((weight[0].double().square() / inverse.diagonal()).argmin())


def test_two_four_with_orthogonal_inputs_keeps_the_two_largest():
    """With H = I the sweep is magnitude pruning and updates nothing: the known answer, by enumeration."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(6))
    gram = torch.eye(16) * 100
    swept = weight.clone()
    obs_prune(swept, inverse_factor(gram, 100, DAMPING), nm=(2, 4))
    for row, start in itertools.product(range(8), range(0, 16, 4)):
        group = weight[row, start : start + 4]
        best = max(itertools.combinations(range(4), 2), key=lambda pair: sum(group[i] ** 2 for i in pair))
        truth = torch.zeros(4)
        truth[list(best)] = group[list(best)]
        torch.testing.assert_close(swept[row, start : start + 4], truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.85])
def test_counts_are_exact(method, sparsity):
    x, weight = inputs(), torch.randn(20, 48, generator=torch.Generator().manual_seed(7))
    s = statistics(x, moments=method == "wanda")
    config = PruneConfig(method=method, sparsity=sparsity, **({"column_block": 32} if method == "sparsegpt" else {}))
    factor = inverse_factor(s.gram, s.count, DAMPING) if method == "sparsegpt" else None
    [solved] = solve([weight], [config], s, factor)
    dropped = (~solved.mask).sum().item()
    assert dropped == (20 * round(sparsity * 48) if method == "wanda" else round(sparsity * 20 * 48))
    assert torch.equal(solved.weight == 0, ~solved.mask)


def test_wanda_keeps_the_largest_products_of_each_row():
    x, weight = inputs(columns=8), torch.randn(3, 8, generator=torch.Generator().manual_seed(8))
    [solved] = solve([weight], [PruneConfig(method="wanda", sparsity=0.5)], statistics(x, moments=True), None)
    score = weight.double().abs() * x.double().square().sum(0).sqrt()
    for row in range(3):
        assert set(solved.mask[row].nonzero()[:, 0].tolist()) == set(score[row].topk(4).indices.tolist())
    torch.testing.assert_close(solved.weight[solved.mask], weight[solved.mask], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_layerwise_reconstruction_keeps_the_mask_and_lowers_the_error(method):
    x, weight = inputs(), torch.randn(16, 48, generator=torch.Generator().manual_seed(9))
    s = statistics(x)
    factor = inverse_factor(s.gram, s.count, DAMPING)
    [plain] = solve([weight], [PruneConfig(method=method, reconstruct="none")], s, None)
    [updated] = solve([weight], [PruneConfig(method=method, reconstruct="layer")], s, factor)
    assert torch.equal(plain.mask, updated.mask)
    assert (updated.weight[~updated.mask] == 0).all()
    h = hessian(x)
    assert objective(updated.weight - weight, h) < 0.8 * objective(plain.weight - weight, h)


TOGETHER = {
    "chosen": dict(method="sparsegpt"),
    "of a sparsity each": dict(method="sparsegpt", sparsity=[0.5, 0.3, 0.8]),
    "2:4": dict(method="sparsegpt", pattern="2:4"),
    "no update": dict(method="sparsegpt", reconstruct="none"),
    "given": dict(method="wanda", reconstruct="layer", sparsity=[0.5, 0.3, 0.8]),
    "given, 2:4": dict(method="magnitude", reconstruct="layer", pattern="2:4"),
    "refit": dict(method="sparsegpt", reconstruct="refit"),
    "towards dense outputs": dict(method="sparsegpt", reconstruct="layer"),
    "refit towards dense outputs": dict(method="wanda", reconstruct="refit"),
}


def swept_float64(weight, mask, factor):
    """The sweep of a matrix on a mask that is known, column by column in float64."""
    w, r = weight.double().masked_fill(factor.dead, 0), factor.r.double()
    for j in range(w.shape[1]):
        error = torch.where(mask[:, j], 0, w[:, j]) / r[j, j]
        w[:, j:] -= error[:, None] * r[j, j:]
    return w.masked_fill(~mask, 0)


@pytest.mark.parametrize(
    "backend",
    [pytest.param("cpu", marks=pytest.mark.skipif(native._C is None, reason="no native module")), "reference"],
)
@pytest.mark.parametrize("name", TOGETHER)
def test_matrices_of_one_input_are_solved_together_as_one_by_one(name, backend):
    fields = dict(TOGETHER[name])
    sparsities = fields.pop("sparsity", [0.5] * 3)
    x = inputs(columns=280)  # two panels and a remainder
    x[:, 7] = 0
    s = statistics(x)
    if "dense" in name:
        s.cross = (x + 0.3 * inputs(columns=280, seed=4)).T @ x
    generator = torch.Generator().manual_seed(13)
    weights = [torch.randn(rows, 280, generator=generator).bfloat16() for rows in (40, 13, 1)]
    before = [weight.clone() for weight in weights]
    configs = [PruneConfig(sparsity=sparsity, **fields) for sparsity in sparsities]
    for config in configs:
        config.column_block = 32
    with ops.backend(backend):
        factor = inverse_factor(s.gram, s.count, DAMPING)
        together = list(solve(weights, configs, s, factor))
        for weight, config, found in zip(weights, configs, together, strict=True):
            [alone] = solve([weight], [config], s, factor)
            assert torch.equal(found.mask, alone.mask) and found.weight.dtype == torch.float32
            if backend == "cpu":
                assert torch.equal(found.weight, alone.weight), "its kernels keep rows apart"
            else:  # of a refit the sweep's, from where the search goes on to its tolerance
                swept, other = (one.weight if one.swept is None else one.swept for one in (found, alone))
                start = weight.float() if s.cross is None else dense_target_start(weight.float(), s, factor)
                truth = start * found.mask if name == "no update" else swept_float64(start, found.mask, factor)
                for error in (swept - truth, other - truth, swept - other):
                    assert error.norm() <= 5e-7 * truth.norm()
            assert config.nm or (~found.mask).sum().item() == (
                len(weight) * round(config.sparsity * 280)
                if config.method == "wanda"
                else round(config.sparsity * weight.numel())
            )
            assert found.wrong.keys() == alone.wrong.keys() and not any(found.wrong.values())
    assert all(torch.equal(a, b) for a, b in zip(weights, before))


class Launched(TorchDispatchMode):
    """Counts operators that a GPU would launch a kernel for: those that make no view and do not only find memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += not func.is_view and "empty" not in func.__name__ and "split" not in func.__name__
        return out


def test_a_stack_takes_the_launches_of_one_matrix(monkeypatch):
    """Beside the ops themselves: a copy of the mask once, of the errors once a panel; a selection for each matrix."""
    called = Counter()

    def obs_sweep(w, r, *, mask=None, nm=None):
        called["obs_sweep"] += 1
        return mask if nm is None else w.new_empty(w.shape, dtype=torch.bool), torch.empty(w.shape), None

    def select_mask(w, k, **options):
        called["select_mask"] += 1
        return w.new_empty(w.shape, dtype=torch.bool)

    monkeypatch.setattr(ops, "obs_sweep", obs_sweep)
    monkeypatch.setattr(ops, "select_mask", select_mask)
    monkeypatch.setattr(ops, "trailing_update", lambda w, e, r: called.update(["trailing_update"]))
    factor, found = Factor(torch.eye(1024), torch.zeros(1024, dtype=torch.bool), DAMPING), {}
    for rows in ([4], [4, 2, 2]):
        for name, choice in (("2:4", {"nm": (2, 4)}), ("half", {"sparsity": 0.5})):
            called.clear()
            with Launched() as launched:
                obs_prune(torch.empty(sum(rows), 1024), factor, rows=rows, **choice)
            assert called["obs_sweep"] == 8 and called["trailing_update"] == 7
            assert called["select_mask"] == (0 if name == "2:4" else 8 * len(rows))
            found[name, len(rows)] = launched.count
    dead, scale, masks, errors, join = 1, 2, 1, 1, 8
    assert found["2:4", 1] == found["2:4", 3] == found["half", 1] == dead + scale + masks + errors
    assert found["half", 3] == found["half", 1] + join


@pytest.mark.parametrize("way", ["propagated", "dense", "sequential"])
def test_runs_sweep_the_matrices_of_one_input_together(way, monkeypatch):
    right, rows = ops.obs_sweep, []

    def obs_sweep(w, r, **choice):
        rows.append(len(w))
        return right(w, r, **choice)

    monkeypatch.setattr(ops, "obs_sweep", obs_sweep)
    model = tiny.model("llama", num_hidden_layers=1)
    prune(model, calibration=tiny.ids(12, 24), evaluation=Evaluation(enabled=False), progress=False, inputs=way)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    q, k, v, o = (getattr(attention, f"{name}_proj").weight.shape for name in "qkvo")
    gate, up, down = (getattr(mlp, f"{name}_proj").weight.shape for name in ("gate", "up", "down"))
    assert rows == [q[0] + k[0] + v[0], o[0], gate[0] + up[0], *[down[0]] * math.ceil(down[1] / 128)]


def test_a_wrong_row_of_the_stack_is_the_fault_of_its_matrix_alone(monkeypatch):
    x = inputs(columns=64)
    s = statistics(x)
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(14)) for rows in (8, 8)]
    right = ops.obs_sweep

    def obs_sweep(w, r, **choice):
        found = right(w, r, **choice)
        w[8:] *= 1.1
        return found

    monkeypatch.setattr(ops, "obs_sweep", obs_sweep)
    wrong = [one.wrong for one in solve(weights, [PruneConfig()] * 2, s, inverse_factor(s.gram, s.count, DAMPING))]
    assert [bool(one["obs_sweep"]) for one in wrong] == [False, True]
    assert not any(one["select_mask"] for one in wrong)


def test_dead_columns_are_zeroed_and_change_nothing_else():
    x = inputs(columns=16)
    x[:, [3, 11]] = 0
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(10))
    s = statistics(x)
    factor = inverse_factor(s.gram, s.count, DAMPING)
    assert factor.dead.nonzero()[:, 0].tolist() == [3, 11]
    swept = weight.clone()
    obs_prune(swept, factor, sparsity=0.5)
    assert (swept[:, [3, 11]] == 0).all() and torch.isfinite(swept).all()


def test_a_failed_factorisation_raises_damping_and_says_so():
    """Rank one with a tiny damping: float32 potrf fails, ten times more succeeds."""
    ones = torch.ones(64, 64) * 1e4
    ones[0, 1] = ones[1, 0] = 1e4 * (1 + 2e-3)
    factor = inverse_factor(ones, 1, 1e-4)
    assert factor.damping > 1e-4 and torch.isfinite(factor.r).all()


def test_an_indefinite_hessian_is_an_error_with_the_name_never_the_identity():
    bad = torch.eye(8)
    bad[0, 1] = bad[1, 0] = 1e6
    with pytest.raises(ConfigError, match="model.layers.7.mlp.down_proj"):
        inverse_factor(bad, 1, DAMPING, "model.layers.7.mlp.down_proj")


def test_damping_is_relative_to_the_mean_diagonal():
    """Scaling the inputs by 1000 changes no mask and no weight."""
    x, weight = inputs(), torch.randn(16, 48, generator=torch.Generator().manual_seed(12))
    results = []
    for scale in (1.0, 1024.0):
        swept = weight.clone()
        keep = obs_prune(swept, inverse_factor(statistics(x * scale).gram, len(x), DAMPING), sparsity=0.5)
        results.append((keep, swept))
    assert (results[0][0] == results[1][0]).float().mean() > 0.99
    assert math.isclose(results[0][1].norm(), results[1][1].norm(), rel_tol=1e-3)
