"""Runs side by side as a page: ``pyprune compare A B --html FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyprune.model.checkpoint import members, plain
from pyprune.reporting.comparison import compare, differences, how_text, read
from pyprune.reporting.page import (
    Markup,
    Point,
    Section,
    Table,
    chart,
    figure,
    lines,
    page,
    paragraph,
    warnings_list,
)
from pyprune.reporting.verdict import ratio, verdict
from pyprune.reporting.words import duration_text, number, perplexity_text, size_text


def comparison_page(directories: Sequence[str | Path]) -> str:
    """The page of several runs, read from the folders that pyprune wrote; the places of its figures are those of
    ``{"runs": pyprune.compare(…), "reports": […]}``. Raises ConfigError for a folder without a report."""
    directories = [path for directory in directories for path in members(directory)]
    rows = plain(compare(directories))
    reports = [plain(read(directory)) for directory in directories]
    names = labels(directories)
    notes = differences(rows)
    sections = [
        Section("The runs", _runs(rows, names)),
        Section("Verdicts", _verdicts(reports, names)),
        Section("Trade-off", tradeoff(rows)),
        Section("Error per block", _blocks(reports, names)),
        Section("Notes", warnings_list(notes) if notes else paragraph("The runs' figures compare.", "quiet")),
    ]
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    return page(f"{len(rows)} runs side by side", sections, kicker="pyprune · comparison", lead=f"Pruned from {models}")


def labels(directories: Sequence[str | Path]) -> list[str]:
    """A short name for each folder: its last component where that tells them apart, else the whole path."""
    short = [Path(directory).expanduser().resolve().name for directory in directories]
    return short if len(set(short)) == len(short) else [str(directory) for directory in directories]


def _runs(rows: list[dict], names: Sequence[str]) -> Markup:
    texts = list(dict.fromkeys(e["text"] for row in rows for e in row["evaluation"]))
    body = []
    for k, (row, name) in enumerate(zip(rows, names)):
        at = {e["text"]: (j, e) for j, e in enumerate(row["evaluation"])}
        cells: list[object] = []
        for text in texts:
            j, e = at.get(text, (0, {}))
            cells += [
                figure(e.get("pruned"), f"runs.{k}.evaluation.{j}.pruned", perplexity_text),
                figure(ratio(e), text=lambda v: f"× {number(v, 3)}"),
            ]
        body.append(
            [
                name,
                how_text(row),
                figure(row["sparsity"], f"runs.{k}.sparsity", lambda v: number(v, 3)),
                *cells,
                figure(row["block_error"], f"runs.{k}.block_error", lambda v: number(v, 3)),
                figure(row["block_error_held_out"], f"runs.{k}.block_error_held_out", lambda v: number(v, 3)),
                figure(row["parameters"], f"runs.{k}.parameters", lambda v: f"{v:,.0f}"),
                figure(row["seconds"], f"runs.{k}.seconds", duration_text),
                figure(row["peak_memory_bytes"], f"runs.{k}.peak_memory_bytes", size_text),
            ]
        )
    asked = [name for text in texts for name in (f"Perplexity on {text}", "× dense")]
    head = ["Run", "Pruned by", "Sparsity", *asked, "Last block's error", "Held out", "Parameters", "Time", "Memory"]
    return Table("What each run was and what it cost.", head, body, words=(1,)).html()


def _verdicts(reports: list[dict], names: Sequence[str]) -> Markup:
    body = [[name, " ".join(verdict(report).sentences)] for name, report in zip(names, reports)]
    return Table("Each run by the rule of its own page.", ["Run", "Verdict"], body, words=(1,)).html()


def tradeoff(rows: list[dict]) -> Markup:
    """Perplexity relative to the dense model over sparsity: one line per way of pruning and text."""
    many = len({e["text"] for row in rows for e in row["evaluation"]}) > 1
    points = [
        Point(how_text(row) + (f" · {e['text']}" if many else ""), row["sparsity"], value)
        for row in rows
        for e in row["evaluation"]
        if (value := ratio(e)) is not None
    ]
    if len({point.x for point in points}) < 2:
        return Markup("")
    table = lines(
        "Perplexity relative to the dense model's, over sparsity.", "Sparsity", points, lambda v: number(v, 4)
    )
    return chart(table, axis="× dense perplexity", log=True)


def _blocks(reports: list[dict], names: Sequence[str]) -> Markup:
    keys = {"error": "", "error_held_out": " · held out"}
    points = [
        Point(name + more, row["block"], row[key], f"reports.{k}.blocks.{b}.{key}")
        for key, more in keys.items()
        for k, (report, name) in enumerate(zip(reports, names))
        for b, row in enumerate(report.get("blocks") or [])
        if row.get(key) is not None
    ]
    table = lines("Error of each block's output relative to the dense model's.", "Block", points)
    return chart(table, axis="relative error", log=True, x="whole")
