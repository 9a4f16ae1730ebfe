"""Measured gain: size, memory and speed of dense and pruned models side by side, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TextIO

import torch
from torch import nn

from pyprune.config import ConfigError
from pyprune.evaluation.latency import latency
from pyprune.execution.activation_store import peak_memory
from pyprune.execution.progress import Doing
from pyprune.model.blocks import predicts_next_token
from pyprune.model.checkpoint import plain, refuse_several
from pyprune.model.positions import of_any
from pyprune.model.shards import write_bytes
from pyprune.packed import card
from pyprune.packed.loading import load
from pyprune.packed.modules import parameter_count, weight_bytes
from pyprune.reporting.card import model_card
from pyprune.reporting.plotting import can_plot, pyplot
from pyprune.reporting.run_page import write_run_page
from pyprune.reporting.words import LABELS, cell, gain_text


def dense_of(name: str | Path, option: str = "--against") -> str:
    """The model that a folder written by pyprune was pruned from. Raises ConfigError if it does not say; ``option``
    is what names it instead."""
    refuse_several(name)
    if not Path(name).exists():
        raise ConfigError(f"no such folder: {name}; for a model of the Hub, name the dense model with {option}")
    record = Path(name) / "pruning.json"
    found = json.loads(record.read_text()).get("settings", {}).get("model") if record.is_file() else None
    if not found:
        raise ConfigError(f"{name} does not say which model it was pruned from; name the dense model with {option}")
    return found


def measure_side_by_side(
    models: Sequence[str | Path],
    *,
    tokens: int = 512,
    new_tokens: int = 32,
    batch_size: int = 1,
    dtype: str = "auto",
    rounds: int = 2,
    progress: bool = False,
) -> list[dict]:
    """Parameters, weight and file bytes, peak memory and tokens per second of each model; the first is the base.

    Every model runs in a fresh process, so that peak memory is its own; they take turns for ``rounds`` rounds and the
    fastest run counts, so that a busy machine slows all alike. Rows carry their ratios to the first. progress: say on
    standard error which model is measured.
    """
    rows: list[dict] = []
    for turn in range(rounds):
        for i, name in enumerate(models):
            with Doing(f"measuring {name}, round {turn + 1} of {rounds}", progress, "latency"):
                row = _in_a_process(str(name), tokens, new_tokens, batch_size, dtype)
            if turn == 0:
                rows.append(row)
                continue
            for key in [k for k in row if k.endswith("per_second")]:
                rows[i][key] = max(rows[i][key], row[key])
            rows[i]["peak_memory_bytes"] = min(rows[i]["peak_memory_bytes"], row["peak_memory_bytes"])
    for row in rows:
        row["ratios"] = {key: row[key] / rows[0][key] for key in LABELS if row.get(key) and rows[0].get(key)}
    return rows


def _in_a_process(name: str, tokens: int, new_tokens: int, batch_size: int, dtype: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "pyprune.evaluation.gain",
        name,
        "--tokens",
        str(tokens),
        "--new-tokens",
        str(new_tokens),
        "--batch-size",
        str(batch_size),
        "--dtype",
        dtype,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise ConfigError((done.stderr.strip().splitlines() or ["the measuring process died"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, *, tokens: int, new_tokens: int, batch_size: int, dtype: str) -> dict:
    """Measure one model in this process: :func:`pyprune.evaluation.latency.latency` for decoders, forward passes for
    encoders."""
    model, _ = load(name, dtype)
    directory = Path(name) if Path(name).is_dir() else None
    positions = of_any(model)
    if positions:
        tokens = min(tokens, max(2, positions.count - new_tokens))
    if predicts_next_token(model):
        row = latency(model, tokens=tokens, new_tokens=new_tokens, batch_size=batch_size, directory=directory)
    else:
        row = _encoder(model, tokens, batch_size, directory)
    return {"model": name, "weight_bytes": weight_bytes(model), **row}


@torch.no_grad()
def _encoder(model: nn.Module, tokens: int, batch_size: int, directory: Path | None) -> dict:
    ids = torch.full((batch_size, tokens), 7)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        model(ids)
        best = min(best, time.perf_counter() - start)
    files = [] if directory is None else [f for f in directory.iterdir() if f.suffix in (".safetensors", ".bin")]
    return {
        "parameters": parameter_count(model),
        "file_bytes": sum(f.stat().st_size for f in files) or None,
        "peak_memory_bytes": peak_memory(),
        "forward_tokens_per_second": batch_size * tokens / best,
        "tokens": tokens,
        "batch_size": batch_size,
        "dtype": str(next(model.parameters()).dtype)[6:],
        "device": "cpu",
    }


def record(rows: list[dict], directory: str | Path, key: Literal["gain", "tasks"] = "gain") -> list[Path]:
    """Add what was measured to the report, its page and the model card in the folder of a pruned model, and a picture
    of the gain where matplotlib is installed; returns the files written. A folder without a report, or one that cannot
    be written, is left alone.

    key: ``gain`` for rows of :func:`measure_side_by_side`; ``tasks`` for those of
    :func:`pyprune.evaluation.task_runs.evaluate_tasks`, which replace those of the same tasks.
    """
    folder = Path(directory)
    path = folder / "report.json"
    if not path.is_file() or not os.access(folder, os.W_OK):
        return []
    report = json.loads(path.read_text())
    if key == "tasks":
        again = {row["task"] for row in rows}
        rows = [row for row in report.get("tasks") or [] if row["task"] not in again] + rows
    report[key] = rows
    picture = folder / "gain.png"
    drawn = key == "gain" and can_plot()
    if drawn:
        plot(rows, picture)
    write_bytes(path, (json.dumps(plain(report), indent=1, allow_nan=False) + "\n").encode())
    text = model_card(report, folder.resolve().name, picture.name if picture.is_file() else None)
    write_bytes(folder / "README.md", card.with_section(text, card.section_of(folder)).encode())
    write_run_page(folder, report, folder.resolve().name)
    return [path, folder / "README.md", folder / "report.html", *([picture] if drawn else [])]


def print_side_by_side(rows: list[dict], out: TextIO | None = None) -> None:
    """One line per measure, one column per model, with the ratio to the first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(str(row["model"]) for row in rows))
    for key, (label, _, _) in LABELS.items():
        if any(row.get(key) for row in rows):
            table.add_row(label, *(cell(row, key, rows[0]) for row in rows))
    console = Console(file=out or sys.stdout, highlight=False)
    console.print(table)
    for row in rows[1:]:
        console.print(*gain_text(row), soft_wrap=True)


def plot(rows: list[dict], path: str | Path) -> None:
    """Bars of every measure relative to the first model."""
    plt = pyplot()
    keys = [k for k in LABELS if all(row["ratios"].get(k) for row in rows)]
    figure, axis = plt.subplots(figsize=(1.5 + 1.2 * len(keys), 2.8))
    for i, row in enumerate(rows):
        axis.bar(
            [j + 0.8 * i / len(rows) for j in range(len(keys))],
            [row["ratios"][k] for k in keys],
            width=0.75 / len(rows),
            label=Path(str(row["model"])).name,
        )
    axis.set_xticks(
        [j + 0.4 * (len(rows) - 1) / len(rows) for j in range(len(keys))], [LABELS[k][0] for k in keys], fontsize=8
    )
    axis.set_ylabel(f"relative to {Path(str(rows[0]['model'])).name}", fontsize=8)
    axis.axhline(1, color="black", linewidth=0.6)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype")
    args = parser.parse_args()
    try:
        row = measure(
            args.model, tokens=args.tokens, new_tokens=args.new_tokens, batch_size=args.batch_size, dtype=args.dtype
        )
    except ConfigError as error:
        sys.exit(str(error))
    print(json.dumps(row))


if __name__ == "__main__":
    _main()
