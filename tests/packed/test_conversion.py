"""Live models with packed layers: the same outputs, the same weights back, and everything that a stock model does."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch

import pyprune
from pyprune.config import ConfigError
from pyprune.packed.modules import SparseLinear, parameter_count, weight_bytes


def layers(model) -> dict:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def same_state(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "bert", "mixtral", "opt"])
def test_a_sparse_model_gives_the_dense_ones_outputs_and_the_dense_one_back(architecture):
    model = tiny.zeroed(tiny.model(architecture), 0.6)
    before, ids = copy.deepcopy(model.state_dict()), tiny.ids(2, 11)
    packed = pyprune.sparse(model)
    found = layers(packed)
    assert found and not any("head" in name for name in found) and not layers(model)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids)[0], model(ids)[0], rtol=1e-5, atol=1e-5)
    assert same_state(pyprune.dense(packed), model) and type(pyprune.dense(packed)) is type(model)
    assert layers(packed)  # neither call changed what it was given
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert parameter_count(packed) == sum(p.numel() for p in model.parameters())
    assert weight_bytes(packed) < weight_bytes(model)
    # what is not packed is not there twice
    embedding = packed.get_input_embeddings().weight
    assert embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_in_place_changes_the_model_that_was_given():
    model = tiny.zeroed(tiny.model("llama"), 0.5)
    assert pyprune.sparse(model, in_place=True) is model and len(layers(model)) == 21
    assert pyprune.dense(model, in_place=True) is model and not layers(model)
    # a copy of either has no memory of the other
    assert "save_pretrained" not in vars(model)


def test_generation_batches_and_caches_work_as_usual():
    model = tiny.zeroed(tiny.model("llama"), 0.5)
    packed = pyprune.sparse(model)
    ids = tiny.ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(packed.generate(ids, **options), model.generate(ids, **options))
    assert torch.equal(
        packed.generate(ids, num_beams=2, **options), model.generate(ids, num_beams=2, use_cache=False, **options)
    )


def test_a_model_without_zeros_and_one_that_is_packed_are_refused():
    with pytest.raises(ConfigError, match="no linear layer with zeros enough"):
        pyprune.sparse(tiny.model("llama"))
    packed = pyprune.sparse(tiny.zeroed(tiny.model("llama"), 0.5))
    with pytest.raises(ConfigError, match=r"packed.*pyprune\.dense"):
        pyprune.prune(packed, method="magnitude", evaluation={"enabled": False}, progress=False)


def test_only_layers_that_it_pays_for_are_packed_and_shared_weights_are_not():
    model = tiny.model("llama")
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.up_proj.weight[:, ::2] = 0
        block.mlp.gate_proj.weight[:, 0] = 0
        block.self_attn.k_proj.weight[:, ::2] = 0
    block.self_attn.v_proj.weight = block.self_attn.k_proj.weight
    assert list(layers(pyprune.sparse(model))) == ["model.layers.1.mlp.up_proj"]


def test_a_packed_model_is_saved_as_a_packed_checkpoint(tmp_path):
    for architecture in ("llama", "gpt2"):
        model = tiny.zeroed(tiny.model(architecture), 0.5).bfloat16()
        packed = pyprune.sparse(model)
        # a copy, and what comes out of a pickle, save themselves and not the model that they were made of
        for k, one in enumerate((packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)))):
            folder = tmp_path / f"{architecture}-{k}"
            with torch.no_grad():
                one.get_input_embeddings().weight[0] = k
                model.get_input_embeddings().weight[0] = k
            one.save_pretrained(folder)
            again = pyprune.load(folder).model
            assert len(layers(again)) == len(layers(packed)) and same_state(pyprune.dense(again), model)
        pyprune.unpack(folder, tmp_path / f"{architecture}-dense")
        assert same_state(pyprune.load(tmp_path / f"{architecture}-dense").model, model)
