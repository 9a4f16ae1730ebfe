"""The public Python names: keywords as the command line has them; a model, a path or a result wherever a model goes."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import pyprune
from pyprune.config import ConfigError, PruneConfig

IDS = tiny.ids(8, 24)
QUIET = dict(progress=False, calibration=IDS)


@pytest.fixture(scope="module")
def result(folder):
    return pyprune.prune(folder, method="wanda", text=IDS[:2], **QUIET)


@pytest.fixture(scope="module")
def pruned(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("pruned") / "wanda"
    result.save(path)
    return path


def test_every_setting_is_a_keyword():
    """The flat names give the run that the sections give."""
    model = tiny.model("llama")
    flat = pyprune.prune(
        model,
        reconstruct="block",
        epochs=2,
        lr=1e-3,
        reconstruction_batch_size=2,
        num_samples=4,
        seq_len=12,
        held_out=2,
        evaluation=False,
        **QUIET,
    )
    nested = pyprune.prune(
        model,
        PruneConfig(
            reconstruct="block",
            reconstruction=pyprune.Reconstruction(epochs=2, lr=1e-3, batch_size=2),
            calibration=pyprune.Calibration(source=IDS, num_samples=4, seq_len=12, held_out=2),
            evaluation=pyprune.Evaluation(enabled=False),
        ),
        progress=False,
    )
    assert flat.config == nested.config and flat.report["evaluation"] == []
    for (name, a), b in zip(flat.model.state_dict().items(), nested.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert pyprune.prune(model, {"num_samples": 4, "evaluation": False}, **QUIET).report["calibration"]["samples"] == 4


def test_suggestions_name_keywords_that_exist():
    with pytest.raises(ConfigError, match="unknown setting 'n_samples'; did you mean 'num_samples'?"):
        pyprune.prune("nowhere", n_samples=3)
    with pytest.raises(ConfigError, match="unknown setting 'epoch'; did you mean 'epochs'?"):
        pyprune.refine(tiny.model("llama"), tiny.model("llama"), IDS, epoch=3)
    with pytest.raises(ConfigError, match="unknown setting 'sparsty'; did you mean 'sparsity'?"):
        pyprune.plan("nowhere", sparsty=0.5)


def test_a_result_goes_wherever_a_model_does(result, pruned, folder):
    by_model = pyprune.evaluate(result.model, IDS[:2])["perplexity"]
    assert pyprune.evaluate(result, IDS[:2])["perplexity"] == by_model == result.report["evaluation"][0]["pruned"]
    assert pyprune.evaluate(pyprune.load(pruned), IDS[:2])["perplexity"] == by_model
    sizes = [
        pyprune.latency(x, tokens=8, new_tokens=2, repeats=1)["parameters"] for x in (result, result.model, pruned)
    ]
    assert len(set(sizes)) == 1
    rows = [pyprune.generate(x, num_samples=2, seq_len=8) for x in (pyprune.load(pruned), pruned)]
    assert all(torch.equal(a, b) for a, b in zip(*rows))
    again = pyprune.prune(result, method="magnitude", sparsity=0.75, probe_samples=0, evaluation=False, progress=False)
    assert again.report["sparsity"] > 0.7 and again.tokenizer is result.tokenizer
    assert pyprune.plan(folder, sparsity=0.25, calibration=IDS)["settings"]["sparsity"] == 0.25


def test_refine_takes_a_result_or_a_folder(folder, pruned, tmp_path):
    result = pyprune.prune(folder, method="magnitude", evaluation=False, **QUIET)
    rows = pyprune.refine(result, calibration=IDS, epochs=1, lr=1e-3)
    assert [row["blocks"] for row in rows] == [[0], [1], [2]] and rows[-1]["after_calibration"] < rows[-1][
        "before_calibration"
    ]
    assert result.report["refinement"]["dense"] == str(folder) and result.report["refinement"]["windows"] == rows
    with pytest.raises(ConfigError, match="would lose what it trains: give output="):
        pyprune.refine(pruned)
    out = tmp_path / "refined"
    rows = pyprune.refine(pruned, output=out, calibration=IDS, epochs=1, lr=1e-3, evaluation=False)
    assert len(rows) == 3 and pyprune.load(out).model is not None
    with pytest.raises(ConfigError, match="refine needs the dense model"):
        pyprune.refine(tiny.model("llama"), calibration=IDS)


@pytest.mark.parametrize("wrong", [3, None, ["a"], {"model": 1}], ids=str)
def test_what_is_no_model_is_refused_in_a_sentence(wrong):
    for function in (pyprune.evaluate, pyprune.latency, pyprune.generate):
        with pytest.raises(ConfigError, match="a model is an nn.Module, a folder, a Hub id.*got"):
            function(wrong)
    with pytest.raises(ConfigError, match="a model is an nn.Module|refine needs|no model"):
        pyprune.refine(wrong, tiny.model("llama"), IDS)


def test_a_vision_model_is_refused_in_a_sentence():
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    model = transformers.ViTModel(config)
    for call in (
        lambda: pyprune.prune(model, **QUIET),
        lambda: pyprune.evaluate(model, IDS),
        lambda: pyprune.latency(model),
        lambda: pyprune.generate(model),
        lambda: pyprune.refine(model, model, IDS),
    ):
        with pytest.raises(ConfigError, match="ViTModel|image"):
            call()
