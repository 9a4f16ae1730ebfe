"""Perplexity against its definition, windows, dtypes, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import tiny
import torch

import pyprune
from pyprune.config import ConfigError, Evaluation
from pyprune.evaluation.domains import alone
from pyprune.evaluation.latency import latency
from pyprune.evaluation.perplexity import measure, perplexity
from pyprune.evaluation.windows import Text, windows, windows_of
from pyprune.model.blocks import predicts_next_token

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds it.\n" * 60


def by_definition(model, rows):
    """exp of the mean over windows of the mean over predictions of −log p, in float64 and one prediction at a time."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logp = model(row[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(logp[t, row[t + 1]].item() for t in range(len(row) - 1)) / (len(row) - 1))
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", vocab_size=tiny.CHARACTERS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_its_definition(model, batch_size):
    rows = list(tiny.ids(4, 30)) + list(tiny.ids(2, 17)) + list(tiny.ids(1, 2))
    assert perplexity(model, rows, dtype="float32", batch_size=batch_size) == pytest.approx(
        by_definition(model, rows), rel=1e-5
    )


def test_windows_longer_than_the_chunk_of_logits(model):
    long = copy.deepcopy(model)
    rows = list(tiny.ids(1, 600))
    assert perplexity(long, rows, dtype="float32") == pytest.approx(by_definition(long, rows), rel=1e-5)


