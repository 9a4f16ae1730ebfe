"""The table of propagated and sequential inputs: pairs of one order are compared, and nothing else."""

from __future__ import annotations

from benchmarks.inputs_table import change, table


def row(order: int, way: str, wiki: float, c4: float, pattern: str = "50%") -> dict:
    setting = {"samples": 16, "windows": 12, "compute": "bfloat16", "method": "wanda", "pattern": pattern}
    return {**setting, "order": order, "inputs": way, "wikitext2": wiki, "c4": c4}


def test_ways_are_compared_order_by_order():
    rows = [{"method": "dense", "wikitext2": 20.0, "c4": 30.0}]
    rows += [row(0, "propagated", 40.0, 80.0), row(0, "sequential", 44.0, 80.0)]
    rows += [row(1, "propagated", 50.0, 90.0), row(1, "sequential", 50.0, 90.0)]
    rows += [row(2, "propagated", 99.0, 99.0), row(0, "propagated", 99.0, 99.0, pattern="2:4")]  # without their pairs
    *_, line = table(rows).splitlines()
    assert line == (
        "| 16 | wanda | 50% | 2 | 45.00 (40.00–50.00) | 47.00 (44.00–50.00) | +4.9 ± 4.8 % | "
        "85.00 (80.00–90.00) | 85.00 (80.00–90.00) | +0.0 ± 0.0 % |"
    )


def test_one_order_has_no_spread():
    assert change([0.0]) == "+0.0 %"
