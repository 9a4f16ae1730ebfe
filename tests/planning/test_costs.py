"""Bytes, passes and operations counted against arithmetic, for models far too large for this machine."""

from __future__ import annotations

import pytest
import torch
import transformers

from pyprune.config import Calibration, Evaluation, PruneConfig, Reconstruction
from pyprune.masks.refit import USUAL_STEPS
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.skeleton import skeleton
from pyprune.planning.costs import Input, activations_of, inputs_of, memory_of, solve_bytes, work_of
from pyprune.planning.rehearsal import rehearsal_model


def view_of(config) -> ModelView:
    return ModelView(skeleton(config, torch.bfloat16))


def selected(view):
    return [weights_of(block) for block in view.blocks]


QUIET = Evaluation(enabled=False)
LLAMA = dict(architectures=["LlamaForCausalLM"])
GIANTS = {
    "70B": (
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            **LLAMA,
        ),
        70.6e9,
    ),
    "405B": (
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=16384,
            intermediate_size=53248,
            num_hidden_layers=126,
            num_attention_heads=128,
            num_key_value_heads=8,
            **LLAMA,
        ),
        405.9e9,
    ),
    "235B experts": (
        transformers.Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            architectures=["Qwen3MoeForCausalLM"],
        ),
        235.1e9,
    ),
}


@pytest.mark.parametrize("name", GIANTS)
def test_models_of_any_size_are_counted_without_weights(name):
    config, parameters = GIANTS[name]
    view = view_of(config)
    assert sum(p.numel() for p in view.model.parameters()) == pytest.approx(parameters, rel=2e-3)
    settings = PruneConfig(calibration=Calibration(num_samples=128, seq_len=2048), output="out")
    host, device = memory_of(view, selected(view), settings, torch.bfloat16, streamed=True, gpu=True)
    block = max(sum(p.numel() for p in b.parameters()) for b in view.blocks)
    assert host["activations"] == (128 + 2 * 4) * 2048 * config.hidden_size * 2, "2 + 2 probes, pruned and dense"
    assert 2 * block * 2 < host["weights"] < 0.1 * parameters * 2, "two blocks and the embeddings, not the model"
    assert device["block"] == 2 * block * 2, "bfloat16: the one at work, and the next on its way"
    _, device = memory_of(view, selected(view), settings, torch.bfloat16, streamed=False, gpu=True, stays=True)
    assert device["weights"] == sum(p.numel() for p in view.model.parameters()) * 2 and "block" not in device
    small, narrowed = rehearsal_model(config, torch.float32)
    assert narrowed and sum(p.numel() for p in small.parameters()) < 2e7 and len(ModelView(small).blocks) == 2


def test_experts_have_inputs_of_their_own():
    config = GIANTS["235B experts"][0]
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 1})
    view = view_of(config)
    found = inputs_of(view, view.blocks[0], weights_of(view.blocks[0]))
    assert sorted(found, key=lambda x: (x.count, x.width)) == [
        Input(4096, (8192, 512, 512)),
        Input(8192, (4096,)),
        Input(1536, (4096,), 128, 8 / 128),
        Input(4096, (2 * 1536,), 128, 8 / 128),
    ]
    work = work_of(view, selected(view), PruneConfig())
    attention, expert = 2 * 4096 * 8192 + 2 * 4096 * 512, 3 * 4096 * 1536
    assert work.forward == 2 * (attention + 8 * expert + 128 * 4096), "eight of 128 experts, and the router"
    assert work.statistics == 4096**2 + 8192**2 + 8 * (4096**2 + 1536**2)


def test_statistics_and_solves_are_counted_as_the_mathematics_has_them():
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **LLAMA,
    )
    view = view_of(config)
    found = inputs_of(view, view.blocks[0], weights_of(view.blocks[0]))
    assert sorted(x.width for x in found) == [64, 64, 64, 160] and all(x.count == 1 for x in found)
    work = work_of(view, selected(view), PruneConfig())
    h, f = 64, 160
    matrices = h * h * 2 + 2 * h * 32 + 3 * h * f
    assert work.forward == 2 * matrices and work.statistics == 3 * h * h + f * f and work.head == 2 * 96 * h
    sweep = 2 * h * (h * h * 2 + 2 * h * 32 + 2 * h * f) + 2 * f * h * f
    assert work.solve == pytest.approx(2 * (3 * h**3 + f**3) + sweep)
    _, device = memory_of(view, selected(view), PruneConfig(), torch.bfloat16, streamed=False, gpu=True)
    assert device["statistics"] == 4 * (3 * h * h + f * f)
    refit = work_of(view, selected(view), PruneConfig(reconstruct="refit"))
    rows = h + 2 * 32 + h + 2 * f  # 64 inputs: a Cholesky factor a row; 160: products with H
    assert refit.solve - work.solve == pytest.approx(rows * h**3 / 3 + 2 * h * f * f * USUAL_STEPS)
    wanda = work_of(view, selected(view), PruneConfig(method="wanda"))
    assert wanda.statistics == 3 * h + f and wanda.solve == 2 * matrices, "norms and masks, no factorisation"


