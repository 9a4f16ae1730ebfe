"""Recorded work on a simulated GPU: the same bytes as work done as it comes, for whatever lies in its rooms."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import simulated_gpu
import tiny
import torch

from pyprune.config import Evaluation
from pyprune.execution import executor
from pyprune.execution.replays import SWITCH, Replays
from pyprune.ops import choice, reference
from pyprune.pipeline.prune import prune

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: tests/pipeline/test_gpu_end_to_end.py"
)
GPU = torch.device("cuda:0")


def doubled(replays: Replays, value: float, also=lambda x: None) -> list[float]:
    """Twice ``value`` plus one, by way of two rooms."""
    x, y = replays.room("x", (3,)), replays.room("y", (3,))
    x.fill_(value)

    def work():
        y.copy_(x * 2)
        also(y)
        y.add_(1)
        x.zero_()

    replays(("doubled", 3), work)
    assert x.inside.eq(0).all() if isinstance(x, simulated_gpu.OnDevice) else x.eq(0).all()
    return y.cpu().tolist()


def test_the_second_time_is_recorded_and_later_ones_see_what_is_in_the_rooms_then():
    with simulated_gpu.present():
        replays = Replays(GPU)
        assert [doubled(replays, value) for value in (1, 2, 3, 4)] == [[3] * 3, [5] * 3, [7] * 3, [9] * 3]
        assert simulated_gpu.graphs == {"recorded": 1, "replayed": 3}
        replays.room("x", (5,))  # larger: it moves, and what was recorded would write to where it was
        assert [doubled(replays, value) for value in (5, 6)] == [[11] * 3, [13] * 3]
        assert simulated_gpu.graphs == {"recorded": 2, "replayed": 5}


def test_what_cannot_be_recorded_is_done_as_it_comes_and_said():
    said = []
    with simulated_gpu.present():
        replays = Replays(GPU, said.append)
        found = [doubled(replays, value, also=lambda y: y.sum().item()) for value in (1, 2, 3)]
        assert found == [[3] * 3, [5] * 3, [7] * 3] and not simulated_gpu.graphs["replayed"]
    [sentence] = said
    assert sentence.startswith("sweeps could not be recorded as CUDA graphs") and "not permitted" in sentence


def test_a_cpu_and_the_switch_record_nothing(monkeypatch):
    replays = Replays(torch.device("cpu"))
    assert [doubled(replays, value) for value in (1, 2, 3)] == [[3] * 3, [5] * 3, [7] * 3]
    monkeypatch.setenv(SWITCH, "0")
    with simulated_gpu.present():
        assert [doubled(Replays(GPU), 1), doubled(Replays(GPU), 2)] == [[3] * 3, [5] * 3]
        assert not simulated_gpu.graphs


RUNS = {
    "chosen": {},
    "2:4": {"pattern": "2:4"},
    "given": {"method": "wanda", "reconstruct": "layer"},
    "refit": {"reconstruct": "refit"},
    "sequential": {"inputs": "sequential"},
    "of a sparsity each": {"sparsity": {"q_proj": 0.3, "k_proj": 0.5, "mlp": 0.6}},
    "towards dense outputs": {"reconstruct": "layer", "global_propagation": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same_recorded_or_not(name, monkeypatch):
    made = []

    class Noted(Replays):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(executor, "Replays", Noted)
    monkeypatch.setattr(choice, "_loaded", {})
    # the reference stands in for kernels here: what it selects is one step, as theirs
    monkeypatch.setattr("pyprune.masks.block.recordable", lambda replays: not replays.off)

    def run():
        with simulated_gpu.present():
            with mock.patch.object(reference, "select_mask", simulated_gpu._at_once(reference.select_mask)):
                result = prune(
                    tiny.model("llama", num_hidden_layers=4),
                    calibration=tiny.ids(12, 24),
                    evaluation=Evaluation(enabled=False),
                    progress=False,
                    device="cuda",
                    **RUNS[name],
                )
            return result, dict(simulated_gpu.graphs)

    recorded, graphs = run()
    groups = 3 if name == "of a sparsity each" else 4
    assert graphs == {"recorded": groups, "replayed": 3 * groups}
    gc.collect()
    assert made and not any(replays() for replays in made), "nothing is kept after a run"
    monkeypatch.setenv(SWITCH, "0")
    plain, graphs = run()
    assert not graphs
    for (path, one), (_, other) in zip(recorded.model.named_parameters(), plain.model.named_parameters()):
        assert torch.equal(one, other), path
    assert recorded.report["weights"] == plain.report["weights"]
    assert recorded.report["warnings"] == plain.report["warnings"]
