"""Multiple choice by log-likelihood: known answers, the published forms of files, and lm-eval on the same items."""

from __future__ import annotations

import json
import math

import lm_eval_task
import pytest
import tiny
import torch

from pyprune.config import ConfigError
from pyprune.evaluation.choices import (
    Item,
    encode_pair,
    loglikelihoods,
    mcnemar,
    mean_and_error,
    paired,
    read_items,
    score,
)


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", vocab_size=tiny.CHARACTERS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def items(count, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def word(longest):
        size = int(torch.randint(1, longest, (), generator=draw))
        return "".join(chr(97 + int(torch.randint(26, (), generator=draw))) for _ in range(size))

    return [
        Item(f"Question: {word(20)}\nAnswer:", tuple(word(12) for _ in range(2 + i % 3)), i % 2) for i in range(count)
    ]


def test_a_score_is_the_sum_of_the_tokens_log_probabilities(model, tokenizer):
    head, after = encode_pair(tokenizer, "two and ", "two")
    assert tokenizer.decode(head) == "two and" and tokenizer.decode(after) == " two", "white space goes to the right"
    whole = torch.tensor(head + after)
    with torch.no_grad():
        logp = model(whole[None]).logits[0].double().log_softmax(-1)
    want = sum(logp[t - 1, whole[t]].item() for t in range(len(head), len(whole)))
    assert loglikelihoods(model, [(head, after)])[0].logp == pytest.approx(want, abs=1e-4)


def test_scores_do_not_depend_on_the_batch_and_come_in_order(model, tokenizer):
    pairs = [encode_pair(tokenizer, item.context, " " + choice) for item in items(9) for choice in item.choices]
    one, many = ([found.logp for found in loglikelihoods(model, pairs, batch_size=size)] for size in (1, 7))
    assert many == pytest.approx(one, abs=1e-4) and len(set(one)) == len(one)
    cut = [((list(range(4, 90)) * 3)[-200:], [7, 8])]  # longer than the model's 128 positions
    kept = [(cut[0][0][-127:], [7, 8])]
    assert loglikelihoods(model, cut)[0].logp == pytest.approx(loglikelihoods(model, kept)[0].logp, abs=1e-6)


def test_published_forms_of_files(tmp_path):
    arc = {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    (item,) = read_items(write(tmp_path / "arc.jsonl", [arc]))
    assert item == Item("Question: Why?\nAnswer:", ("a", "b", "c"), 2)
    raw = {"question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}}
    (item,) = read_items(write(tmp_path / "raw.jsonl", [{**raw, "answerKey": "B"}]))
    assert item == Item("Question: Why?\nAnswer:", ("a", "b"), 1)
    (tmp_path / "piqa").mkdir()
    write(tmp_path / "piqa/valid.jsonl", [{"goal": "g", "sol1": "x", "sol2": "y"}] * 2)
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n0\n")
    assert [i.gold for i in read_items(tmp_path / "piqa")] == [1, 0]
    assert read_items(tmp_path / "piqa")[0] == Item("Question: g\nAnswer:", ("x", "y"), 1)
    hella = {
        "activity_label": "Cook",
        "ctx_a": "He cuts. [title] Now",
        "ctx_b": "he",
        "endings": ["[x] eats.", "sits."],
    }
    (item,) = read_items(write(tmp_path / "h.jsonl", [{**hella, "endings": ["[x] eats.", "sits."], "label": "1"}]))
    assert item == Item("Cook: He cuts.. Now He", (" eats.", "sits."), 1)
    boolq = {"passage": "P", "question": "is it so", "answer": True}
    (item,) = read_items(write(tmp_path / "b.jsonl", [boolq]))
    assert item == Item("P\nQuestion: is it so?\nAnswer:", ("no", "yes"), 1)
    own = {"context": "One, two,", "choices": ["three", "four"], "answer": "three"}
    (item,) = read_items(write(tmp_path / "o.jsonl", [own]))
    assert item == Item("One, two,", ("three", "four"), 0)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "x"}], "no multiple-choice task: its keys are text"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 2}], "item 1 .* has answer 2 of 2 choices"),
        ([{"question": "x", "choices": ["a", "b"]}], "item 1 .* is not one of choices"),
        ([{"question": "x", "choices": ["a", "b"], "answer": "c"}], "item 1"),
        ([], "no rows"),
    ],
)
def test_refusals(rows, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        read_items(write(tmp_path / "x.jsonl", rows))


def test_known_figures_of_the_paired_test():
    assert mcnemar(0, 0) == 1 and mcnemar(0, 5) == pytest.approx(2 / 32) and mcnemar(3, 3) == 1
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    found = paired([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0])
    assert (found["only_dense"], found["only_pruned"], found["difference"]) == (2, 1, -0.25)
    assert "mcnemar_p" not in paired([0.2, 0.4], [0.1, 0.5])
    mean, error = mean_and_error([1.0, 0.0, 1.0, 1.0])
    assert mean == 0.75 and error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_the_scoring_is_lm_evals_on_the_same_items(model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra (pip install 'pyprune[eval]')")
    from lm_eval.api.task import ConfigurableTask

    from pyprune.evaluation.task_runs import through_lm_eval

    rows = [
        {
            "query": i.context.removesuffix("\nAnswer:").removeprefix("Question: "),
            "options": list(i.choices),
            "gold": i.gold,
        }
        for i in items(12, seed=3)
    ]
    path = write(tmp_path / "items.jsonl", rows)
    task = ConfigurableTask(config=lm_eval_task.multiple_choice(path))
    theirs = through_lm_eval(model, tokenizer, task, None, 4)
    ours = score(model, tokenizer, items(12, seed=3))
    assert ours["per_item"] == theirs["per_item"]
    for key in ("items", "acc", "acc_norm", "acc_standard_error", "acc_norm_standard_error"):
        assert ours[key] == pytest.approx(theirs[key]), key
    assert 0 < ours["acc"] < 1, "a test that something could fail"
