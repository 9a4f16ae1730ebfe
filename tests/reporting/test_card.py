"""README.md of a pruned checkpoint says what its report says."""

from __future__ import annotations

import json

import pytest
import tiny

import pyprune
from pyprune.reporting.card import model_card
from pyprune.reporting.verdict import RULE, verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "out"
    pyprune.prune(
        tiny.model("llama", vocab_size=tiny.CHARACTERS),
        method="magnitude",
        sparsity=0.6,
        calibration=tiny.ids(8, 24),
        evaluation=[tiny.ids(3, 24, seed=1)],
        output=str(out),
        progress=False,
    )
    return out


def test_the_verdict_is_that_of_the_page(folder):
    report, card = json.loads((folder / "report.json").read_text()), (folder / "README.md").read_text()
    for sentence in (*verdict(report).sentences, RULE):
        assert sentence in card and sentence.replace("'", "&#x27;") in (folder / "report.html").read_text()
    (row,) = report["evaluation"]
    assert f"to {row['pruned']:.2f} on" in card, "the figure, not only the words"


def test_a_tokenizer_is_named_where_one_was_written(folder, tmp_path):
    assert "AutoTokenizer" not in (folder / "README.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["model"]["tokenizer"] is False
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    settings = {"method": "magnitude", "evaluation": False, "probe_samples": 0, "progress": False}
    pyprune.prune(model, tokenizer=tiny.tokenizer(), output=str(tmp_path / "out"), **settings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import AutoModelForCausalLM, AutoTokenizer" in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("out")' in card


def test_every_sentence_of_a_verdict_stands_in_the_card(folder):
    report = json.loads((folder / "report.json").read_text())
    rows = [
        {**report["evaluation"][0], "text": name, "dense": 10.0, "pruned": to} for name, to in (("a", 11), ("b", 40))
    ]
    report |= {"evaluation": rows, "blocks": [{**report["blocks"][-1], "error": 0.1, "error_held_out": 0.2}]}
    card = model_card(report, "out")
    assert (
        "**Perplexity goes from 10.00 to 40.00 on b, 4 times the dense model's: the model is badly damaged.**" in card
    )
    assert "It depends on the text: 4 times the dense perplexity on b, 1.1 times on a." in card
    assert "2 times as large on held-out text" in card
    assert "**Perplexity was not measured" in model_card({**report, "evaluation": None}, "out")
