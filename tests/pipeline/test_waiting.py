"""Whole runs on a simulated GPU: what the host waits for in a block is a number of its own, whatever the batches."""

from __future__ import annotations

from collections import Counter

import pytest
import simulated_gpu
import tiny
import torch

from pyprune import ops
from pyprune.config import Evaluation, Reconstruction
from pyprune.execution.executor import Executor
from pyprune.execution.run import Clock
from pyprune.ops import reference
from pyprune.pipeline.prune import prune

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: tests/pipeline/test_gpu_end_to_end.py"
)
TRAINS = Reconstruction(epochs=1, batch_size=4)


def waits_of_a_block(monkeypatch, memory=10**11, **fields) -> tuple[Counter, Counter]:
    """Waits of the middle one of three blocks by kind and by place, with six batches to a pass."""
    snapshots, compute = [], Executor.compute

    def noting(self, index, ahead=None):
        if ahead is not None:
            snapshots.append(Counter(simulated_gpu.waits))
        return compute(self, index, ahead)

    monkeypatch.setattr(Executor, "compute", noting)
    with simulated_gpu.present(memory):
        result = prune(
            tiny.model("llama", num_hidden_layers=3),
            calibration=tiny.ids(12, 24),
            evaluation=Evaluation(enabled=False),
            progress=False,
            batch_size=2,
            device="cuda",
            **fields,
        )
    assert all(p.device.type == "cpu" for p in result.model.parameters()), "the model comes back where it was"
    found = snapshots[2] - snapshots[1]
    kinds: Counter = Counter()
    for (kind, _), count in found.items():
        kinds[kind] += count
    return kinds, found


LIAR = {"read": 4, "stream": 5, "event": 1, "copy to the host": 3}
"""Statistics with their guards, errors, the solution with its guards, and the block's error are read; scores, the
repaired weight and its bias go to the host, where the block is."""


@pytest.mark.parametrize(
    "fields,waits",
    [
        # statistics, results, bad scores (kernels tell of theirs without a read), errors; a stream per pass. A block
        # that arrives from the host goes back there as well.
        (dict(), {"read": 4, "stream": 5, "device": 1, "event": 1}),
        (dict(memory=1000), {"read": 4, "stream": 6, "device": 1, "event": 1}),
        (dict(method="wanda"), {"read": 4, "stream": 5, "device": 1, "event": 1}),
        # a pass that cannot be made again looks at its first statistics before it goes on
        (dict(method="wanda", pattern="2:4", inputs="dense"), {"read": 5, "stream": 4, "device": 1, "event": 1}),
        # its passes stand still for the groups; statistics and results of all of them are read at the end
        (dict(method="wanda", inputs="sequential"), {"read": 3, "stream": 2, "device": 1, "event": 1}),
        (
            dict(method="wanda", reconstruct="block", reconstruction=TRAINS),
            {"read": 9, "stream": 5, "device": 1, "event": 1},
        ),
        (
            dict(method="wanda", reconstruct="block", reconstruction=TRAINS, memory=1000),
            {"read": 9, "stream": 9, "device": 1, "event": 1},
        ),
        (dict(pattern="neurons", inputs="propagated", memory=1000, structured={"damping": 0.1}), LIAR),
    ],
)
def test_the_host_waits_a_fixed_number_of_times_per_block(fields, waits, monkeypatch):
    kinds, places = waits_of_a_block(monkeypatch, **fields)
    assert kinds == Counter(waits), places


def test_the_reference_reports_bad_data_on_a_gpu_without_being_waited_for():
    weight = torch.randn(4, 8)
    weight[1, 2] = torch.nan
    with simulated_gpu.present() as waits:
        reference.select_mask(weight.to("cuda:0"), 4)
        reference.select_mask(torch.randn(4, 8).to("cuda:0"), 4)
        assert not any(kind == "read" for kind, _ in waits)
        with pytest.raises(ValueError, match="w has NaN scores"):
            ops.raise_faults("cuda:0")
        ops.raise_faults("cuda:0")  # once is enough


def test_a_factorisation_that_fails_is_found_when_the_block_is_read():
    """Two identical columns of inputs, and no damping to tell them apart: the block is solved again with more."""
    model = tiny.model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:2] = 1
        model.model.embed_tokens.weight[:, 1] = model.model.embed_tokens.weight[:, 0]
    fields = dict(
        calibration=tiny.ids(12, 24),
        evaluation=Evaluation(enabled=False),
        progress=False,
        batch_size=12,
        damping=1e-8,
        targets=["q_proj"],
    )
    there = prune(model, backend="reference", **fields)
    with simulated_gpu.present():
        here = prune(model, device="cuda", **fields)
    assert [row["damping"] for row in here.report["weights"]] == [row["damping"] for row in there.report["weights"]]
    assert here.report["weights"][0]["damping"] > 1e-8
    assert any("damping raised" in text for text in here.report["warnings"])


def test_on_a_gpu_phases_are_measured_by_events():
    clock = Clock()
    with simulated_gpu.present() as waits:
        clock.follow(torch.device("cuda:0"))
        with clock("forward"), clock("statistics"):
            pass
        assert not waits and clock.seconds == {"forward": pytest.approx(2e-3), "statistics": pytest.approx(1e-3)}
        assert sum(waits.values()) == 1 and clock.seconds["forward"] == pytest.approx(2e-3), "read twice, counted once"
