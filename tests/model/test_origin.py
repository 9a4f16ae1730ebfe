"""Nothing of a checkpoint is lost in any kind of run: tensors that its class does not use, side files, permissions."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from same_bytes import stored

import pyprune
from pyprune.config import Calibration, ConfigError, Evaluation
from pyprune.model import checkpoint
from pyprune.pipeline.refine_checkpoint import refine_checkpoint
from pyprune.reporting.card import model_card
from pyprune.reporting.summary import summary_rows

POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
SIDE = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "Dense"},
        ]
    ),
    "1_Pooling/config.json": json.dumps(POOLING),
    "2_Dense/config.json": "{}",
    "preprocessor_config.json": '{"size": 3}',
    "modeling_own.py": "ANSWER = 42\n",
    "LICENSE": "Do what is right.\n",
    "chat_template.jinja": "{{ messages }}",
    "README.md": "---\nlicense: mit\n---\n# dense\n",
    # a temperature without sampling: published models have it, and transformers refuses to write it
    "generation_config.json": '{\n  "do_sample": false,\n  "temperature": 0.6,\n  "top_k": 7, "ours": [1, 2]\n}\n',
}
LEFT_OUT = ("pytorch_model.bin", "optimizer.pt", "onnx/model.onnx", "onnx/config.json", ".git/HEAD", "model.gguf")
EXTRA = {
    "mtp.head.weight": torch.arange(12.0).reshape(3, 4),
    "model.layers.1.extra": torch.tensor([3], dtype=torch.int8),
}


def state(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, found as other tools find them: by its index where it has one."""
    index = Path(folder) / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return {name: t for file in sorted(names) for name, t in load_file(Path(folder) / file).items()}


