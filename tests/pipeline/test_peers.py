"""What other pruning tools do wrong without a word, each tried on the living one: here each is right or refused."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
import transformers as hf

import pyprune
from pyprune.config import Calibration, ConfigError, Evaluation
from pyprune.masks import solvers

METHODS = ["magnitude", "wanda", "sparsegpt"]
NO_EVALUATION = Evaluation(enabled=False)


def prune(model, **fields):
    fields = {"calibration": tiny.ids(12, 24), "evaluation": NO_EVALUATION, "progress": False, **fields}
    return pyprune.prune(model, **fields)


def sparsity(tensor):
    return (tensor == 0).double().mean().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_never_pruned_and_ignoring_a_layer_works(method, tied):
    model = tiny.model("llama", tie_word_embeddings=tied)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = prune(model, method=method, ignore=["lm_head", "layers.1.mlp.down_proj"])
    after = dict(result.model.named_parameters())
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(result.model.lm_head.weight, model.lm_head.weight)
    assert (result.model.lm_head.weight is result.model.model.embed_tokens.weight) == tied
    assert result.report["coverage"]["skipped"] == ["model.layers.1.mlp.down_proj.weight"]
    assert any("model.layers.1.mlp.down_proj.weight" in text for text in result.report["warnings"])
    assert sparsity(after["model.layers.0.mlp.down_proj.weight"]) == 0.5


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_no_success(field):
    with pytest.raises(ConfigError, match=f"{field} pattern 're:.*q_porj' selects no prunable weight.*q_proj"):
        prune(tiny.model("llama"), **{field: ["re:.*q_porj"]})


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_every_matrix(method, pattern):
    result = prune(tiny.model("llama"), method=method, pattern=pattern)
    matrices = {name: p for name, p in result.model.named_parameters() if name.endswith("_proj.weight")}
    assert len(matrices) == 21
    assert {sparsity(p) for p in matrices.values()} == {0.5}
    assert {row["name"]: row["sparsity"] for row in result.report["weights"]} == dict.fromkeys(matrices, 0.5)


def test_sparsity_and_pattern_that_contradict_each_other():
    with pytest.raises(ConfigError, match="sparsity 0.3 contradicts pattern '2:4'"):
        prune(tiny.model("llama"), sparsity=0.3, pattern="2:4")


@pytest.mark.parametrize("value", [1.5, 1.0, -0.1, float("nan")])
def test_sparsity_out_of_range(value):
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\)"):
        prune(tiny.model("llama"), sparsity=value)


def test_fewer_calibration_samples_than_asked():
    with pytest.raises(ConfigError, match="64 calibration samples were asked for, but .* has 2 rows"):
        prune(tiny.model("llama"), calibration=Calibration(source=tiny.ids(2, 24), num_samples=64))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite(method, value):
    model = tiny.model("llama")
    spoilt = lambda module, args, out: out.index_fill(-1, torch.tensor([7]), value)  # noqa: E731  finite weights
    model.model.layers[1].post_attention_layernorm.register_forward_hook(spoilt)
    with pytest.raises(ConfigError, match=r"input of model.layers.1.mlp.\w+.weight is \S+ at calibration sequence 0"):
        prune(model, method=method)


def test_a_factorisation_that_fails_is_damped_and_said_or_refused_by_name():
    singular = torch.ones(8, 8)
    factor = solvers.inverse_factor(singular, 10, 1e-8, "some.weight")
    assert factor.damping > 1e-8
    with pytest.raises(ConfigError, match="some.weight"):
        solvers.inverse_factor(-singular - torch.eye(8), 10, 0.01, "some.weight")


def test_reversed_pattern_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="did you mean '2:4'"):
        pyprune.prune("no-such-org/no-such-model", pattern="4:2")


def test_the_saved_config_is_the_models_and_not_the_original_checkpoints(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "dense")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    del model.model.layers[1]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = 2
    result = prune(model)
    result.save(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_hidden_layers"] == 2
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = tiny.ids(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)


def test_a_failed_run_leaves_nothing_that_changes_the_next(monkeypatch):
    clean = prune(tiny.model("llama")).model.state_dict()
    model = tiny.model("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    calls = []

    def fail(*arguments, **fields):
        calls.append(1)
        if len(calls) == 6:  # in the middle of the second block, which has four groups of weights
            raise RuntimeError("out of memory, say")
        return solve(*arguments, **fields)

    import importlib

    from pyprune.ops import choice

    engine = importlib.import_module("pyprune.masks.block")
    solve = engine.solve
    monkeypatch.setattr(engine, "solve", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        prune(model, backend="reference")
    monkeypatch.undo()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items()), "the caller's model is whole"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert choice._forced.get() is None
    again = prune(model).model.state_dict()
    assert all(torch.equal(clean[name], again[name]) for name in clean)


def test_a_run_reports_progress_over_the_whole_model_and_its_quality(capsys):
    text = tiny.ids(3, 24)
    result = prune(
        tiny.model("llama"),
        progress=True,
        evaluation=Evaluation(text=text, dtype="float32"),
        calibration=Calibration(source=tiny.ids(16, 24), num_samples=12),
    )
    err = capsys.readouterr().err
    assert all(f"{i}/3" in err for i in (1, 2, 3)) and "left" in err
    row = result.report["evaluation"][0]
    for model, key in ((tiny.model("llama"), "dense"), (result.model, "pruned")):
        assert row[key] == pytest.approx(pyprune.evaluate(model, text, dtype="float32")["perplexity"])
    assert all(0 < w["error"] < 1 for w in result.report["weights"])
    assert all(b["error"] > 0 and b["error_held_out"] > 0 for b in result.report["blocks"])