def test_bfloat16_forward_leaves_the_parameters_alone(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = list(tiny.ids(4, 30))
    low = perplexity(model, rows, dtype="bfloat16")
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    exact = perplexity(model, rows, dtype="float32")
    assert low != exact and low == pytest.approx(exact, rel=0.05)
    cast = copy.deepcopy(model)
    for p in cast.parameters():
        p.data = p.data.bfloat16()
    assert perplexity(cast, rows) == low, "a bfloat16 model and a bfloat16 forward of its float32 twin are one thing"


def test_tied_weights_stay_tied_in_another_dtype():
    tied = tiny.model("llama", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    rows = list(tiny.ids(2, 20))
    assert perplexity(tied, rows, dtype="bfloat16") == pytest.approx(by_definition(tied, rows), rel=0.05)


def test_mode_is_restored_and_dropout_is_off():
    model = tiny.model("gpt2")
    rows, values = list(tiny.ids(2, 20)), set()
    model.train()
    for _ in range(2):
        values.add(perplexity(model, rows, dtype="float32"))
        assert model.training
    assert len(values) == 1


def test_windows_of_text_do_not_overlap_and_start_at_the_beginning(tokenizer):
    rows = windows(Evaluation(text=[PROSE], window=64, max_windows=5), tokenizer)
    whole = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    assert [row.tolist() for row in rows] == [whole[i : i + 64] for i in range(0, 5 * 64, 64)]
    assert len(windows(Evaluation(text=[PROSE], window=64, max_windows=None), tokenizer)) == len(whole) // 64


def test_long_rows_of_token_ids_are_cut_into_windows(tmp_path):
    corpus = torch.arange(1030)  # a whole text as one row, as the published pruning code has it
    for text in (corpus, corpus[None], [corpus.tolist()]):
        found = windows(Evaluation(text=text, window=100, max_windows=None))
        assert len(found) == 10 and torch.equal(torch.cat(found), corpus[:1000])
    mixed = [torch.arange(40), torch.arange(130), torch.arange(250)]
    assert [len(row) for row in windows(Evaluation(text=mixed, window=100))] == [40, 100, 100, 100]
    assert [len(row) for row in windows(Evaluation(text=mixed, window=100, max_windows=3))] == [40, 100, 100]
    assert len(windows(Evaluation(text=corpus[None]))[0]) == 1030, "without a window rows are whole"


def test_bos_at_every_window_or_none():
    tokenizer = tiny.tokenizer(bos=True)
    with_bos = windows(Evaluation(text=[PROSE], window=64, max_windows=3), tokenizer)
    without = windows(Evaluation(text=[PROSE], window=64, max_windows=3, bos=False), tokenizer)
    assert all(len(row) == 64 and row[0] == 1 for row in with_bos)
    assert torch.equal(torch.cat([row[1:] for row in with_bos])[:100], torch.cat(without)[:100])


def test_evaluate_takes_text_ids_files_and_folders(tmp_path, folder, tokenizer):
    ids = tiny.ids(3, 24)
    np.save(tmp_path / "ids.npy", ids.numpy())
    (tmp_path / "prose.txt").write_text(PROSE)
    model, loaded = pyprune.load(folder)
    truth = by_definition(model, list(ids))
    for text in (ids, str(tmp_path / "ids.npy")):
        found = pyprune.evaluate(model, text, dtype="float32")
        assert found["perplexity"] == pytest.approx(truth, rel=1e-5) and (found["windows"], found["window"]) == (3, 24)
    assert pyprune.evaluate(folder, str(tmp_path / "ids.npy"), dtype="float32")["perplexity"] == pytest.approx(
        truth, rel=1e-5
    )
    several = pyprune.evaluate(
        folder, [str(tmp_path / "prose.txt"), str(tmp_path / "ids.npy")], window=50, max_windows=4, dtype="float32"
    )
    assert [row["windows"] for row in several["texts"]] == [4, 3]
    assert (
        several["perplexity"]
        == several["texts"][0]["perplexity"]
        == pytest.approx(
            pyprune.evaluate(model, [PROSE], tokenizer=tokenizer, window=50, max_windows=4, dtype="float32")[
                "perplexity"
            ]
        )
    )
    assert pyprune.evaluate(model, Evaluation(text=ids, max_windows=2), max_windows=1)["windows"] == 1


def test_windows_of_is_empty_where_there_is_nothing_to_measure(tokenizer):
    evaluation = Evaluation(text=[PROSE], window=50)
    asked = alone(evaluation)
    assert len(windows_of(asked, evaluation, tokenizer)) == 1
    assert windows_of(asked, evaluation, tokenizer, encoder=True) == []
    assert windows_of(asked, Evaluation(enabled=False), tokenizer) == []
    assert windows_of(alone(Evaluation()), Evaluation(), None) == []


def test_non_finite_logits(folder):
    model, tokenizer = pyprune.load(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    rows = [Text("text", list(tiny.ids(2, 9)))]
    assert math.isnan(measure(model, rows, Evaluation())[0]["perplexity"]), "a long run's report survives it"
    with pytest.raises(ConfigError, match="perplexity on .* is nan: .* NaN or inf"):
        pyprune.evaluate(model, tiny.ids(2, 9))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (["too short"], "has 9 tokens, fewer than one window of 128"),
        (tiny.ids(2, 9) + 100, "outside the model's vocabulary of 104"),
        (tiny.ids(2, 1), "row 0 .* has 1 tokens"),
        ("missing.npy", "no such file: missing.npy"),
    ],
)
def test_refusals(model, tokenizer, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        pyprune.evaluate(model, text, tokenizer=tokenizer)


def test_models_and_fields_that_cannot_be_evaluated(model):
    encoder = tiny.model("bert")
    assert not predicts_next_token(encoder) and predicts_next_token(model)
    with pytest.raises(ConfigError, match="BertModel does not predict the next token"):
        pyprune.evaluate(encoder, tiny.ids(2, 9))
    with pytest.raises(ConfigError, match="evaluation text needs a tokenizer"):
        pyprune.evaluate(model, [PROSE])
    with pytest.raises(ConfigError, match="unknown field 'max_window' in evaluation; did you mean 'max_windows'"):
        pyprune.evaluate(model, tiny.ids(2, 9), max_window=3)
    with pytest.raises(ConfigError, match="device 'warp' cannot be used"):
        pyprune.evaluate(model, tiny.ids(2, 9), device="warp")


def test_latency_counts_what_it_ran(model, folder):
    found = latency(model, tokens=16, new_tokens=4, repeats=1, directory=folder)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["prefill_tokens_per_second"] > found["decode_tokens_per_second"] > 0
