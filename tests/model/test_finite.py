"""NaN and infinity: found in any tensor of a checkpoint before any work, said wherever a perplexity is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.cli import commands
from pyprune.config import Calibration, ConfigError, Evaluation
from pyprune.evaluation.perplexity import perplexity_of
from pyprune.evaluation.single import NotFinite
from pyprune.pipeline.refine_checkpoint import refine_checkpoint
from pyprune.reporting import summary, words

LLAMA = {
    "model.embed_tokens.weight": (7, 3),
    "lm_head.weight": (0, 1),
    "model.norm.weight": (3,),
    "model.layers.2.input_layernorm.weight": (31,),
    "model.layers.2.mlp.down_proj.weight": (3, 63),
    "model.layers.0.self_attn.q_proj.bias": (5,),
    "extra.table": (1, 1),
}


def poisoned(folder, name: str, place: tuple, value: float = math.nan) -> str:
    """A tiny LLaMA with biases and a tensor that its class does not use, damaged in one place."""
    tiny.model("llama", attention_bias=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["extra.table"] = torch.ones(2, 2)
    tensors[name][place] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def run(model, **fields):
    how = {} if "pattern" in fields else {"method": "magnitude"}
    return pyprune.prune(
        model,
        progress=False,
        **{
            **how,
            "ignore": ["down_proj"],
            "calibration": tiny.ids(8, 24),
            "evaluation": Evaluation(enabled=False),
            **fields,
        },
    )


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("name", LLAMA)
def test_nan_in_any_tensor_is_named_before_any_work(tmp_path, monkeypatch, name, stream):
    path = poisoned(tmp_path / "dense", name, LLAMA[name], -math.inf if "norm" in name else math.nan)
    monkeypatch.setattr("pyprune.pipeline.phases.Meter", lambda *_, **__: pytest.fail("work has begun"))
    value, place = "-inf" if "norm" in name else "nan", str(list(LLAMA[name]))
    with pytest.raises(ConfigError) as refusal:
        run(path, stream=stream, output=str(tmp_path / "out"))
    assert f"{name} holds {value} at {place}" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_stored_buffer_that_is_not_finite_is_named(tmp_path):
    """Persistent buffers are part of a model's state as its parameters are."""
    live = tiny.model("llama")
    live.model.register_buffer("scale", torch.tensor([1.0, math.inf]))
    with pytest.raises(ConfigError, match=r"model\.scale holds inf at \[1\]"):
        run(live)


