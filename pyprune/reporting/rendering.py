"""A run's report as people read it: the table after a run, the plan before it; labels and cells of every table."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pyprune.config import member_name, sparsity_text


def open_console(out: TextIO | None = None):
    """A rich console; wide where it is no terminal, so that logs and pipes hold whole lines."""
    from rich.console import Console

    out = out or sys.stdout
    return Console(file=out, highlight=False, width=None if out.isatty() else 140)


def print_json(value) -> None:
    """Plain data on standard output; what is not finite is null."""
    from pyprune.model.checkpoint import plain

    print(json.dumps(plain(value), indent=1, allow_nan=False))


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def counted(count: int, noun: str) -> str:
    """``1 sequence``, ``2 sequences``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def kind_of_weight(name: str) -> str:
    """A weight's name with its block's and expert's numbers left open."""
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"(^|\.)\d+\.", r"\1*.", name))


def perplexity_text(value: float | None) -> str:
    """Two decimals while they mean something."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def headline(report: dict) -> str:
    """What was done, in one line: ``sparsegpt 2:4, sparsity 0.5, reconstruct layer``."""
    config = report["config"]
    shown = asked_text(config["sparsity"])
    structured = config["pattern"] in ("neurons", "heads", "structured")
    return (
        f"{criterion_text(config) if structured else config['method']} {config['pattern']}, sparsity {shown}, "
        f"reconstruct {reconstruction_text(config)}"
    )


def criterion_text(config: dict) -> str:
    """``wifv``; of a function given in memory its name, as ``function by_peak``."""
    found = config["criterion"]
    return f"function {found[1:].partition(' ')[0]}" if found.startswith("<") else found


def reconstruction_text(config: dict) -> str:
    """``block + GP``."""
    return config["reconstruct"] + (" + GP" if config.get("global_propagation") else "")


RECONSTRUCTIONS = {
    "layer": "layer by layer, a one-sided OBS sweep: a column's error is made up for by later columns only",
    "refit": "layer by layer, the kept weights are refitted by least squares on the mask",
    "block": "an OBS sweep layer by layer, then each block is trained against the dense one",
    "cross_block": "an OBS sweep layer by layer, then windows of two blocks are trained against the dense ones",
}
"""What a model card says of each reconstruction of masks."""

INPUTS = {
    "propagated": "of the dense block behind the pruned blocks before it",
    "sequential": "of each group of layers behind the pruned groups before it, in one pass",
    "dense": "of the dense model",
}
"""Whose inputs statistics were taken of, as summary and model card say it."""


def print_summary(report: dict, directory: str | Path | None = None, out: TextIO | None = None) -> None:
    """The table at the end of a run: perplexity before and after, sparsity, seconds by phase, where everything lies."""
    from rich.table import Table

    console = open_console(out)
    table = Table(title=f"{report['model']['name']}: {headline(report)}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in summary_rows(report):
        table.add_row(label, text)
    if directory is not None:
        table.add_row("model", str(directory))
        curve = curve_of(report)
        folders = [member_name(entry["sparsity"]) for entry in curve] if len(curve) > 1 else ["."]
        pages = "\n".join(str(Path(directory) / folder / "report.html") for folder in folders)
        table.add_row("report", f"{pages}, its figures in report.json")
        if len(curve) > 1:
            table.add_row("side by side", f"pyprune compare {directory} --html FILE")
    console.print(table)


def summary_rows(report: dict) -> list[tuple[str, str]]:
    """Label and text of each line of the summary."""
    rows = []
    curve = curve_of(report)
    several = len(curve) > 1
    if several:
        rows += [("dense", f"perplexity {text}") for text in dense_texts(report)]
    rows += [(f"at {entry['sparsity']:g}", entry_text(entry)) for entry in curve]
    for row in (report.get("evaluation") or []) if not several else []:
        rows.append(
            (
                "perplexity",
                f"{perplexity_text(row['dense'])} dense → {perplexity_text(row['pruned'])} pruned{ratio_text(row)}  "
                f"({windows_text(row)}{domain_text(row)}, {source_text(row)})",
            )
        )
    if not several and (gap := gap_text(report)) is not None:
        rows.append(("generalisation gap", gap))
    if not curve:
        rows.append(("sparsity", achieved_text(report)))
        if (named := by_key_text(report)) is not None:
            rows.append(("asked → achieved", named))
    last = report["blocks"][-1] if report.get("blocks") and not several else {}
    if last.get("error") is not None:
        held = "" if last.get("error_held_out") is None else f", {number(last['error_held_out'])} on held-out text"
        rows.append(("block error", f"{number(last.get('error'))} after the last block{held} (relative to dense)"))
        if last.get("steps"):
            rows.append(
                (
                    "last block",
                    " → ".join(
                        f"{s['step']} {number(s.get('calibration'), 3)} / {number(s.get('held_out'), 3)}"
                        for s in last["steps"]
                    )
                    + " (calibration / held out)",
                )
            )
    seconds = report["seconds"]
    phases = ", ".join(
        f"{phase} {value:.1f}" for phase, value in sorted(seconds.items(), key=lambda p: -p[1]) if value >= 0.05
    )
    rows.append(("seconds", f"{sum(seconds.values()):.1f}: {phases}"))
    rows.append(("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"))
    if not several and (refitted := refit_text(report)) is not None:
        rows.append(("refit", refitted))
    rows.append(("calibration", report["calibration"]["description"]))
    if (inputs := inputs_text(report)) is not None:
        rows.append(("inputs", inputs))
    rows += [("warning", text) for text in distinct(report.get("warnings") or [])]
    return rows


def curve_of(report: dict) -> list[dict]:
    """What a report of several sparsities says of each; of any other there is nothing."""
    return report.get("curve") or (report.get("structured") or {}).get("curve", [])


def dense_texts(report: dict) -> list[str]:
    """The dense model's perplexity on each text, with its windows."""
    return [
        f"{perplexity_text(row['dense'])}  ({windows_text(row)}{domain_text(row)}, {source_text(row)})"
        for row in report.get("evaluation") or []
    ]


