"""Perplexity with overlapping windows against its definition; what its rows say; independence of the batch size."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import pyprune
from pyprune.config import ConfigError, Evaluation
from pyprune.evaluation.block_by_block import Blockwise, Meter, measure_streamed
from pyprune.evaluation.domains import alone
from pyprune.evaluation.perplexity import losses_of, measure, perplexity
from pyprune.evaluation.windows import windows_of
from pyprune.execution.distributed import World
from pyprune.execution.executor import Resident
from pyprune.model.blocks import ModelView
from pyprune.reporting.record import compared
from pyprune.reporting.words import conditions_text, source_text, windows_text

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds it.\n" * 8


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", vocab_size=tiny.CHARACTERS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def by_definition(model, ids, window, stride):
    """The loop of "Perplexity of fixed-length models" (transformers), in float64, without its last, shorter window."""
    total, count, seen = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = begin + window
        if end > len(ids):
            break
        row = ids[begin:end]
        labels = row.clone()
        labels[: window - (end - seen)] = -100
        with torch.no_grad():
            logp = model(row[None]).logits[0].double().log_softmax(-1)
        for t in range(window - 1):
            if labels[t + 1] != -100:
                total -= logp[t, labels[t + 1]].item()
                count += 1
        seen = end
    return math.exp(total / count), count


def texts_of(tokenizer, **fields):
    evaluation = Evaluation(text=[PROSE], dtype="float32", **fields)
    return windows_of(alone(evaluation), evaluation, tokenizer), evaluation


@pytest.mark.parametrize("stride", [1, 20, 37])
def test_the_definition_in_memory_and_streamed(model, tokenizer, stride):
    ids = tokenizer(PROSE, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    ids = ids[: 48 + 6 * stride]
    truth, count = by_definition(model, ids, 48, stride)
    texts, evaluation = texts_of(tokenizer, window=48, stride=stride, max_windows=7, batch_size=3)
    (row,) = measure(model, texts, evaluation)
    assert row["perplexity"] == pytest.approx(truth, rel=1e-5)
    assert (row["tokens"], row["windows"], row["window"], row["stride"]) == (count, 7, 48, stride)
    (apart,) = measure_streamed(Blockwise(ModelView(model), Resident()), texts, evaluation)
    assert apart["perplexity"] == pytest.approx(truth, rel=1e-5) and apart["tokens"] == count
    assert truth != pytest.approx(perplexity(model, texts[0].windows, dtype="float32"), rel=1e-4), "it would be no test"


def test_windows_longer_than_the_chunk_of_logits(model):
    ids = tiny.ids(1, 700)[0]
    rows = [ids[:600], ids[100:700]]
    truth, _ = by_definition(model, ids, 600, 100)
    assert perplexity(model, rows, scored=[599, 100], dtype="float32") == pytest.approx(truth, rel=1e-5)
    assert perplexity(model, rows, scored=[599, 100], dtype="float32", batch_size=2) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_a_stride_as_long_as_the_window_is_the_default(model, bos):
    tokenizer = tiny.tokenizer(bos=True)
    fields = dict(tokenizer=tokenizer, window=32, max_windows=4, dtype="float32", bos=bos)
    plain, same = (pyprune.evaluate(model, [PROSE], stride=stride, **fields) for stride in (None, 32))
    assert same["losses"] == plain["losses"] and same["perplexity"] == plain["perplexity"]
    assert (same["stride"], same["tokens"]) == (plain["stride"], plain["tokens"]) == (None, 4 * 31)


def test_every_token_is_scored_once_also_with_bos(model):
    texts, _ = texts_of(tiny.tokenizer(bos=True), window=32, stride=10, max_windows=5)
    rows, scored = texts[0].windows, texts[0].scored
    assert all(row[0] == 1 and len(row) == 32 for row in rows)
    told = torch.cat([row[len(row) - count :] for row, count in zip(rows, scored)])
    whole = tiny.tokenizer()(PROSE, add_special_tokens=False)["input_ids"]
    assert told.tolist() == whole[: 31 + 4 * 10]


@pytest.mark.parametrize("stride", [None, 16])
def test_perplexity_does_not_depend_on_the_batch_size(model, tokenizer, stride):
    texts, evaluation = texts_of(tokenizer, window=40, stride=stride, max_windows=9)
    one, *others = (
        losses_of(model, texts[0].windows, scored=texts[0].scored, dtype="float32", batch_size=size)
        for size in (1, 2, 4, 16)
    )
    for losses in others:
        assert losses == pytest.approx(one, rel=1e-6)


def test_processes_measure_their_shares(model, tokenizer):
    texts, evaluation = texts_of(tokenizer, window=40, stride=16, max_windows=7)
    whole = measure(model, texts, evaluation)
    shares = [measure(model, [text.share(rank, 3) for text in texts], evaluation) for rank in range(3)]
    world = World()
    world.size = 3
    world.everyone = lambda value: shares
    (row,) = Meter(texts, evaluation, torch.device("cpu"), None, world).joined(None)
    assert row["perplexity"] == pytest.approx(whole[0]["perplexity"], rel=1e-6)
    assert (row["tokens"], row["scored"]) == (whole[0]["tokens"], whole[0]["scored"])


def test_the_ratio_is_that_of_the_perplexities(tokenizer, model):
    texts, evaluation = texts_of(tokenizer, window=40, stride=8, max_windows=6)
    other = tiny.model("llama", vocab_size=tiny.CHARACTERS, tie_word_embeddings=True)
    (row,) = compared(measure(model, texts, evaluation), measure(other, texts, evaluation))
    assert row["ratio"] == pytest.approx(row["pruned"] / row["dense"], rel=1e-12) != 1
    assert row["ratio_standard_error"] > 0 and "scored" not in row


def test_rows_say_data_set_split_windows_and_stride():
    row = {"text": "Salesforce/wikitext", "split": "test", "subset": "wikitext-2-raw-v1", "windows": 3, "window": 512}
    row |= {"stride": 256, "tokens": 1023, "dtype": "float32"}
    assert source_text(row) == "Salesforce/wikitext (wikitext-2-raw-v1, split test)"
    assert windows_text(row) == "3 windows of 512 tokens with stride 256"
    assert conditions_text(row) == "3 × 512 tokens, stride 256, 1,023 scored, float32"
    old = {"text": "a.txt", "windows": 3, "window": 512, "dtype": "float32"}
    assert (source_text(old), conditions_text(old)) == ("a.txt", "3 × 512 tokens, float32")


def test_rows_of_a_saved_data_set_have_its_split(model, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"text": [PROSE]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    found = pyprune.evaluate(model, str(tmp_path / "saved"), tokenizer=tokenizer, split="train", window=40)
    assert (found["split"], found["subset"]) == ("train", None) and found["text"] == str(tmp_path / "saved")
    assert pyprune.evaluate(model, [PROSE], tokenizer=tokenizer, window=40)["split"] is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(text="a.txt", window=32, stride=33), "stride=33 is longer than the window of 32 tokens"),
        (dict(text="a.txt", stride=1025), "longer than the window of 1024 tokens"),
        (dict(text="a.txt", stride=0), "stride must be at least 1, got 0"),
        (dict(text="ids.npy", stride=8), "stride=8 would do nothing: only text that is tokenised here"),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Evaluation(**fields)


def test_a_stride_beyond_the_positions_of_the_model_is_refused(tokenizer):
    short = tiny.model("gpt2", vocab_size=tiny.CHARACTERS)
    positions = short.config.n_positions
    with pytest.raises(ConfigError, match=f"longer than the window of {positions} tokens"):
        pyprune.evaluate(short, [PROSE], tokenizer=tokenizer, stride=positions + 1)
