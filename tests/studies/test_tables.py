"""Mean and spread over seeds, and how they are written."""

from __future__ import annotations

import csv
import io
import math

import pytest
from reports import report

from pyprune.studies import tables


def test_mean_and_sample_standard_deviation_over_seeds():
    found = tables.rows_of([("a", report(0, 12.0)), ("b", report(1, 16.0)), ("c", report(0, 11.0, method="magnitude"))])
    assert [(row["how"], row["seeds"], row["folders"]) for row in found] == [
        ("magnitude + none", [0], ["c"]),
        ("wanda + none", [0, 1], ["a", "b"]),
    ]
    text = found[1]["texts"][0]
    assert text["pruned"] == {"mean": 14.0, "spread": pytest.approx(math.sqrt(8.0))}
    assert text["ratio"]["mean"] == pytest.approx(1.4) and found[0]["texts"][0]["ratio"]["spread"] is None
    assert found[1]["seconds"]["mean"] == 2.5 and found[1]["block_error"]["mean"] == pytest.approx(0.15)
    assert found[1]["block_error_held_out"] == {"mean": None, "spread": None}
    assert tables.mean_text(text["pruned"]) == "14 ± 2.8"


def test_one_run_that_broke_breaks_the_mean():
    (row,) = tables.rows_of([("a", report(0, 12.0)), ("b", report(1, None))])
    assert row["texts"][0]["ratio"] == {"mean": None, "spread": None}
    assert tables.worst_ratio(row) == math.inf and tables.worst_ratio({"texts": []}) is None


def test_the_files_hold_the_rows(tmp_path):
    rows = tables.rows_of([("a", report(0, 12.0)), ("b", report(0, 30.0, sparsity=0.7)), ("c", report(1, 16.0))])
    lines = list(csv.DictReader(io.StringIO(tables.comma_separated(rows))))
    assert [float(line["sparsity asked"]) for line in lines] == [0.5, 0.7]
    assert float(lines[0]["ratio on t mean"]) == rows[0]["texts"][0]["ratio"]["mean"]
    assert lines[1]["ratio on t spread"] == "" and lines[0]["seeds"] == "2"
    text = tables.markdown(rows, ["Use it."])
    assert "| wanda + none | unstructured | 0.5 | 2 | 14 ± 2.8 | 1.4 ± 0.28 |" in text and text.endswith("- Use it.\n")
    assert [row["asked"] for row in tables.lines_of(rows)["wanda + none, unstructured"]] == [0.5, 0.7]
    pytest.importorskip("matplotlib")
    tables.picture(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
