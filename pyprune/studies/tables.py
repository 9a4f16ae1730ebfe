"""The table of a study: mean and spread over seeds, as data, Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyprune.reporting.plotting import pyplot
from pyprune.reporting.verdict import last_errors, ratio
from pyprune.reporting.words import number, reconstruction_text

STRUCTURED = ("neurons", "heads", "structured")
MEASURES = {
    "sparsity": "sparsity",
    "block_error": "last block's error",
    "block_error_held_out": "held out",
    "parameters": "parameters",
    "seconds": "seconds",
    "peak_memory_bytes": "peak memory",
}
"""What each row has of every run, beside the texts, and how its column is called."""


def rows_of(reports: Iterable[tuple[str, dict]]) -> list[dict]:
    """One row per way of pruning and sparsity, from (folder, report) of every finished run.

    ``how``, ``pattern``, ``asked`` (sparsity), ``seeds``, ``folders``, and per measure ``{"mean", "spread"}``: the
    sample standard deviation over seeds, None of a single one. ``texts``: the same of ``dense``, ``pruned`` and
    ``ratio`` for each text; a ratio that is not finite makes its mean None.
    """
    groups: dict[tuple, list[tuple[str, dict]]] = {}
    for folder, report in reports:
        groups.setdefault(key_of(report), []).append((folder, report))
    rows = []
    for (how, pattern, asked), members in sorted(groups.items()):
        found = [measured(report) for _, report in members]
        texts = list(dict.fromkeys(text for one in found for text in one["texts"]))
        rows.append(
            {
                "how": how,
                "pattern": pattern,
                "asked": asked,
                "seeds": sorted(report["config"]["seed"] for _, report in members),
                "folders": [folder for folder, _ in members],
                **{name: spread([one[name] for one in found]) for name in MEASURES},
                "texts": [
                    {
                        "text": text,
                        **{
                            name: spread([one["texts"].get(text, {}).get(name) for one in found])
                            for name in ("dense", "pruned", "ratio")
                        },
                    }
                    for text in texts
                ],
            }
        )
    return rows


def key_of(report: dict) -> tuple[str, str, float]:
    """What runs of one row have in common: how they were pruned, the pattern, the sparsity that was asked for."""
    config = report["config"]
    how = config["criterion"] if config["pattern"] in STRUCTURED else config["method"]
    return f"{how} + {reconstruction_text(config)}", config["pattern"], config["sparsity"]


def measured(report: dict) -> dict:
    """The measures of one run."""
    error, held_out = last_errors(report)
    return {
        "sparsity": report["sparsity"],
        "block_error": error,
        "block_error_held_out": held_out,
        "parameters": report["model"]["parameters"],
        "seconds": sum(report["seconds"].values()),
        "peak_memory_bytes": report["peak_memory_bytes"],
        "texts": {
            row["text"]: {"dense": row.get("dense"), "pruned": row.get("pruned"), "ratio": ratio(row)}
            for row in report.get("evaluation") or []
        },
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; both None if a value is missing or not finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return {"mean": None, "spread": None}
    return {"mean": statistics.fmean(known), "spread": statistics.stdev(known) if len(known) > 1 else None}


def worst_ratio(row: dict) -> float | None:
    """The largest mean ratio over the texts; None where nothing was measured, infinity where one is not finite."""
    means = [text["ratio"]["mean"] for text in row["texts"]]
    if not means:
        return None
    return math.inf if None in means else max(means)


def mean_text(found: dict[str, float | None], digits: int = 4) -> str:
    """``1.234 ± 0.056``."""
    mean, deviation = found["mean"], found["spread"]
    return number(mean, digits) + ("" if deviation is None else f" ± {number(deviation, 2)}")


def markdown(rows: Sequence[dict], notes: Sequence[str]) -> str:
    """The table for a document, and what it comes to in sentences below it."""
    texts = list(dict.fromkeys(text["text"] for row in rows for text in row["texts"]))
    head = ["pruned by", "pattern", "sparsity", "seeds"]
    head += [name for text in texts for name in (f"perplexity, {text}", "× dense")]
    head += ["last block's error", "held out", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in rows:
        at = {text["text"]: text for text in row["texts"]}
        cells = [row["how"], row["pattern"], f"{row['asked']:g}", str(len(row["seeds"]))]
        for text in texts:
            cells += [mean_text(at[text][name]) if text in at else "–" for name in ("pruned", "ratio")]
        cells += [mean_text(row["block_error"], 3), mean_text(row["block_error_held_out"], 3)]
        cells += [number(row["seconds"]["mean"], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", "Mean ± sample standard deviation over the seeds.", "", *(f"- {n}" for n in notes), ""]
    )


def comma_separated(rows: Sequence[dict]) -> str:
    """One line per row, each measure as mean and spread, for a spreadsheet."""
    texts = list(dict.fromkeys(text["text"] for row in rows for text in row["texts"]))
    columns = [f"{name} {kind}" for name in MEASURES for kind in ("mean", "spread")]
    columns += [
        f"{n} on {text} {k}" for text in texts for n in ("dense", "pruned", "ratio") for k in ("mean", "spread")
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["pruned by", "pattern", "sparsity asked", "seeds", *columns])
    for row in rows:
        at = {text["text"]: text for text in row["texts"]}
        values = [row[name][kind] for name in MEASURES for kind in ("mean", "spread")]
        values += [
            at[text][name][kind] if text in at else None
            for text in texts
            for name in ("dense", "pruned", "ratio")
            for kind in ("mean", "spread")
        ]
        writer.writerow([row["how"], row["pattern"], row["asked"], len(row["seeds"]), *values])
    return out.getvalue()


def lines_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of each curve, by its name, in ascending sparsity; N:M patterns stand beside unstructured ones."""
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(line_name(row), []).append(row)
    return {name: sorted(found, key=lambda row: row["asked"]) for name, found in lines.items()}


def line_name(row: dict) -> str:
    return f"{row['how']}, {row['pattern']}"


def picture(rows: Sequence[dict], path: Path) -> None:
    """Ratio of perplexities over sparsity, one panel per text, spread as bars. ConfigError without matplotlib."""
    plt = pyplot()
    texts = list(dict.fromkeys(text["text"] for row in rows for text in row["texts"]))
    figure, panels = plt.subplots(1, len(texts), figsize=(1 + 4.6 * len(texts), 3.8), squeeze=False, sharey=True)
    for panel, text in zip(panels[0], texts):
        for name, found in lines_of(rows).items():
            points = [
                (row["asked"], at["ratio"]["mean"], at["ratio"]["spread"] or 0.0)
                for row in found
                for at in row["texts"]
                if at["text"] == text and at["ratio"]["mean"] is not None
            ]
            if points:
                x, y, error = zip(*points)
                panel.errorbar(x, y, yerr=error, marker="o", markersize=4, linewidth=1.3, capsize=2, label=name)
        panel.axhline(1, color="grey", linewidth=0.7)
        panel.set_yscale("log")
        panel.set_xlabel("sparsity")
        panel.set_title(text, fontsize=9)
    panels[0][0].set_ylabel("perplexity, × dense")
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
