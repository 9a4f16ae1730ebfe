"""The plan says what the run then does, and does nothing itself."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import pyprune
from pyprune import cli
from pyprune.config import ConfigError, Evaluation, PruneConfig


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert", "phi3", "opt"])
def test_the_plan_names_what_the_run_prunes(tmp_path, architecture):
    model = tiny.model(architecture)
    model.save_pretrained(tmp_path)
    ignore = ["*.1.*"]  # the second block
    found = pyprune.plan(PruneConfig(model=str(tmp_path), ignore=ignore))
    result = pyprune.prune(str(tmp_path), calibration=tiny.ids(6, 24), evaluation=Evaluation(enabled=False),
                           method="magnitude", progress=False, ignore=ignore)
    planned = {row["name"]: row["shape"] for row in found["weights"] if row["prune"]}
    assert planned == {row["name"]: row["shape"] for row in result.report["weights"]}
    assert found["coverage"] == result.report["coverage"]
    left = [row["name"] for row in found["weights"] if not row["prune"]]
    assert sorted(left) == sorted(result.report["coverage"]["skipped"])
    assert all(row["why"] for row in found["weights"] if not row["prune"])
    assert found["memory_bytes"]["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["disk_bytes"]["checkpoint"] == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.05)
    assert found["model"]["parameters"] == result.report["model"]["parameters"]


def test_flops_are_those_of_the_passes(tmp_path):
    model = tiny.model("llama")
    model.save_pretrained(tmp_path)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)

    def flops(**fields):
        return pyprune.plan({"model": str(tmp_path), "evaluation": {"enabled": False}, "probe_samples": 0,
                             "calibration": {"num_samples": 10, "seq_len": 100}, **fields})["flops"]

    assert flops(method="wanda")["forward"] == 2 * 2 * 1000 * matrices, "statistics and propagation: two passes"
    assert flops(method="wanda", inputs="dense")["forward"] == 2 * 1000 * matrices
    assert flops(method="magnitude") == {}
    assert flops()["gram"] == 3 * 1000 * (3 * 32**2 + 64**2), "q, k and v share one input, gate and up another"
    assert flops(reconstruct="block")["reconstruct"] == 5 * 3 * 2 * 1000 * matrices


def test_command_prints_and_stops(tmp_path, folder, capsys):
    arguments = ["prune", str(folder), "-o", str(tmp_path / "out"), "--plan", "--pattern", "2:4", "--ignore", "v_proj"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not stop.value.code and not (tmp_path / "out").exists()
    assert found["coverage"]["skipped"] == [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(3)]
    assert found["seconds"]["total"] > 0 and found["disk_bytes"]["free"] > 0
    with pytest.raises(SystemExit):
        cli.main(arguments)
    out = capsys.readouterr().out
    for text in ("self_attn.v_proj.weight", "no: not among targets, or ignored", "64×32", "memory", "disk", "seconds"):
        assert text in out


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"pattern": "2:5"}, "pattern 2:5 does not divide the 32 inputs of model.layers.0.self_attn.q_proj.weight"),
    ({"targets": ["nothing"]}, "targets pattern 'nothing' selects no prunable weight"),
    ({"model": "./nowhere"}, "unknown model './nowhere'"),
    ({"model": None}, "no model"),
    ({"device": "warp"}, "device 'warp' cannot be used"),
])
def test_refusals_are_those_of_the_run(folder, fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        pyprune.plan({"model": str(folder), **fields})


def test_nothing_is_allocated_for_the_weights(tmp_path):
    config = tiny.CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 8, 128
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(tmp_path)
    found = pyprune.plan({"model": str(tmp_path)})
    assert found["model"]["parameters"] > 60e9 and found["memory_bytes"]["weights"] > 120e9
