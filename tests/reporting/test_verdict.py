"""The verdict follows its stated rule."""

from __future__ import annotations

import math

import pytest

from pyprune.reporting.verdict import last_errors, ratio, verdict


def row(factor: float, text: str = "t") -> dict:
    return {"text": text, "dense": 20.0, "pruned": 20.0 * factor}


@pytest.mark.parametrize(
    ("factors", "level"),
    [
        ([1.0], "close"),
        ([1.1], "close"),
        ([1.11], "visible"),
        ([1.6], "heavy"),
        ([3.1], "damaged"),
        ([1.0, 2.0], "heavy"),
    ],
)
def test_the_worst_text_decides(factors, level):
    assert verdict({"evaluation": [row(factor) for factor in factors]}).level == level


def test_a_ratio_that_rounds_to_one_is_said_in_words():
    assert "on t, within 0.5 % of the dense model's: " in verdict({"evaluation": [row(1.004)]}).sentences[0]
    assert "on t, 1.01 times the dense model's: " in verdict({"evaluation": [row(1.006)]}).sentences[0]


def test_what_is_not_finite_is_damaged_and_nothing_measured_is_said():
    assert ratio({"dense": 20.0, "pruned": math.nan}) is None
    assert verdict({"evaluation": [row(1.0), {"text": "u", "dense": 20.0, "pruned": None}]}).level == "damaged"
    assert verdict({"evaluation": []}).level == "unmeasured"


def test_texts_apart_and_held_out_errors_are_pointed_out():
    found = verdict(
        {"evaluation": [row(1.2, "wiki"), row(1.9, "prose")], "blocks": [{"error": 0.1, "error_held_out": 0.2}]}
    )
    assert "1.9 times the dense perplexity on prose, 1.2 times on wiki" in found.sentences[1]
    assert "2 times as large on held-out text" in found.sentences[2]
    calm = verdict({"evaluation": [row(1.2), row(1.7)], "blocks": [{"error": 0.1, "error_held_out": 0.14}]})
    assert len(calm.sentences) == 1


def test_a_refinement_has_the_last_word():
    window = {"after_calibration": 0.1, "after_held_out": 0.3}
    assert last_errors({"blocks": [{"error": 1.0}], "refinement": {"windows": [window]}}) == (0.1, 0.3)
