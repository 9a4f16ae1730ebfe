"""The exact refit: float64 row by row, bounds against the sweep, and whole runs with ``reconstruct="refit"``."""

from __future__ import annotations

import pytest
import tiny
import torch
from fast import equal, run, state
from objective import DAMPING, hessian, inputs, objective, statistics
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.config import ConfigError, Evaluation, PruneConfig, from_yaml, to_yaml
from pyprune.execution.journal import Interrupted, Journal
from pyprune.masks import refit
from pyprune.masks.refit import NARROW, damped, exact_refit
from pyprune.masks.solvers import inverse_factor, solve
from pyprune.pipeline.prune import prune
from pyprune.reporting import summary
from pyprune.reporting.card import model_card

NARROW_COLUMNS, WIDE_COLUMNS = 48, NARROW + 32


def row_by_row(dense, mask, h):
    """The published formula in float64, one row at a time."""
    best = torch.zeros_like(dense, dtype=torch.double)
    for row in range(len(dense)):
        support = mask[row].nonzero()[:, 0]
        best[row, support] = torch.linalg.solve(h[support][:, support], (h @ dense[row].double())[support])
    return best


def weights(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [NARROW_COLUMNS, WIDE_COLUMNS])
@pytest.mark.parametrize("tokens", [30, 800])
def test_refit_is_the_least_squares_solution_of_every_row(columns, tokens):
    """Few tokens leave most directions to the damping. Rows with everything, one weight and nothing kept are there."""
    x, dense = inputs(tokens, columns), weights(37, columns)
    keep = torch.rand(37, columns, generator=torch.Generator().manual_seed(2)) > 0.5
    keep[0], keep[1], keep[2] = True, False, False
    keep[2, 5] = True
    found = exact_refit(dense, keep, damped(statistics(x).gram, tokens, DAMPING), dense * keep)
    h = hessian(x)
    best = row_by_row(dense, keep, h)
    assert torch.equal(found.weight == 0, ~keep) and found.converged and (found.steps > 0) == (columns > NARROW)
    excess = objective(found.weight - dense, h) / objective(best - dense, h)
    assert 1 - 1e-5 <= excess < 1 + 1e-3
    torch.testing.assert_close(found.weight[0], dense[0], rtol=1e-3, atol=1e-4)
    assert (found.weight - best).norm() / best.norm() < 2e-2


