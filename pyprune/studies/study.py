"""``pyprune.study``: one model pruned in many ways by as many workers as there are, and what comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pyprune.config import Calibration, ConfigError, PruneConfig, from_dict, member_name
from pyprune.data.calibration import settled
from pyprune.execution.progress import Doing, announce
from pyprune.execution.weight_streaming import Opened, whole
from pyprune.model.checkpoint import plain
from pyprune.model.shards import write_bytes
from pyprune.pipeline.prune import given_sections, prune, prune_copy
from pyprune.pipeline.result import PruneResult, write_records
from pyprune.pipeline.shared import Shared
from pyprune.reporting.comparison import read
from pyprune.reporting.console import open_console
from pyprune.reporting.plotting import can_plot
from pyprune.reporting.record import written as written_down
from pyprune.reporting.words import number
from pyprune.studies import safety, tables
from pyprune.studies.claims import Claims
from pyprune.studies.grid import Axes, Cell, Grid, make_grid
from pyprune.studies.study_page import study_page

MAX_RATIO = 1.1
"""Perplexity relative to the dense model's up to which a setting counts as safe, where nothing else is asked."""

WRITTEN_EVERY = 60.0
"""Seconds between two versions of the table while a worker works."""


def study(
    model: str | Path,
    output: str | Path,
    *,
    methods: Sequence[str] = ("sparsegpt",),
    criteria: Sequence[str] = ("wifv",),
    patterns: Sequence[str] = ("unstructured",),
    sparsities: Sequence[float] = (0.5,),
    reconstruct: Sequence[str | None] = (None,),
    seeds: int | Sequence[int] = 3,
    max_ratio: float = MAX_RATIO,
    keep_models: bool = False,
    progress: bool = True,
    **fields,
) -> dict:
    """Prune a model in every combination of the given values and say how far is safe.

    model: what :func:`pyprune.prune` takes by name. output: a folder, which several workers may share: each call takes
    the runs that nobody works on, and a call on a folder that has finished runs does the others.
    methods, criteria: of masks, and of structured patterns. reconstruct: values of that field, ``"block+gp"`` with
    global propagation, None each pattern's default. Combinations that are no run are named in the result. seeds: how
    many, from 0 on, or which. max_ratio: perplexity relative to the dense model's up to which a setting counts as safe.
    keep_models: keep the pruned models, not only their reports. fields: those of :class:`pyprune.PruneConfig` that all
    runs share.
    Returns what ``table.json`` holds: ``rows`` with mean and spread over seeds, ``curves``, ``recommendation``,
    ``left_out``, ``failed``, ``waiting`` (runs that other workers have). Beside it are ``table.md``, ``table.csv``,
    ``study.html``, with matplotlib ``tradeoff.png``, and in ``cells`` a folder per run. Raises ConfigError for bad
    input before any run, and for a folder of a study with other settings.
    """
    axes = Axes(
        methods=tuple(methods),
        criteria=tuple(criteria),
        patterns=tuple(patterns),
        sparsities=tuple(sparsities),
        reconstruct=tuple(reconstruct),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
    )
    if not max_ratio > 1:
        raise ConfigError(f"max_ratio must be above 1, the dense model's own, got {max_ratio!r}")
    common = {**given_sections(fields), "model": str(model)}
    if "calibration" in common:
        given = common["calibration"]
        common["calibration"] = settled(
            from_dict(Calibration, given, "calibration") if isinstance(given, dict) else given
        )
    grid = make_grid(axes, common)
    place = Place(Path(output).expanduser(), grid)
    place.open(common)
    Worker(place, keep_models, progress, max_ratio).work()
    return place.write(max_ratio)


