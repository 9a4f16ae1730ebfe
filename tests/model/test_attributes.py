"""Names of Hugging Face: one package spells them, and its functions read known configurations correctly."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import pyprune
from pyprune.config import ConfigError
from pyprune.model import architecture, attributes, sizes

PACKAGE = Path(pyprune.__file__).parent
NAMES = {
    *attributes.POSITIONS,
    *attributes.EXPERTS,
    *attributes.NARROWED,
    *sizes.HEADS,
    *sizes.GROUPS,
    *sizes.WIDTHS,
    *sizes.NEURONS,
    *sizes.BIAS_FLAGS,
    sizes.HEADS_PER_GROUP,
    "head_dim",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_kv_shared_layers",
    "layer_types",
    "pad_token_id",
    "bos_token",
    "bos_token_id",
    "eos_token_id",
    "is_encoder_decoder",
    "is_decoder",
    "is_causal",
    "quantization_config",
    "quant_method",
    "architectures",
    "auto_map",
    "model_type",
    "attribute_map",
    "generation_config",
    "use_cache",
    "past_key_values",
    "cache_params",
    "_experts_implementation",
    "_attn_implementation",
    "attn_implementation",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "get_text_config",
    "text_config",
    "get_input_embeddings",
    "get_output_embeddings",
    "num_embeddings",
    "lm_head",
    "hidden_states",
    "last_hidden_state",
    "base_model_prefix",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "self_attn",
    "mlp",
    "router",
    "experts",
}
ALLOWED = {("execution/cpu_forward.py", "is_causal"), ("config/values.py", "mlp")}
"""Names that mean something else in a file: an argument of torch's own attention, a kind of layers that users name."""


def spelled(path: Path) -> list[str]:
    """Names of Hugging Face in a file, as an attribute or as a string of its own, with their lines."""
    found, file = [], path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
        if isinstance(name, str) and name in NAMES and (file, name) not in ALLOWED:
            found.append(f"{file}:{node.lineno}: {name}")
    return found


def test_only_the_model_package_spells_names_of_hugging_face():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "model"]
    assert len(files) > 40
    assert [line for path in files for line in spelled(path)] == []
    assert spelled(PACKAGE / "model" / "attributes.py")  # the search finds what is there


@pytest.mark.parametrize(
    "config, count",
    [
        (hf.LlamaConfig(max_position_embeddings=77), 77),
        (hf.GPT2Config(n_positions=65), 65),
        (hf.MptConfig(max_seq_len=55), 55),
        (hf.BloomConfig(), None),
        (hf.XLNetConfig(), None),
    ],
)
def test_positions_under_every_name(config, count):
    assert attributes.positions_named(config) == count


def test_share_of_active_experts():
    assert attributes.active_share(tiny.CONFIGS["qwen3_moe"]()) == 2 / 4
    assert attributes.active_share(hf.MixtralConfig(num_local_experts=8, num_experts_per_tok=2)) == 2 / 8
    assert attributes.active_share(tiny.CONFIGS["llama"]()) == 1


@pytest.mark.parametrize("name, size", [("llama", 32), ("qwen3", 64), ("gpt2", 32), ("bert", 32)])
def test_width_of_all_heads(name, size):
    assert attributes.attention_size(tiny.CONFIGS[name]()) == size


def test_a_config_without_heads_has_no_attention():
    assert attributes.attention_size(hf.MambaConfig()) == 0


def test_padding_and_ends_of_configs_and_tokenizers():
    config = hf.LlamaConfig(pad_token_id=None, bos_token_id=3, eos_token_id=[4, 5])
    assert (attributes.pad_token(config), attributes.begin_token(config), attributes.end_tokens(config)) == (
        None,
        3,
        [4, 5],
    )
    assert attributes.pad_token(None) is None
    assert attributes.special_tokens(config) == {3, 4, 5}


def test_any_token_is_no_padding_and_in_the_vocabulary():
    model = tiny.model("llama")
    model.config.pad_token_id = 6
    assert attributes.any_token(model) == 7
    model.config.pad_token_id = tiny.VOCABULARY
    assert attributes.any_token(model) == tiny.VOCABULARY - 1


def test_embeddings_of_models_and_of_none():
    model = tiny.model("opt")
    assert attributes.vocabulary_size(model) == tiny.VOCABULARY
    assert attributes.embedding_width(model) == 32
    assert attributes.embedding_device(model) == torch.device("cpu")
    assert attributes.output_layer(model) is model.lm_head
    with pytest.raises(ConfigError, match="Linear has no table of token ids"):
        attributes.vocabulary_size(nn.Linear(2, 2))
    assert attributes.output_layer(nn.Linear(2, 2)) is None


def test_a_shortened_config_keeps_the_kinds_of_its_first_blocks():
    config = hf.Gemma3TextConfig(num_hidden_layers=12)
    short, fewer = attributes.shortened(config, blocks=2, experts=8)
    assert (short.num_hidden_layers, short.layer_types, fewer) == (2, config.layer_types[:2], False)
    assert config.num_hidden_layers == len(config.layer_types) == 12
    short, fewer = attributes.shortened(hf.Qwen3MoeConfig(num_experts=64), blocks=2, experts=8)
    assert (short.num_experts, fewer) == (8, True)


def test_a_config_that_names_no_class_is_a_causal_language_model():
    config = tiny.CONFIGS["llama"]()
    architecture.assume_causal(config)
    assert config.architectures == ["LlamaForCausalLM"]
    config.architectures = ["LlamaModel"]
    architecture.assume_causal(config)
    assert config.architectures == ["LlamaModel"]


def test_heads_of_modules_and_configs():
    before, after = sizes.Heads(4, 2, 8), sizes.Heads(2, 1, 8)
    attention = tiny.model("llama").model.layers[0].self_attn
    values = sizes.head_attributes(attention, before, after)
    assert values["config"] == {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1}
    attention = tiny.model("gpt2").transformer.h[0].attn
    values = sizes.head_attributes(attention, sizes.Heads(4, 4, 8), sizes.Heads(3, 3, 8))
    assert (values["num_heads"], values["split_size"]) == (3, 24)
    assert sizes.neuron_fields(hf.Qwen3MoeConfig(intermediate_size=64, moe_intermediate_size=64), 64, True) == [
        "moe_intermediate_size",
        "intermediate_size",
    ]
    falcon = sizes.head_fields(hf.FalconConfig(), after)
    assert "head_dim" not in falcon
