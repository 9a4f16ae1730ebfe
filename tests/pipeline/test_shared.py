"""What runs share is found by all that it depends on, and by nothing else."""

from __future__ import annotations

import dataclasses

import tiny

from pyprune.config import PruneConfig
from pyprune.evaluation.windows import Text
from pyprune.pipeline.shared import Shared


def test_a_value_is_worked_out_once():
    shared, calls = Shared(), []
    assert [shared.once("a", lambda: calls.append(1) or 7) for _ in range(3)] == [7, 7, 7] and len(calls) == 1
    assert shared.once("b", lambda: 8) == 8


def test_sequences_are_shared_by_runs_that_read_the_same():
    shared, ids = Shared(), tiny.ids(4, 8)
    base = PruneConfig(calibration={"source": ids})

    def name(**changes) -> str:
        return shared.sequences(dataclasses.replace(base, **changes))

    assert name() == name(method="wanda", reconstruct="none") == name(sparsity=0.7)
    assert name() != name(calibration={"source": ids, "seed": 1})
    assert name() != name(calibration={"source": tiny.ids(4, 8)}), "equal ids, but another object: read anew"
    assert name() != name(method="magnitude", reconstruct="none"), "its text only measures errors"


def test_the_dense_model_is_measured_once_per_window_type_and_device():
    texts = [Text("t", list(tiny.ids(2, 8)))]
    base = PruneConfig()
    assert Shared.dense(base, texts) == Shared.dense(dataclasses.replace(base, method="wanda", reconstruct=None), texts)
    for other in (
        Shared.dense(dataclasses.replace(base, evaluation={"dtype": "float32"}), texts),
        Shared.dense(dataclasses.replace(base, device="cuda"), texts),
        Shared.dense(base, [Text("t", list(tiny.ids(2, 8, seed=1)))]),
    ):
        assert other != Shared.dense(base, texts)