def add(folder, tensors) -> None:
    path = Path(folder) / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny LLaMA with everything a repository may hold."""
    path = tmp_path_factory.mktemp("dense") / "model"
    tiny.model("llama", vocab_size=tiny.CHARACTERS).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    add(path, EXTRA)
    for name, text in {**SIDE, **dict.fromkeys(LEFT_OUT, "old")}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    save_file({"linear.weight": torch.eye(3)}, path / "2_Dense" / "model.safetensors")
    return path


def run(model, output, **fields):
    how = {} if "pattern" in fields else {"method": "magnitude"}
    fields = {**how, "calibration": tiny.ids(8, 24), "evaluation": Evaluation(enabled=False), **fields}
    return pyprune.prune(str(model), output=str(output), progress=False, **fields)


def assert_whole(dense, folder) -> None:
    """Side files to the byte, unused tensors to the bit, nothing stale, permissions as the umask gives them."""
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, text in SIDE.items():
        assert written["README.original.md" if name == "README.md" else name].read_text() == text, name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert written[name].read_bytes() == (dense / name).read_bytes()
    assert written["2_Dense/model.safetensors"].read_bytes() == (dense / "2_Dense" / "model.safetensors").read_bytes()
    assert not set(LEFT_OUT) & set(written)
    tensors = state(folder)
    assert set(tensors) >= set(state(dense)), "a structured model may have biases more"
    for name, tensor in EXTRA.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    for path in written.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    model, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and set(info["unexpected_keys"]) == set(EXTRA)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    "fields",
    [
        dict(stream="never"),
        dict(stream="always"),
        dict(pattern="neurons", stream="never"),
        dict(pattern="neurons", stream="always"),
    ],
    ids=["memory", "streamed", "structured", "structured and streamed"],
)
def test_nothing_is_lost(dense, tmp_path, fields):
    result = run(dense, tmp_path / "out", **fields)
    assert_whole(dense, tmp_path / "out")
    told = [text for text in result.report["warnings"] if "does not use" in text]
    assert len(told) == 1 and "LlamaForCausalLM does not use model.layers.1.extra and 1 more" in told[0]
    assert "kept unchanged" in told[0]
    assert told[0] in (tmp_path / "out" / "README.md").read_text()
    assert ("warning", told[0]) in summary_rows(result.report)


def test_nothing_is_lost_of_several_sparsities_nor_by_saving_again(dense, tmp_path):
    result = run(dense, tmp_path / "out", pattern="neurons", sparsity=[0.25, 0.5], inputs="dense")
    result.save(tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        for name in ("sparsity-0.25", "sparsity-0.5"):
            assert_whole(dense, folder / name)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_nothing_is_lost_in_a_refinement(dense, tmp_path, stream):
    run(dense, tmp_path / "pruned")
    found = refine_checkpoint(
        tmp_path / "pruned",
        tmp_path / "out",
        calibration=Calibration(source=tiny.ids(8, 24), num_samples=6, seq_len=24, held_out=2),
        evaluation=Evaluation(enabled=False),
        stream=stream,
        progress=False,
    )
    assert_whole(dense, tmp_path / "out")
    assert any("does not use" in text for text in found["warnings"])
    assert "does not use" in (tmp_path / "out" / "README.md").read_text()


def test_a_pickled_checkpoint_loses_nothing_either(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(state(dense), tmp_path / "bin" / "pytorch_model.bin")
    run(tmp_path / "bin", tmp_path / "out")
    assert_whole(dense, tmp_path / "out")


def test_an_output_inside_the_model_s_folder_is_not_part_of_the_model(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "dense" / "pruned")
    run(tmp_path / "dense", tmp_path / "dense" / "second")
    assert not {"pruned", "second"} & {path.name for path in (tmp_path / "dense" / "second").iterdir()}


def test_tables_that_the_model_computes_are_not_kept(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "dense")
    add(tmp_path / "dense", {"embeddings.position_ids": torch.arange(128)[None]})
    result = run(tmp_path / "dense", tmp_path / "out")
    assert not any("does not use" in text for text in result.report["warnings"])
    assert set(stored(tmp_path / "out")) == set(state(tmp_path / "dense")) - {"embeddings.position_ids"}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_neox", "phi3", "roberta"])
def test_tensors_stored_under_other_names_are_not_taken_for_unused_ones(tmp_path, architecture):
    tiny.model(architecture).save_pretrained(tmp_path / "dense")
    result = run(tmp_path / "dense", tmp_path / "out")
    assert not any("does not use" in text for text in result.report["warnings"])
    assert set(state(tmp_path / "out")) == set(state(tmp_path / "dense"))


def test_a_tensor_that_cannot_be_kept_is_named(tmp_path):
    """As in old BERT files: transformers renames gamma, of a head too, before it says what it does not use."""
    hf.BertForPreTraining(tiny.CONFIGS["bert"]()).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    rename(tmp_path / "dense", ["BertModel"])
    result = run(tmp_path / "dense", tmp_path / "out")
    told, after = " ".join(result.report["warnings"]), state(tmp_path / "out")
    for name in tensors:
        assert name in after or name.removeprefix("bert.") in after or name.replace("gamma", "weight") in told, name


def rename(folder, architectures) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("architectures")
    path.write_text(json.dumps({**config, **({"architectures": architectures} if architectures else {})}))


@pytest.mark.parametrize(
    "cls",
    [
        "LlamaForCausalLM",
        "LlamaModel",
        "LlamaForSequenceClassification",
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForSequenceClassification",
        "GPT2LMHeadModel",
    ],
)
def test_a_config_without_architectures_is_loaded_as_the_class_that_uses_every_tensor(tmp_path, cls):
    built = getattr(hf, cls)(tiny.CONFIGS["bert" if "Bert" in cls else "gpt2" if "GPT2" in cls else "llama"]())
    built.save_pretrained(tmp_path)
    rename(tmp_path, None)
    model = pyprune.load(tmp_path).model
    assert type(model).__name__ == cls
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), built.parameters()))


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("architectures", [None, ["LlamaModel"], ["OwnLlama"]])
def test_a_head_is_never_dropped(tmp_path, stream, architectures):
    built = tiny.model("llama")
    built.save_pretrained(tmp_path / "dense")
    rename(tmp_path / "dense", architectures)
    result = run(tmp_path / "dense", tmp_path / "out", stream=stream)
    assert torch.equal(state(tmp_path / "out")["lm_head.weight"], built.lm_head.weight)
    assert set(state(tmp_path / "out")) == set(state(tmp_path / "dense"))
    named = ", ".join(architectures or []) or "no class"
    assert (
        f"config.json names {named} in architectures; loaded as LlamaForCausalLM, which uses every tensor of the "
        "checkpoint"
    ) in result.report["warnings"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_class_that_is_named_stays_where_its_names_are_the_file_s(tmp_path):
    """As of bert-base-uncased, whose file has the head for next sentences beside the named masked language model."""
    hf.BertForPreTraining(tiny.CONFIGS["bert"]()).save_pretrained(tmp_path / "dense")
    rename(tmp_path / "dense", ["BertForMaskedLM"])
    result = run(tmp_path / "dense", tmp_path / "out")
    before, after = state(tmp_path / "dense"), state(tmp_path / "out")
    assert type(result.model).__name__ == "BertForMaskedLM" and set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before if "seq_relationship" in name)


def test_a_head_that_its_config_ties_but_its_file_does_not_is_kept(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    run(tmp_path / "dense", tmp_path / "out")
    assert torch.equal(state(tmp_path / "out")["lm_head.weight"], state(tmp_path / "dense")["lm_head.weight"])
    with pytest.raises(ConfigError, match="its config says that .* are one, its files hold two"):
        run(tmp_path / "dense", tmp_path / "streamed", stream="always")


def test_a_live_model_has_only_itself(tmp_path):
    result = pyprune.prune(
        tiny.model("llama"),
        method="magnitude",
        calibration=tiny.ids(8, 24),
        progress=False,
        evaluation=Evaluation(enabled=False),
        output=str(tmp_path / "out"),
    )
    assert result.origin.folder is None
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".md", ".html", ".yaml", ".safetensors"}


def test_a_hub_model_s_side_files_come_from_its_cache(dense, tmp_path, monkeypatch):
    """No network: what was downloaded with the model is all there is."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(path, local_files_only=False, **_):
        if not local_files_only:
            raise LocalEntryNotFoundError("offline")
        return str(dense)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = checkpoint.Source("some-org/some-model", local=False)
    origin = checkpoint.find_origin(source)
    assert origin.folder == dense and "mtp.head.weight" in origin.files.where
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    origin = checkpoint.find_origin(source)
    assert origin.folder is None and "beside its weights could not be read" in origin.notes[0]


def test_the_card_names_what_was_kept(dense, tmp_path):
    result = run(dense, tmp_path / "out")
    assert "kept unchanged" in model_card(result.report, "out")
