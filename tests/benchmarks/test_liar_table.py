"""The LIAR results under version control are tables that a report and a resumed run are made from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The benchmarks are modules of the repository, not of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("OUT", raising=False)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_the_report_made_from_the_tables_is_the_one_beside_them():
    from benchmarks.liar_report import report_text
    from benchmarks.liar_table import read_cells, read_differences

    assert report_text(read_cells(), read_differences()) == (RESULTS / "liar.md").read_text()


def test_a_run_does_no_cell_again_that_the_table_holds(tmp_path):
    from benchmarks.liar import cells, finished, key
    from benchmarks.liar_report import merged
    from benchmarks.liar_table import CELL, read_cells, write_tables

    planned = cells()
    write_tables([{**cell, "value": 0.5} for cell in planned], [], str(tmp_path))
    rows = read_cells(str(tmp_path))
    assert finished(planned, rows) == {key(cell) for cell in planned}
    assert len(merged(rows, planned, CELL)) == len(planned)  # each is known again, sparsity 1/3 too
    # a missing cell is measured together with those that it is compared with: they share test rows
    lost = rows.pop(next(i for i, row in enumerate(rows) if row["sparsity"] == 1 / 3))
    group = [
        cell
        for cell in planned
        if (cell["pattern"], cell["sparsity"], cell["criterion"])
        == (lost["pattern"], lost["sparsity"], lost["criterion"])
    ]
    assert {key(cell) for cell in planned} - finished(planned, rows) == {key(cell) for cell in group}


def test_the_cells_of_the_report_are_known_to_a_new_run():
    from benchmarks.liar import cells, finished, key
    from benchmarks.liar_table import read_cells

    rows = read_cells()
    assert {key(row) for row in rows} - {key(cell) for cell in cells()} == set()
    assert len(finished(cells(), rows)) > 1300


def test_new_cells_join_the_table_and_old_rows_stay_byte_for_byte(tmp_path, monkeypatch):
    import json

    from benchmarks import liar_report, liar_table

    for name in ("liar.csv", "liar_differences.csv"):
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    cache = tmp_path / "cells"
    cache.mkdir()
    cell = {
        "task": "sst2",
        "pattern": "neurons",
        "sparsity": 0.5,
        "criterion": "wifv",
        "method": "liar",
        "seed": 7,
        "sentences": 2048,
        "inputs": "dense",
        "value": 0.8311,
        "rows": [0.5, 0.25],
        "errors": [0.1, None, 0.4, 0.2],
        "dampings": [None, 0.01, 0.3, 0.1],
        "norm_ratios": [1.0, 1.25, 1.5, 1.0],
        "methods": ["liar"] * 4,
        "prune_seconds": 1.26,
        "seconds_by_phase": {"forward": 1.26, "solve": 0.04},
    }
    (cache / "one.json").write_text(json.dumps(cell))
    monkeypatch.setattr(liar_report, "plot", lambda *args: None)
    liar_report.write_report(cache, str(tmp_path))
    before = (RESULTS / "liar.csv").read_text().splitlines()
    after = (tmp_path / "liar.csv").read_text().splitlines()
    assert set(before) < set(after) and len(after) == len(before) + 1
    assert (tmp_path / "liar_differences.csv").read_bytes() == (RESULTS / "liar_differences.csv").read_bytes()
    found = next(row for row in liar_table.read_cells(str(tmp_path)) if row["seed"] == 7)
    # per repaired group of the block: the median of 0.1, 0.2 and 0.4, and the largest of each
    assert found == {
        "task": "sst2",
        "pattern": "neurons",
        "sparsity": 0.5,
        "criterion": "wifv",
        "method": "liar",
        "inputs": "dense",
        "sentences": 2048,
        "seed": 7,
        "value": 0.8311,
        "error_median": 0.2,
        "error_max": 0.4,
        "damping_max": 0.3,
        "norm_ratio_max": 1.5,
        "prune_seconds": 1.3,
        "seconds_by_phase": {"forward": 1.3, "solve": 0.0},
    }


def test_result_files_are_small_enough_to_read():
    sizes = {path.name: path.stat().st_size for path in RESULTS.iterdir() if path.suffix != ".png"}
    assert max(sizes.values()) < 300_000, sizes
