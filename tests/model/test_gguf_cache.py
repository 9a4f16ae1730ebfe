"""A GGUF file is dequantised once: the second opening reads the kept checkpoint, the same to the last bit."""

from __future__ import annotations

import os

import pytest
import tiny
import torch

import pyprune
from pyprune.config import ConfigError
from pyprune.model import checkpoint, gguf_cache

gguf = pytest.importorskip("gguf", reason="gguf is an extra (pip install 'pyprune[demo]')")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A small LLaMA with a vocabulary as GGUF; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(gguf_cache.SWITCH, raising=False)
    return write(tmp_path / "model.gguf")


def write(path, seed=0):
    model = tiny.model("llama", seed=seed, num_hidden_layers=1, tie_word_embeddings=False)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(config.vocab_size - 4)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    for name, value in model.state_dict().items():
        writer.add_tensor(names[name], value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entries() -> list[str]:
    return sorted(path.name for path in (gguf_cache.cache_folder() / "gguf").glob("*"))


def test_the_second_opening_has_the_same_bits_and_does_not_read_the_file(file, monkeypatch):
    first, words = pyprune.load(file)
    assert len(entries()) == 1 and not entries()[0].startswith(".")
    import transformers.modeling_gguf_pytorch_utils as reader

    monkeypatch.setattr(reader, "load_gguf_checkpoint", lambda *a, **k: pytest.fail("read again"))
    second, other = pyprune.load(file)
    assert type(second) is type(first)
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert second.dtype == torch.float32 and not second.training
    assert words("ab!")["input_ids"] == other("ab!")["input_ids"]
    assert checkpoint.load_config(file).num_hidden_layers == 1
    half = pyprune.load(file, "bfloat16").model
    assert torch.equal(half.lm_head.weight, first.lm_head.weight.bfloat16())


def test_a_changed_file_is_read_again_and_replaces_what_was_kept(file):
    first = pyprune.load(file).model
    before = entries()
    write(file, seed=1)
    second = pyprune.load(file).model
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert len(entries()) == 1 and entries() != before
    os.utime(file, ns=(1, 1))  # the same bytes at another time: read again, which costs time and nothing else
    assert torch.equal(pyprune.load(file).model.lm_head.weight, second.lm_head.weight)
    assert len(entries()) == 1


def test_a_saving_that_fails_leaves_nothing_behind(file, monkeypatch):
    def fails(tokenizer, folder, origin):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_extras", fails)
    assert pyprune.load(file).model is not None
    assert entries() == []


def test_it_can_be_switched_off_and_has_a_limit(file, monkeypatch):
    monkeypatch.setenv(gguf_cache.SWITCH, "0")
    pyprune.load(file)
    assert entries() == []
    monkeypatch.delenv(gguf_cache.SWITCH)
    monkeypatch.setattr(gguf_cache, "LARGEST", 10)
    pyprune.load(file)
    assert entries() == []
    with pytest.raises(ConfigError, match="no such file"):
        pyprune.load(file.with_name("other.gguf"))
