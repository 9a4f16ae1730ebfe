"""Slicing is exact, its result is a plain checkpoint or is described whole, and what cannot be said is refused."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from pyprune.config import ConfigError
from pyprune.model.blocks import ModelView
from pyprune.model.sizes import sized_class
from pyprune.model.watching import expert_loop
from pyprune.structured import config_edits, slicing
from pyprune.structured.allocation import choose
from pyprune.structured.groups import find_groups
from pyprune.structured.slicing import Pick, mask_units, slice_block

ALL = list(tiny.CONFIGS)
GROUPED = [a for a in ALL if a not in ("opt", "gpt2", "gpt_neox", "bert", "roberta")]


def logits(model):
    with torch.no_grad(), expert_loop(model.config):
        return model(tiny.ids(2, 20))[0]


def prepared(architecture, scope, seed=0, counts=None):
    """A model, and random picks that drop half of everything, differently in each block."""
    model = tiny.model(architecture)
    generator = torch.Generator().manual_seed(seed)
    picks = []
    for groups in find_groups(ModelView(model), "structured", scope):
        picks.append([Pick(g, choose(g, torch.rand(g.units, generator=generator), g.units // 2)) for g in groups])
    return model, picks


@pytest.mark.parametrize(("architecture", "scope"), [(a, "groups") for a in ALL] + [(a, "queries") for a in GROUPED])
def test_sliced_equals_masked(architecture, scope):
    """The sliced model's logits are the masked dense model's, float rounding apart."""
    model, picks = prepared(architecture, scope)
    masked = copy.deepcopy(model)
    for block, chosen in zip(ModelView(masked).blocks, picks):
        for pick in chosen:
            mask_units(block, pick.group, pick.kept)
    want = logits(masked)
    assert float((want - logits(model)).norm() / want.norm()) > 0.01  # the units mattered
    for block, chosen in zip(ModelView(model).blocks, picks):
        slice_block(block, chosen)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "mixtral"])
def test_padded_slices_equal_sliced(architecture):
    """Room for three quarters, half of it exact zeros: same logits, zeros in producers, biases and consumers."""
    model, picks = prepared(architecture, "groups")
    padded = copy.deepcopy(model)
    for block, chosen in zip(ModelView(model).blocks, picks):
        slice_block(block, chosen)
    for block, chosen in zip(ModelView(padded).blocks, picks):
        for pick in chosen:
            pick.padded_to = pick.group.units * 3 // 4 if pick.group.units > 2 else pick.group.units
        slice_block(block, chosen)
        for pick in chosen:
            columns = pick.group.consumer.view(block)
            width = pick.group.width
            assert columns.shape[1] == pick.padded_to * width
            assert int((columns != 0).any(0).sum()) == len(pick.kept) * width
    want = logits(model)
    torch.testing.assert_close(logits(padded), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_linear_layers_know_their_new_sizes():
    model, picks = prepared("llama", "groups")
    changed = slice_block(model.model.layers[0], picks[0])
    block = model.model.layers[0]
    assert (block.mlp.down_proj.in_features, block.mlp.gate_proj.out_features) == (32, 32)
    assert (block.self_attn.q_proj.out_features, block.self_attn.k_proj.out_features) == (16, 8)
    assert changed["self_attn"]["config"] == {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1}
    assert model.config.num_attention_heads == 4  # the shared config is edited only when the whole model is done


def test_reconstructed_weight_and_new_bias_are_written():
    model, picks = prepared("llama", "groups")
    neurons = picks[0][1]
    neurons.weight, neurons.bias = torch.randn(32, 32), torch.randn(32)
    slice_block(model.model.layers[0], picks[0])
    down = model.model.layers[0].mlp.down_proj
    assert torch.equal(down.weight.data, neurons.weight) and torch.equal(down.bias.data, neurons.bias)


def test_verify_refuses_a_wrong_group():
    """Rows of another unit: the sliced block differs from the masked one, which is an error, not a result."""
    model = tiny.model("llama")
    view = ModelView(model)
    group = find_groups(view, "neurons")[0][0]
    hidden, arguments = view.record(tiny.ids(1, 12))
    slicing.verify(view.blocks[0], [group], hidden, arguments[0], "block 0")
    rows = group.slots[0].rows.roll(1, dims=0)
    wrong = group.__class__(
        **{**group.__dict__, "slots": (group.slots[0].__class__(group.slots[0].path, 0, rows), group.slots[1])}
    )
    with pytest.raises(ConfigError, match="differs from the masked one"):
        slicing.verify(view.blocks[0], [wrong], hidden, arguments[0], "block 0")


@pytest.mark.parametrize(
    ("architecture", "field"),
    [("llama", "intermediate_size"), ("opt", "ffn_dim"), ("gpt2", "n_inner"), ("qwen3_moe", "moe_intermediate_size")],
)
def test_config_field_is_found_by_shape(architecture, field):
    model, picks = prepared(architecture, "groups")
    for block, chosen in zip(ModelView(model).blocks, picks):
        slice_block(block, [p for p in chosen if p.group.kind == "neurons"])
    neurons = next(p.group for p in picks[0] if p.group.kind == "neurons")
    assert config_edits.standard_edits(model, {"neurons": neurons}, {"neurons": neurons.units // 2}, {}) == {
        field: neurons.units // 2
    }


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "opt", "gpt_neox"])
def test_fewer_heads_without_head_dim_have_no_stock_config(architecture):
    model, picks = prepared(architecture, "groups")
    for block, chosen in zip(ModelView(model).blocks, picks):
        slice_block(block, [p for p in chosen if p.group.kind == "heads"])
    heads = picks[0][0].group
    with pytest.raises(ConfigError, match="num_attention_heads=2.*the pruned model has"):
        config_edits.standard_edits(model, {"heads": heads}, {"heads": 2}, {})


def test_head_count_that_the_config_refuses():
    """LLaMA's config wants the hidden size divisible by the heads, whatever head_dim says."""
    with pytest.raises(ConfigError, match="not a multiple"):
        config_edits.empty_like(
            tiny.model("llama"), {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
        )


def test_bias_flags_are_found_where_the_architecture_has_them():
    def flags(architecture):
        model = tiny.model(architecture)
        groups = find_groups(ModelView(model), "structured")[0]
        paths = {g.kind: config_edits.consumer_path("model.layers", 0, g.consumer) for g in groups}
        return config_edits.bias_flags(model, paths)

    assert flags("llama") == {"heads": "attention_bias", "neurons": "mlp_bias"}
    assert flags("qwen3") == {"heads": "attention_bias"}
    assert flags("mistral") == {}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "phi3"])
def test_layout_builds_the_same_model_again(architecture):
    """Blocks of different sizes: rebuilt from config and layout, the state dict fits and the logits are equal."""
    model, picks = prepared(architecture, "groups")
    view = ModelView(model)
    attributes = []
    for i, (block, chosen) in enumerate(zip(view.blocks, picks)):
        for pick in chosen:
            if pick.group.kind == "neurons":
                pick.kept = torch.arange(10 + i)
        attributes.append(slice_block(block, chosen))
    sizes = config_edits.layout(model, view.path, attributes, [])
    again = sized_class(type(model), sizes)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))
