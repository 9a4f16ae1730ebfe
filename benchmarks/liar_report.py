"""Tables and plots of the LIAR cells: what was measured, and which differences a paired bootstrap supports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from benchmarks.common import data, result_path
from benchmarks.liar_table import CELL, COMPARED, read_cells, read_differences, write_tables
from pyprune.config import ConfigError
from pyprune.evaluation.tasks import paired_bootstrap, read_pairs, spearman

COLOURS = {"none": "#9a9a9a", "bias": "#3b7dd8", "mask_tuning": "#e0862f", "liar_uniform": "#a8d8b0", "liar": "#2a9d4a"}
NAMES = {
    "none": "none",
    "bias": "bias compensation",
    "mask_tuning": "mask tuning",
    "liar_uniform": "LIAR as published",
    "liar": "LIAR",
}
BASELINES = ("none", "bias", "mask_tuning", "liar_uniform")
UNITS = {
    "sts": "Spearman on STS-B test",
    "sst2": "accuracy on SST-2 dev",
    "ppl": "perplexity on WikiText-2 test",
    "ppl_all": "perplexity on WikiText-2 test, every window",
}
READING = """Encoder: all-MiniLM-L6-v2 (6 post-norm blocks of 1,536 neurons and 12 heads) on all 1,379 STS-B test pairs
(Spearman of cosine similarity and human score) and on SST-2 dev with one linear head fitted to the dense model's
vectors. Decoder: SmolLM2-135M (pre-norm), WikiText-2 test in windows of 1,024 tokens. Calibration: 2,048 unlabelled
training sentences (encoder) or 32 × 512 tokens of WikiText-2 train (decoder), never a test sentence or a label.
Every block loses the same share. Products are bfloat16, sums float32 or wider; on the dense encoder Spearman
differs from float32's by 0.00016, the same way for every cell. Nothing is trained.

Two streams: *dense* inputs repair each block on what the dense model feeds it, from one pass; *propagated* inputs on
what the already pruned blocks feed it.

Bias compensation, mask tuning and *LIAR as published* count every token the same. *LIAR* is what pyprune does unless
told otherwise (``token_weights="auto"``): in post-norm models each token's error counts by the size of its own output
(``relative``); in pre-norm models by the size of the token's residual stream and for itself, in equal parts
(``balanced``). ``bias_relative`` and ``mask_tuning_relative`` give the baselines the encoder's weights, so that the
gain of the weights and of the regression can be told apart. All reconstructions of one criterion repair the same mask.

Intervals are paired bootstraps: test rows are drawn with replacement, 400 times, the same rows for both models, seeds
averaged inside each draw. "Surely" means that the 95 % interval does not contain zero. With some hundreds of such
comparisons about one in forty is on either side by chance.

"""
CAUSE = """## Why the published fit fails for random, Taylor and Fisher selection, and what is done

MiniLM has a neuron in each of the blocks 0, 1 and 2 that speaks on [CLS] only, far louder than everything else.
Criteria that look at activations keep it; random, Taylor and Fisher selection drop it, rightly: after the layer norm it
is nearly without effect (without any repair Spearman stays at 0.79–0.82). Yet in the block that loses it, 96–99 % of
the squared error lies on [CLS] tokens and 95–99 % is that one neuron's. Least squares then rebuilds it from neurons
that hint at it (weights grow up to 7-fold) and what these add to all other tokens is noise; bias compensation gives
every token the mean of it. The layer's held-out error falls all the same (0.98 to 0.03), so no guard on it can notice:
it is the wrong measure, not a bad split, a bad λ or too few tokens.

LIAR at 50 % of the neurons under other weights of a token's squared error: 1 (published); one over the power of its own
output y, alone or with the published fit beside it, which then makes up the share α of both relative errors; the same
with the power of the residual stream s that y lands in. One calibration draw; random masks of four seeds. MiniLM:
Spearman on all test pairs; SmolLM2: perplexity on 4 test windows of 1,024 tokens (dense 21.2), for propagated inputs
on 12 (dense 22.3).

| mask | published | y, α = 0.5 | y, α = 0.1 | y alone | s, α = 0.5 | s alone |
|---|---|---|---|---|---|---|
| MiniLM, random | .73 .81 .54 .38 | .78 .82 .68 .64 | .81 .82 .81 .81 | .81 .82 .82 .82 | – | .81 .82 .77 .77 |
| MiniLM, Taylor | .771 | .784 | .814 | .821 | – | .800 |
| MiniLM, Fisher | .758 | .787 | .815 | .822 | – | .800 |
| MiniLM, WIFV | .829 | .829 | .829 | .829 | – | .829 |
| SmolLM2, random | 706 178 88 405 | 88 769 85 87 | 88 452 88 80 | 111 497 95 96 | – | 83 – – – |
| SmolLM2, magnitude | 489 | 388 | 336 | 324 | – | – |
| SmolLM2, Taylor | 39.05 | – | 38.62 | 38.91 | – | – |
| SmolLM2, WIFV | 37.06 | 36.95 | 36.99 | 37.19 | – | 37.17 |
| SmolLM2, greedy OBS | 35.43 | – | 35.37 | 35.60 | – | – |
| SmolLM2, greedy OBS, propagated | 36.86 | – | 41.53 | – | 36.89 | 37.05 |
| SmolLM2, random, propagated | 72.49 | – | – | – | 63.44 | – |

