"""A tiny run with reconstruction, and how its results are compared."""

from __future__ import annotations

import tiny
import torch

from pyprune.config import Calibration, Evaluation, Reconstruction
from pyprune.pipeline.prune import prune

FAST = Reconstruction(epochs=3, batch_size=4, lr=2e-3)


def run(model=None, samples=12, **fields):
    fields = {"evaluation": Evaluation(enabled=False), "reconstruct": "block", **fields}
    if fields["reconstruct"] in ("block", "cross_block"):
        fields = {"reconstruction": FAST, **fields}
    calibration = fields.pop("calibration", {})
    source = Calibration(source=tiny.ids(samples + 8, 24), num_samples=samples, seq_len=24, held_out=8, **calibration)
    return prune(model or tiny.model("llama"), calibration=source, progress=False, **fields)


def state(result):
    return result.model.state_dict()


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)
