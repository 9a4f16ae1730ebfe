"""Runs side by side: what each was, what it cost, and what makes their numbers not comparable."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pyprune.config import ConfigError
from pyprune.reporting.console import open_console
from pyprune.reporting.words import number, perplexity_text, reconstruction_text

LONG = 16
"""Characters of a folder's path beyond which a table has it from where all its folders lie."""


def read(directory: str | Path) -> dict:
    """``report.json`` of a run's folder. Raises :class:`ConfigError` if there is none."""
    path = Path(directory).expanduser() / "report.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no report.json: no finished run of pyprune wrote it")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def compare(*directories: str | Path | Sequence[str | Path]) -> list[dict]:
    """Runs side by side, read from the folders that pyprune wrote, given one by one or as a list.

    Returns one row per folder, of one with several sparsities one for each: settings, perplexity of the dense and the
    pruned model per text, error behind the last block, seconds, memory in bytes and parameters; of a refined model what
    it became, with the seconds of both runs, and beside its error that of the model it was refined from, on the same
    sequences (``block_error_before``). Raises ConfigError for a folder without a report.
    """
    folders = [path for given in directories for path in ([given] if isinstance(given, (str, Path)) else given)]
    if not folders:
        raise ConfigError("compare needs at least one folder")
    rows = []
    for directory in [path for given in folders for path in _runs_in(given)]:
        report = read(directory)
        config, last = report["config"], (report.get("blocks") or [{}])[-1]
        error, held_out, seconds = last.get("error"), last.get("error_held_out"), sum(report["seconds"].values())
        came: dict = {}
        calibration = report["calibration"]["fingerprint"]
        if (refined := report.get("refinement")) is not None:
            window, seconds = refined["windows"][-1], seconds + refined["seconds"]
            error, held_out = window["after_calibration"], window.get("after_held_out")
            if refined.get("blocks"):
                came, now = (refined["blocks"][-1][when] for when in ("before", "after"))
                error, held_out = now["error"], now["error_held_out"]
            calibration = refined.get("fingerprint", calibration)
        rows.append(
            {
                "directory": str(directory),
                "model": report["model"]["name"],
                **{
                    name: config.get(name)
                    for name in ("method", "criterion", "pattern", "reconstruct", "global_propagation")
                },
                "refined": None
                if refined is None
                else {
                    "reconstruct": "cross_block" if refined["cross_block"] else "block",
                    "global_propagation": refined["global_propagation"],
                },
                "sparsity": report["sparsity"],
                "coverage": report["coverage"]["fraction"],
                "evaluation": [
                    {name: e.get(name) for name in ("text", "domain", "windows", "window", "dense", "pruned", "ratio")}
                    for e in report.get("evaluation") or []
                ],
                "generalisation_gap": (report.get("generalisation") or {}).get("gap"),
                "block_error": error,
                "block_error_held_out": held_out,
                "block_error_before": came.get("error"),
                "block_error_held_out_before": came.get("error_held_out"),
                "seconds": seconds,
                "peak_memory_bytes": report["peak_memory_bytes"],
                "parameters": report["model"]["parameters"],
                "calibration": calibration[:12],
            }
        )
    return rows


def _runs_in(directory: str | Path) -> list[str | Path]:
    """The runs in a folder of several sparsities; of any other, the folder as it was given."""
    from pyprune.model.checkpoint import members  # torch comes with it: help and version do without

    found = members(directory)
    return [*found] if len(found) > 1 else [directory]


def how_text(row: dict) -> str:
    """How a row's model was pruned: ``sparsegpt + layer``, and by what it was refined."""
    structured = row["pattern"] in ("neurons", "heads", "structured")
    how = f"{row['criterion' if structured else 'method']} + {reconstruction_text(row)}"
    return how + (f", refined: {reconstruction_text(row['refined'])}" if row["refined"] else "")


def error_text(row: dict, key: str) -> str:
    """``0.0312``; of a refined model ``0.0518 → 0.0312``, both on the refinement's sequences."""
    before, text = row.get(f"{key}_before"), number(row[key], 3)
    return text if before is None else f"{number(before, 3)} → {text}"


def _shortened(folders: list[str]) -> tuple[str, list[str]]:
    """Where the folders lie, and their paths from there; nothing and the paths as they are where these are short."""
    place = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    if max(map(len, folders)) <= LONG or place == os.path.abspath(os.sep):
        return "", folders
    return place, [os.path.relpath(folder, place) for folder in folders]


def print_comparison(rows: list[dict], out: TextIO | None = None) -> None:
    """:func:`compare`'s rows as a table, and what makes them not comparable, if anything does."""
    from rich.table import Table

    console = open_console(out)
    place, names = _shortened([str(row["directory"]) for row in rows])
    table = Table(
        title=f"folders of {place}" if place else None,
        title_justify="left",
        caption="gap: the rise of perplexity off-domain over that in-domain. block error: of the last block's output, "
        "relative to the dense model's, on calibration and on held-out sequences.",
        caption_justify="left",
    )
    left = ("folder", "pruned by", "pattern", "text")
    for heading in (
        "folder",
        "pruned by",
        "pattern",
        "sparsity",
        "text",
        "perplexity",
        "dense",
        "gap",
        "block error",
        "held out",
        "seconds",
    ):
        table.add_column(heading, overflow="fold", justify="left" if heading in left else "right")
    for row, name in zip(rows, names):
        table.add_row(
            name,
            how_text(row),
            row["pattern"],
            f"{row['sparsity']:.3f}",
            "\n".join(e.get("domain") or e["text"] for e in row["evaluation"]),
            "\n".join(perplexity_text(e["pruned"]) for e in row["evaluation"]),
            "\n".join(perplexity_text(e["dense"]) for e in row["evaluation"]),
            number(row.get("generalisation_gap"), 3),
            error_text(row, "block_error"),
            error_text(row, "block_error_held_out"),
            f"{row['seconds']:.1f}",
        )
    console.print(table)
    for text in differences(rows):
        console.print(f"note: {text}")


def differences(rows: list[dict]) -> list[str]:
    """Reasons why the numbers of two rows should not be compared, in sentences."""
    found = []
    keys = ("text", "split", "subset", "windows", "window", "stride")
    conditions = {tuple(tuple(e.get(key) for key in keys) for e in row["evaluation"]) for row in rows}
    if len(conditions) > 1:
        found.append("the runs were evaluated on different text or windows: their perplexities do not compare")
    if len({row["model"] for row in rows}) > 1:
        found.append("the runs start from different models")
    if len({row["calibration"] for row in rows}) > 1:
        found.append("the runs were calibrated on different tokens: their block errors do not compare")
    return found
