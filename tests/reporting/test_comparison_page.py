"""The page of several runs shows the figures of ``pyprune compare`` and of their reports."""

from __future__ import annotations

import pytest
import tiny
from pages import Page, check_accessible, check_figures, drawn, needs_chromium

import pyprune
from pyprune.cli.commands import main
from pyprune.reporting.comparison import read
from pyprune.reporting.comparison_page import labels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("runs"), tiny.model("llama")
    for sparsity in (0.25, 0.5):
        pyprune.prune(
            model,
            method="wanda",
            sparsity=sparsity,
            calibration=tiny.ids(4, 16),
            evaluation=tiny.ids(2, 16),
            output=str(root / f"s{sparsity}"),
            progress=False,
        )
    return [root / "s0.25", root / "s0.5"]


@needs_chromium
def test_the_command_writes_a_page_whose_charts_are_the_runs(runs, tmp_path):
    target = tmp_path / "both.html"
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, runs), "--html", str(target)])
    assert stop.value.code == 0
    rows, reports = pyprune.compare(runs), [read(run) for run in runs]
    page = Page(target.read_text())
    shown = check_figures(page, {"runs": rows, "reports": reports})
    check_accessible(page)
    assert {"runs.0.evaluation.0.pruned", "runs.1.sparsity", "reports.1.blocks.2.error"} <= shown
    curve, blocks = drawn(target, tmp_path / "profile")
    ratios = [row["evaluation"][0]["pruned"] / row["evaluation"][0]["dense"] for row in rows]
    assert curve == [[0.25, 0.5], ratios]
    assert blocks[1:3] == [[row["error"] for row in report["blocks"]] for report in reports]


def test_labels_are_short_where_that_is_enough():
    assert labels(["a/x", "b/y"]) == ["x", "y"] and labels(["a/x", "b/x"]) == ["a/x", "b/x"]
