"""``pyprune.load`` of a packed folder: a stock model with packed layers, and never all weights dense at once."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.config import ConfigError
from pyprune.model import checkpoint
from pyprune.model.packed_shards import PackedFiles
from pyprune.packed.modules import SparseLinear


def layers(model) -> set:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def folders(tmp_path, architecture, dtype=torch.float32, **changes):
    model = tiny.zeroed(tiny.model(architecture, **changes), 0.6).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    pyprune.pack(tmp_path / "dense", tmp_path / "packed")
    return model, tmp_path / "dense", tmp_path / "packed"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bert", "mixtral", "qwen3_moe", "phi3"])
def test_a_packed_folder_gives_the_model_that_was_packed(tmp_path, architecture):
    model, _, packed = folders(tmp_path, architecture)
    loaded, ids = pyprune.load(packed).model, tiny.ids(2, 9)
    assert type(loaded) is type(model) and not loaded.training and layers(loaded) == layers(pyprune.sparse(model))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids)[0], model(ids)[0], rtol=1e-5, atol=1e-5)
    state, known = pyprune.dense(loaded).state_dict(), model.state_dict()
    assert state.keys() == known.keys() and all(torch.equal(state[key], known[key]) for key in known)
    # what reads a checkpoint to work on it reads the dense one
    whole = checkpoint.load_model(packed).model
    assert not layers(whole) and all(torch.equal(t, known[key]) for key, t in whole.state_dict().items())


def test_types_tied_weights_and_generation_settings(tmp_path):
    model = tiny.zeroed(tiny.model("llama", tie_word_embeddings=True), 0.5)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "dense")
    pyprune.pack(tmp_path / "dense", tmp_path / "packed")
    loaded = pyprune.load(tmp_path / "packed", "bfloat16").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.generation_config.max_new_tokens == 7
    assert loaded.generate(tiny.ids(1, 4), do_sample=False).shape == (1, 11)
    assert pyprune.load(tmp_path / "packed").model.dtype == torch.float32


def test_no_dense_matrix_is_made_where_the_names_are_the_models(tmp_path, monkeypatch):
    model, _, packed = folders(tmp_path, "llama", torch.bfloat16)
    read, seen = PackedFiles.read, []
    monkeypatch.setattr(PackedFiles, "read", lambda self, name, pin=False: seen.append(name) or read(self, name, pin))
    pyprune.load(packed)
    assert set(seen) == {name for name in model.state_dict() if "proj" not in name}


def test_damage_and_gaps_are_named(tmp_path):
    model, _, packed = folders(tmp_path, "llama")
    path = next(packed.glob("*.safetensors"))
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight.mask"][0, 0] ^= 255
    save_file(tensors, path, metadata)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in .* is damaged: .*row 0"):
        pyprune.load(packed)
    state = {k: v for k, v in model.state_dict().items() if k != "model.norm.weight"}
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    pyprune.pack(tmp_path / "dense", tmp_path / "gaps")
    with pytest.raises(ConfigError, match=r"lacks model\.norm\.weight"):
        pyprune.load(tmp_path / "gaps")


def test_a_packed_repository_on_the_hub_is_fetched_and_loaded(tmp_path, monkeypatch, tokenizer):
    _, _, packed = folders(tmp_path, "llama")
    tokenizer.save_pretrained(packed)
    monkeypatch.setattr(checkpoint, "resolve", lambda name: checkpoint.Source(str(name), local=False))
    monkeypatch.setattr(checkpoint, "folder_of", lambda path, local: tmp_path / "packed")
    assert len(layers(pyprune.load(packed).model)) == 21
    assert not layers(checkpoint.load_model(packed).model)


def test_a_checkpoint_of_packed_experts_alone_and_one_that_names_no_class(tmp_path):
    """Experts in one tensor are unpacked into memory; without architectures the class is found by the tensors."""
    model = tiny.model("mixtral")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter[..., ::2] = 0
    model.save_pretrained(tmp_path / "dense")
    pyprune.pack(tmp_path / "dense", tmp_path / "packed")
    loaded = pyprune.load(tmp_path / "packed").model
    state, known = loaded.state_dict(), model.state_dict()
    assert not layers(loaded) and all(torch.equal(state[key], known[key]) for key in known)
    _, _, packed = folders(tmp_path / "bert", "bert")
    config = json.loads((packed / "config.json").read_text())
    del config["architectures"]
    (packed / "config.json").write_text(json.dumps(config))
    assert type(pyprune.load(packed).model).__name__ == "BertModel" and checkpoint.load_model(packed).model is not None


def test_perplexity_and_inspection_of_a_packed_folder(tmp_path, tokenizer):
    model, dense, packed = folders(tmp_path, "llama", vocab_size=tiny.CHARACTERS)
    tokenizer.save_pretrained(packed)
    tokenizer.save_pretrained(dense)
    rows = [tiny.ids(3, 20)[k] for k in range(3)]
    for dtype in ("float32", "bfloat16"):
        found, known = (pyprune.evaluate(str(f), torch.stack(rows), dtype=dtype)["perplexity"] for f in (packed, dense))
        assert found == pytest.approx(known, rel=1e-3 if dtype == "float32" else 2e-2)
    found, known = pyprune.inspect(packed), pyprune.inspect(dense)
    assert found["weights"] == [{**row, "packed": True} for row in known["weights"]]
    assert found["sparsity"] == known["sparsity"] and found["bytes"] < known["bytes"]
    assert found["packed"] == {
        "matrices": 21,
        "bytes": found["packed"]["bytes"],
        "dense_bytes": sum(4 * row["shape"][0] * row["shape"][1] for row in known["weights"]),
    }


def test_a_packed_folder_is_pruned_and_streamed_like_the_dense_one(tmp_path):
    _, dense, packed = folders(tmp_path, "llama")
    options = dict(
        method="wanda", sparsity=0.75, calibration=tiny.ids(4, 16), evaluation={"enabled": False}, progress=False
    )
    for stream in ("never", "always"):
        states = []
        for source in (dense, packed):
            output = tmp_path / f"{stream}-{source.name}"
            pyprune.prune(str(source), output=str(output), stream=stream, **options)
            states.append(pyprune.load(output).model.state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
