"""``pyprune eval --tasks`` on files: what their rows tell, two models side by side, refusals before any work."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import pyprune
from pyprune.cli.commands import main
from pyprune.config import ConfigError
from pyprune.evaluation import choices, task_runs, tasks
from pyprune.evaluation.block_by_block import Blockwise
from pyprune.evaluation.task_runs import evaluate_tasks
from pyprune.execution.executor import Resident
from pyprune.execution.weight_streaming import Streamed
from pyprune.model.blocks import ModelView


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"question": f"what is {i}", "choices": [f"it is {i}", "no", f"{i * i}"], "answer": i % 3} for i in range(9)
    ]
    return write(tmp_path / "questions.jsonl", rows)


def halved(folder, out):
    pyprune.prune(
        str(folder),
        output=out,
        sparsity=0.7,
        calibration={"num_samples": 4, "seq_len": 32},
        evaluation={"enabled": False},
        progress=False,
    )


def test_a_pruned_model_beside_its_dense_one_on_the_command_line(folder, questions, tmp_path, capsys):
    out = str(tmp_path / "out")
    halved(folder, out)
    main_ = lambda *words: main(["eval", out, *words])  # noqa: E731
    with pytest.raises(SystemExit) as end:
        main_("--tasks", questions, "--against", "dense", "--limit", "8", "--json")
    assert not end.value.code
    printed, err = capsys.readouterr()
    said = [err.index(f"evaluating · {text}") for text in (f"loading {tmp_path / 'out'}", "measuring tasks\n")]
    said += [err.index(f"evaluating · {text}") for text in (f"loading {folder}", "measuring tasks of the dense model")]
    assert said == sorted(said), "loading is not called measuring"
    (row,) = json.loads(printed)
    assert row["items"] == 8 and row["task"] == questions
    test = row["paired"]["acc"]
    assert row["acc"] - row["dense"]["acc"] == pytest.approx(test["difference"])
    assert test["difference"] == pytest.approx((test["only_pruned"] - test["only_dense"]) / 8)
    (alone,) = evaluate_tasks(str(folder), [questions], limit=8)
    assert alone["acc"] == row["dense"]["acc"], "the dense column is the dense model's"
    report, card = (tmp_path / "out" / "report.json"), (tmp_path / "out" / "README.md")
    assert json.loads(report.read_text())["tasks"] == [row], "the folder holds what was measured"
    line = f"| {questions} | 8 | acc | {row['dense']['acc']:.4f} ±"
    assert line in card.read_text() and f"{test['difference']:+.4f} ±" in card.read_text()
    assert "tasks.0.paired.acc.difference" in (tmp_path / "out" / "report.html").read_text()
    other = write(tmp_path / "other.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}] * 3)
    with pytest.raises(SystemExit):
        main_("--tasks", other)
    assert "added to" in capsys.readouterr().out
    held = json.loads(report.read_text())["tasks"]
    assert held[0] == row and [one["task"] for one in held] == [questions, other], "other tasks stay"
    with pytest.raises(SystemExit):
        main_("--tasks", questions, "--limit", "4", "--json")
    capsys.readouterr()
    assert [(one["task"], one["items"]) for one in json.loads(report.read_text())["tasks"]] == [
        (other, 3),
        (questions, 4),
    ], "measured again, a task is there once"
    with pytest.raises(SystemExit) as end:
        main_("--tasks", questions, "--against", "dense")
    shown = capsys.readouterr().out
    assert not end.value.code and "acc_norm" in shown and "difference" in shown


def test_packed_and_plain_models_score_alike(folder, questions, tmp_path):
    out = str(tmp_path / "out")
    halved(folder, out)
    pyprune.pack(out, str(tmp_path / "packed"))
    plain, packed = (evaluate_tasks(name, [questions])[0] for name in (out, str(tmp_path / "packed")))
    assert {**packed, "task": 0} == {**plain, "task": 0}


def test_a_streamed_model_scores_as_in_memory_and_reads_each_block_once_per_task(
    folder, questions, tmp_path, monkeypatch
):
    halved(folder, tmp_path / "out")
    whole = evaluate_tasks(str(tmp_path / "out"), [questions, questions], against=str(folder), stream="never")
    read = []
    of_block = Streamed._read
    monkeypatch.setattr(Streamed, "_read", lambda self, index: read.append(index) or of_block(self, index))
    apart = evaluate_tasks(str(tmp_path / "out"), [questions, questions], against=str(folder), stream="always")
    assert apart == whole, "report and summary are made from these rows"
    assert sorted(read) == sorted(4 * list(range(max(read) + 1))), "two models, two tasks"


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_log_likelihoods_block_by_block_are_those_of_the_whole_model(batch_size):
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    ids = [row.tolist() for row in tiny.ids(9, 40)]
    pairs = [(row[: 5 + i], row[5 + i : 6 + 2 * i]) for i, row in enumerate(ids)] + [(4 * ids[0], [7, 8])]
    with torch.no_grad():
        best = model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax().item()
    pairs.append((pairs[0][0], [best]))
    whole = choices.loglikelihoods(model, pairs, batch_size=batch_size)
    apart = choices.loglikelihoods(Blockwise(ModelView(model), Resident()), pairs, batch_size=batch_size)
    assert [one.logp for one in apart] == pytest.approx([one.logp for one in whole], abs=1e-4)
    assert [one.greedy for one in apart] == [one.greedy for one in whole] and whole[-1].greedy and not whole[0].greedy


def test_what_cannot_be_streamed_is_refused_before_any_work(folder, questions, tmp_path, monkeypatch):
    tiny.model("bert", vocab_size=tiny.CHARACTERS).save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(task_runs, "_measured", lambda *a: pytest.fail("worked"))
    with pytest.raises(ConfigError, match="in memory"):
        evaluate_tasks(tiny.model("llama"), [questions], tokenizer=tiny.tokenizer(), stream="always")
    with pytest.raises(ConfigError, match="does not predict the next token, and only"):
        evaluate_tasks(str(tmp_path / "encoder"), [questions], stream="always")
    with pytest.raises(ConfigError, match="in memory"):
        evaluate_tasks(str(folder), [questions], against=tiny.model("llama"), stream="always")
    assert main_code(["eval", str(folder), "--latency", "--against", str(folder), "--stream", "always"]) == 2


def test_sentence_pairs_and_labelled_sentences_for_encoders(tmp_path):
    words = tiny.tokenizer(encoder=True)
    dense = tiny.model("bert", vocab_size=tiny.CHARACTERS)
    other = tiny.model("bert", vocab_size=tiny.CHARACTERS, seed=1)
    pairs = [{"sentence1": f"a {i}", "sentence2": "b" * (i + 1), "score": (i * 7) % 5} for i in range(20)]
    file = write(tmp_path / "pairs.jsonl", pairs)
    (row,) = evaluate_tasks(other, [file], against=dense, tokenizer=words)
    assert row["dense"]["spearman"] == tasks.sts_spearman(dense, words, file)["spearman"]
    assert row["paired"]["spearman"]["difference"] == pytest.approx(row["spearman"] - row["dense"]["spearman"])
    assert row["spearman_standard_error"] > 0

    (tmp_path / "sst").mkdir()
    labelled = [{"sentence": ("good " if i % 2 else "zzz ") * (1 + i % 3), "label": i % 2} for i in range(24)]
    write(tmp_path / "sst/train.jsonl", labelled)
    write(tmp_path / "sst/dev.jsonl", labelled[:10])
    (row,) = evaluate_tasks(dense, [str(tmp_path / "sst")], tokenizer=words)
    assert row["items"] == 10 and row["acc"] == 1.0, "the two words are easily told apart"


def test_refusals_come_before_any_work(folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("worked"))
    model, words = tiny.model("bert", vocab_size=tiny.CHARACTERS), tiny.tokenizer(encoder=True)
    with pytest.raises(ConfigError, match="does not predict the next token"):
        evaluate_tasks(model, [questions], tokenizer=words)
    with pytest.raises(ConfigError, match="no such file"):
        evaluate_tasks(model, [questions.replace("questions", "other")], tokenizer=words)
    with pytest.raises(ConfigError, match="put train.jsonl beside it"):
        evaluate_tasks(model, [write(tmp_path / "dev.jsonl", [{"sentence": "x", "label": 1}])], tokenizer=words)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        evaluate_tasks(model, [questions])
    assert main_code(["eval", str(folder), "--tasks", questions, "--window", "9"]) == 2
    assert main_code(["eval", str(folder), "--limit", "9"]) == 2


def main_code(words):
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code