@pytest.mark.parametrize("columns", [NARROW_COLUMNS, WIDE_COLUMNS])
@pytest.mark.parametrize("choice", [dict(sparsity=0.5), dict(pattern="2:4"), dict(sparsity=0.7)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_refit_is_never_above_the_sweep_and_keeps_its_mask(columns, choice, method):
    x, dense = inputs(400, columns), weights(24, columns)
    s, h = statistics(x), hessian(x)
    factor = inverse_factor(s.gram, s.count, DAMPING)
    [swept] = solve([dense], [PruneConfig(method=method, reconstruct="layer", **choice)], s, factor)
    [solved] = solve([dense], [PruneConfig(method=method, reconstruct="refit", **choice)], s, factor)
    assert torch.equal(solved.mask, swept.mask) and torch.equal(solved.swept, swept.weight)
    assert torch.equal(solved.weight == 0, ~solved.mask)
    changes = [(found.weight - dense).double() for found in (solved, swept)]
    ours, sweeps = (torch.einsum("ri,ij,rj->r", d, h, d) for d in changes)
    assert (ours <= sweeps * (1 + 1e-5)).all()
    best = objective(row_by_row(dense, solved.mask, h) - dense, h)
    assert objective(solved.weight - dense, h) == pytest.approx(best, rel=1e-3)


def test_the_sweep_is_far_above_the_refit_where_tokens_are_few():
    """The error without damping, on the tokens themselves: twice the refit's with many, dozens of times with few."""
    columns, ratios = 256, {}
    dense = weights(64, columns)
    for tokens in (4000, 200, 100):
        x = inputs(tokens, columns)
        x += 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        s = statistics(x)
        factor = inverse_factor(s.gram, s.count, DAMPING)
        [solved] = solve([dense], [PruneConfig(reconstruct="refit")], s, factor)
        lost = [(x.double() @ (w - dense).double().T).square().sum().item() for w in (solved.swept, solved.weight)]
        ratios[tokens] = lost[0] / lost[1]
    assert 1.5 < ratios[4000] < 3 < 4 < ratios[200] and ratios[100] > 30


def test_dead_columns_stay_zero_and_change_nothing_else():
    x, dense = inputs(600, WIDE_COLUMNS), weights(8, WIDE_COLUMNS)
    x[:, [3, 11]] = 0
    s = statistics(x)
    [solved] = solve(
        [dense], [PruneConfig(method="magnitude", reconstruct="refit")], s, inverse_factor(s.gram, 600, DAMPING)
    )
    assert (solved.weight[:, [3, 11]] == 0).all() and solved.mask[:, [3, 11]].any()
    alive = torch.ones(WIDE_COLUMNS, dtype=torch.bool)
    alive[[3, 11]] = False
    h = hessian(x)[alive][:, alive]
    best = row_by_row(dense[:, alive], solved.mask[:, alive], h)
    ours = objective(solved.weight[:, alive] - dense[:, alive], h)
    assert ours == pytest.approx(objective(best - dense[:, alive], h), rel=1e-3)


@pytest.mark.parametrize("columns", [NARROW_COLUMNS, WIDE_COLUMNS])
def test_dense_stream_targets_are_fitted_on_the_mask(columns):
    """GP: the solution is that of ``X̄ Wᵀ ≈ X W'ᵀ`` on the support, the ridge pulling towards W."""
    x, dense = inputs(600, columns), weights(12, columns)
    ahead = x + 0.3 * inputs(600, columns, seed=4)
    s = statistics(x)
    s.cross = ahead.T @ x
    factor = inverse_factor(s.gram, s.count, DAMPING)
    [solved] = solve([dense], [PruneConfig(method="wanda", reconstruct="refit")], s, factor)
    h = hessian(x)
    ridge = h - x.double().T @ x.double() / 600
    right = (ahead.double().T @ x.double() / 600 + ridge).T @ dense.double().T
    best = torch.zeros_like(dense, dtype=torch.double)
    for row in range(len(dense)):
        support = solved.mask[row].nonzero()[:, 0]
        best[row, support] = torch.linalg.solve(h[support][:, support], right[support, row])
    assert objective(solved.weight - best, h) < 1e-3 * objective(solved.swept - best, h)


def test_a_system_that_is_not_positive_definite_is_an_error():
    h = torch.eye(8)
    h[2, 2] = -1
    with pytest.raises(ConfigError, match="refit of row 1 is singular; use a larger damping"):
        keep = torch.ones(3, 8, dtype=torch.bool)
        keep[0, 2] = False
        exact_refit(torch.ones(3, 8), keep, h, torch.ones(3, 8) * keep)


def test_the_search_waits_for_the_device_once_in_several_steps():
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
            return func(*args, **(kwargs or {}))

    x, dense = inputs(600, WIDE_COLUMNS), weights(300, WIDE_COLUMNS)
    keep = dense.abs() > 0.6
    h = damped(statistics(x).gram, 600, DAMPING)
    with Waits() as waits:
        found = exact_refit(dense, keep, h, dense * keep)
    assert found.steps >= refit.CHECK and waits.count == found.steps // refit.CHECK


def refitted(model=None, **fields):
    return run(model, reconstruct="refit", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(method="wanda", pattern="2:4"),
        dict(method="magnitude"),
        dict(inputs="dense"),
        dict(global_propagation=True),
    ],
)
def test_the_report_has_both_errors_of_every_weight(fields):
    """Errors on all calibration sequences: the refit fits exactly these, up to its damping."""
    result, swept = (
        refitted(samples=16, probe_samples=16, **fields),
        run(samples=16, probe_samples=16, reconstruct="layer", **fields),
    )
    rows = {row["name"]: row for row in result.report["weights"]}
    for name, row in rows.items():
        assert row["error"] < row["error_sweep"] * 1.001 or fields.get("global_propagation"), name
        assert min(row["error_held_out"], row["error_held_out_sweep"]) > 0
    for row in swept.report["weights"]:
        assert "error_sweep" not in row
        if row["block"] == 0:
            assert rows[row["name"]]["error_sweep"] == row["error"], "the first block sees the same inputs"
            assert rows[row["name"]]["sparsity"] == row["sparsity"]
    first = [key for key in state(swept) if "layers.0." in key]
    assert all(torch.equal(state(result)[key] == 0, state(swept)[key] == 0) for key in first)
    assert result.report["blocks"][-1]["error"] < swept.report["blocks"][-1]["error"]


def test_wide_layers_are_refitted_in_a_run_and_a_stopped_search_is_said(monkeypatch):
    def wide(**fields):
        return refitted(tiny.model("llama", intermediate_size=WIDE_COLUMNS), method="wanda", probe_samples=12, **fields)

    errors = [row for row in wide().report["weights"] if "down_proj" in row["name"]]
    assert len(errors) == 3 and all(row["error"] < 0.95 * row["error_sweep"] for row in errors)
    monkeypatch.setattr(refit, "MOST_STEPS", 1)
    stopped = wide(targets=["layers.1."]).report
    assert stopped["warnings"][0] == (
        "model.layers.1.mlp.down_proj.weight: the refit was stopped after 1 steps, before its tolerance"
    )
    (row,) = [row for row in stopped["weights"] if "down_proj" in row["name"]]
    assert row["error"] < row["error_sweep"], "each step lowers it"


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "qwen3_moe"])
def test_other_layouts_are_refitted_too(architecture):
    """Transposed weights, encoders, and experts in one parameter."""
    result = refitted(tiny.model(architecture), method="wanda", probe_samples=12)
    rows = [row for row in result.report["weights"] if "error_sweep" in row]
    assert len(rows) > 10 and all(row["error"] < row["error_sweep"] * 1.001 for row in rows)
    assert sum(row["error"] for row in rows) < 0.95 * sum(row["error_sweep"] for row in rows)


