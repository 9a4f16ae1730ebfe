"""SQuAD: the official normalisation and scores, the best span, long contexts in pieces."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers as hf
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from pyprune.config import ConfigError
from pyprune.evaluation import squad
from pyprune.evaluation.task_runs import evaluate_tasks

CONFIG = {**tiny._COMMON, "vocab_size": tiny.CHARACTERS}


def reader(seed=0):
    torch.manual_seed(seed)
    return tiny.spread(hf.BertForQuestionAnswering(hf.BertConfig(**CONFIG)).eval())


class BracketsForQuestionAnswering(hf.BertForQuestionAnswering):
    """Answers with the text from [ to ], and with the first token where there are none."""

    def forward(self, input_ids, **_):
        start, end = tiny.tokenizer().convert_tokens_to_ids(["[", "]"])
        logits = [9.0 * (input_ids == token) for token in (start, end)]
        for part in logits:
            part[:, 0] += 1
        return QuestionAnsweringModelOutput(start_logits=logits[0], end_logits=logits[1])


def test_official_normalisation_and_scores():
    assert squad.normalised("The  Levi's Stadium, an arena.") == "levis stadium arena"
    assert squad.normalised("Theatre a") == "theatre", "articles are whole words"
    assert squad.exact_match("the Denver Broncos!", "Denver Broncos") == 1
    golds = ("Santa Clara, California", "Levi's Stadium in the San Francisco Bay Area at Santa Clara, California.")
    assert squad.best(squad.exact_match, "Levi's Stadium", golds) == 0
    assert squad.best(squad.f1, "Levi's Stadium", golds) == pytest.approx(2 * 2 / (2 + 11)), "2 of 2 words, 2 of 11"
    assert squad.f1("no no yes", "no yes yes") == pytest.approx(2 / 3), "words count as often as they occur"
    assert squad.best(squad.f1, "", ()) == 1 and squad.best(squad.f1, "x", ()) == 0


def test_best_span_is_that_of_a_search():
    g = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 50, generator=g)
    expected = max((float(start[i] + end[j]), i, j) for i in range(50) for j in range(i, min(50, i + 7)))
    assert squad.best_span(start, end, longest=7) == pytest.approx(expected)


@pytest.mark.parametrize("before", [0, 90, 115, 333, 590])
def test_an_answer_is_found_anywhere_in_a_long_context(before):
    """128 tokens hold a fifth of the context; an answer at the edge of one piece lies whole in the next."""
    context = "x" * before + "[rome]" + "y" * (594 - before)
    model, words = BracketsForQuestionAnswering(hf.BertConfig(**CONFIG)), tiny.tokenizer()
    item = squad.Item("where? " * 30, context, ("Rome",))
    assert squad.answers_of(model, words, [item]) == ["[rome]"]


def test_no_answer_only_where_a_question_of_the_file_has_none():
    model, words = BracketsForQuestionAnswering(hf.BertConfig(**CONFIG)), tiny.tokenizer()
    plain = squad.Item("who", "nobody here", ("nobody",))
    without, answered = squad.Item("who", "nobody is here", ()), squad.Item("who", "it is [me]", ("me",))
    assert squad.answers_of(model, words, [plain])[0] != ""
    assert squad.answers_of(model, words, [plain, without, answered]) == ["", "", "[me]"]
    row = squad.measure(model, words, [without, answered])
    assert row["exact_match"] == row["f1"] == 1.0


@torch.no_grad()
def test_a_pruned_reader_beside_its_dense_one(tmp_path):
    """Spans of a real model equal those of a plain call; the official file and jsonl rows give the same figures."""
    words, dense = tiny.tokenizer(encoder=True), reader()
    pruned = tiny.zeroed(reader(), 0.8)
    rows = []
    for i in range(12):
        question, context = f"q{i}?", f"the {i} of {chr(97 + i)}{i * i} and then {i + 1}"
        out = dense(**words(question, context, return_tensors="pt"))
        skip = len(question)
        _, first, last = squad.best_span(out.start_logits[0, skip:], out.end_logits[0, skip:])
        rows.append({"question": question, "context": context, "answers": {"text": [context[first : last + 1]]}})
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = evaluate_tasks(pruned, [str(file)], against=dense, tokenizer=words)
    assert row["dense"]["exact_match"] == row["dense"]["f1"] == 1.0, "the answers are the dense model's own"
    assert row["exact_match"] < 1 and row["exact_match"] <= row["f1"] < 1
    assert row["paired"]["exact_match"]["only_dense"] == round(12 * (1 - row["exact_match"]))
    assert row["paired"]["f1"]["difference"] == pytest.approx(row["f1"] - 1)

    official = [
        {"context": r["context"], "qas": [{"question": r["question"], "answers": [{"text": r["answers"]["text"][0]}]}]}
        for r in rows
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": official}]}))
    (again,) = evaluate_tasks(pruned, [str(tmp_path / "dev.json")], tokenizer=words)
    assert again["f1"] == row["f1"] and again["items"] == 12


def test_refusals_come_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("worked"))
    file = tmp_path / "dev.json"
    file.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]})
    )
    with pytest.raises(ConfigError, match="BertModel has no question-answering head"):
        evaluate_tasks(tiny.model("bert"), [str(file)], tokenizer=tiny.tokenizer())
    file.write_text('{"data": [{}]}')
    with pytest.raises(ConfigError, match="not of SQuAD's form"):
        evaluate_tasks(reader(), [str(file)], tokenizer=tiny.tokenizer())
