"""GLUE's tasks: metrics by hand, the public forms of the files, a model's own head and a linear one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf

import pyprune
from pyprune.config import ConfigError
from pyprune.evaluation import glue, tasks
from pyprune.evaluation.task_runs import evaluate_tasks, print_tasks

PREDICTED = torch.tensor([1] * 6 + [0] * 2 + [1] + [0] * 3)
LABELS = torch.tensor([1] * 8 + [0] * 4)
"""6 true positives, 2 false negatives, 1 false positive, 3 true negatives."""


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def classifier(classes=2, seed=0, **config):
    """A tiny BERT with a classification head."""
    config = hf.BertConfig(**{**tiny._COMMON, "vocab_size": tiny.CHARACTERS}, num_labels=classes, **config)
    torch.manual_seed(seed)
    return tiny.spread(hf.BertForSequenceClassification(config).eval())


@torch.no_grad()
def logits_of(model, words, texts):
    """Logits of texts one by one, ``[texts, classes]``; first the bias is set so that every class is answered."""
    model.bert.pooler.dense.weight.div_(6)

    def plain():
        return torch.cat([model(**words(*text, return_tensors="pt")).logits for text in texts])

    model.classifier.bias.sub_(plain().mean(0))
    return plain()


def test_metrics_computed_by_hand():
    assert glue.f1(PREDICTED, LABELS) == pytest.approx(12 / 15)
    assert glue.matthews(PREDICTED, LABELS) == pytest.approx((6 * 3 - 1 * 2) / (7 * 8 * 4 * 5) ** 0.5)
    assert glue.matthews(LABELS, LABELS) == 1 and glue.matthews(1 - LABELS, LABELS) == -1
    assert glue.matthews(torch.ones(12).long(), LABELS) == 0, "all one class: undefined, 0 as GLUE has it"
    assert glue.f1(torch.zeros(3).long(), torch.zeros(3).long()) == 0


def test_a_row_has_each_metric_with_its_error():
    row = glue.scored(PREDICTED, glue.Examples(([""] * 12,), LABELS), ("acc", "f1"), "own")
    assert row["acc"] == 9 / 12 and row["f1"] == pytest.approx(0.8)
    assert row["acc_standard_error"] == pytest.approx((0.75 * 0.25 / 11) ** 0.5)
    assert 0.02 < row["f1_standard_error"] < 0.3
    order = torch.tensor([0, 8])
    assert row["statistics"]["f1"](order) == pytest.approx(2 / 3), "one hit, one false positive"


@pytest.mark.parametrize(
    "name, text, texts, labels",
    [
        ("cola/dev.tsv", 'gj04\t1\t\tThe "x" sank.\ngj04\t0\t*\tSank it\n', [['The "x" sank.', "Sank it"]], [1, 0]),
        ("sst2/dev.tsv", "sentence\tlabel\nfine\t1\n", [["fine"]], [1]),
        ("mrpc/dev.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta b\tb a\n", [["a b"], ["b a"]], [1]),
        ("qqp/dev.tsv", "id\tquestion1\tquestion2\tis_duplicate\n3\tq\tr\t0\n", [["q"], ["r"]], [0]),
        ("qnli/dev.tsv", "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n", [["q"], ["s"]], [1]),
        (
            "mnli/dev.tsv",
            "sentence1\tsentence2\tlabel1\tgold_label\np\th\tneutral\tcontradiction\n",
            [["p"], ["h"]],
            [2],
        ),
        ("mnli/dev.jsonl", '{"premise": "p", "hypothesis": "h", "label": 1}\n', [["p"], ["h"]], [1]),
    ],
)
def test_published_forms(tmp_path, name, text, texts, labels):
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text(text)
    found = glue.read_examples(file)
    assert list(found.texts) == texts and found.labels.tolist() == labels
    keys = glue.fields_of(glue.read_rows(file)[0])
    expected = {"cola": ("mcc",), "mrpc": ("acc", "f1"), "qqp": ("acc", "f1")}.get(file.parent.name, ("acc",))
    assert glue.metrics_of(file, keys) == expected


def test_a_folder_is_measured_on_the_split_that_has_labels(tmp_path):
    for part, label in (("train", 1), ("test", -1), ("validation", 0)):
        write(tmp_path / f"rte/{part}.jsonl", [{"sentence1": "a", "sentence2": "b", "label": label}])
    assert glue.held_out_file(tmp_path / "rte").name == "validation.jsonl"


def test_linear_head_of_three_classes_is_the_optimum():
    """At the optimum the mean of (softmax − one-hot) · x equals the penalty's gradient, here computed in float64."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 4, generator=g), torch.randint(0, 3, (300,), generator=g)
    x[torch.arange(300), labels] += 1.5
    head = tasks.fit_head(x, labels, decay=0.01)
    assert head.shape == (5, 3)
    assert float((tasks.predicted_classes(x, head) == labels).float().mean()) > 0.7
    std, mean = x.std(0).double(), x.mean(0).double()
    weight = torch.cat([head[:-1].double() * std[:, None], (head[-1].double() + mean @ head[:-1].double())[None]])
    inputs = torch.cat([(x.double() - mean) / std, torch.ones(300, 1)], 1)
    wrong = (inputs @ weight).softmax(1) - torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(inputs.T @ wrong / 300, -2 * 0.01 * weight, rtol=0, atol=2e-4)


