"""Models that cannot be pruned are refused by one sentence before any work; Falcon is pruned."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import pyprune
from pyprune.config import ConfigError

IDS = tiny.ids(12, 16)
_VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
_TEXT = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    bos_token_id=1,
    eos_token_id=2,
)


class _Quantised(nn.Linear):
    """As bitsandbytes' layers are: a linear layer whose weight is packed bytes."""

    def __init__(self, dense: nn.Linear):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        self.weight = nn.Parameter((dense.weight * 10).to(torch.int8), requires_grad=False)


class _QuantLinear(nn.Module):
    """As GPTQ's layers are: no linear layer of torch's at all."""


def _quantised() -> nn.Module:
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = _Quantised(layer.mlp.up_proj)
    return model


def _no_linear_left() -> nn.Module:
    model = tiny.model("llama")
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _QuantLinear())
    return model


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return hf.LlamaForCausalLM(tiny.CONFIGS["llama"]())


REFUSED = {
    "xlnet": (
        lambda: hf.XLNetModel(hf.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=64)),
        r"XLNetModel passes states of shape \[8, 2, 32\] between its blocks for 2 sequences of 8 tokens",
    ),
    "rwkv": (
        lambda: hf.RwkvForCausalLM(
            hf.RwkvConfig(
                vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64
            )
        ),
        "RwkvForCausalLM rescales its own weights during its forward pass",
    ),
    "vision": (lambda: hf.ViTModel(hf.ViTConfig(**_VISION)), "ViTModel is no Hugging Face model that reads token ids"),
    "images and text": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=dict(_TEXT), vision_config=dict(_VISION))),
        "CLIPModel is no Hugging Face model that reads token ids",
    ),
    "module": (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential is no Hugging Face model that reads token ids"),
    "list": (
        lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])}),
        "ModuleDict is no Hugging Face model that reads token ids",
    ),
    "encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        "T5ForConditionalGeneration is an encoder–decoder",
    ),
    "no blocks": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=0, num_attention_heads=4
            )
        ),
        "LlamaForCausalLM has no list of transformer blocks",
    ),
    "meta": (_on_meta, "model.embed_tokens.weight is on the meta device: LlamaForCausalLM has no weights yet"),
    "float64": (
        lambda: tiny.model("llama").double(),
        r"model.layers.0.self_attn.q_proj.weight is float64; convert the model with model.float\(\)",
    ),
    "packed": (_quantised, "model.layers.0.mlp.up_proj.weight is int8: the model is quantised or packed"),
    "quantised": (_no_linear_left, "LlamaForCausalLM is quantised; prune it in float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("fields", [{"method": "wanda"}, {"pattern": "neurons"}])
@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_before_any_work(name, fields):
    build, sentence = REFUSED[name]
    model = build().eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if not value.is_meta}
    with pytest.raises(ConfigError, match=sentence) as refusal:
        pyprune.prune(model, calibration=IDS, progress=False, in_place=True, **fields)
    assert "\n" not in str(refusal.value)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_refinement_refuses_them_too():
    with pytest.raises(ConfigError, match="is float64"):
        pyprune.refine(tiny.model("llama").double(), tiny.model("llama"), IDS)


def test_a_float64_checkpoint_is_pruned_in_float32(tmp_path):
    model = tiny.model("llama")
    model.double().save_pretrained(tmp_path / "wide")
    with pytest.raises(ConfigError, match="is float64; convert .* or load it with dtype='float32'"):
        pyprune.prune(tmp_path / "wide", method="wanda", calibration=IDS, progress=False)
    result = pyprune.prune(tmp_path / "wide", method="wanda", dtype="float32", calibration=IDS, progress=False)
    assert abs(result.report["sparsity"] - 0.5) < 0.01


def falcon(**fields) -> nn.Module:
    config = hf.FalconConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    torch.manual_seed(0)
    model = hf.FalconForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
    return model


FALCONS = {
    "parallel": dict(parallel_attn=True),
    "grouped": dict(new_decoder_architecture=True, num_kv_heads=2),
    "sequential": dict(parallel_attn=False, multi_query=False),
    "alibi": dict(parallel_attn=False, multi_query=False, alibi=True, bias=True),
    "parallel alibi": dict(parallel_attn=True, alibi=True),
}


def pruned(model: nn.Module, **fields):
    return pyprune.prune(
        model, sparsity=0.5, criterion="magnitude", reconstruct="none", calibration=IDS, progress=False, **fields
    )


@pytest.mark.parametrize("kind", FALCONS)
def test_falcon_without_half_of_its_neurons_is_the_masked_one(kind, tmp_path):
    model = falcon(**FALCONS[kind])
    result = pruned(model, pattern="neurons")
    probe = tiny.ids(2, 9, seed=9)
    with torch.no_grad():
        for block, smaller in zip(model.transformer.h, result.model.transformer.h):
            rows = [
                next(i for i in range(128) if torch.equal(block.mlp.dense_h_to_4h.weight[i], row))
                for row in smaller.mlp.dense_h_to_4h.weight
            ]
            assert len(rows) == 64
            block.mlp.dense_4h_to_h.weight[:, [i for i in range(128) if i not in rows]] = 0
        want, got = model(probe).logits, result.model(probe).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    result.save(tmp_path / "out")
    with torch.no_grad():
        reloaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(probe).logits
    torch.testing.assert_close(reloaded, got, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
def test_falcon_loses_whole_heads(kind, tmp_path):
    """A stock config cannot say it: the way out is to save sizes, and the model reloads to the same bits."""
    model = falcon(**FALCONS[kind])
    with pytest.raises(ConfigError, match="makes a model that stock tools cannot load.*nonstandard='save'"):
        pruned(model, pattern="heads")
    result = pruned(model, pattern="heads", structured={"nonstandard": "save"})
    assert all(block.self_attention.num_heads == 2 for block in result.model.transformer.h)
    result.save(tmp_path / "out")
    probe = tiny.ids(2, 9, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(
            pyprune.load(tmp_path / "out").model(probe).logits, result.model(probe).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize(
    "kind,scope,sentence",
    [
        ("parallel", "groups", "has a single key/value group, which cannot be dropped; use head_scope='queries'"),
        ("alibi", "groups", "pattern='neurons' is what can be pruned"),
        ("parallel alibi", "queries", "pattern='neurons' is what can be pruned"),
    ],
)
def test_heads_of_falcon_that_cannot_go(kind, scope, sentence):
    with pytest.raises(ConfigError, match=sentence):
        pruned(falcon(**FALCONS[kind]), pattern="heads", structured={"head_scope": scope, "nonstandard": "save"})
