"""Coupled groups, found by derivatives: known answers for every architecture, and what must be refused."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf

from pyprune.config import ConfigError
from pyprune.model.blocks import ModelView
from pyprune.structured.groups import find_groups

# architecture: (heads, key/value groups, head size, neurons)
SIZES = {
    "llama": (4, 2, 8, 64),
    "mistral": (4, 2, 8, 64),
    "qwen2": (4, 2, 8, 64),
    "qwen3": (4, 2, 16, 64),
    "gemma2": (4, 2, 8, 64),
    "gemma3": (4, 2, 8, 64),
    "phi3": (4, 2, 8, 64),
    "opt": (4, 4, 8, 64),
    "gpt2": (4, 4, 8, 128),
    "gpt_neox": (4, 4, 8, 64),
    "bert": (4, 4, 8, 64),
    "roberta": (4, 4, 8, 64),
    "mixtral": (4, 2, 8, 64),
    "qwen3_moe": (4, 2, 8, 16),
}
POST_NORM = ("gemma2", "gemma3")
MOE = ("mixtral", "qwen3_moe")


def first(architecture: str, scope: str = "groups", **changes):
    return find_groups(ModelView(tiny.model(architecture, **changes)), "structured", scope)[0]


def slot(group, ending: str):
    return next(s for s in group.slots if s.path.endswith(ending))


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_heads_and_neurons_of_every_architecture(architecture):
    heads, groups, size, neurons = SIZES[architecture]
    head, *rest = first(architecture)
    assert (head.kind, head.units, head.width, head.heads, head.groups) == (
        "heads",
        groups,
        heads // groups * size,
        heads,
        groups,
    )
    assert all(n.kind == "neurons" and (n.units, n.width) == (neurons, 1) for n in rest)
    assert len(rest) == (4 if architecture in MOE else 1)
    # whole key/value heads with their query heads: every producer row belongs to exactly one group
    rows = sum(s.rows.numel() for s in head.slots if s.path.endswith("weight"))
    assert rows == (heads + 2 * groups) * size
    for s in head.slots:
        assert s.rows.flatten().sort().values.tolist() == list(range(s.rows.numel()))


@pytest.mark.parametrize("architecture", [a for a, s in SIZES.items() if s[0] > s[1]])
def test_query_heads_inside_groups(architecture):
    heads, groups, size, _ = SIZES[architecture]
    head = first(architecture, "queries")[0]
    assert (head.units, head.width) == (heads, size)
    assert head.pools.tolist() == [h // (heads // groups) for h in range(heads)]
    assert sum(s.rows.numel() for s in head.slots if s.path.endswith("weight")) == heads * size  # no keys, no values


def test_interleaved_qkv_of_neox():
    """NeoX stores query, key and value of a head one after another: head h owns rows 24h … 24h + 23."""
    head = first("gpt_neox")[0]
    assert slot(head, "query_key_value.weight").rows.tolist() == torch.arange(96).reshape(4, 24).tolist()
    assert slot(head, "query_key_value.bias").rows.tolist() == torch.arange(96).reshape(4, 24).tolist()


def test_concatenated_qkv_of_phi3_and_gpt2():
    """Phi-3: 32 query rows, then 16 key and 16 value rows; GPT-2 the same with equal parts, stored [in, out]."""
    rows = slot(first("phi3")[0], "qkv_proj.weight").rows
    assert rows[1].tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]
    conv = slot(first("gpt2")[0], "c_attn.weight")
    assert conv.dim == 1
    assert conv.rows[2].tolist() == [*range(16, 24), *range(48, 56), *range(80, 88)]


def test_fused_gate_and_up():
    rows = slot(first("phi3")[1], "gate_up_proj.weight").rows
    assert rows.tolist() == [[j, 64 + j] for j in range(64)]
    expert = first("mixtral")[3]
    assert expert.consumer.expert == 2 and expert.slots[0].expert == 2
    assert expert.slots[0].rows.tolist() == [[j, 64 + j] for j in range(64)]


def test_biases_belong_to_their_unit():
    paths = {s.path.rpartition(".")[2] for g in first("opt") for s in g.slots}
    assert paths == {"weight", "bias"}
    assert slot(first("bert")[1], "intermediate.dense.bias").rows.tolist() == [[j] for j in range(64)]


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_where_the_output_lands(architecture):
    """The residual sum of each consumer: found, or None where a norm stands between (Gemma's sandwich)."""
    targets = {g.kind: g.target for g in first(architecture)}
    if architecture in POST_NORM:
        assert targets == {"heads": None, "neurons": None}
    elif architecture in ("bert", "roberta"):
        assert targets == {"heads": "attention.output.LayerNorm", "neurons": "output.LayerNorm"}
    elif architecture == "gpt_neox":
        assert targets == {"heads": "", "neurons": ""}  # parallel residual
    else:
        assert targets["heads"] and "norm" in targets["heads"] or targets["heads"] == "ln_2"
        assert targets["neurons"] is (None if architecture in MOE else targets["neurons"])
        assert architecture in MOE or targets["neurons"] == ""


def test_one_key_value_head_needs_queries():
    model = tiny.model("llama", num_key_value_heads=1)
    head = find_groups(ModelView(model), "heads", "groups")[0][0]
    assert (head.units, head.groups) == (1, 1)
    queries = find_groups(ModelView(model), "heads", "queries")[0][0]
    assert (queries.units, queries.pools.tolist()) == (4, [0, 0, 0, 0])


def test_norm_over_all_heads_couples_them():
    """OLMo-2 normalises queries over all heads together: no head can go alone, and that is said, not assumed."""
    torch.manual_seed(0)
    model = hf.Olmo2ForCausalLM(
        hf.Olmo2Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).eval()
    with pytest.raises(ConfigError, match="no prunable heads"):
        find_groups(ModelView(model), "heads")
    assert find_groups(ModelView(model), "neurons")[0][0].units == 64


def test_unit_size_is_what_slicing_removes():
    model = tiny.model("llama")
    head, neuron = find_groups(ModelView(model), "structured")[0]
    block = model.model.layers[0]
    assert head.unit_size(block) == 32 * (16 + 8 + 8) + 16 * 32
    assert neuron.unit_size(block) == 3 * 32
