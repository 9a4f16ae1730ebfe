"""``pyprune.refine``: models that are pruned already, with zeros or with fewer heads and neurons."""

from __future__ import annotations

import pytest
import tiny
import torch

import pyprune
from pyprune.config import Calibration, ConfigError, Evaluation, Reconstruction
from pyprune.prune import prune

FAST = Reconstruction(epochs=3, batch_size=4, lr=2e-3)


def run(model=None, samples=12, **fields):
    fields = {"evaluation": Evaluation(enabled=False), "reconstruction": FAST, "reconstruct": "block", **fields}
    calibration = fields.pop("calibration", {})
    source = Calibration(source=tiny.ids(samples + 8, 24), num_samples=samples, seq_len=24, held_out=8, **calibration)
    return prune(model or tiny.model("llama"), calibration=source, progress=False, **fields)


def state(result):
    return result.model.state_dict()


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("cross, propagate", [(False, True), (True, True), (True, False), (False, False)])
def test_a_pruned_model_is_refined_with_its_zeros_in_place(cross, propagate):
    pruned = run(method="magnitude", reconstruct="none", pattern="2:4").model
    zeros = {name: p == 0 for name, p in pruned.named_parameters() if p.ndim == 2}
    rows = pyprune.refine(pruned, tiny.model("llama"), Calibration(source=tiny.ids(24, 24), num_samples=16, seq_len=24,
                          held_out=8), cross_block=cross, global_propagation=propagate, settings=FAST)
    assert [r["blocks"] for r in rows] == ([[0], [0, 1], [1, 2], [2]] if cross else [[0], [1], [2]])
    assert all(r["after_calibration"] < r["before_calibration"] for r in rows)
    assert all(torch.equal(p == 0, zeros[name]) for name, p in pruned.named_parameters() if p.ndim == 2)


def test_refining_after_the_run_is_refining_in_the_run():
    """Magnitude masks do not depend on data, so the orchestrator and the function do the same work."""
    calibration = Calibration(source=tiny.ids(20, 24), num_samples=12, seq_len=24, held_out=8)
    inside = run(method="magnitude", global_propagation=True, reconstruct="block")
    outside = run(method="magnitude", reconstruct="layer", global_propagation=False).model
    with torch.no_grad():  # block 0 of both starts from the same layer-wise solution
        rows = pyprune.refine(outside, tiny.model("llama"), calibration, settings=FAST)
    first = {k: v for k, v in state(inside).items() if "layers.0." in k}
    assert equal(first, outside.state_dict())
    assert rows[0]["after_calibration"] < rows[0]["before_calibration"]


def test_a_structured_model_is_refined():
    dense = tiny.model("llama")
    pruned = prune(tiny.model("llama"), pattern="neurons", sparsity=0.5, calibration=tiny.ids(12, 24),
                   evaluation=Evaluation(enabled=False), progress=False).model
    assert pruned.model.layers[0].mlp.up_proj.weight.shape[0] == dense.model.layers[0].mlp.up_proj.weight.shape[0] // 2
    rows = pyprune.refine(pruned, dense, tiny.ids(12, 24), settings=Reconstruction(epochs=8, batch_size=4, lr=2e-3))
    assert rows[-1]["after_calibration"] < 0.8 * rows[-1]["before_calibration"]


def test_models_that_do_not_match_are_refused():
    with pytest.raises(ConfigError, match="same blocks"):
        pyprune.refine(tiny.model("llama"), tiny.model("llama", num_hidden_layers=2), tiny.ids(4, 8))
