"""Plans: the estimate against a real run, bytes against arithmetic, and models far too large for this machine."""

from __future__ import annotations

import time

import pytest
import torch
import transformers

from pyprune.config import Calibration, Evaluation, PruneConfig
from pyprune.model import ModelView, weights_of
from pyprune.planning import inputs_of, memory_of, passes_of, rehearsal_model, rehearse, work_of
from pyprune.prune import prune
from pyprune.weights import skeleton


def view_of(config) -> ModelView:
    return ModelView(skeleton(config, torch.bfloat16))


def selected(view):
    return [weights_of(block) for block in view.blocks]


LLAMA = dict(architectures=["LlamaForCausalLM"])
GIANTS = {
    "70B": (transformers.LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                     num_attention_heads=64, num_key_value_heads=8, **LLAMA), 70.6e9),
    "405B": (transformers.LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248,
                                      num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, **LLAMA),
             405.9e9),
    "235B experts": (transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        architectures=["Qwen3MoeForCausalLM"]), 235.1e9),
}


@pytest.mark.parametrize("name", GIANTS)
def test_models_of_any_size_are_counted_without_weights(name):
    config, parameters = GIANTS[name]
    view = view_of(config)
    assert sum(p.numel() for p in view.model.parameters()) == pytest.approx(parameters, rel=2e-3)
    settings = PruneConfig(calibration=Calibration(num_samples=128, seq_len=2048), output="out")
    host, device = memory_of(view, selected(view), settings, torch.bfloat16, streamed=True)
    block = max(sum(p.numel() for p in b.parameters()) for b in view.blocks)
    assert host["activations"] == 128 * 2048 * config.hidden_size * 2
    assert 2 * block * 2 < host["weights"] < 0.1 * parameters * 2, "two blocks and the embeddings, not the model"
    assert device["block"] == 2 * block * 2
    small, narrowed = rehearsal_model(config, torch.float32)
    assert narrowed and sum(p.numel() for p in small.parameters()) < 2.5e8 and len(ModelView(small).blocks) == 2


def test_statistics_and_solves_are_counted_as_the_mathematics_has_them():
    config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, **LLAMA)
    view = view_of(config)
    assert sorted(w for w, _, _ in inputs_of(view.blocks[0], weights_of(view.blocks[0]))) == [64, 64, 64, 160]
    work = work_of(view, selected(view))
    h, f = 64, 160
    matrices = h * h * 2 + 2 * h * 32 + 3 * h * f
    assert work.forward == 2 * matrices and work.gram == 3 * h * h + f * f and work.head == 2 * 96 * h
    sweep = 2 * h * (h * h * 2 + 2 * h * 32 + 2 * h * f) + 2 * f * h * f
    assert work.solve == pytest.approx(2 * (3 * h**3 + f**3) + sweep)
    _, device = memory_of(view, selected(view), PruneConfig(), torch.bfloat16, streamed=False)
    assert device["statistics"] == 4 * (3 * h * h + f * f)


def test_passes_are_those_the_orchestrator_makes():
    assert passes_of(PruneConfig(method="magnitude"))["statistics"] == 0
    assert passes_of(PruneConfig(method="wanda")) == {"statistics": 1, "propagation": 1, "dense": 0, "training": 0}
    assert passes_of(PruneConfig(method="wanda", inputs="dense"))["propagation"] == 0


@pytest.mark.parametrize("fields", [dict(), dict(method="wanda", pattern="2:4")])
def test_the_estimate_is_within_a_quarter_of_a_real_run(fields, monkeypatch):
    """In CPU seconds of one thread, each the least of three: what else the machine does only ever adds."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = transformers.LlamaConfig(vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
                                      num_attention_heads=4, max_position_embeddings=512, **LLAMA)
    calibration = dict(num_samples=48, seq_len=128, held_out=2)
    evaluation = dict(window=256, max_windows=4)
    asked = PruneConfig(calibration=Calibration(**calibration), evaluation=Evaluation(text=["any"], **evaluation),
                        **fields)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    def rehearsed() -> dict:
        view = ModelView(skeleton(config, torch.float32))
        return rehearse(config, asked, view, selected(view), torch.float32)

    def real() -> dict:
        return prune(model, progress=False,
                     calibration=Calibration(source=torch.randint(5, 2000, (50, 128)), **calibration),
                     evaluation=Evaluation(text=torch.randint(5, 2000, (4, 256)), **evaluation), **fields
                     ).report["seconds"]

    def least(run) -> float:
        work = ("forward", "probe", "statistics", "solve", "evaluation")
        return min(sum(seconds.get(phase, 0) for phase in work) for seconds in (run() for _ in range(3)))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert least(rehearsed) == pytest.approx(least(real), rel=0.25)
    finally:
        torch.set_num_threads(threads)
