"""Trackers get the figures of each block once, and those of the report."""

from __future__ import annotations

import importlib.util

import pytest
import tiny

import pyprune
from pyprune.config import ConfigError
from pyprune.pipeline import tracking

SMALL = dict(calibration=tiny.ids(4, 16), evaluation=tiny.ids(2, 16, seed=1), progress=False)


def test_a_callback_gets_every_block_and_the_outcome():
    calls = []
    result = pyprune.prune(
        tiny.model("llama"), method="wanda", reconstruct="layer", track=lambda *call: calls.append(call), **SMALL
    )
    blocks = result.report["blocks"]
    assert [step for step, _ in calls] == [0, 1, 2, 3]
    for row, (_, values) in zip(blocks, calls):
        assert values["block/error"] == row["error"] and values["block/seconds"] == row["seconds"]
        for step in row.get("steps") or []:
            assert values[f"block/steps/{step['step']}/calibration"] == step["calibration"]
    (text,) = result.report["evaluation"]
    assert calls[-1][1] == {f"perplexity/{whose}/{text['text']}": text[whose] for whose in ("dense", "pruned")}


def test_a_resumed_run_tracks_what_was_not_done(folder, tmp_path, stop_after):
    from pyprune.execution.journal import Interrupted

    steps = []
    run = dict(method="magnitude", output=str(tmp_path / "out"), track=lambda step, _: steps.append(step), **SMALL)
    stop_after(2)
    with pytest.raises(Interrupted):
        pyprune.prune(str(folder), **run)
    stop_after(-1)
    pyprune.prune(str(folder), resume=True, **run)
    assert steps == [0, 1, 2, 3]


def test_scalars_are_numbers_alone():
    row = {"block": 3, "error": 0.5, "note": "x", "done": True, "none": None, "quantiles": {"calibration": {"p50": 1}}}
    row["steps"] = [{"step": "mask", "held_out": 2.0}]
    assert tracking.scalars(row) == {
        "block/error": 0.5,
        "block/quantiles/calibration/p50": 1.0,
        "block/steps/mask/held_out": 2.0,
    }


@pytest.mark.parametrize("target", ["wandb:x", "tensorboard:", "runs"])
def test_an_unknown_tracker_is_refused_before_any_work(target, tmp_path):
    with pytest.raises(ConfigError, match="track must be tensorboard:FOLDER"):
        pyprune.prune(tiny.model("llama"), track=target, output=str(tmp_path / "out"), **SMALL)
    assert not (tmp_path / "out").exists()


def test_tensorboard_holds_the_scalars(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match="pip install tensorboard"), tracking.tracker("tensorboard:x"):
            pass
        pytest.skip("TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking.tracker(f"tensorboard:{tmp_path}") as track:
        track(0, {"block/error": 0.25})
        track(1, {"block/error": 0.5})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("block/error")] == [(0, 0.25), (1, 0.5)]
