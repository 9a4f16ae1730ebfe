"""The page of the history shows its rows."""

from __future__ import annotations

from pages import Page, check_accessible, check_figures, drawn, needs_chromium

from pyprune.watching.history import seconds_of
from pyprune.watching.history_page import history_page


def row(run: str, when: str, pruned: float, error: float) -> dict:
    return {
        "run": run,
        "finished": f"{when}T10:00:00+00:00",
        "model": "hub/m",
        "method": "wanda",
        "criterion": "wifv",
        "pattern": "unstructured",
        "reconstruct": "none",
        "global_propagation": False,
        "refined": None,
        "sparsity": 0.5,
        "evaluation": [{"text": "wiki", "dense": 10.0, "pruned": pruned}],
        "block_error": error,
        "block_error_held_out": None,
        "seconds": 61.0,
        "peak_memory_bytes": 2**30,
    }


ROWS = [row("a", "2026-01-01", 12.0, 0.5), row("b", "2026-02-01", 11.0, 0.4), row("c", "2026-03-01", 15.0, 0.3)]


def test_figures_are_those_of_the_rows():
    page = Page(history_page(ROWS))
    shown = check_figures(page, ROWS)
    check_accessible(page)
    assert {f"{k}.{key}" for k in range(3) for key in ("block_error", "seconds", "peak_memory_bytes")} <= shown
    assert "2026-02-01 10:00" in page.text and "3 runs over time" in page.text


@needs_chromium
def test_a_browser_draws_the_trend(tmp_path):
    path = tmp_path / "history.html"
    path.write_text(history_page(ROWS))
    ratios, errors, *_ = drawn(path, tmp_path / "profile")
    times = [seconds_of(row) for row in ROWS]
    assert ratios == [times, [1.2, 1.1, 1.5]] and errors == [times, [0.5, 0.4, 0.3]]