def test_matrices_that_are_swept_together_are_held_together():
    gate_and_up, matrix = Input(64, (4000, 4000)), 64 * 4000
    factor, stack, errors = 4 * 64**2, 4 * 2 * matrix, 8 * matrix
    together = Reconstruction(layerwise_target="dense")
    for fields, wanted in (
        ({}, factor + stack + errors),
        ({"method": "wanda"}, 12 * matrix),
        ({"global_propagation": True, "reconstruct": "layer"}, factor + 2 * stack + errors),
        ({"global_propagation": True, "reconstruct": "block"}, factor + stack + errors),
        ({"global_propagation": True, "reconstruct": "block", "reconstruction": together}, factor + 2 * stack + errors),
        ({"reconstruct": "refit"}, 2 * factor + stack + 8 * matrix + 12 * 4000 * 64**2),
        ({"pattern": "neurons"}, factor + 12 * matrix),
    ):
        assert solve_bytes(gate_and_up, PruneConfig(**fields)) == wanted, fields
    assert solve_bytes(Input(4000, (64,)), PruneConfig()) == 12 * 4000**2, "while it is factored"


def test_recorded_sweeps_keep_their_rooms_from_block_to_block(monkeypatch):
    view = view_of(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=1024, intermediate_size=3000, num_hidden_layers=2, num_attention_heads=4, **LLAMA
        )
    )

    def peak(gpu=True, **fields):
        settings = PruneConfig(
            calibration=Calibration(num_samples=1, seq_len=8), evaluation=QUIET, batch_size=1, **fields
        )
        return memory_of(view, selected(view), settings, torch.bfloat16, streamed=False, gpu=gpu)[gpu]

    stack, factor, masks = 2 * 3000 * 1024, 3000**2, 4 * 1024**2 + 3 * 3000 * 1024
    found = peak()
    assert found["recorded_sweeps"] == 7 * stack + 8 * 2 * 3000 * 512 + 4 * factor
    assert found["solve"] == masks + 12 * factor, "the stack lies in its room"
    assert "recorded_sweeps" not in peak(method="wanda")
    assert "recorded_sweeps" not in peak(gpu=False)
    monkeypatch.setenv("PYPRUNE_GRAPHS", "0")
    found = peak()
    assert "recorded_sweeps" not in found and found["solve"] == masks + 12 * factor


def test_memory_is_that_of_the_moment_that_needs_most():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, **LLAMA
    )
    view = view_of(config)

    def peak(budget=float("inf"), **fields):
        settings = PruneConfig(calibration=Calibration(num_samples=8, seq_len=64), **fields)
        return memory_of(view, selected(view), settings, torch.bfloat16, streamed=False, gpu=False, budget=budget)[0]

    fitted = peak(evaluation=Evaluation(enabled=False))
    assert "batches" in fitted and "activations" in fitted and "evaluation" not in fitted
    measured = peak(evaluation=Evaluation(batch_size=256))
    assert set(measured) == {"process", "weights", "evaluation"}, "activations are gone, or not yet there"
    assert peak(budget=1000, evaluation=Evaluation(enabled=False))["activations"] == 1000, "the rest lies in files"


def test_passes_that_stand_still_take_the_room_there_is_and_spill_the_rest():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, **LLAMA
    )
    view = view_of(config)
    calibration = Calibration(num_samples=8, seq_len=64)
    settings = PruneConfig(calibration=calibration, evaluation=QUIET, inputs="sequential", probe_samples=0)
    between, inside = 512 * 64 * 2, 512 * (64 + 4 * 64) * 2

    def count(budget, room):
        stored, stays = activations_of(view, selected(view), settings, torch.bfloat16, budget, room)
        host, device = memory_of(
            view, selected(view), settings, torch.bfloat16, False, room is not None, budget, room or 0
        )
        held = device if room is not None else host
        assert (host["activations"], held.get("paused_passes", 0)) == (min(budget, stored), stays)
        return stored, stays

    assert count(between + inside, None) == (between, inside)
    assert count(between + 1000, None) == (between + inside - 1000, 1000), "the store's budget is for both"
    assert count(1000, None) == (between + inside, 0)
    assert count(10 * between, 5000) == (between + inside - 5000, 5000), "a GPU's spill to the host"