A post-norm block divides each token by its own size at once, so only the relative error goes on, and the loud [CLS] may
be anything. In a pre-norm decoder the loud first token stays in the residual stream; our reading, not proved here, is
that later blocks use it as their attention sink. There the published fit pays for it with all other tokens, and a
relative one gives it up. Behind a pruned prefix the size of y is the wrong measure altogether: what has to be made up
for is the stream's error, and that is as large where y is small. Hence the rule: relative to y where a norm follows the
residual sum at once (found by a probe of the block, not by its name); elsewhere relative to s, with the published fit
at α = 0.5. For masks that keep the loud neurons, as every criterion that looks at activations does, it changes nothing;
where they are gone it is better in most draws, not in all. The rule rests on one model of each family.

"""


def write_report(cache: Path, out: str | None) -> None:
    """Tables, ``liar.md`` and one plot per task and pattern, from the cached cells and those reported before.

    Raises ConfigError if there are none.
    """
    cells = [json.loads(p.read_text()) for p in sorted(cache.glob("*.json"))]
    differences = merged(read_differences(out), paired_differences(cells), COMPARED)
    cells = merged(read_cells(out), cells, CELL)
    if not cells:
        raise ConfigError(f"no finished cells in {cache}")
    write_tables(cells, differences, out)
    path = result_path("liar", out, ".md")
    path.write_text(report_text(cells, differences))
    print(path.read_text())
    for task, pattern in sorted({(c["task"], c["pattern"]) for c in cells if c["sparsity"]}):
        plot(cells, task, pattern, result_path(f"liar_{task}_{pattern}", out, ".png"))


def report_text(cells: list[dict], differences: list[dict]) -> str:
    """The whole of ``liar.md``."""
    return (
        "# LIAR on real models\n\n"
        + READING
        + CAUSE
        + tables(cells)
        + difference_table(differences)
        + criterion_table(differences)
        + sizes(cells)
        + phases(cells)
    )


def merged(before: list[dict], now: list[dict], names: tuple[str, ...]) -> list[dict]:
    """Entries of an earlier report, those of the same ``names`` replaced, new ones added, in order. A difference over
    fewer seeds does not replace one over more."""
    found = {tuple(entry[name] for name in names): entry for entry in before}
    for entry in now:
        place = tuple(entry[name] for name in names)
        if entry.get("seeds", 0) >= found.get(place, {}).get("seeds", 0):
            found[place] = entry
    return [found[place] for place in sorted(found)]


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
        digits = 2 if task.startswith("ppl") else 4
        sparsities = sorted({k[0] for k in found})
        shown = [m for m in COLOURS if any(k[2] == m for k in found)]
        seeds = max(len(v) for v in found.values())
        out += (
            f"## {UNITS[task]}, {pattern}, {inputs} inputs\n\n"
            f"Dense {dense:.{digits}f}. Each entry: {' / '.join(NAMES[m] for m in shown)}; mean "
            f"over {seeds} seed{'s'[: seeds > 1]} at most.\n\n| criterion | "
            + " | ".join(f"{s:.0%}" for s in sparsities)
            + " |\n|---"
        )
        out += "|---" * len(sparsities) + "|\n"
        for criterion in sorted({k[1] for k in found}):
            row = []
            for s in sparsities:
                values = [found.get((s, criterion, m)) for m in shown]
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


def paired_differences(cells: list[dict]) -> list[dict]:
    """LIAR against each baseline on the same test rows: difference, bootstrap error and 95 % interval.

    Rows are resampled together for both models; seeds are averaged inside a resample. Positive is better.
    """
    gold = read_pairs(data("stsb", "test.jsonl"))[2] if any(c["task"] == "sts" for c in cells) else None
    out = []
    seen = {(c["task"], c["pattern"], c["inputs"]) for c in cells if c["sparsity"]}
    for task, pattern, inputs in sorted(seen):
        found = grid(cells, task=task, pattern=pattern, inputs=inputs)
        for (sparsity, criterion, method), rows in sorted(found.items()):
            for other in BASELINES if method == "liar" else ():
                base = {c["seed"]: c for c in found.get((sparsity, criterion, other), [])}
                pairs = [(c, base[c["seed"]]) for c in rows if c["seed"] in base]
                if pairs:
                    out.append(
                        {
                            "task": task,
                            "pattern": pattern,
                            "inputs": inputs,
                            "sparsity": sparsity,
                            "criterion": criterion,
                            "against": other,
                            "seeds": len(pairs),
                            **_bootstrap(task, pairs, gold),
                        }
                    )
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
    out = (
        "## LIAR against the baselines\n\nMean over criteria (positive: LIAR is better); in brackets the number of "
        "criteria whose 95 % interval lies above zero / below zero.\n\n"
        "| task, pattern, inputs | sparsity | criteria | − none | − bias | − mask tuning | − LIAR as published |\n"
        + "|---" * 7
        + "|\n"
    )
    for where in sorted({(d["task"], d["pattern"], d["inputs"], d["sparsity"]) for d in differences}):
        part = [d for d in differences if (d["task"], d["pattern"], d["inputs"], d["sparsity"]) == where]
        cols = []
        for other in BASELINES:
            mine = [d for d in part if d["against"] == other]
            mean = sum(d["difference"] for d in mine) / len(mine) if mine else math.nan
            cols.append(
                "–"
                if not mine
                else f"{mean:+.4f} ({sum(d['low'] > 0 for d in mine)} / {sum(d['high'] < 0 for d in mine)})"
            )
        out += (
            f"| {where[0]}, {where[1]}, {where[2]} | {where[3]:.0%} | {len({d['criterion'] for d in part})} | "
            + " | ".join(cols)
            + " |\n"
        )
    worse = [d for d in differences if d["high"] < 0]
    out += (
        "\nSurely worse than a baseline (95 %): "
        + (
            "; ".join(
                f"{d['task']} {d['pattern']} {d['sparsity']:.0%} {d['criterion']} against {d['against']} "
                f"{d['difference']:+.4f}"
                for d in worse
            )
            or "nowhere"
        )
        + ".\n\n"
    )
    return out


def criterion_table(differences: list[dict]) -> str:
    """LIAR minus bias compensation and mask tuning for every criterion, in the mean over sparsities above 30 %."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for d in differences:
        if d["sparsity"] > 0.3 and d["inputs"] == "dense" and d["against"] in ("bias", "mask_tuning"):
            found.setdefault((d["task"], d["pattern"]), {}).setdefault((d["criterion"], d["against"]), []).append(
                d["difference"]
            )
    if not found:
        return ""
    out = (
        "## Every criterion above 30 %\n\nLIAR minus bias compensation / minus mask tuning, mean over the "
        "sparsities above 30 % (positive: LIAR is better; perplexities fall).\n\n"
    )
    criteria = sorted({c for means in found.values() for c, _ in means})
    out += "| task, pattern | " + " | ".join(criteria) + " |\n|---" + "|---" * len(criteria) + "|\n"
    for (task, pattern), means in sorted(found.items()):
        shown = [
            " / ".join(
                f"{sum(v) / len(v):+.{1 if task.startswith('ppl') else 4}f}" if v else "–"
                for v in (means.get((c, other)) for other in ("bias", "mask_tuning"))
            )
            for c in criteria
        ]
        out += f"| {task}, {pattern} | " + " | ".join(shown) + " |\n"
    return out + "\n"