def test_what_overflows_in_the_type_asked_for_is_named(tmp_path):
    path = poisoned(tmp_path / "dense", "model.norm.weight", (2,), 1e6)
    for stream in ("never", "always"):
        with pytest.raises(ConfigError, match=r"model\.norm\.weight holds inf at \[2\].* overflowed in its dtype"):
            run(path, dtype="float16", stream=stream, output=str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_live_models_are_looked_at_whole(name):
    live = tiny.model("llama")
    with torch.no_grad():
        live.get_parameter(name)[4, 2] = math.nan
    with pytest.raises(ConfigError, match=rf"{name} holds nan at \[4, 2\]"):
        run(live)
    with pytest.raises(ConfigError, match=rf"{name} holds nan at \[4, 2\]"):
        pyprune.refine(tiny.model("llama"), live, tiny.ids(8, 24))


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("damaged", ["pruned", "dense"])
def test_refinement_looks_at_both_models(tmp_path, stream, damaged):
    for name in ("pruned", "dense"):
        poisoned(tmp_path / name, "model.norm.weight", (3,), math.nan if name == damaged else 1.0)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight holds nan at \[3\]"):
        refine_checkpoint(
            tmp_path / "pruned",
            tmp_path / "out",
            dense=tmp_path / "dense",
            stream=stream,
            calibration=Calibration(source=tiny.ids(8, 24), num_samples=8, seq_len=24),
            progress=False,
        )


def test_perplexity_of_losses_that_are_too_large_is_infinite():
    assert perplexity_of([2.0, 4.0]) == pytest.approx(math.exp(3))
    assert perplexity_of([800.0, 900.0]) == math.inf
    assert math.isnan(perplexity_of([1.0, math.nan])) and math.isnan(perplexity_of([1.0, math.inf]))
    for value in (math.inf, math.nan, None):
        assert words.perplexity_text(value) == "not finite"


@pytest.fixture(scope="module")
def hot(tmp_path_factory):
    """A folder whose weights are finite and whose logits are not."""
    folder = tmp_path_factory.mktemp("hot") / "model"
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
        model.model.norm.weight.fill_(100.0)
    model.save_pretrained(folder)
    np.save(folder.parent / "ids.npy", tiny.ids(3, 16).numpy())
    return folder


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_perplexity_that_is_not_finite_is_a_warning_in_every_output(hot, tmp_path, stream):
    result = run(
        str(hot),
        stream=stream,
        evaluation=Evaluation(text=tiny.ids(2, 16), dtype="float32"),
        output=str(tmp_path / "out"),
    )
    told = [text for text in result.report["warnings"] if "is not finite" in text]
    assert [text.split("'s")[0] for text in told] == ["the dense model", "the pruned model"]
    assert "in float32" in told[0]
    assert set(told) <= set(json.loads((tmp_path / "out" / "report.json").read_text())["warnings"])
    card = (tmp_path / "out" / "README.md").read_text()
    shown = [text for _, text in summary.summary_rows(result.report)]
    assert all(f"warning: {text}" in card and text in shown for text in told)
    assert "| not finite | not finite |" in card


def test_every_sparsity_is_looked_at(hot, tmp_path):
    result = run(
        str(hot),
        pattern="neurons",
        sparsity=[0.25, 0.5],
        ignore=[],
        inputs="dense",
        criterion="random",
        evaluation=Evaluation(text=tiny.ids(2, 16), dtype="float32"),
        output=str(tmp_path / "out"),
    )
    told = " ".join(result.report["warnings"])
    assert "pruned (sparsity 0.25) model's perplexity" in told and "pruned (sparsity 0.5) model's perplexity" in told
    assert "is not finite" in (tmp_path / "out" / "sparsity-0.25" / "README.md").read_text()


def test_a_refinement_says_it_too(hot, tmp_path):
    run(str(hot), output=str(tmp_path / "pruned"))
    found = refine_checkpoint(
        tmp_path / "pruned",
        tmp_path / "out",
        progress=False,
        calibration=Calibration(source=tiny.ids(8, 16), num_samples=8, seq_len=16),
        evaluation=Evaluation(text=tiny.ids(2, 16), dtype="float32"),
    )
    told = [text.split("'s")[0] for text in found["warnings"] if "is not finite" in text]
    assert told == ["the dense model", "the pruned model", "the refined model"]
    assert "- warning: the refined model's perplexity" in (tmp_path / "out" / "README.md").read_text()


def test_eval_shows_what_it_found_and_fails(hot, tmp_path, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            commands.main([str(a) for a in arguments])
        return (stop.value.code, *capsys.readouterr())

    ids = hot.parent / "ids.npy"
    code, out, err = call("eval", hot, "--text", ids, "--dtype", "float32")
    assert code == 2 and out == "" and f"the perplexity on {Path(ids)} is nan" in err
    code, out, err = call("eval", hot, "--text", ids, "--text", ids, "--dtype", "float32", "--json")
    found = json.loads(out)
    assert code == 2 and found["perplexity"] is None and len(found["texts"]) == len(found["warnings"]) == 2
    assert "the perplexity on" in found["warnings"][0] and "\nerror: " in err
    path = poisoned(tmp_path / "dense", "model.norm.weight", (3,))
    code, _, err = call("eval", path, "--text", ids, "--dtype", "float32")
    assert code == 2 and "model.norm.weight holds nan at [3]" in err


def test_the_rows_of_other_texts_are_not_lost():
    """One text is measured well, on the other a window meets a token whose embedding is damaged."""
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = math.nan
    good, bad = torch.full((1, 8), 7), torch.full((1, 8), 5)
    with pytest.raises(NotFinite, match=r"model\.embed_tokens\.weight holds nan at \[5, 0\]") as caught:
        pyprune.evaluate(model, [good, bad], dtype="float32")
    rows = caught.value.found["texts"]
    assert math.isfinite(rows[0]["perplexity"]) and math.isnan(rows[1]["perplexity"])
    assert rows[0]["perplexity"] == pyprune.evaluate(model, good, dtype="float32")["perplexity"]


def test_an_encoder_s_embedding_is_looked_at(tmp_path):
    model = hf.BertModel(tiny.CONFIGS["bert"]())
    with torch.no_grad():
        model.embeddings.LayerNorm.bias[9] = math.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"embeddings\.LayerNorm\.bias holds inf at \[9\]"):
        run(str(tmp_path), ignore=[])
