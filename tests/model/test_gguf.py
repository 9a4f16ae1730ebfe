"""An independent reader: a structurally pruned LLaMA, written as GGUF, runs in llama.cpp with the same logits.

llama.cpp takes head counts, head size and FFN width from the file's metadata and refuses tensors of other shapes, so
this proves that the pruned config and weights say the same thing to somebody who is not transformers.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import pyprune

gguf = pytest.importorskip("gguf", reason="gguf is an extra (pip install 'pyprune[demo]')")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is the independent reader")


def write_gguf(model, path) -> None:
    """A Hugging Face LLaMA as a float32 GGUF without a vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, value in model.state_dict().items():
        if name in whole:
            writer.add_tensor(whole[name], value.numpy())
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, kind = rest.rsplit(".", 1)
        if stem.endswith(("q_proj", "k_proj")):  # llama.cpp rotates neighbours, Hugging Face halves
            value = value.reshape(-1, 2, config.head_dim // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{names[stem]}.{kind}", np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(path, ids: list[int]) -> torch.Tensor:
    reader = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    reader.eval(ids)
    return torch.from_numpy(np.array(reader.scores[: len(ids)]))


@pytest.mark.parametrize("pattern", ["neurons", "structured"])
def test_llama_cpp_reads_the_pruned_model(pattern, tmp_path):
    # widths llama.cpp's kernels take: rows of whole 32s
    dense = tiny.model(
        "llama", hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    result = pyprune.prune(
        dense,
        pattern=pattern,
        sparsity=0.5,
        calibration=tiny.ids(60, 24),
        inputs="dense",
        progress=False,
        evaluation={"enabled": False},
    )
    result.save(tmp_path / "out")
    model = pyprune.load(tmp_path / "out").model
    assert model.config.intermediate_size == 64
    assert model.model.layers[0].mlp.down_proj.bias.any()
    write_gguf(model, tmp_path / "model.gguf")
    ids = tiny.ids(1, 16)[0]
    with torch.no_grad():
        want = model(ids[None]).logits[0]
        other = dense(ids[None]).logits[0]
    got = llama_cpp_logits(tmp_path / "model.gguf", ids.tolist())
    scale = float(want.abs().max())
    assert float((want - other).abs().max()) > 0.05 * scale  # it is the pruned model, not the dense one
    torch.testing.assert_close(got, want, rtol=0, atol=5e-3 * scale)
