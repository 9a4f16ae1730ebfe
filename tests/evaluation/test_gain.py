"""``pyprune eval --latency``: sizes are what the arithmetic says, each model measured in a process of its own."""

from __future__ import annotations

import functools
import json

import pytest
import tiny
from calling import call

import pyprune
from pyprune.config import ConfigError
from pyprune.evaluation import gain


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder of a dense LLaMA, and of the same one without half its neurons."""
    root = tmp_path_factory.mktemp("speed")
    tiny.model("llama", intermediate_size=512).save_pretrained(root / "dense")
    pyprune.prune(
        str(root / "dense"),
        pattern="neurons",
        sparsity=0.5,
        calibration=tiny.ids(20, 24),
        progress=False,
        output=str(root / "pruned"),
        evaluation={"enabled": False},
    )
    return root / "dense", root / "pruned"


def test_latency_of_dense_and_pruned_in_one_run(pair, tmp_path, monkeypatch, capsys):
    quick = functools.partial(gain.measure_side_by_side, tokens=64, new_tokens=4, rounds=1)
    monkeypatch.setattr(gain, "measure_side_by_side", quick)
    code, out, err = call(capsys, "eval", pair[1], "--latency", "--plot", tmp_path / "gain.png", "--json")
    assert code == 0 and "latency · measuring" in err
    dense, pruned = json.loads(out)
    # per block: gate, up and down lose 256 × 32 each, and gain biases of 256, 256 and 32
    saved = 3 * (3 * 256 * 32 - (2 * 256 + 32))
    assert dense["parameters"] - pruned["parameters"] == saved
    assert dense["weight_bytes"] - pruned["weight_bytes"] == 4 * saved
    assert pruned["file_bytes"] < dense["file_bytes"]
    assert abs(dense["file_bytes"] - pruned["file_bytes"] - 4 * saved) < 4096  # the header names the new biases
    assert dense["model"] == str(pair[0]) and pruned["ratios"]["parameters"] < 0.6
    assert all(row["prefill_tokens_per_second"] > 0 and row["peak_memory_bytes"] > 2**20 for row in (dense, pruned))
    assert (tmp_path / "gain.png").stat().st_size > 1000
    # the report beside the model holds it, and its card shows it
    assert json.loads((pair[1] / "report.json").read_text())["gain"] == [dense, pruned]
    card = (pair[1] / "README.md").read_text()
    assert f"| {pruned['parameters'] / 1e6:,.1f} M  ×{pruned['ratios']['parameters']:.2f} |" in card
    assert "![gain](gain.png)" in card and (pair[1] / "gain.png").stat().st_size > 1000 and "are gone" in card
    assert pyprune.load(pair[1]).model.num_parameters() == pruned["parameters"]


def test_the_dense_model_is_found_or_asked_for(pair):
    assert gain.dense_of(pair[1]) == str(pair[0])
    with pytest.raises(ConfigError, match="--against"):
        gain.dense_of(pair[0])
    with pytest.raises(ConfigError, match="no-such-model"):
        gain.measure_side_by_side(["./no-such-model"])


def test_a_folder_without_a_report_is_left_alone(pair):
    before = sorted(pair[0].iterdir())
    assert gain.record([{"model": "x", "ratios": {}}], pair[0]) == [] and sorted(pair[0].iterdir()) == before


def test_model_card_says_how_to_load(pair, tmp_path):
    assert "are gone" in (pair[1] / "README.md").read_text()
    own = pyprune.prune(
        tiny.model("bert"),
        pattern="heads",
        sparsity=0.5,
        calibration=tiny.ids(20, 24),
        progress=False,
        evaluation={"enabled": False},
        structured={"nonstandard": "save"},
    )
    own.save(tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert 'pyprune.load("own")' in card and "num_attention_heads=2" in card


def test_a_folder_that_is_not_there_is_named_as_such(capsys):
    code, _, err = call(capsys, "eval", "nowhere", "--latency")
    assert code == 2 and "no such folder: nowhere; for a model of the Hub, name the dense model with --against" in err
