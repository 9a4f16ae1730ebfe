"""Sparsity and patterns of checkpoints as they lie on disk, against counting by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import save_file

import pyprune
from pyprune.config import ConfigError, Evaluation
from pyprune.reporting.inspection import violations

NO_EVALUATION = Evaluation(enabled=False)


def prune(model, **fields):
    return pyprune.prune(model, calibration=tiny.ids(6, 24), evaluation=NO_EVALUATION, progress=False, **fields)


def test_violations_against_counting_by_hand():
    matrix = torch.tensor([[1.0, 0, 2, 0, 3, 4, 5, 0], [0.0, 0, 0, 0, 1, 1, 1, 1], [-0.0, 1, 0, 1, 0, 0, 0, 0]])
    assert violations(matrix, 2, 4) == 2 and violations(matrix, 4, 8) == 1
    assert violations(matrix[:, :6], 2, 4) is None
    assert violations(torch.stack([matrix, matrix]), 2, 4) == 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert", "phi3"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_inspect_sees_what_was_pruned(tmp_path, architecture, form):
    result = prune(tiny.model(architecture), method="magnitude", pattern="2:4")
    if form == "bin":
        result.model.config.save_pretrained(tmp_path)
        torch.save(result.model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        result.model.save_pretrained(tmp_path)
    found = pyprune.inspect(tmp_path)
    assert found["patterns"]["2:4"]["violations"] == 0 and found["holds"] == ["2:4", "4:8"]
    assert found["sparsity_of_pruned"] == pytest.approx(0.5)
    assert found["coverage"]["fraction"] == pytest.approx(result.report["coverage"]["fraction"])
    kinds = {name.split(".")[-2] for name in found["coverage"]["dense"]}
    assert kinds == ({"gate"} if architecture == "mixtral" else set())


def test_inspect_tells_a_broken_pattern_and_dense_weights(tmp_path):
    model = tiny.model("llama")
    result = prune(model, method="magnitude", pattern="2:4", ignore=["v_proj"])
    state = result.model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"][5, 8:12] = 1.0
    state["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    result.model.save_pretrained(tmp_path)
    found = pyprune.inspect(tmp_path)
    assert found["patterns"]["2:4"]["violations"] == 1 and found["non_finite"] == 1
    assert [row["name"] for row in found["weights"] if row["violations"]["2:4"] and row["sparsity"] > 0.1] == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    assert found["coverage"]["dense"] == [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(3)]
    assert found["coverage"]["fraction"] == pytest.approx(result.report["coverage"]["fraction"])


def test_inspect_refuses_what_is_no_checkpoint(tmp_path):
    for path, sentence in [(tmp_path / "none", "no such folder"), (tmp_path, "holds no .safetensors or .bin")]:
        with pytest.raises(ConfigError, match=sentence):
            pyprune.inspect(path)
    (tmp_path / "model.safetensors").write_bytes(b"\1\0\0")
    with pytest.raises(ConfigError, match="is not a readable weight file"):
        pyprune.inspect(tmp_path)
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="not a transformer checkpoint"):
        pyprune.inspect(tmp_path)
