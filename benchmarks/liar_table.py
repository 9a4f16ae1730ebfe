"""The LIAR results as tables: ``liar.csv`` has one row per cell, ``liar_differences.csv`` one row per comparison.

Both are small enough to read and to compare line by line. ``liar.json`` says on which machine and with which versions
the last report was made. A cell's numbers per repaired group are summed up: ``error_median`` and ``error_max`` of the
held-out errors, ``damping_max`` and ``norm_ratio_max``.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

from benchmarks.common import environment, result_path

TEXT = ("task", "pattern", "criterion", "method", "inputs", "against")
COUNTS = ("seed", "seeds", "sentences", "windows")
PHASES = "seconds_by_phase"
CELL = ("task", "pattern", "sparsity", "criterion", "method", "inputs", "sentences", "seed")
"""What names a cell."""
CELL_COLUMNS = (
    *CELL,
    "value",
    "windows",
    "error_median",
    "error_max",
    "damping_max",
    "norm_ratio_max",
    "solve_seconds",
    "prune_seconds",
    "measure_seconds",
    PHASES,
)
COMPARED = ("task", "pattern", "inputs", "sparsity", "criterion", "against")
"""What names a comparison of LIAR with another reconstruction."""
DIFFERENCE_COLUMNS = (*COMPARED, "seeds", "difference", "standard_error", "low", "high")
SUMMARIES = {
    "error_median": ("errors", statistics.median),
    "error_max": ("errors", max),
    "damping_max": ("dampings", max),
    "norm_ratio_max": ("norm_ratios", max),
}
"""Column → the list per group in a cell that was just measured, and what is kept of it."""
DECIMALS = {
    "value": 9,
    "difference": 10,
    "solve_seconds": 2,
    "prune_seconds": 1,
    "measure_seconds": 1,
    "error_median": 4,
    "error_max": 4,
    "norm_ratio_max": 3,
}
"""Decimals of a column, six of all others. The report shows four of values and differences, and means of them."""


def read_cells(out: str | None = None) -> list[dict]:
    """The cells of an earlier, perhaps partial, run."""
    return _read(result_path("liar", out, ".csv"))


def read_differences(out: str | None = None) -> list[dict]:
    return _read(result_path("liar_differences", out, ".csv"))


def write_tables(cells: list[dict], differences: list[dict], out: str | None = None) -> None:
    """Write both tables, and the environment they were completed in beside them."""
    _write(result_path("liar", out, ".csv"), CELL_COLUMNS, [summed_up(cell) for cell in cells])
    _write(result_path("liar_differences", out, ".csv"), DIFFERENCE_COLUMNS, differences)
    made = {"benchmark": "liar", "environment": environment(), "tables": ["liar.csv", "liar_differences.csv"]}
    result_path("liar", out).write_text(json.dumps(made, indent=1) + "\n")


def summed_up(cell: dict) -> dict:
    """A cell as the table keeps it: of every list per group the median or the largest number."""
    row = dict(cell)
    for column, (name, summary) in SUMMARIES.items():
        known = [value for value in cell.get(name, ()) if value is not None]
        if known:
            row[column] = summary(known)
    return row


def _write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows([_text(name, row.get(name)) for name in columns] for row in rows)


def _text(name: str, value) -> str:
    if value is None:
        return ""
    if name in TEXT or name in COUNTS:
        return str(value)
    if name == PHASES:
        return " ".join(f"{phase}={seconds:.1f}" for phase, seconds in value.items())
    if name == "sparsity":
        return repr(value)  # it names the cell, so it has to come back as it was
    return f"{value:.{DECIMALS.get(name, 6)}f}".rstrip("0").rstrip(".")


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: _value(name, text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _value(name: str, text: str):
    if name in TEXT:
        return text
    if name in COUNTS:
        return int(text)
    if name == PHASES:
        return {phase: float(seconds) for phase, seconds in (part.split("=") for part in text.split())}
    return float(text)
