"""A model against limits: what passes, what fails, and what is named."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import pyprune
from pyprune.cli.commands import main
from pyprune.config import ConfigError
from pyprune.watching import check

TEXT = [tiny.ids(3, 16, seed=1), tiny.ids(2, 16, seed=2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model, and it with a head that is far too sure."""
    root = tmp_path_factory.mktemp("pair")
    for name in ("base", "worse"):
        model = tiny.model("llama", vocab_size=tiny.CHARACTERS, num_hidden_layers=2)
        if name == "worse":
            with torch.no_grad():
                model.lm_head.weight.mul_(3)
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root / "base", root / "worse"


def test_figures_are_those_of_evaluate_and_the_limit_decides(pair):
    base, worse = pair
    before, after = (pyprune.evaluate(str(place), TEXT)["texts"] for place in pair)
    ratios = [b["perplexity"] / a["perplexity"] for a, b in zip(before, after)]
    assert min(ratios) > 1.2
    found = pyprune.check(worse, base, text=TEXT[0], max_perplexity_ratio=ratios[0] * 0.99)
    (figure,) = found["figures"]
    assert not found["passed"] and figure["value"] == pytest.approx(ratios[0])
    assert (figure["before"], figure["after"]) == (before[0]["perplexity"], after[0]["perplexity"])
    assert pyprune.check(worse, base, text=TEXT[0], max_perplexity_ratio=ratios[0] * 1.01)["passed"]
    assert pyprune.check(base, base, text=TEXT[0])["figures"][0]["value"] == 1.0


def test_self_generated_text_is_the_other_model_s(pair):
    base, worse = pair
    found = pyprune.check(worse, base, text=TEXT[0], self_generated=3, seq_len=12, seed=5)
    ids = pyprune.generate(str(base), num_samples=3, seq_len=12, seed=5)
    figure = found["figures"][1]
    assert figure["what"] == "perplexity on 3 self-generated sequences of 12 tokens"
    expected = [pyprune.evaluate(str(place), torch.stack(ids))["perplexity"] for place in pair]
    assert [figure["before"], figure["after"]] == pytest.approx(expected)


def test_a_perplexity_that_is_not_finite_fails():
    key = ("perplexity", "t")
    for one, two in ((10.0, float("nan")), (10.0, float("inf")), (float("nan"), 10.0)):
        assert not check._compared({key: one}, {key: two}, 1e9, 0.02)[0]["passed"]


def test_the_command_exits_with_1_and_names_the_figure(pair, tmp_path, capsys):
    base, worse = map(str, pair)
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ["--against", base, "--text", str(text), "--window", "16", "--max-windows", "4"]
    with pytest.raises(SystemExit) as stop:
        main(["check", worse, *options, "--max-perplexity-ratio", "1.01"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 1 and "FAILED perplexity on" in out and "limit × 1.01" in out and "failed: 1 of 1" in out
    with pytest.raises(SystemExit) as stop:
        main(["check", base, *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and found["passed"]
    with pytest.raises(SystemExit) as stop:
        main(["check", base, *options[2:]])
    assert stop.value.code == 2 and "--against" in capsys.readouterr().err


def test_encoders_are_checked_by_tasks(tmp_path):
    rows = [("ab", "ab", 5), ("ab", "zq", 1), ("xy", "xw", 3)]
    pairs = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in rows]
    (tmp_path / "sts.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    place = tmp_path / "bert"
    tiny.model("bert", vocab_size=tiny.CHARACTERS).save_pretrained(place)
    tiny.tokenizer(encoder=True).save_pretrained(place)
    found = pyprune.check(place, place, tasks=[tmp_path / "sts.jsonl"])
    assert found["passed"] and found["figures"][0]["value"] == 0.0
    with pytest.raises(ConfigError, match="name tasks to check it by"):
        pyprune.check(place, place)


def test_multiple_choice_is_scored_as_by_eval(pair, tmp_path):
    from pyprune.evaluation.task_runs import evaluate_tasks

    items = [
        {"question": f"Which letter is {c}?", "choices": ["a", "b", "c"], "answer": k} for k, c in enumerate("abc")
    ]
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, items)))
    path = str(tmp_path / "mc.jsonl")
    found = pyprune.check(pair[1], pair[0], text=TEXT[0], tasks=[path], max_perplexity_ratio=1e9, max_drop=1)
    scores = {figure["what"]: (figure["before"], figure["after"]) for figure in found["figures"][1:]}
    (before,), (after,) = (evaluate_tasks(str(place), [path]) for place in pair)
    assert found["passed"] and scores[f"score of {path}, acc"] == (before["acc"], after["acc"])


def test_a_score_may_fall_by_max_drop_and_no_more():
    before, after = {("task", "t"): 0.80}, {("task", "t"): 0.775}
    (figure,) = check._compared(before, after, 1.1, 0.02)
    assert not figure["passed"] and figure["value"] == pytest.approx(0.025)
    assert check._compared(before, after, 1.1, 0.03)[0]["passed"]
    (figure,) = check._compared(after, before, 1.1, 0.0)
    assert figure["passed"], "a score that rises is never too low"
    assert "rose by 0.025, limit 0" in check.sentence(figure)


def report(error: float, held_out: float, **more) -> str:
    return json.dumps({"blocks": [{"error": error, "error_held_out": held_out, **more}]})


@pytest.mark.parametrize(
    ("base", "own", "passed"),
    [
        ((0.30, 0.40), (0.20, 0.45), [False]),  # calibration down, held-out up
        ((0.30, 0.40), (0.20, 0.39), [True]),  # both down
        ((0.30, 0.40), (0.35, 0.45), [True]),  # both up: worse, but not fitted to the calibration text
        ((0.30, 0.40), (0.20, 0.403), [True]),  # below a hundredth
    ],
)
def test_overfitting_since_the_other_run_is_flagged(tmp_path, base, own, passed):
    for name, errors in (("base", base), ("own", own)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report(*errors))
    assert [f["passed"] for f in check._overfitting(tmp_path / "own", tmp_path / "base")] == passed


def test_overfitting_within_a_run_is_flagged(tmp_path):
    steps = [
        {"step": "mask", "calibration": 0.3, "held_out": 0.3},
        {"step": "block", "calibration": 0.1, "held_out": 0.4},
    ]
    (tmp_path / "report.json").write_text(report(0.1, 0.4, steps=steps))
    (figure,) = check._overfitting(tmp_path, tmp_path / "none")
    assert not figure["passed"] and "within the run" in figure["what"] and figure["value"] == pytest.approx(1 / 3)
    assert "rose by 33.3%, limit 1% where the calibration error falls" in check.sentence(figure)
    assert "rose by 33.3%, as calibration did" in check.sentence({**figure, "passed": True})
    assert "fell by 20.0%, limit 1%" in check.sentence({**figure, "passed": True, "value": -0.2})


@pytest.mark.parametrize("limits", [{"max_perplexity_ratio": 0}, {"max_drop": -0.1}])
def test_limits_that_are_none_are_refused(limits, pair):
    with pytest.raises(ConfigError, match="must be"):
        pyprune.check(pair[1], pair[0], **limits)
