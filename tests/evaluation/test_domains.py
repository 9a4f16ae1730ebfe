"""Every run measures text of the calibration's kind beside text of another, and says how far the two lie apart."""

from __future__ import annotations

import json
import math

import pytest
import tiny

import pyprune
from pyprune.config import Calibration, Evaluation
from pyprune.data import builtin
from pyprune.evaluation.domains import GAP, IN, OFF, alone, gap_warning, generalisation, of_run
from pyprune.reporting.card import model_card
from pyprune.reporting.summary import summary_rows


def plan(evaluation=None, calibration=None):
    return [(a.source, a.domain, a.most) for a in of_run(evaluation or Evaluation(), calibration or Calibration())]


def test_what_a_run_measures():
    mine = Calibration(source="mine.jsonl")
    assert plan() == [(builtin.REST, IN, 8), (builtin.NOVEL, OFF, 8)]
    assert plan(None, mine) == [(None, IN, 8), (builtin.NOVEL, OFF, 8)]
    assert plan(Evaluation(text="a.txt"), mine) == [("a.txt", IN, 24), (builtin.NOVEL, OFF, 8)]
    # nobody calibrated on a.txt
    assert plan(Evaluation(text="a.txt")) == [("a.txt", OFF, 24), (builtin.REST, IN, 8)]
    assert plan(Evaluation(text="a.txt", off_domain=["b.txt", "c.txt"], max_windows=3), mine) == [
        ("a.txt", IN, 3),
        ("b.txt", OFF, 3),
        ("c.txt", OFF, 3),
    ]
    assert plan(Evaluation(off_domain="none")) == [(builtin.REST, IN, 8)]
    assert plan(Evaluation(max_windows=5)) == [(builtin.REST, IN, 5), (builtin.NOVEL, OFF, 5)]
    assert plan(None, Calibration(source="builtin:novel"))[1][0] == builtin.ESSAYS
    assert plan(Evaluation(enabled=False)) == []
    assert [a.source for a in alone(Evaluation())] == [builtin.REST, builtin.NOVEL]
    assert [(a.source, a.domain) for a in alone(Evaluation(text="a.txt"))] == [("a.txt", None)]


def test_the_gap_is_a_ratio_of_ratios():
    rows = [
        {"domain": IN, "ratio": 1.5},
        {"domain": OFF, "ratio": 2.0},
        {"domain": OFF, "ratio": 8.0},
        {"domain": None, "ratio": 9.0},
    ]
    found = generalisation(rows)
    assert found["in_domain_ratio"] == pytest.approx(1.5) and found["off_domain_ratio"] == pytest.approx(4.0)
    assert found["gap"] == pytest.approx(4 / 1.5) and found["warn_above"] == GAP
    (told,) = gap_warning(found)
    assert "generalisation gap 2.67" in told and "4.00 times" in told and "1.50 times" in told
    assert gap_warning({**found, "gap": GAP}) == []
    assert generalisation(rows[:1]) is None
    assert generalisation([*rows, {"domain": IN, "ratio": None}]) is None


def test_a_run_reports_both_kinds_side_by_side(folder, tmp_path):
    result = pyprune.prune(
        str(folder),
        calibration=Calibration(num_samples=4, seq_len=32),
        evaluation=Evaluation(window=48, max_windows=3),
        output=str(tmp_path / "out"),
        progress=False,
    )
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = report["evaluation"]
    assert [(row["domain"], row["windows"], row["window"]) for row in rows] == [(IN, 3, 48), (OFF, 3, 48)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["pruned"] / row["dense"], rel=1e-12)
        assert row["ratio_standard_error"] >= 0
    gap = report["generalisation"]
    assert gap["gap"] == pytest.approx(rows[1]["ratio"] / rows[0]["ratio"])
    shown = dict(summary_rows(result.report))["generalisation gap"]
    assert shown.startswith(f"{gap['gap']:.2f}: ")
    card = model_card(report, "out")
    assert f"Generalisation gap {gap['gap']:.2f}" in card and card.count("-domain | 3 × 48 tokens") == 2


def test_the_calibrations_own_source_is_measured_where_no_text_is_named(tokenizer):
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    document = "".join(f"{i:06d} " for i in range(2000))
    result = pyprune.prune(
        model,
        tokenizer=tokenizer,
        calibration=Calibration(source=[document], num_samples=6, seq_len=40, held_out=2),
        progress=False,
    )
    own, novel = result.report["evaluation"]
    assert (own["domain"], own["windows"], own["window"]) == (IN, 8, 40)
    assert (novel["domain"], novel["text"], novel["window"]) == (OFF, builtin.TEXTS[builtin.NOVEL], 40)


def test_ids_without_a_tokenizer_are_measured_alone():
    result = pyprune.prune(tiny.model("llama"), calibration=tiny.ids(8, 24), evaluation=tiny.ids(3, 24), progress=False)
    (row,) = result.report["evaluation"]
    assert row["domain"] == IN and result.report["generalisation"] is None
    losses = [math.log(row["dense"]), math.log(row["pruned"])]
    assert math.log(row["ratio"]) == pytest.approx(losses[1] - losses[0], abs=1e-9)


def test_a_window_longer_than_the_novel_is_no_error(tokenizer):
    from pyprune.evaluation.windows import windows_of

    told = []
    evaluation = Evaluation(text=["x " * 40_000], window=70_000)
    found = windows_of(of_run(evaluation, Calibration(source="x.txt")), evaluation, tokenizer, warn=told.append)
    assert [text.domain for text in found] == [IN] and "fewer than one window" in told[0]
