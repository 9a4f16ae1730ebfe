"""Runs below a folder, in the order of their making."""

from __future__ import annotations

import json
import os

import pytest
import tiny

import pyprune
from pyprune.config import ConfigError
from pyprune.watching import history


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs below one folder, the second made first; files that are no run's, and one in a hidden folder."""
    root, model = tmp_path_factory.mktemp("runs"), tiny.model("llama", num_hidden_layers=2)
    for name, sparsity, when in (("b/old", 0.25, "2026-01-01"), ("a", 0.5, "2026-03-01")):
        result = pyprune.prune(
            model,
            method="wanda",
            sparsity=sparsity,
            calibration=tiny.ids(4, 16),
            evaluation=tiny.ids(2, 16),
            progress=False,
        )
        assert result.report["finished"][:2] == "20"
        result.report["finished"] = f"{when}T10:00:00+00:00"
        (root / name).mkdir(parents=True)
        (root / name / "report.json").write_text(json.dumps(result.report))
    for name, text in (("other", '{"some": "thing"}'), ("broken", "{"), (".pyprune", "{}")):
        (root / name).mkdir()
        (root / name / "report.json").write_text(text)
    return root


def test_runs_are_found_everywhere_below_and_sorted_by_time(runs):
    rows = pyprune.history(runs)
    assert [(row["run"], row["finished"][:10]) for row in rows] == [("b/old", "2026-01-01"), ("a", "2026-03-01")]
    report = json.loads((runs / "a" / "report.json").read_text())
    assert rows[1]["block_error"] == report["blocks"][-1]["error"]
    assert rows[1]["evaluation"][0]["pruned"] == report["evaluation"][0]["pruned"]
    assert [row["run"] for row in pyprune.history(runs / "a")] == ["a"]


def test_the_table_has_a_line_for_each_text_beside_its_own_figures(capsys):
    texts = [{"text": "a text with a name so long that a terminal breaks it " * 2, "dense": 10.0, "pruned": 12.0}]
    texts.append({"text": "prose", "dense": 20.0, "pruned": 50.0})
    row = {"finished": "2026-01-01T10:00:00+00:00", "run": "r", "model": "m", "method": "wanda", "reconstruct": "none"}
    row |= {"pattern": "unstructured", "sparsity": 0.5, "sparsity_asked": 0.5, "evaluation": texts}
    row |= {
        "block_error": 0.1,
        "block_error_held_out": 0.2,
        "criterion": None,
        "global_propagation": False,
        "refined": None,
    }
    history.print_history([row])
    shown = capsys.readouterr().out.splitlines()
    (first,), (second,) = ([line for line in shown if value in line] for value in ("12.00", "50.00"))
    assert "a text with" in first and "1.2" in first and "0.1" in first and "prose" in second and "2.5" in second


def test_a_report_without_a_time_has_that_of_its_file(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    os.utime(tmp_path / "report.json", (0, 0))
    assert history.finished({}, tmp_path) == "1970-01-01T00:00:00+00:00"
    assert history.finished({"finished": "x"}, tmp_path) == "x"
    assert history.seconds_of({"finished": "1970-01-01T00:01:00+00:00"}) == 60


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no report.json of a finished run"):
        pyprune.history(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        pyprune.history(tmp_path / "none")


def test_the_picture_is_written(runs, tmp_path):
    pytest.importorskip("matplotlib")
    history.picture(pyprune.history(runs), tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