@dataclass(frozen=True)
class Place:
    """The folder of a study."""

    folder: Path
    grid: Grid

    def open(self, common: Mapping[str, Any]) -> None:
        """Make the folder this study's, or see that it is one of the same settings; its values may be others."""
        self.cells.mkdir(parents=True, exist_ok=True)
        (self.folder / "failed").mkdir(exist_ok=True)
        self.agree("settings", {key: told(value) for key, value in common.items()})

    def agree(self, name: str, value: dict) -> None:
        """Record what all runs of this folder have in common, or compare it with what the first of them recorded."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            _write_json(path, value)
            return
        before = json.loads(path.read_text())
        differ = sorted(key for key in {*before, *value} if before.get(key) != value.get(key))
        if differ:
            raise ConfigError(
                f"{self.folder} holds a study with another {', '.join(differ)} ({path.name}); choose another folder, "
                "or the same settings"
            )

    @property
    def cells(self) -> Path:
        return self.folder / "cells"

    def done(self, cell: Cell) -> bool:
        return (self.cells / cell.name).is_dir()

    def failure(self, cell: Cell) -> Path:
        return self.folder / "failed" / f"{cell.name}.json"

    def reports(self) -> list[tuple[str, dict]]:
        """Folder, as ``cells`` names it, and report of every finished run of this grid."""
        found = []
        for cell in self.grid.cells:
            for path in sorted((self.cells / cell.name).rglob("report.json")):
                found.append((path.parent.relative_to(self.folder).as_posix(), read(path.parent)))
        return found

    def write(self, max_ratio: float) -> dict:
        """All that the finished runs come to, written into the folder and returned."""
        rows = tables.rows_of(self.reports())
        claims = Claims(self.folder / "claims")
        open_cells = [cell for cell in self.grid.cells if not self.done(cell)]
        failed = {
            c.name: json.loads(self.failure(c).read_text())["error"] for c in open_cells if self.failure(c).is_file()
        }
        waiting = {c.name: str(owner) for c in open_cells if (owner := claims.owner(c.name)) is not None}
        result = plain(
            {
                "model": self.grid.cells[0].config.model,
                "max_ratio": max_ratio,
                "rule": safety.rule(max_ratio),
                "recommendation": safety.recommendation(rows, max_ratio),
                "curves": safety.curves(rows, max_ratio),
                "rows": rows,
                "finished": len(self.grid.cells) - len(open_cells),
                "cells": len(self.grid.cells),
                "left_out": self.grid.left_out,
                "failed": failed,
                "waiting": waiting,
            }
        )
        _write_json(self.folder / "table.json", result)
        write_bytes(self.folder / "table.md", tables.markdown(rows, result["recommendation"]).encode())
        write_bytes(self.folder / "table.csv", tables.comma_separated(rows).encode())
        write_bytes(self.folder / "study.html", study_page(result).encode())
        if can_plot() and any(row["texts"] for row in rows):
            picture = self.folder / f".{uuid.uuid4().hex}.png"
            tables.picture(rows, picture)
            picture.replace(self.folder / "tradeoff.png")
        return result


class Worker:
    """Takes the runs that are free, one after the other."""

    def __init__(self, place: Place, keep_models: bool, progress: bool, max_ratio: float):
        self.place, self.keep_models, self.progress, self.max_ratio = place, keep_models, progress, max_ratio
        self.claims = Claims(place.folder / "claims")
        self.shared = Shared()
        self.opened: Opened | None = None
        self.known: dict[str, Any] = {}

    def work(self) -> None:
        """Every run that is free now, those that others left behind too; a failed one is tried once by each call."""
        tried: set[str] = set()
        started, written = self.claims.now(), time.monotonic()
        while (cell := self._free(tried, started)) is not None:
            tried.add(cell.name)
            with self.claims.claim(cell.name) as mine:
                if not mine or self.place.done(cell):
                    continue
                done = sum(map(self.place.done, self.place.grid.cells))
                announce(f"{done} of {len(self.place.grid.cells)} runs done · {cell.name}", self.progress, "study")
                self._open(cell.config)
                try:
                    self._run(cell)
                except ConfigError as error:
                    announce(f"{cell.name} failed: {error}", self.progress, "study")
                    _write_json(self.place.failure(cell), {"error": str(error)})
                    continue
            self.place.failure(cell).unlink(missing_ok=True)
            if time.monotonic() - written > WRITTEN_EVERY:
                self.place.write(self.max_ratio)
                written = time.monotonic()

    def _free(self, tried: set[str], started: float) -> Cell | None:
        for cell in self.place.grid.cells:
            if cell.name in tried or self.place.done(cell) or self.claims.owner(cell.name) is not None:
                continue
            failure = self.place.failure(cell)
            if failure.is_file() and failure.stat().st_mtime >= started:
                continue  # another worker of this study met it just now
            return cell
        return None

    def _run(self, cell: Cell) -> None:
        """One run; its folder appears whole or not at all."""
        holder = self.place.cells / f".{uuid.uuid4().hex[:8]}"
        staging = holder / cell.name  # its name is the model's on card and page
        try:
            result = self._pruned(cell, staging)
            self._record(result, staging)
            with contextlib.suppress(OSError):  # a worker that was thought dead was first: the same result
                staging.rename(self.place.cells / cell.name)
        finally:
            shutil.rmtree(holder, ignore_errors=True)

    def _open(self, config: PruneConfig) -> None:
        """Load the model before the first run; not where every run reads it from its files."""
        if self.opened is None and config.stream != "always":
            with Doing(f"loading {config.model_name}", self.progress, "study"):
                self.opened = whole(config.model_name, config.dtype)
            self.place.agree("model", self.opened.identity())

    def _pruned(self, cell: Cell, staging: Path) -> PruneResult:
        if self.opened is None:  # never whole in memory: each run reads and writes its own
            config = dataclasses.replace(cell.config, output=str(staging.parent / "streamed" / cell.name))
            return prune(None, config, progress=self.progress)
        self._take_up()
        result = prune_copy(self.opened, cell.config, self.shared, self.progress)
        self._leave()
        return result

    def _record(self, result: PruneResult, staging: Path) -> None:
        if result.config.output is not None:
            made = Path(result.config.output)
            staging.mkdir()
            kept = None if self.keep_models else ("report.json", "report.html", "run.yaml", "pruning.json", "README.md")
            for path in list(made.iterdir()):
                if kept is None or path.name in kept:
                    path.rename(staging / path.name)
        elif self.keep_models:
            result.save(str(staging))
        else:
            several = result.singles()
            for single in several or [result]:
                folder = staging / member_name(single.config.one_sparsity) if several else staging
                folder.mkdir(parents=True)
                write_records(folder, plain(single.report), single.config, folder.name if several else staging.name)

    def _take_up(self) -> None:
        """What other workers measured of the dense model."""
        path = self.place.folder / "dense.json"
        if path.is_file():
            self.known = json.loads(path.read_text())
            for name, rows in self.known.items():
                self.shared.values.setdefault(name, rows)

    def _leave(self) -> None:
        """What this one measured of it."""
        finite = {
            name: rows
            for name, rows in self.shared.values.items()
            if name.startswith("dense ") and all(math.isfinite(row["perplexity"]) for row in rows)  # type: ignore[attr-defined]
        }
        if {*finite} - {*self.known}:
            _write_json(self.place.folder / "dense.json", {**self.known, **finite})


def told(value: Any) -> Any:
    """A setting as plain data; what lies in memory is told by a hash of it."""
    if isinstance(value, dict):
        return {key: told(inner) for key, inner in value.items()}
    if dataclasses.is_dataclass(value):
        return told({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    numbers = isinstance(value, (list, tuple)) and all(isinstance(inner, (int, float)) for inner in value)
    return list(value) if numbers else written_down(value)


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def print_study(found: dict, directory: str | Path, out: TextIO | None = None) -> None:
    """The table, how far is safe, what is missing, where everything lies."""
    from rich.table import Table

    console = open_console(out)
    texts = list(dict.fromkeys(text["text"] for row in found["rows"] for text in row["texts"]))
    table = Table(
        "pruned by", "pattern", "sparsity", "seeds", *(f"× dense, {text}" for text in texts), "block error", "held out"
    )
    for row in found["rows"]:
        at = {text["text"]: text for text in row["texts"]}
        table.add_row(
            row["how"],
            row["pattern"],
            f"{row['asked']:g}",
            str(len(row["seeds"])),
            *(tables.mean_text(at[text]["ratio"], 3) if text in at else "–" for text in texts),
            tables.mean_text(row["block_error"], 3),
            tables.mean_text(row["block_error_held_out"], 3),
        )
    console.print(table)
    for curve in found["curves"]:
        parts = [f"safe up to {number(curve['safe'], 3)}"]
        parts += [f"the limit is reached at about {curve['crosses']:.2f}"] if curve["crosses"] is not None else []
        parts += [f"knee at {curve['knee']:g}"] if curve["knee"] is not None else []
        console.print(f"{curve['line']}: {', '.join(parts)}")
    for sentence in found["recommendation"]:
        console.print(f"recommended: {sentence}")
    console.print(found["rule"])
    for label, lines in (
        ("not a run", found["left_out"]),
        ("failed", [f"{k}: {v}" for k, v in found["failed"].items()]),
    ):
        for line in lines:
            console.print(f"{label}: {line}")
    for name, owner in found["waiting"].items():
        console.print(f"being worked on by {owner}: {name}")
    console.print(
        f"{found['finished']} of {found['cells']} runs, written to {directory}: study.html, table.md, table.csv"
    )
