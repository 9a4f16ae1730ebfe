"""The README's picture, from the committed results: the time that pruning takes, what reconstruction gives back.

python -m benchmarks.picture     # docs/images/gains.svg
"""

from __future__ import annotations

import statistics

from benchmarks.common import RESULTS, ROOT, command_line
from benchmarks.common import read as rows_of

PICTURE = ROOT / "docs" / "images" / "gains.svg"
INK, FAINT, COLOURS = "#1f2937", "#9ca3af", ("#2563eb", "#93c5fd", "#d1d5db")
STEPS = {
    "mask": "mask\nonly",
    "LR": "layer\nby layer",
    "BR": "block\nby block",
    "BR+GP": "… towards\ndense",
    "BR+GP+CR": "… by two\nblocks",
}
"""A step of ``reconstruction_cpu.json`` → what the axis calls it."""
JOBS = (("sparsegpt", "unstructured", "SparseGPT 50 %"), ("sparsegpt", "2:4", "SparseGPT 2:4"))
JOBS += (("wanda", "unstructured", "Wanda 50 %"), ("wanda", "2:4", "Wanda 2:4"))


def speed(axes) -> None:
    """CPU seconds of the pruning call beside the published loop's, of the same run."""
    rows = [row for row in rows_of("main_job", RESULTS) if row["tool"] != "dense"]

    def seconds(method: str, pattern: str, **wanted) -> float:
        return next(
            row["cpu_seconds"]
            for row in rows
            if (row["method"], row["pattern"]) == (method, pattern)
            and row.get("inputs", "propagated") == "propagated"
            and all(row[key] == value for key, value in wanted.items())
        )

    for place, (method, pattern, label) in enumerate(reversed(JOBS)):
        bars = (
            seconds(method, pattern, tool="published loop"),
            seconds(method, pattern, tool="pyprune", compute="float32"),
            seconds(method, pattern, tool="pyprune", compute="bfloat16"),
        )
        for k, (length, colour) in enumerate(zip(bars, (COLOURS[2], COLOURS[1], COLOURS[0]))):
            axes.barh(place + 0.27 - 0.27 * k, length, height=0.25, color=colour)
            times = f"{length:.0f} s" + (f", {bars[0] / length:.1f}× as fast" if k else "")
            axes.text(length + 4, place + 0.27 - 0.27 * k, times, va="center", fontsize=7.5, color=INK)
        axes.text(-6, place, label, va="center", ha="right", fontsize=8.5, color=INK)
    axes.set_title("Pruning SmolLM2-135M: CPU seconds, less is better", fontsize=10, color=INK, loc="left")
    names = ("published loop", "pyprune, float32", "pyprune, bfloat16")
    handles = [axes.barh(0, 0, color=colour) for colour in (COLOURS[2], COLOURS[1], COLOURS[0])]
    axes.legend(handles, names, fontsize=7.5, frameon=False, loc="lower right")
    axes.set_yticks([])
    axes.set_xlim(0, 400)


def reconstruction(axes) -> None:
    """Perplexity of half of the weights, by what follows the mask; mean and range of the seeds."""
    rows = [row for row in rows_of("reconstruction_cpu", RESULTS) if not row["self_generated"]]
    dense = rows[0]["dense_wikitext2"]
    for method, colour, name in (
        ("magnitude", FAINT, "magnitude"),
        ("wanda", COLOURS[1], "Wanda"),
        ("sparsegpt", COLOURS[0], "SparseGPT"),
    ):
        points = []
        for place, step in enumerate(STEPS):
            found = [row["wikitext2"] for row in rows if (row["mask"], row["step"]) == (method, step)]
            if found and max(found) < 100:
                points.append((place, statistics.mean(found), min(found), max(found)))
        x, mean, low, high = zip(*points)
        axes.plot(x, mean, "o-", color=colour, markersize=4, linewidth=1.6, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(dense, color=INK, linewidth=0.8, linestyle=":")
    axes.text(0, dense + 0.8, f"the dense model: {dense:.1f}", fontsize=7.5, color=INK)
    axes.set_xticks(range(len(STEPS)), STEPS.values())
    axes.set_title("Half zeros, then repaired: perplexity, less is better", fontsize=10, color=INK, loc="left")
    axes.legend(fontsize=7.5, frameon=False, loc="upper right")


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pyprune"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.3), width_ratios=(1.15, 1))
    for axes, draw in zip(panels, (speed, reconstruction)):
        draw(axes)
        axes.tick_params(colors=INK, labelsize=8, length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
    figure.subplots_adjust(left=0.12, right=0.955, top=0.9, bottom=0.13, wspace=0.16)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, facecolor="white", metadata={"Date": None})
    print(PICTURE)


if __name__ == "__main__":
    command_line(main)
