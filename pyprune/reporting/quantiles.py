"""How the errors of a block spread over tokens and over sequences: the order of their quantiles, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyprune.config import ConfigError
from pyprune.reporting.plotting import pyplot


def quantile_order(levels: Sequence[float]) -> tuple[list[int], list[tuple[int, int]]]:
    """The places of ``levels`` as they are shown, the median first, and which of these are edges of one band.

    ``[0.05, 0.5, 0.95, 1.0]`` → ``[1, 0, 2, 3], [(1, 2)]``. Without a median the middle level takes its place.
    """
    middle = min(range(len(levels)), key=lambda q: abs(levels[q] - 0.5))
    pairs = [
        (low, high)
        for low in range(middle)
        for high in range(middle + 1, len(levels))
        if abs(levels[low] + levels[high] - 1) < 1e-9
    ]
    order = [middle, *(q for pair in pairs for q in pair)]
    bands = [(1 + 2 * k, 2 + 2 * k) for k in range(len(pairs))]
    return order + [q for q in range(len(levels)) if q not in order], bands


def quantile_name(level: float) -> str:
    """``median``, ``95 %``, ``largest``."""
    return {0.0: "smallest", 0.5: "median", 1.0: "largest"}.get(level) or f"{100 * level:g} %"


def picture(reports: Sequence[tuple[str, dict]], path: str | Path) -> None:
    """Quantiles of every block's error, a row of panels per run (name, report), over tokens and over sequences.

    Per kind of text the median, and bands around it. Raises ConfigError without matplotlib, and where no report has
    quantiles.
    """
    plt = pyplot()
    found = [
        (name, report) for name, report in reports if any(row.get("error_quantiles") for row in report["blocks"] or [])
    ]
    if not found:
        raise ConfigError("no quantiles to draw: none of these runs measured errors (probe_samples above 0)")
    figure, panels = plt.subplots(len(found), 2, figsize=(9.5, 0.6 + 3.1 * len(found)), squeeze=False, sharey="row")
    for row_of_panels, (name, report) in zip(panels, found):
        rows = [row for row in report["blocks"] if row.get("error_quantiles")]
        order, bands = quantile_order(report["error_quantile_levels"])
        x = [row["block"] for row in rows]
        for panel, over in zip(row_of_panels, ("tokens", "sequences")):
            for text in rows[0]["error_quantiles"]:
                curves = [[row["error_quantiles"][text][over][q] for row in rows] for q in order]
                (line,) = panel.plot(x, curves[0], linewidth=1.4, label=text.replace("_", "-"))
                for low, high in bands:
                    panel.fill_between(x, curves[low], curves[high], color=line.get_color(), alpha=0.18, linewidth=0)
            panel.set_yscale("log")
            panel.set_title(f"{name}, over {over}", fontsize=9)
            panel.set_xlabel("block", fontsize=8)
        row_of_panels[0].set_ylabel("relative error", fontsize=8)
        row_of_panels[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(Path(path).expanduser(), dpi=140)
    plt.close(figure)
