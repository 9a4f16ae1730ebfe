"""How far is safe: known curves with known answers."""

from __future__ import annotations

import math

import pytest
from reports import report

from pyprune.studies import safety
from pyprune.studies.tables import rows_of


def test_safe_stops_at_the_first_sparsity_beyond_the_limit():
    points = [(0.2, 1.01), (0.4, 1.2), (0.6, 1.05), (0.8, 9.0)]
    assert safety.safe(points, 1.1) == 0.2, "0.6 is within the limit by chance: what lies before it is not"
    assert safety.safe(points, 1.2) == 0.6 and safety.safe(points, 1.0) is None
    assert safety.safe([(0.2, math.inf)], 1.1) is None and safety.safe([(0.2, math.nan)], 1.1) is None


def test_the_limit_is_reached_on_a_straight_line_in_loss():
    assert safety.crossing([(0.4, 1.0), (0.6, 1.21)], 1.1) == pytest.approx(0.5)  # log 1.1 is half of log 1.21
    assert safety.crossing([(0.5, 1.21)], 1.1) == pytest.approx(0.25), "from the dense model on"
    assert safety.crossing([(0.5, 1.05)], 1.1) is None and safety.crossing([(0.5, math.inf)], 1.1) is None


def test_the_knee_is_where_the_curve_bends():
    steps = [k / 10 for k in range(1, 10)]
    broken = [(s, math.exp(0.0 if s <= 0.5 else s - 0.5)) for s in steps]  # flat, then straight up
    assert safety.knee(broken) == 0.5
    # loss = s⁴ on [0, 0.9]: s/0.9 − (s/0.9)⁴ is largest at s = 0.9 · 4^(−1/3) = 0.567
    assert safety.knee([(s, math.exp(s**4)) for s in steps]) == 0.6
    assert safety.knee([(s, math.exp(0.3 * s)) for s in steps]) is None, "a straight line has none"
    assert safety.knee([(0.5, 1.1), (0.6, 2.0)]) is None, "two points are no curve"
    assert safety.knee([(s, 1.0) for s in steps]) is None, "nothing is lost at all"
    assert safety.knee([*broken, (0.95, math.inf)]) == 0.5, "what is not finite lies beyond every knee"


def rows(**ratios) -> list[dict]:
    """``wanda={0.5: 1.05}`` → rows of one text."""
    return rows_of(
        (f"{how}-{s}", report(0, 10.0 * ratio, sparsity=s, **settings(how)))
        for how, curve in ratios.items()
        for s, ratio in curve.items()
    )


def settings(how: str) -> dict:
    return {"pattern": "neurons", "reconstruct": "liar"} if how == "neurons" else {"method": how}


def test_the_recommendation_is_the_highest_safe_sparsity_and_of_equals_the_best():
    found = safety.recommendation(
        rows(wanda={0.4: 1.02, 0.5: 1.09, 0.6: 1.5}, sparsegpt={0.4: 1.01, 0.5: 1.04, 0.6: 1.3}), 1.1
    )
    assert found == [
        "Zeros inside the matrices: sparsegpt + none, unstructured, sparsity 0.5. Its perplexity is 1.04 times the "
        "dense model's on the text that suffers most (one run); at 0.6 it is 1.3 times."
    ]


def test_both_kinds_of_pruning_are_answered_and_nothing_safe_is_said():
    told = safety.recommendation(rows(wanda={0.5: 1.05}, neurons={0.25: 1.4, 0.5: 3.0}), 1.1)
    assert "nothing higher was tried" in told[0]
    assert "nothing that was tried stays within 1.1" in told[1] and "sparsity 0.25 with 1.4 times" in told[1]
    assert safety.recommendation([], 1.1)[0].startswith("No perplexity was measured")


def test_the_text_that_suffers_most_decides():
    runs = [report(0, 10.5), report(1, 10.5)]
    for one in runs:
        one["evaluation"].append({"text": "prose", "dense": 10.0, "pruned": 20.0})
    (curve,) = safety.curves(rows_of(enumerate(runs)), 1.1)
    assert curve["points"] == [{"sparsity": 0.5, "ratio": 2.0}] and curve["safe"] is None