def sizes(cells: list[dict]) -> str:
    """Effect of the calibration size."""
    found = sorted(
        (c["sentences"], c["value"])
        for c in cells
        if (c["task"], c["pattern"], c["sparsity"], c["criterion"], c["method"], c["inputs"], c["seed"])
        == ("sts", "neurons", 0.5, "wifv", "liar", "dense", 0)
    )
    if len(found) < 2:
        return ""
    return (
        "## Calibration size (STS-B, neurons 50 %, WIFV, LIAR)\n\n| sentences | "
        + " | ".join(str(n) for n, _ in found)
        + " |\n|---"
        + "|---" * len(found)
        + "|\n| Spearman | "
        + " | ".join(f"{v:.4f}" for _, v in found)
        + " |\n\n"
    )


def phases(cells: list[dict]) -> str:
    timed = [c for c in cells if c.get("seconds_by_phase")]
    if not timed:
        return ""
    names = sorted({n for c in timed for n in c["seconds_by_phase"]})
    out = (
        "## Seconds by phase of whole runs (propagated; a shared machine, so ratios only)\n\n| run | "
        + " | ".join(names)
        + " |\n|---"
        + "|---" * len(names)
        + "|\n"
    )
    for c in timed:
        out += (
            f"| {c['task']} {c['pattern']} {c['sparsity']:.0%} {c['criterion']} {c['method']} | "
            + " | ".join(f"{c['seconds_by_phase'].get(n, 0):.1f}" for n in names)
            + " |\n"
        )
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
    for axis in axes.flat[len(criteria) :]:
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
        if task.startswith("ppl"):
            axis.set_yscale("log")
    for row in axes:
        row[0].set_ylabel(UNITS[task], fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