def entry_text(entry: dict) -> str:
    """What came out at one of several sparsities: how much is gone, and perplexities in the order of the texts."""
    gone = [f"{share:.4g} of the {kind} removed" for kind, share in entry.get("removed", {}).items()]
    if gone or "achieved" not in entry:
        gone.append(f"{entry['parameters']:,} parameters")
    else:
        gone.append(f"{entry['achieved']:.4f} of the pruned weights are zero")
    moved = [
        perplexity_text(row["pruned"]) + (f" ({more.removeprefix(', ')})" if (more := ratio_text(row)) else "")
        for row in entry.get("evaluation") or []
    ]
    parts = [", ".join(gone)] + [f"perplexity {', '.join(moved)}"] * bool(moved)
    if entry.get("error") is not None:
        held = "" if entry["error_held_out"] is None else f", {number(entry['error_held_out'])} on held-out text"
        parts.append(f"block error {number(entry['error'])} after the last block{held}")
    return "; ".join(parts)


def ratio_text(row: dict) -> str:
    """``, ×1.66 ± 0.02``: pruned over dense and its standard error."""
    if row.get("ratio") is None:
        return ""
    error = row.get("ratio_standard_error")
    return f", ×{row['ratio']:.2f}" + ("" if error is None else f" ± {error:.2g}")


def gap_text(report: dict) -> str | None:
    """How much more was lost on other kinds of text than on the calibration's; None where that was not measured."""
    found = report.get("generalisation")
    if not found:
        return None
    return (
        f"{found['gap']:.2f}: perplexity ×{found['off_domain_ratio']:.2f} off-domain over "
        f"×{found['in_domain_ratio']:.2f} in-domain"
    )


def asked_text(sparsity) -> str:
    """A sparsity as it was asked for: a number, several, or several by name."""
    return sparsity_text(sparsity).replace(",", ", ")


def by_key_text(report: dict) -> str | None:
    """``mlp 0.6 → 0.6000, attention 0.4 → 0.4000``: asked for and achieved, where sparsities were given by name."""
    rows = report.get("sparsity_by_key") or []
    return ", ".join(f"{row['key']} {row['asked']:g} → {row['achieved']:.4f}" for row in rows) or None


def achieved_text(report: dict) -> str:
    """What was asked for beside what was achieved."""
    asked = report.get("sparsity_asked", report["config"]["sparsity"])
    structured = report.get("structured")
    if not structured:
        share = f"{report['coverage']['fraction']:.1%} of the blocks' matrix weights"
        return (
            f"{asked_text(asked)} asked for, {report['sparsity']:.4f} of the pruned weights are zero; they are {share}"
        )
    gone = ", ".join(f"{share:.4g} of the {kind}" for kind, share in structured.get("removed", {}).items())
    return f"{asked_text(asked)} asked for, {gone or format(report['sparsity'], '.4g')} removed; {left_text(report)}"


def left_text(report: dict) -> str:
    """Parameters before and after a structured run."""
    left, dense = report["model"]["parameters"], report["model"].get("parameters_dense")
    return f"{left:,} parameters are left" + (f" of {dense:,}, {left / dense:.1%}" if dense else "")


def refit_text(report: dict) -> str | None:
    """What the exact refit gained over the sweep, in the mean over the weights; None where none was measured."""
    parts = []
    for key, where in (("error", "calibration"), ("error_held_out", "held-out")):
        pairs = [(w[key + "_sweep"], w[key]) for w in report.get("weights") or [] if key + "_sweep" in w]
        if pairs:
            swept, refitted = (sum(values) / len(pairs) for values in zip(*pairs))
            parts.append(f"{number(swept)} → {number(refitted)} on {where} inputs")
    return f"error of a weight's outputs, sweep → refit: {', '.join(parts)} (mean over weights)" if parts else None


