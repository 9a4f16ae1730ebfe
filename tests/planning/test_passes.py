"""The passes and streams that a plan counts are those that a run makes and keeps, by the blocks' own calls."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pyprune.config import Calibration, Evaluation, PruneConfig, Reconstruction, from_dict
from pyprune.execution.activation_store import Store
from pyprune.pipeline.prune import prune
from pyprune.planning.costs import activation_bytes, passes_of

SEQUENCES, LENGTH = 6, 21
TRAINED = Reconstruction(epochs=2, batch_size=3)
LIAR = dict(reconstruct="liar", criterion="wifv", sparsity=0.5, structured={"token_weights": "uniform"})
RUNS = {
    "magnitude": dict(method="magnitude"),
    "wanda": dict(method="wanda"),
    "wanda, dense inputs": dict(method="wanda", inputs="dense"),
    "sparsegpt": dict(),
    "sparsegpt 2:4, dense inputs": dict(pattern="2:4", inputs="dense"),
    "layer": dict(method="wanda", reconstruct="layer"),
    "layer, validated on dense inputs": dict(
        reconstruct="layer", inputs="dense", probe_samples=1, reconstruction=Reconstruction(select="validation")
    ),
    "refit towards the dense stream": dict(reconstruct="refit", global_propagation=True),
    "layer towards the dense stream, sequential": dict(global_propagation=True, inputs="sequential"),
    "block": dict(reconstruct="block", reconstruction=TRAINED),
    "block GP": dict(reconstruct="block", global_propagation=True, reconstruction=TRAINED),
    "cross": dict(reconstruct="cross_block", reconstruction=TRAINED),
    "cross GP": dict(reconstruct="cross_block", global_propagation=True, reconstruction=TRAINED),
    "liar neurons": dict(LIAR, pattern="neurons", inputs="propagated"),
    "liar heads": dict(LIAR, pattern="heads", inputs="propagated"),
    "liar both": dict(LIAR, pattern="structured", inputs="propagated"),
    "liar both, dense inputs": dict(LIAR, pattern="structured", inputs="dense"),
    "liar both, sequential": dict(LIAR, pattern="structured", inputs="sequential"),
    "liar neurons, sequential": dict(LIAR, pattern="neurons", inputs="sequential"),
    "scores alone, sequential": dict(
        LIAR, pattern="structured", inputs="sequential", reconstruct="none", structured={"token_weights": "uniform"}
    ),
    "liar neurons, dense inputs": dict(LIAR, pattern="neurons", inputs="dense"),
    "liar to several sparsities": dict(LIAR, pattern="neurons", sparsity=[0.25, 0.5]),
    "scores alone": dict(
        pattern="structured",
        criterion="wifv",
        sparsity=0.5,
        reconstruct="none",
        structured={"token_weights": "uniform"},
    ),
    "shared out": dict(
        LIAR, pattern="neurons", structured={"token_weights": "uniform", "allocation": "global", "nonstandard": "pad"}
    ),
    "random neurons": dict(pattern="neurons", criterion="random", sparsity=0.5, reconstruct="none"),
}


class Counted:
    """Sequences of the calibration length that passed each block, and the most streams of them held at a time."""

    def __init__(self, monkeypatch):
        self.passed: dict[bool, Counter] = {False: Counter(), True: Counter()}
        self.held = self.most = 0
        forward, empty = LlamaDecoderLayer.forward, Store.empty

        def passing(block, hidden, *args, **kwargs):
            if hidden.shape[1] == LENGTH:
                self.passed[torch.is_grad_enabled()][block.self_attn.layer_idx] += len(hidden)
            return forward(block, hidden, *args, **kwargs)

        def holding(store, shape, dtype):
            tensor = empty(store, shape, dtype)
            if shape[:2] == (SEQUENCES, LENGTH) and shape[-1]:
                self.held += 1
                self.most = max(self.most, self.held)
                weakref.finalize(tensor, self.let_go)
            return tensor

        monkeypatch.setattr(LlamaDecoderLayer, "forward", passing)
        monkeypatch.setattr(Store, "empty", holding)

    def let_go(self) -> None:
        self.held -= 1


@pytest.mark.parametrize("name", RUNS)
def test_a_run_makes_the_passes_and_keeps_the_streams_that_its_plan_counts(monkeypatch, name):
    unmeasured = {} if name == "liar to several sparsities" else {"probe_samples": 0}
    fields = {**unmeasured, "evaluation": Evaluation(enabled=False), **RUNS[name]}
    model = tiny.model("llama", num_hidden_layers=4)
    held_out = fields.get("probe_samples", 0)
    source = [*tiny.ids(SEQUENCES, LENGTH), *tiny.ids(held_out, 9)]
    reads = name not in ("magnitude", "random neurons")
    settings = Calibration(num_samples=SEQUENCES, seq_len=LENGTH, held_out=held_out) if reads else Calibration()
    planned = passes_of(from_dict(PruneConfig, {**fields, "calibration": settings}))
    counted = Counted(monkeypatch)
    given = Calibration(source=source, num_samples=SEQUENCES, held_out=held_out) if reads else Calibration()
    prune(model, progress=False, calibration=given, batch_size=4 if reads else None, **fields)
    # one sequence tells the errors: of every weight, of both models, of the masks alone and of the new weights
    probes = 5 * held_out
    inner = [1, 2]
    assert [counted.passed[False][i] for i in inner] == [planned.forward * SEQUENCES + probes] * 2
    assert [counted.passed[True][i] for i in inner] == [planned.training * SEQUENCES] * 2
    assert counted.most == len(planned.streams), planned.streams


def test_held_activations_are_counted_by_the_streams():
    settings = Calibration(num_samples=10, seq_len=100)
    for name, streams in (
        ("magnitude", 0),
        ("wanda", 1),
        ("block GP", 2),
        ("cross", 3),
        ("liar neurons", 2),
        ("liar both", 3),
        ("liar both, dense inputs", 1),
    ):
        fields = {**RUNS[name], "probe_samples": 0, "calibration": settings if streams else Calibration()}
        assert activation_bytes(from_dict(PruneConfig, fields), 32, torch.float32) == streams * 10 * 100 * 32 * 4
