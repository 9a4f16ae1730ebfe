"""Figures and rows of reports in words: numbers, sizes, times, sparsities, texts; labels and cells of every table."""

from __future__ import annotations

import math
import re

from pyprune.config import sparsity_text


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


def ratio_text(row: dict) -> str:
    """``, ×1.66 ± 0.02``: pruned over dense and its standard error."""
    if row.get("ratio") is None:
        return ""
    error = row.get("ratio_standard_error")
    return f", ×{row['ratio']:.2f}" + ("" if error is None else f" ± {error:.2g}")


def asked_text(sparsity) -> str:
    """A sparsity as it was asked for: a number, several, or several by name."""
    return sparsity_text(sparsity).replace(",", ", ")


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