def inputs_text(report: dict) -> str | None:
    """Whose inputs statistics were taken of; None where none were taken."""
    config = report["config"]
    ways = [row["inputs"] for row in report.get("blocks") or [] if "inputs" in row]  # where blocks may differ
    if report.get("structured"):
        ways = [report["structured"]["inputs"]]
    elif not ways and (config["method"] != "magnitude" or config["reconstruct"] != "none"):
        ways = [config["inputs"]]
    counts = {way: ways.count(way) for way in INPUTS if way in ways}
    parts = [
        f"{way}: {INPUTS[way]}" + (f" ({count} of {len(ways)} blocks)" if len(counts) > 1 else "")
        for way, count in counts.items()
    ]
    return "; ".join(parts) or None


def distinct(warnings: list[str]) -> list[str]:
    """One of each kind: warnings that differ in their numbers alone say the same of other weights."""
    kinds: dict[str, list[str]] = {}
    for text in warnings:
        kinds.setdefault(re.sub(r"\d+(\.\d+)?", "0", text), []).append(text)
    return [
        texts[0] + (f" (and {len(texts) - 1} like it, in report.json)" if len(texts) > 1 else "")
        for texts in kinds.values()
    ]


def domain_text(row: dict) -> str:
    """``, in-domain``, where the row says it."""
    return f", {row['domain']}" if row.get("domain") else ""


def source_text(row: dict) -> str:
    """The text of a row of perplexity; of a data set also its configuration and its split."""
    parts = [row.get("subset"), f"split {row['split']}" if row.get("split") else None]
    more = ", ".join(part for part in parts if part)
    return row["text"] + (f" ({more})" if more else "")


def windows_text(row: dict) -> str:
    """``24 windows of 1024 tokens``, and the stride where they overlap."""
    stride = f" with stride {row['stride']}" if row.get("stride") else ""
    return f"{row['windows']} windows of {row['window']} tokens{stride}"


def conditions_text(row: dict) -> str:
    """The windows of a row, the tokens that they score, and the number type, for a table."""
    stride = f", stride {row['stride']}" if row.get("stride") else ""
    scored = f", {row['tokens']:,} scored" if row.get("tokens") else ""
    return f"{row['windows']} × {row['window']} tokens{stride}{scored}, {row.get('dtype', '')}"


def print_evaluation(found: dict, out: TextIO | None = None) -> None:
    """One line per text whose perplexity is a number; the others are errors."""
    for row in found.get("texts", [found]):
        if not math.isfinite(row["perplexity"]):
            continue
        print(
            f"perplexity {perplexity_text(row['perplexity'])}  ({windows_text(row)}, "
            f"{row['dtype']}, {row['seconds']:.1f} s, {source_text(row)})",
            file=out or sys.stdout,
        )


def print_inspection(found: dict, out: TextIO | None = None) -> None:
    """What :func:`pyprune.inspect` found, the matrices of a kind in one line."""
    from rich.table import Table

    for member in found.get("members", ()):
        print_inspection(member, out)
    if "members" in found:
        return
    console = open_console(out)
    console.print(
        f"{found['path']}: {found['parameters']:,} parameters, {found['bytes'] / 2**20:.1f} MiB of {found['format']}"
    )
    if (packed := found.get("packed")) is not None:
        share = f", {packed['bytes'] / packed['dense_bytes']:.3f} of their dense size" if packed["matrices"] else ""
        console.print(f"packed: {packed['matrices']} matrices without their zeros{share}")
    coverage, structure = found["coverage"], _structure_text(found)
    if structure:
        console.print(structure)
    if coverage["pruned"] or not structure:
        console.print(
            f"sparsity {found['sparsity']:.4f} of the blocks' matrices, {found['sparsity_of_model']:.4f} of all "
            f"parameters; {coverage['pruned']} of {coverage['matrices']} matrices are pruned, "
            f"{coverage['fraction']:.1%} of their weights, to {found['sparsity_of_pruned']:.4f}"
        )
    patterns = found["patterns"] if coverage["pruned"] else {}
    for name, row in patterns.items():
        console.print(f"{name}: {row['violations']:,} violations in {row['groups']:,} groups of the pruned matrices")
    if found["non_finite"]:
        console.print(f"{found['non_finite']:,} values are NaN or infinite")
    kinds: dict[str, list[dict]] = {}
    for row in found["weights"]:
        kinds.setdefault(kind_of_weight(row["name"]), []).append(row)
    table = Table("matrices", "number", "shape", "sparsity", *patterns)
    for kind, rows in kinds.items():
        spread = [row["sparsity"] for row in rows]
        broken = [[row["violations"][name] for row in rows] for name in patterns]
        table.add_row(
            kind,
            str(len(rows)),
            " … ".join("×".join(map(str, shape)) for shape in _ends([row["shape"] for row in rows])),
            f"{min(spread):.3f}" if max(spread) - min(spread) < 5e-4 else f"{min(spread):.3f} … {max(spread):.3f}",
            *("–" if None in counts else f"{sum(counts):,}" for counts in broken),
        )
    console.print(table)


