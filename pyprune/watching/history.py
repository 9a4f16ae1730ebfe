"""The runs below a folder, in the order of their making."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from pyprune.config import ConfigError
from pyprune.reporting.comparison import compare, how_text
from pyprune.reporting.console import open_console
from pyprune.reporting.plotting import pyplot
from pyprune.reporting.verdict import ratio
from pyprune.reporting.words import number, perplexity_text


def history(root: str | Path) -> list[dict]:
    """The finished runs below ``root``, oldest first: the rows of :func:`pyprune.compare` with ``run``, the folder
    below ``root``, and ``finished``, an ISO time; of reports that do not say it, the time of the file.

    Raises ConfigError if there is no such folder, or no run in it. A ``report.json`` of something else is passed over.
    """
    place = Path(root).expanduser()
    if not place.is_dir():
        raise ConfigError(f"no such folder: {root}")
    rows = []
    for folder in _runs(place):
        report = json.loads((folder / "report.json").read_text())
        (row,) = compare([folder])
        name = folder.relative_to(place).as_posix()
        rows.append(
            {"run": name if name != "." else folder.resolve().name, "finished": finished(report, folder), **row}
        )
    if not rows:
        raise ConfigError(f"{root} and the folders below it hold no report.json of a finished run")
    return sorted(rows, key=lambda row: (row["finished"], row["run"]))


def _runs(place: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "report.json" not in files:
            continue
        try:
            report = json.loads((Path(parent) / "report.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and {"config", "model", "sparsity", "seconds", "calibration"} <= report.keys():
            yield Path(parent)


def finished(report: dict, folder: Path) -> str:
    """When a run ended, as an ISO time in UTC."""
    if found := report.get("finished"):
        return found
    stamp = (folder / "report.json").stat().st_mtime
    return datetime.datetime.fromtimestamp(stamp, datetime.timezone.utc).isoformat(timespec="seconds")


def seconds_of(row: dict) -> float:
    """When a run ended, in seconds since 1970."""
    return datetime.datetime.fromisoformat(row["finished"]).timestamp()


def line_name(row: dict) -> str:
    """What runs have in common that are one line of a trend: the model and how it was pruned."""
    asked = row.get("sparsity_asked")
    sparsity = row["sparsity"] if asked is None or isinstance(asked, (list, tuple, dict)) else asked
    return f"{Path(row['model']).name}, {how_text(row)}, {row['pattern']} {sparsity:.2g}"


def print_history(rows: Sequence[dict], out: TextIO | None = None) -> None:
    """One line per run and text."""
    from rich.table import Table

    console = open_console(out)
    table = Table("finished", "run", "model and pruning", "text", "perplexity", "× dense", "block error", "held out")
    for row in rows:
        when, errors = row["finished"][:16].replace("T", " "), (row["block_error"], row["block_error_held_out"])
        run = [when, row["run"], line_name(row)]
        last = [number(error, 3) for error in errors]
        for e in row["evaluation"] or [{}]:
            measured = perplexity_text(e["pruned"]) if e else "–"
            table.add_row(*run, e.get("text", "–"), measured, number(ratio(e), 3), *last)
            run, last = [""] * len(run), [""] * len(last)
    console.print(table)


def picture(rows: Sequence[dict], path: str | Path) -> None:
    """The ratio of perplexities and the last block's error over time. Raises ConfigError without matplotlib."""
    plt = pyplot()
    lines: dict[str, dict[str, list[tuple[datetime.datetime, float]]]] = {"× dense perplexity": {}, "block error": {}}
    for row in rows:
        when = datetime.datetime.fromisoformat(row["finished"])
        for e in row["evaluation"]:
            if (value := ratio(e)) is not None:
                lines["× dense perplexity"].setdefault(f"{line_name(row)} · {e['text']}", []).append((when, value))
        for key, more in (("block_error", ""), ("block_error_held_out", " · held out")):
            if row[key] is not None:
                lines["block error"].setdefault(line_name(row) + more, []).append((when, row[key]))
    figure, panels = plt.subplots(len(lines), 1, figsize=(8, 6.5), sharex=True)
    for panel, (what, found) in zip(panels, lines.items()):
        for name, points in found.items():
            panel.plot(*zip(*points), marker="o", markersize=4, linewidth=1.3, label=name)
        panel.set_ylabel(what)
        if found:
            panel.legend(fontsize=7, frameon=False)
    figure.autofmt_xdate()
    figure.tight_layout()
    figure.savefig(Path(path).expanduser(), dpi=140)
    plt.close(figure)
