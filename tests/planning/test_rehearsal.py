"""The estimate of a plan against a real run."""

from __future__ import annotations

import time

import pytest
import torch
import transformers

from pyprune.config import Calibration, Evaluation, PruneConfig
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.skeleton import skeleton
from pyprune.pipeline.prune import prune
from pyprune.planning.costs import work_of
from pyprune.planning.rehearsal import rehearsal_model, rehearse


def view_of(config) -> ModelView:
    return ModelView(skeleton(config, torch.bfloat16))


def selected(view):
    return [weights_of(block) for block in view.blocks]


LLAMA = dict(architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize("fields", [dict(), dict(method="wanda", pattern="2:4")])
def test_the_estimate_is_within_a_quarter_of_a_real_run(fields, monkeypatch):
    """In CPU seconds of one thread, each the least of three: what else the machine does only ever adds."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
        **LLAMA,
    )
    calibration = dict(num_samples=48, seq_len=128, held_out=2)
    evaluation = dict(window=256, max_windows=4)
    asked = PruneConfig(
        calibration=Calibration(source=["any"], **calibration),
        evaluation=Evaluation(text=["any"], off_domain="none", **evaluation),
        **fields,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    def rehearsed() -> dict:
        view = ModelView(skeleton(config, torch.float32))
        return rehearse(
            asked,
            view,
            work_of(view, selected(view), asked),
            ModelView(rehearsal_model(view.model.config, torch.float32)[0]),
        )

    def real() -> dict:
        return prune(
            model,
            progress=False,
            calibration=Calibration(source=torch.randint(5, 2000, (50, 128)), **calibration),
            evaluation=Evaluation(text=torch.randint(5, 2000, (4, 256)), **evaluation),
            **fields,
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