def _structure_text(found: dict) -> str | None:
    """What structured pruning removed, from the checkpoint's own record; None where it removed nothing."""
    record = found.get("pruning") or {}
    structured, model = record.get("structured"), record.get("model") or {}
    if not structured:
        return None
    gone = ", ".join(f"{share:.4g} of the {kind}" for kind, share in structured.get("removed", {}).items())
    sizes = ", ".join(f"{name} {value}" for name, value in (structured.get("edits") or {}).items())
    dense = model.get("parameters_dense")
    left = (
        f"; {found['parameters']:,} parameters are left of {dense:,}, {found['parameters'] / dense:.1%}"
        if dense
        else ""
    )
    return (
        f"structured: {gone or 'heads or neurons'} removed{left}"
        + (f"; the config says {sizes}" if sizes else "; no stock config says its sizes, pyprune.load knows them")
        + ". Matrices became smaller, which leaves no zeros to count"
    )


def _ends(shapes: list[list[int]]) -> list[list[int]]:
    """The one shape that all have, or the smallest and the largest."""
    ordered = sorted(shapes)
    return ordered[:1] if ordered[0] == ordered[-1] else [ordered[0], ordered[-1]]


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


def size_text(size: float) -> str:
    """``37.8 GiB``."""
    unit, name = next(
        (u, n)
        for u, n in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        if size >= 0.995 * u or u == 1
    )
    return f"{size / unit:.{0 if name == 'B' or size >= 100 * unit else 1}f} {name}"


def duration_text(seconds: float) -> str:
    """``43 h``, ``2 h 5 min``, ``6 min 30 s``, ``12 s``, ``0.4 s``: two figures that mean something."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    unit, names = (60, ("min", "s")) if seconds < 3600 else (3600, ("h", "min"))
    large, small = divmod(round(seconds / (unit / 60)), 60)
    return f"{large} {names[0]}" + (f" {small} {names[1]}" if small and large < 10 else "")


def cell(row: dict, key: str, base: dict) -> str:
    """A measure as text, with its ratio to the base's."""
    _, unit, name = LABELS[key]
    value, ratio = row.get(key), row["ratios"].get(key)
    beside = f"  ×{ratio:.2f}" if ratio and row is not base else ""
    return f"{value / unit:,.1f} {name}{beside}" if value else "–"


LABELS = {
    "parameters": ("parameters", 1e6, "M"),
    "weight_bytes": ("weights", 2**20, "MiB"),
    "file_bytes": ("file", 2**20, "MiB"),
    "peak_memory_bytes": ("peak memory", 2**20, "MiB"),
    "forward_tokens_per_second": ("forward", 1, "tokens/s"),
    "prefill_tokens_per_second": ("prefill", 1, "tokens/s"),
    "decode_tokens_per_second": ("decode", 1, "tokens/s"),
}
"""Measure → its label, unit and the unit's name."""


TASK_METRICS = ("acc", "acc_norm", "f1", "mcc", "exact_match", "spearman")
"""Scores of tasks, of which more is better, in rows of :func:`pyprune.evaluation.task_runs.evaluate_tasks`."""


def score_text(row: dict, metric: str) -> str:
    """``0.5000 ± 0.0100``: a task's value with its standard error."""
    error = row.get(f"{metric}_standard_error")
    return f"{row[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def difference_text(test: dict) -> str:
    """The difference of two models on the same items, with its standard error."""
    return f"{test['difference']:+.4f} ± {test['standard_error'] or 0:.4f}"


def gain_text(row: dict) -> list[str]:
    """``This model: 0.56 of the size, 1.4 times the decoding speed on this machine.``, from a measured row."""
    parts = [
        f"{row['ratios'][key]:.2f} {text}"
        for key, text in (
            ("file_bytes" if row["ratios"].get("file_bytes") else "weight_bytes", "of the size"),
            ("decode_tokens_per_second", "times the decoding speed"),
            ("prefill_tokens_per_second", "times the speed of reading a prompt"),
            ("forward_tokens_per_second", "times the speed"),
        )
        if row["ratios"].get(key)
    ]
    return [f"This model: {', '.join(parts)} on this machine, relative to the dense one."] if parts else []
