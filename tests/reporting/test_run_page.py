"""``report.html`` shows the figures of ``report.json``, to the parser and to a browser."""

from __future__ import annotations

import json

import pytest
import tiny
from pages import Page, check_accessible, check_figures, drawn, needs_chromium

import pyprune
from pyprune.reporting.run_page import MAX_WEIGHTS, run_page

RUNS = {
    "masks": dict(method="sparsegpt", sparsity=0.5),
    "trained": dict(method="wanda", reconstruct="cross_block", global_propagation=True),
    "structured": dict(
        pattern="structured",
        sparsity=0.5,
        structured=pyprune.Structured(allocation="global", nonstandard="save"),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of run."""
    root, model = tmp_path_factory.mktemp("runs"), tiny.model("llama", vocab_size=tiny.CHARACTERS)
    for name, fields in RUNS.items():
        pyprune.prune(
            model,
            tokenizer=tiny.tokenizer(),
            calibration=tiny.ids(8, 24),
            evaluation=[tiny.ids(3, 24, seed=1), tiny.ids(2, 24, seed=2)],
            output=str(root / name),
            progress=False,
            **fields,
        )
    return {name: root / name for name in RUNS}


def loaded(folder) -> tuple[dict, Page]:
    text = (folder / "report.html").read_text()
    assert len(text.encode()) < 2_000_000
    return json.loads((folder / "report.json").read_text()), Page(text)


@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_the_report(folders, name):
    report, page = loaded(folders[name])
    shown = check_figures(page, report)
    check_accessible(page)
    expected = {f"evaluation.{k}.{key}" for k in range(2) for key in ("dense", "pruned")}
    expected |= {f"weights.{k}.sparsity" for k in range(len(report["weights"]))}
    expected |= {f"seconds.{phase}" for phase in report["seconds"]} | {"peak_memory_bytes", "sparsity"}
    for k, row in enumerate(report["blocks"]):
        expected |= {f"blocks.{k}.{key}" for key in ("error", "error_held_out") if row[key] is not None}
        expected |= {f"blocks.{k}.steps.{s}.calibration" for s in range(len(row.get("steps") or []))}
    for k, row in enumerate(report["weights"]):
        expected |= {f"weights.{k}.{key}" for key in ("error", "error_held_out") if row.get(key) is not None}
    assert expected <= shown
    for text in (report["calibration"]["fingerprint"], report["versions"]["torch"], *report["warnings"]):
        assert text in page.text
    assert "pyprune prune --config run.yaml" in page.text and "probe_samples: 2" in page.text


def test_the_chart_of_weights_says_which_text_it_shows(folders):
    """LIAR's errors are of held-out text alone, those of masks of calibration text."""
    pages = {name: (folder / "report.html").read_text() for name, folder in folders.items()}
    caption, other = (f"Error of each weight&#x27;s outputs, {text} text." for text in ("held-out", "calibration"))
    assert caption in pages["structured"] and other not in pages["structured"]
    assert other in pages["masks"] and caption not in pages["masks"]
    assert 'data-y="error_held_out"' not in pages["structured"] and 'data-y="error"' not in pages["masks"]


@needs_chromium
def test_a_browser_draws_the_figures_of_the_report(folders, tmp_path):
    """Opened without a network: every chart is drawn, from exactly the numbers in report.json."""
    report = json.loads((folders["trained"] / "report.json").read_text())
    blocks, *quantiles, weights = drawn(folders["trained"] / "report.html", tmp_path / "profile")
    assert blocks == [[row[key] for row in report["blocks"]] for key in ("block", "error", "error_held_out")]
    spreads = [row["error_quantiles"] for row in report["blocks"]]
    shown = [report["error_quantile_levels"].index(level) for level in (0.5, 0.05, 0.95, 0.25, 0.75)]
    assert [chart[1:] for chart in quantiles] == [
        [[spread[text][over][level] for spread in spreads] for text in ("calibration", "held_out") for level in shown]
        for over in ("tokens", "sequences")
    ], "the median of each kind of text, and the edges of its bands"
    kinds = list(dict.fromkeys(row["name"].partition("layers.")[2][2:] for row in report["weights"]))
    assert weights[1:] == [
        [row["error"] for row in report["weights"] if row["name"].endswith(f".{kind}")] for kind in kinds
    ]


def test_what_other_reports_hold_is_shown_and_what_they_lack_is_not(folders):
    """Latency, tasks, quantiles, refinement and several sparsities, where a report has them."""
    report, _ = loaded(folders["masks"])
    gain = [{"model": "dense", "parameters": 10, "ratios": {}}, {"model": "p", "parameters": 5, "device": "cpu"}]
    gain[1]["ratios"] = {"parameters": 0.5}
    report["error_quantile_levels"] = [0.5, 0.9]
    for k, row in enumerate(report["blocks"]):
        row["error_quantiles"] = {"held_out": {"tokens": [0.1 + k, 0.9 + k]}}
    windows = [{"before_calibration": 0.4, "after_calibration": 0.2, "before_held_out": 0.5, "after_held_out": 0.3}]
    refinement = {
        "windows": windows,
        "cross_block": False,
        "dense": "d",
        "global_propagation": True,
        "warnings": ["w!"],
    }
    paired = {"acc": {"difference": -0.25, "standard_error": 0.1, "mcnemar_p": 0.03}}
    task = {"task": "arc_easy", "items": 8, "acc": 0.25, "acc_standard_error": 0.15, "paired": paired}
    task["dense"] = {"acc": 0.5, "acc_standard_error": 0.2}
    more = {**report, "gain": gain, "tasks": [task]}
    more |= {"generalisation": {"gap": 1.5}}
    shown = check_figures(Page(run_page(more, "m")), more)
    assert {
        "gain.1.parameters",
        "gain.1.ratios.parameters",
        "tasks.0.acc",
        "tasks.0.dense.acc",
        "tasks.0.paired.acc.mcnemar_p",
    } <= shown
    assert {"blocks.2.error_quantiles.held_out.tokens.1", "generalisation.gap"} <= shown
    refined = {**report, "refinement": refinement}
    page = Page(run_page(refined, "m"))
    assert "refinement.windows.0.after_held_out" in check_figures(page, refined) and "w!" in page.text
    bare = {**report, "evaluation": [], "blocks": [], "weights": []}
    assert "Before and after" not in Page(run_page(bare, "m")).text


def test_a_perplexity_that_is_not_finite_is_said(folders):
    report, _ = loaded(folders["masks"])
    report["evaluation"][0]["pruned"] = float("nan")
    page = Page(run_page(report, "m"))
    assert "is not finite: this model cannot be used" in page.text
    assert "evaluation.0.pruned" not in {path for path, _, _ in page.figures}


def test_thousands_of_experts_stay_below_two_megabytes(folders):
    report, _ = loaded(folders["masks"])
    row = report["weights"][0]
    report["weights"] = [
        {**row, "block": k % 40, "name": f"model.layers.{k % 40}.mlp.experts.down_proj[{k // 40}]"}
        for k in range(10_000)
    ]
    text = run_page(report, "m")
    assert len(text.encode()) < 2_000_000 and f"{10_000 - MAX_WEIGHTS:,} more weights are in report.json" in text
    assert "the mean over the experts of a block" in text
