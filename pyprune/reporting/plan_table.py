"""The plan of a run as people read it on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TextIO

from pyprune.reporting.console import open_console
from pyprune.reporting.words import asked_text, counted, duration_text, headline, kind_of_weight, size_text


def print_plan(found: dict, out: TextIO | None = None) -> None:
    """What :func:`pyprune.plan` found: every kind of weight, then device, passes, memory, disk and time."""
    from rich.table import Table

    console, model = open_console(out), found["model"]
    console.print(
        f"{model['name']}: {model['architecture']}, {model['blocks']} blocks, {model['parameters']:,} "
        f"parameters in {model['dtype']}\n{headline({'config': found['settings']})}"
    )
    kinds: dict[tuple, list[dict]] = {}
    for row in found["weights"]:
        kinds.setdefault((kind_of_weight(row["name"]), row["prune"], row["why"], tuple(row["shape"])), []).append(row)
    table = Table("weights", "number", "shape", "pruned")
    for (kind, prune, why, shape), rows in kinds.items():
        table.add_row(kind, str(len(rows)), "×".join(map(str, shape)), "yes" if prune else f"no: {why}")
    console.print(table)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in plan_rows(found):
        table.add_row(label, text)
    console.print(table)


def plan_rows(found: dict) -> list[tuple[str, str]]:
    """Label and text of each line below a plan's weights."""
    calibration, disk, free = found["calibration"], found["disk_bytes"], found["free_bytes"]
    passes = {name: count for name, count in found["passes"].items() if count and name != "training"}
    training = f", {found['passes']['training']} to train" if found["passes"].get("training") else ""
    count, runs = sum(passes.values()), found["runs"]
    each = f", {count // runs} for each of {runs} sparsities" if runs > 1 else ""
    rows = [
        *((row["field"], _pattern_text(row)) for row in found["patterns"]),
        *(("sparsity", text) for text in achieved_rows(found)),
        (
            "coverage",
            f"{found['coverage']['fraction']:.1%} of the blocks' matrix weights; the embedding and the head stay dense",
        ),
        ("device", f"{found['device']}, forward passes in {found['compute_dtype']}"),
        (
            "weights",
            f"{'streamed block by block' if found['streamed'] else 'loaded whole'}: {found['streamed_because']}",
        ),
        (
            "passes",
            f"{count} per block ({', '.join(passes)}){each}{training}, "
            f"over {counted(calibration['sequences'], 'sequence')}, "
            f"{'at most ' if calibration['at_most'] else ''}{calibration['tokens']:,} tokens"
            if passes
            else "none: no calibration data is needed",
        ),
        (
            "evaluation",
            f"{counted(found['evaluation']['windows'], 'window')}, {found['evaluation']['tokens']:,} tokens, "
            "before and after"
            if found["evaluation"]["windows"]
            else "none: no perplexity is measured",
        ),
        ("host memory", _parts(found["memory_bytes"], size_text, f", {size_text(free['memory'])} free")),
        (
            "device memory",
            "none: everything is computed on the CPU"
            if found["device_memory_bytes"] is None
            else _parts(found["device_memory_bytes"], size_text, f", {size_text(free['device'])} free"),
        ),
        (
            "disk",
            f"{size_text(disk['while_running'])} while running, {size_text(disk['checkpoint'])} at the end, "
            f"{size_text(disk['free'])} free",
        ),
        ("time", "about " + _parts(found["seconds"], duration_text)),
    ]
    for what, needed, there in (
        ("host memory", found["memory_bytes"]["total"] - found["memory_bytes"]["process"], free["memory"]),
        ("device memory", (found["device_memory_bytes"] or {}).get("total", 0), free["device"]),
        ("disk", disk["while_running"], disk["free"]),
    ):
        if there is not None and needed > there:
            rows.append(("warning", f"more {what} is needed than is free"))
    return rows


def achieved_rows(found: dict) -> list[str]:
    """What a plan says of each sparsity that was asked for."""
    texts = []
    uniform = found["settings"]["allocation"] == "uniform"
    unknown = "about that share of each block" if uniform else "widths depend on the scores"
    for row in found["achieved"]:
        got = ", ".join(f"{share:.4g} of the {kind} will be removed" for kind, share in row["removed"].items())
        if isinstance(row["asked"], dict) and row.get("by_key"):
            got = ", ".join(
                f"{part['key']}: {part['asked']:g} of {part['weights']:,} weights" for part in row["by_key"]
            )
        elif found["settings"]["pattern"] not in ("neurons", "heads", "structured"):
            zeros = sum(math.prod(w["shape"]) for w in found["weights"] if w["prune"])
            got = f"about that share of {zeros:,} weights will be zero"
        texts += [f"{asked_text(row['asked'])} asked for, {got or unknown}", *row["notes"]]
    return texts


def _pattern_text(row: dict) -> str:
    """``'layers.1': 7 weights, model.layers.1.self_attn.q_proj.weight, …``."""
    examples = row["examples"]
    if not examples:
        return f"{row['pattern']!r}: no weight of the blocks, only what stays dense anyway"
    shown = ", ".join(examples) if len(examples) == row["weights"] else f"{', '.join(examples[:-1])} … {examples[-1]}"
    return f"{row['pattern']!r}: {row['weights']} weight{'s' if row['weights'] > 1 else ''}, {shown}"


def _parts(values: dict, text: Callable[[float], str], free: str = "") -> str:
    """The total, then what it is made of, largest first; what is below a hundredth of it is left out."""
    parts = {name: value for name, value in values.items() if name != "total" and value >= values["total"] / 100}
    shown = ", ".join(
        f"{name.replace('_', ' ')} {text(value)}" for name, value in sorted(parts.items(), key=lambda part: -part[1])
    )
    return f"{text(values['total'])}{free}: {shown}"