def test_pairs_by_a_linear_head_on_frozen_vectors(tmp_path):
    """Equal or different sentences: only |u − v| tells them apart."""
    texts = ["ab", "zz y", "12 34", "hello", "q", "KLM"]
    rows = [{"question1": a, "question2": b, "label": int(a == b)} for a in texts for b in (*texts, a, a, a)]
    write(tmp_path / "pairs/train.jsonl", rows)
    write(tmp_path / "pairs/dev.jsonl", rows[::2])
    model = tiny.model("bert", vocab_size=tiny.CHARACTERS)
    (row,) = evaluate_tasks(model, [str(tmp_path / "pairs")], tokenizer=tiny.tokenizer(encoder=True))
    assert row["head"] == "linear" and row["acc"] == row["f1"] == 1.0


def test_own_head_is_transformers_in_glues_order_of_labels(tmp_path):
    words = tiny.tokenizer(encoder=True)
    names = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    model = classifier(3, id2label=names, label2id={name: number for number, name in names.items()})
    rows = [{"premise": chr(98 + i) * (1 + i % 4), "hypothesis": chr(97 + i) * 5, "label": i % 3} for i in range(12)]
    examples = glue.read_examples(Path(write(tmp_path / "x.jsonl", rows)))
    logits = logits_of(model, words, [(row["premise"], row["hypothesis"]) for row in rows])
    expected = (2 - logits.argmax(1)).tolist()
    assert len(set(expected)) > 1
    assert glue.by_own_head(model, words, examples).tolist() == expected


def test_a_pruned_classifier_beside_its_dense_one(tmp_path, capsys):
    model, words = classifier(), tiny.tokenizer(encoder=True)
    sentences = [chr(97 + i % 26) * (1 + i % 7) + str(i) for i in range(40)]
    labels = logits_of(model, words, [(sentence,) for sentence in sentences]).argmax(1).tolist()
    assert 0 < sum(labels) < 40
    model.save_pretrained(tmp_path / "dense")
    words.save_pretrained(tmp_path / "dense")
    out = str(tmp_path / "out")
    pyprune.prune(
        str(tmp_path / "dense"),
        output=out,
        sparsity=0.8,
        calibration={"num_samples": 4, "seq_len": 32},
        evaluation={"enabled": False},
        progress=False,
    )
    rows = [{"sentence": sentence, "label": label} for sentence, label in zip(sentences, labels)]
    file = write(tmp_path / "cola/dev.jsonl", rows)
    (row,) = evaluate_tasks(out, [file], against=str(tmp_path / "dense"))
    assert row["head"] == "own" and row["dense"]["mcc"] == 1.0, "the labels are the dense model's own answers"
    test = row["paired"]["mcc"]
    assert test["difference"] == pytest.approx(row["mcc"] - 1) and test["low"] <= test["difference"] < 0
    print_tasks([row])
    assert "mcc" in capsys.readouterr().out


def test_refusals_come_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("worked"))
    words, body = tiny.tokenizer(encoder=True), tiny.model("bert", vocab_size=tiny.CHARACTERS)
    pair = {"premise": "p", "hypothesis": "h"}
    file = write(tmp_path / "mnli/dev.jsonl", [{**pair, "label": 2}])
    with pytest.raises(ConfigError, match="3 classes, the head of BertForSequenceClassification has 2"):
        evaluate_tasks(classifier(), [file], tokenizer=words)
    with pytest.raises(ConfigError, match=r"put train\.jsonl beside it"):
        evaluate_tasks(body, [file], tokenizer=words)
    write(tmp_path / "mnli/train.jsonl", [{**pair, "label": 0}, {**pair, "label": 1}])
    with pytest.raises(ConfigError, match="labels of another kind"):
        evaluate_tasks(body, [file], tokenizer=words)
    with pytest.raises(ConfigError, match="row 1 .* has label -1"):
        evaluate_tasks(classifier(), [write(tmp_path / "x.jsonl", [{**pair, "label": -1}])], tokenizer=words)
    with pytest.raises(ConfigError, match="mcc need two"):
        evaluate_tasks(
            classifier(3), [write(tmp_path / "cola.jsonl", [{"sentence": "a", "label": 1}])], tokenizer=words
        )
