"""A run's report as people read it on a terminal: the table after a run."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from pyprune.config import member_name
from pyprune.reporting.console import open_console
from pyprune.reporting.words import (
    INPUTS,
    asked_text,
    distinct,
    domain_text,
    headline,
    number,
    perplexity_text,
    ratio_text,
    source_text,
    windows_text,
)


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


def gap_text(report: dict) -> str | None:
    """How much more was lost on other kinds of text than on the calibration's; None where that was not measured."""
    found = report.get("generalisation")
    if not found:
        return None
    return (
        f"{found['gap']:.2f}: perplexity ×{found['off_domain_ratio']:.2f} off-domain over "
        f"×{found['in_domain_ratio']:.2f} in-domain"
    )


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
        zeros = f"{report['sparsity']:.4f} of the selected weights are zero"
        return f"{zeros}, {asked_text(asked)} asked for; selected: {share}"
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
