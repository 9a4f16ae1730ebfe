"""Tables and plots of the LIAR cells: what was measured, and which differences a paired bootstrap supports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from benchmarks.common import data, result_path, write
from pyprune.evaluate_tasks import paired_bootstrap, read_pairs, spearman

COLOURS = {"none": "#9a9a9a", "bias": "#3b7dd8", "mask_tuning": "#e0862f", "liar": "#2a9d4a"}
NAMES = {"none": "none", "bias": "bias compensation", "mask_tuning": "mask tuning", "liar": "LIAR"}
UNITS = {"sts": "Spearman on STS-B test", "sst2": "accuracy on SST-2 dev", "ppl": "perplexity on WikiText-2 test"}
HIDDEN = ("rows",)


def write_report(cache: Path, out: str | None) -> None:
    """``liar.json``, ``liar.md`` and one plot a task and pattern."""
    cells = [json.loads(p.read_text()) for p in sorted(cache.glob("*.json"))]
    if not cells:
        raise SystemExit(f"no finished cells in {cache}")
    differences = compare(cells)
    plain = [{k: v for k, v in c.items() if k not in HIDDEN} for c in cells]
    write("liar", plain, out, differences=differences)
    text = tables(cells) + difference_table(differences) + sizes(cells) + phases(cells)
    path = result_path("liar", out, ".md")
    path.write_text("# LIAR on real models\n\n" + text)
    print(path.read_text())
    for task, pattern in sorted({(c["task"], c["pattern"]) for c in cells if c["sparsity"]}):
        plot(cells, task, pattern, result_path(f"liar_{task}_{pattern}", out, ".png"))


def grid(cells: list[dict], **wanted) -> dict[tuple, list[dict]]:
    """Cells of the main grid by (sparsity, criterion, method)."""
    found: dict[tuple, list[dict]] = {}
    for c in cells:
        if c["sentences"] == 2048 and all(c[k] == v for k, v in wanted.items()):
            found.setdefault((c["sparsity"], c["criterion"], c["method"]), []).append(c)
    return found


def dense_value(cells: list[dict], task: str) -> float | None:
    return next((c["value"] for c in cells if c["task"] == task and c["sparsity"] == 0), None)


def tables(cells: list[dict]) -> str:
    out = ""
    for task, pattern, inputs in sorted({(c["task"], c["pattern"], c["inputs"]) for c in cells if c["sparsity"]}):
        found = grid([c for c in cells if c["sparsity"]], task=task, pattern=pattern, inputs=inputs)
        if not found:
            continue
        dense = dense_value(cells, task)
        digits = 2 if task == "ppl" else 4
        sparsities = sorted({k[0] for k in found})
        out += f"## {UNITS[task]}, {pattern}, {inputs} inputs\n\n" \
               f"Dense {dense:.{digits}f}. Each entry: none / bias compensation / mask tuning / LIAR, mean over " \
               "seeds.\n\n| criterion | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |\n|---"
        out += "|---" * len(sparsities) + "|\n"
        for criterion in sorted({k[1] for k in found}):
            row = []
            for s in sparsities:
                values = [found.get((s, criterion, m)) for m in COLOURS]
                row.append(" / ".join("–" if v is None else f"{_mean(v):.{digits}f}" for v in values))
            out += f"| {criterion} | " + " | ".join(row) + " |\n"
        rest = sorted({k for k in found if k[2] not in COLOURS})
        if rest:
            said = [f"{k[1]} {k[0]:.0%} {k[2]} {_mean(found[k]):.{digits}f}" for k in rest]
            out += "\nAblation: " + "; ".join(said) + "\n"
        out += "\n"
    return out


def _mean(cells: list[dict]) -> float:
    return sum(c["value"] for c in cells) / len(cells)


def compare(cells: list[dict]) -> list[dict]:
    """LIAR against each baseline on the same test rows: difference, bootstrap error and 95 % interval.

    Rows are resampled together for both models; seeds are averaged inside a resample. Positive is better.
    """
    gold = read_pairs(data("stsb", "test.jsonl"))[2] if any(c["task"] == "sts" for c in cells) else None
    out = []
    seen = {(c["task"], c["pattern"], c["inputs"]) for c in cells if c["sparsity"]}
    for task, pattern, inputs in sorted(seen):
        found = grid(cells, task=task, pattern=pattern, inputs=inputs)
        for (sparsity, criterion, method), rows in sorted(found.items()):
            for other in ("none", "bias", "mask_tuning") if method == "liar" else ():
                base = {c["seed"]: c for c in found.get((sparsity, criterion, other), [])}
                pairs = [(c, base[c["seed"]]) for c in rows if c["seed"] in base]
                if pairs:
                    out.append({"task": task, "pattern": pattern, "inputs": inputs, "sparsity": sparsity,
                                "criterion": criterion, "against": other, "seeds": len(pairs),
                                **_bootstrap(task, pairs, gold)})
    return out


def _bootstrap(task: str, pairs: list[tuple[dict, dict]], gold) -> dict:
    values = [(torch.tensor(a["rows"]).float(), torch.tensor(b["rows"]).float()) for a, b in pairs]

    def better(rows: torch.Tensor) -> float:
        if task == "sts":
            truth = gold[rows]
            return sum(spearman(a[rows], truth) - spearman(b[rows], truth) for a, b in values) / len(values)
        if task == "sst2":
            return sum(float((a[rows] - b[rows]).mean()) for a, b in values) / len(values)
        return sum(float(b[rows].mean().exp() - a[rows].mean().exp()) for a, b in values) / len(values)

    return paired_bootstrap(better, len(values[0][0]), samples=400)


def difference_table(differences: list[dict]) -> str:
    """LIAR minus each baseline, averaged over criteria, and every criterion where LIAR is surely worse."""
    if not differences:
        return ""
    out = "## LIAR against the baselines\n\nMean over criteria (positive: LIAR is better); in brackets the number of " \
          "criteria whose 95 % interval lies above zero / below zero.\n\n" \
          "| task, pattern, inputs | sparsity | criteria | − none | − bias | − mask tuning |\n" + "|---" * 6 + "|\n"
    for where in sorted({(d["task"], d["pattern"], d["inputs"], d["sparsity"]) for d in differences}):
        part = [d for d in differences if (d["task"], d["pattern"], d["inputs"], d["sparsity"]) == where]
        cols = []
        for other in ("none", "bias", "mask_tuning"):
            mine = [d for d in part if d["against"] == other]
            mean = sum(d["difference"] for d in mine) / len(mine) if mine else math.nan
            cols.append("–" if not mine else f"{mean:+.4f} ({sum(d['low'] > 0 for d in mine)} / "
                                             f"{sum(d['high'] < 0 for d in mine)})")
        out += f"| {where[0]}, {where[1]}, {where[2]} | {where[3]:.0%} | {len({d['criterion'] for d in part})} | " \
               + " | ".join(cols) + " |\n"
    worse = [d for d in differences if d["high"] < 0]
    out += "\nSurely worse than a baseline (95 %): " + ("; ".join(
        f"{d['task']} {d['pattern']} {d['sparsity']:.0%} {d['criterion']} against {d['against']} "
        f"{d['difference']:+.4f}" for d in worse) or "nowhere") + ".\n\n"
    return out


def sizes(cells: list[dict]) -> str:
    """Effect of the calibration size."""
    found = sorted((c["sentences"], c["value"]) for c in cells if (
        c["task"], c["pattern"], c["sparsity"], c["criterion"], c["method"], c["inputs"], c["seed"]) == (
        "sts", "neurons", 0.5, "wifv", "liar", "dense", 0))
    if len(found) < 2:
        return ""
    return "## Calibration size (STS-B, neurons 50 %, WIFV, LIAR)\n\n| sentences | " + " | ".join(
        str(n) for n, _ in found) + " |\n|---" + "|---" * len(found) + "|\n| Spearman | " + " | ".join(
        f"{v:.4f}" for _, v in found) + " |\n\n"


def phases(cells: list[dict]) -> str:
    timed = [c for c in cells if c.get("seconds_by_phase")]
    if not timed:
        return ""
    names = sorted({n for c in timed for n in c["seconds_by_phase"]})
    out = "## Seconds by phase of whole runs (propagated; a shared machine, so ratios only)\n\n| run | " \
          + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|\n"
    for c in timed:
        out += f"| {c['task']} {c['pattern']} {c['sparsity']:.0%} {c['criterion']} {c['method']} | " + " | ".join(
            f"{c['seconds_by_phase'].get(n, 0):.1f}" for n in names) + " |\n"
    return out + "\n"


def plot(cells: list[dict], task: str, pattern: str, path: Path) -> None:
    """Quality over sparsity, one panel a criterion, one line a reconstruction (the paper's figures 1 and 3)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = grid([c for c in cells if c["sparsity"]], task=task, pattern=pattern, inputs="dense")
    criteria = sorted({k[1] for k in found})
    if not criteria:
        return
    columns = min(4, len(criteria))
    lines = math.ceil(len(criteria) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.7 * lines), sharey=True, squeeze=False)
    dense = dense_value(cells, task)
    for axis in axes.flat[len(criteria):]:
        axis.axis("off")
    for axis, criterion in zip(axes.flat, criteria):
        axis.axhline(dense, color="black", linewidth=0.8, linestyle=":")
        for method, colour in COLOURS.items():
            points = sorted((k[0], _mean(v)) for k, v in found.items() if k[1:] == (criterion, method))
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, color=colour, label=NAMES[method])
        axis.set_title(criterion, fontsize=9)
        axis.set_xlabel(f"{pattern} dropped", fontsize=8)
        axis.tick_params(labelsize=7)
        if task == "ppl":
            axis.set_yscale("log")
    for row in axes:
        row[0].set_ylabel(UNITS[task], fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
