"""``study.html`` shows the figures of ``table.json``."""

from __future__ import annotations

from pages import Page, check_accessible, check_figures, drawn, needs_chromium

from pyprune.studies import safety
from pyprune.studies.study_page import study_page
from pyprune.studies.tables import rows_of


def report(method: str, seed: int, sparsity: float, pruned: float) -> dict:
    settings = {"criterion": "wifv", "pattern": "unstructured", "reconstruct": "none"}
    return {
        "config": {**settings, "method": method, "seed": seed, "sparsity": sparsity},
        "sparsity": sparsity,
        "model": {"parameters": 10},
        "seconds": {"solve": 61.0},
        "peak_memory_bytes": 2**20,
        "blocks": [{"error": sparsity / 7, "error_held_out": sparsity / 6}],
        "evaluation": [
            {"text": "wiki", "dense": 10.0, "pruned": pruned},
            {"text": "prose", "dense": 9.0, "pruned": pruned},
        ],
    }


def found() -> dict:
    rows = rows_of(
        (f"{method}-{s}-{seed}", report(method, seed, s, 10 + s * factor + seed / 9))
        for method, factor in (("wanda", 3), ("magnitude", 9))
        for s in (0.2, 0.4, 0.6, 0.7)
        for seed in (0, 1)
    )
    return {
        "model": "hub/some-model",
        "rule": safety.rule(1.1),
        "recommendation": safety.recommendation(rows, 1.1),
        "curves": safety.curves(rows, 1.1),
        "rows": rows,
        "finished": 16,
        "cells": 18,
        "left_out": ["wanda + liar: no"],
        "failed": {"a-cell": "it <broke>"},
        "waiting": {"b-cell": "process 7 on node3"},
    }


def test_figures_are_those_of_the_table():
    study = found()
    page = Page(study_page(study))
    shown = check_figures(page, study)
    check_accessible(page)
    for k in range(len(study["rows"])):
        assert {f"rows.{k}.texts.{t}.ratio.{m}" for t in (0, 1) for m in ("mean", "spread")} <= shown
        assert {f"rows.{k}.block_error.mean", f"rows.{k}.asked"} <= shown
    assert {f"curves.{k}.{key}" for k in (0, 1) for key in ("safe", "crosses")} & shown
    for text in ("it <broke>", "process 7 on node3", "wanda + liar: no", *study["recommendation"]):
        assert text in page.text


@needs_chromium
def test_a_browser_draws_the_curves(tmp_path):
    study = found()
    path = tmp_path / "study.html"
    path.write_text(study_page(study))
    first, second, errors = drawn(path, tmp_path / "profile")
    for text, chart in enumerate((first, second)):
        assert chart[0] == [0.2, 0.4, 0.6, 0.7]
        for column, method in zip(chart[1:], ("magnitude", "wanda")):
            own = [row for row in study["rows"] if row["how"].startswith(method)]
            assert column == [row["texts"][text]["ratio"]["mean"] for row in own]
    assert len(errors) == 5