def test_validation_judges_the_refit_against_the_mask():
    steps = refitted(method="wanda", reconstruction={"select": "validation"}).report["blocks"][0]["steps"]
    assert [s["step"] for s in steps[:2]] == ["mask", "refit"]


def test_resume_and_streaming_give_the_same_bits(folder, tmp_path, monkeypatch):
    def written(name, **fields):
        prune(
            str(folder),
            output=str(tmp_path / name),
            reconstruct="refit",
            method="wanda",
            progress=False,
            calibration=tiny.ids(8, 24),
            evaluation=Evaluation(enabled=False),
            **fields,
        )
        return {n: t for path in (tmp_path / name).glob("*.safetensors") for n, t in load_file(path).items()}

    whole = written("whole", stream="never")
    monkeypatch.setattr(Journal, "stopping", property(lambda self: len(self.entries) == 1))
    with pytest.raises(Interrupted):
        written("resumed", stream="never")
    monkeypatch.setattr(Journal, "stopping", False)
    assert equal(whole, written("resumed", stream="never", resume=True))
    assert equal(whole, written("streamed", stream="always"))
    with pytest.raises(ConfigError, match="reconstruct"):
        prune(config=from_yaml(tmp_path / "whole" / "run.yaml"), reconstruct="refitt", output=str(tmp_path / "other"))


def test_configuration_model_card_and_summary_name_the_refit():
    config = PruneConfig(method="magnitude", reconstruct="refit")
    assert from_yaml(to_yaml(config)) == config
    with pytest.raises(ConfigError, match="must be one of none, bias"):
        PruneConfig(pattern="neurons", reconstruct="refit")
    with pytest.raises(ConfigError, match="nothing would use the 3 self-generated"):
        PruneConfig(reconstruct="refit", calibration={"self_generated": 3})
    result = refitted()
    assert "the kept weights are refitted by least squares on the mask" in model_card(result.report, "m")
    (text,) = [text for label, text in summary.summary_rows(result.report) if label == "refit"]
    assert text.startswith("error of a weight's outputs, sweep → refit: ") and text.count("→") == 3
    swept = run(reconstruct="layer").report
    card = model_card(swept, "m")
    assert "one-sided OBS sweep: a column's error is made up for by later columns only" in card
    assert "refit" not in dict(summary.summary_rows(swept))
