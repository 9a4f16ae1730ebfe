"""``merge_lora``: the update reaches the kept weights, the zeros stay, and what was lost is the number that it says."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch

import pyprune
from pyprune.config import ConfigError

peft = pytest.importorskip("peft", reason="peft belongs to the extra 'finetune'")


def adapted(architecture="llama", seed=0, **options):
    """A half-zero model, its state, and the same with random adapters."""
    model = tiny.zeroed(tiny.model(architecture), 0.5)
    base = copy.deepcopy(model).eval()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return base, tuned.eval()


@pytest.mark.parametrize(
    "architecture, targets, turned, dora",
    [
        ("llama", ["q_proj", "down_proj"], False, False),
        ("gpt2", ["c_attn"], True, False),
        ("llama", ["up_proj"], False, True),
    ],
)
def test_updates_reach_the_kept_weights_alone(architecture, targets, turned, dora):
    base, tuned = adapted(architecture, target_modules=targets, fan_in_fan_out=turned, use_dora=dora)
    whole = copy.deepcopy(tuned).merge_and_unload().state_dict()
    model, lost, rows = pyprune.merge_lora(tuned)
    assert type(model) is type(base) and model.state_dict().keys() == base.state_dict().keys()
    fell = total = 0.0
    for name, weight in base.state_dict().items():
        now = model.state_dict()[name]
        if not any(target in name for target in targets) or weight.ndim < 2:
            assert torch.equal(now, weight)
            continue
        dropped = weight == 0
        assert torch.equal(now, whole[name].masked_fill(dropped, 0)) and not torch.equal(now, weight)
        update = (whole[name] - weight).double()
        fell, total = fell + float(update[dropped].square().sum()), total + float(update.square().sum())
    assert lost == pytest.approx(math.sqrt(fell / total), rel=1e-6)
    if not dora:
        assert lost == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert len(rows) == 3 * len(targets) and all(row["sparsity"] == pytest.approx(0.5, abs=0.02) for row in rows)
    # nothing of peft is left, and the result packs
    assert pyprune.inspect and not any("lora" in name for name, _ in model.named_modules())
    assert pyprune.sparse(model) is not None


def test_what_cannot_be_merged_is_refused_before_anything_is():
    base, tuned = adapted(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        pyprune.merge_lora(base)
    last = [p for name, p in tuned.named_parameters() if "lora_A" in name][-1]
    with torch.no_grad():
        last[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.2\.self_attn\.v_proj\.lora_A.*nothing was merged"):
        pyprune.merge_lora(tuned)
    weight = tuned.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, base.model.layers[0].self_attn.q_proj.weight)
    _, tuned = adapted(target_modules=["q_proj"])
    tuned.merge_adapter()
    with pytest.raises(ConfigError, match="merged already"):
        pyprune.merge_lora(tuned)
