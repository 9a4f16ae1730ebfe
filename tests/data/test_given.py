"""Text and token ids in every form that Python code has them in, for calibration and evaluation alike."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import pyprune
from pyprune.config import Calibration, ConfigError, Evaluation
from pyprune.data import calibration, texts
from pyprune.data.given import token_rows
from pyprune.reporting.record import written
from pyprune.sources import kind, kinds, split

IDS = tiny.ids(6, 12)
LISTS = IDS.tolist()
MASK = torch.ones_like(IDS)
MASK[:, 8:] = 0
ROWS = {
    "tensor": (IDS, IDS),
    "array": (IDS.numpy(), IDS),
    "int32 array": (IDS.numpy().astype(np.int32), IDS),
    "lists": (LISTS, IDS),
    "tuple of lists": (tuple(map(tuple, LISTS)), IDS),
    "list of arrays": (list(IDS.numpy()), IDS),
    "one sequence": (IDS[0], IDS[:1]),
    "one list": (LISTS[0], IDS[:1]),
    "batch encoding of lists": (BatchEncoding({"input_ids": LISTS, "attention_mask": MASK.tolist()}), IDS[:, :8]),
    "batch encoding of tensors": (BatchEncoding({"input_ids": IDS, "attention_mask": MASK}), IDS[:, :8]),
    "dictionary": ({"input_ids": IDS}, IDS),
    "pair of ids and mask": ((IDS, MASK), IDS[:, :8]),
    "list of dictionaries": ([{"input_ids": row, "labels": row} for row in LISTS], IDS),
    "list of masked dictionaries": (
        [{"input_ids": r, "attention_mask": m.tolist()} for r, m in zip(LISTS, MASK)],
        IDS[:, :8],
    ),
    "(input, target) pairs": ([(row[None], torch.full((1, 12), -100)) for row in IDS], IDS),
    "data set": (datasets.Dataset.from_dict({"input_ids": LISTS}), IDS),
    "loader of tensors": (DataLoader(TensorDataset(IDS), batch_size=4), IDS),
    "loader of a data set": (
        DataLoader(datasets.Dataset.from_dict({"input_ids": LISTS}).with_format("torch"), batch_size=2),
        IDS,
    ),
}
TEXTS = ["a text of some words", "and another one"]
PROSE = {
    "string": (TEXTS[0], TEXTS[:1]),
    "long string": ("word " * 5000, ["word " * 5000]),
    "list": (TEXTS, TEXTS),
    "tuple": (tuple(TEXTS), TEXTS),
    "list of long strings": (["word " * 5000] * 2, ["word " * 5000] * 2),
    "list of dictionaries": ([{"text": text, "id": "x"} for text in TEXTS], TEXTS),
    "data set": (datasets.Dataset.from_dict({"text": TEXTS}), TEXTS),
    "streamed data set": (datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), TEXTS),
    "loader": (DataLoader(TEXTS, batch_size=2), TEXTS),
    "loader of a data set": (DataLoader(datasets.Dataset.from_dict({"text": TEXTS}), batch_size=1), TEXTS),
}


@pytest.mark.parametrize("form", ROWS)
def test_token_ids_in_every_form_are_the_same_sequences(form):
    source, expected = ROWS[form]
    assert kind(source) == "ids" and split(source)[0] is source and len(split(source)) == 1
    found = token_rows(source)
    assert [row.tolist() for row in found] == expected.tolist() and all(row.dtype == torch.int64 for row in found)
    settled = calibration.coerce(Calibration(source=source))
    assert (settled.num_samples, settled.seq_len) == tuple(expected.shape), "all rows, whole"


@pytest.mark.parametrize("form", PROSE)
def test_text_in_every_form_is_the_same_text(form):
    source, expected = PROSE[form]
    assert kind(source) != "data set" or "loader" in form
    settled = calibration.settled(Calibration(source=source)).source
    assert token_rows(settled) is None
    assert list(texts.read(settled, split="train", subset=None, text_column=None)) == expected


def test_a_loader_is_read_once_and_no_further_than_asked():
    seen = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            seen.append(index)
            return torch.full((4,), index)

    loader = DataLoader(Counted(), batch_size=2)
    settled = calibration.settled(Calibration(source=loader, num_samples=3, held_out=1))
    assert len(settled.source) == 4 and len(seen) <= 6
    assert calibration.settled(settled) is settled


def test_what_is_no_source_is_named_with_what_is_one():
    for wrong in (5, object(), [object()], [1.5, 2.5]):
        with pytest.raises(ConfigError, match="text and token ids come as a path.*got"):
            calibration.coerce(Calibration(source=wrong))
    with pytest.raises(ConfigError, match="the attention mask has shape .*the token ids"):
        token_rows({"input_ids": IDS, "attention_mask": MASK[:2]})


def test_names_and_prose_are_told_apart(tmp_path):
    path = tmp_path / "two words.txt"
    assert kinds(["a.txt", "b.npy"]) == {"prose", "ids"} and kinds(["no name", "b.npy"]) == {"prose"}
    assert kinds(("wikitext", "c4")) == {"data set"} and kind(str(path)) == "prose" and kind("x " * 2000) == "prose"
    with pytest.raises(ConfigError, match="no such file or folder"):
        list(texts.read(str(path), split="test", subset=None, text_column=None))


def test_text_in_memory_is_fingerprinted_and_never_written_out():
    secret = ["the secret text", "of a customer"]
    first = written(secret)
    assert first == written(tuple(secret)).replace("tuple", "list") != written(secret[::-1])
    assert first.startswith("<list in memory, sha256 ") and "secret" not in first
    assert written(["a.txt", IDS]) == ["a.txt", written(IDS)] and written(None) is None
    assert written("wikitext") == "wikitext" and "sha256" in written(secret[0])


def test_calibration_and_evaluation_take_them(tokenizer):
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    long = "words of a text that is long enough. " * 20
    fields = dict(tokenizer=tokenizer, method="wanda", num_samples=2, seq_len=16, held_out=1, progress=False)
    runs = [
        pyprune.prune(model, calibration=source, evaluation=Evaluation(text=long, window=24), **fields)
        for source in (long, [long], (long,), [{"text": long}], datasets.Dataset.from_dict({"text": [long]}))
    ]
    assert len({run.report["calibration"]["fingerprint"] for run in runs}) == 1
    assert runs[0].report["evaluation"][0]["text"] == "a text given in Python"
    assert pyprune.evaluate(runs[0], long, window=24)["perplexity"] == runs[0].report["evaluation"][0]["pruned"]
