"""How errors spread: what is the middle, what is a band, and the picture of both."""

from __future__ import annotations

import pytest

from pyprune.config import ConfigError
from pyprune.execution.error_probes import LEVELS
from pyprune.reporting.quantiles import picture, quantile_name, quantile_order


def test_bands_lie_symmetrically_around_the_median():
    order, bands = quantile_order(LEVELS)
    shown = [LEVELS[q] for q in order]
    assert shown[0] == 0.5 and sorted(shown) == sorted(LEVELS)
    assert [(shown[low], shown[high]) for low, high in bands] == [(0.05, 0.95), (0.25, 0.75)]
    assert quantile_order([0.5, 0.9]) == ([0, 1], []) and quantile_order([0.1, 0.9]) == ([0, 1], [])
    assert [quantile_name(level) for level in (0.05, 0.5, 1.0)] == ["5 %", "median", "largest"]


def test_the_picture_draws_medians_and_bands_of_every_kind_of_text(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    spread = {"tokens": [1.0, 2, 3, 4, 5, 6], "sequences": [2.0, 3, 4, 5, 6, 7]}
    blocks = [
        {
            "block": k,
            "error_quantiles": {
                text: {over: [10**k * scale * value for value in values] for over, values in spread.items()}
                for text, scale in (("calibration", 1), ("held_out", 2))
            },
        }
        for k in range(2)
    ]
    lines, bands = [], []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **more: lines.append((x, y)) or plot(self, x, y, **more))
    monkeypatch.setattr(
        Axes,
        "fill_between",
        lambda self, x, low, high, **more: bands.append((low, high)) or fill(self, x, low, high, **more),
    )
    picture([("run", {"blocks": blocks, "error_quantile_levels": LEVELS})], tmp_path / "q.png")
    assert lines == [([0, 1], y) for y in ([3, 30], [6, 60], [4, 40], [8, 80])], "tokens, then sequences"
    assert bands[:2] == [([1, 10], [5, 50]), ([2, 20], [4, 40])] and len(bands) == 8
    assert (tmp_path / "q.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_without_quantiles_have_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no quantiles to draw"):
        picture([("run", {"blocks": [{"block": 0, "error": None}]})], tmp_path / "q.png")


def test_without_matplotlib_a_picture_is_refused_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="a picture needs matplotlib: pip install matplotlib"):
        picture([], tmp_path / "picture.png")
