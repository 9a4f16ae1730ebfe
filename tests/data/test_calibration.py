"""Calibration sequences: what is taken, what is set aside, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from pyprune.config import Calibration, ConfigError
from pyprune.data import texts
from pyprune.data.calibration import coerce, fingerprint, load, tokenize

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds it.\n" * 200


def numbered(n):
    return [f"Sentence number {i} says something of its own." for i in range(n)]


def test_pieces_are_cut_from_the_text_and_held_out_ones_are_others(tokenizer):
    data = load(Calibration(source=[PROSE], num_samples=10, seq_len=50, held_out=5), tokenizer)
    whole = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    pieces = [tuple(whole[i : i + 50]) for i in range(0, len(whole) - 49, 50)]
    taken = [tuple(row.tolist()) for row in data.sequences + data.held_out]
    assert (len(data.sequences), len(data.held_out)) == (10, 5)
    assert all(row in pieces for row in taken)
    assert all(row.dtype == torch.int64 and row.shape == (50,) for row in data.sequences)


def test_fit_and_held_out_share_no_text(tokenizer):
    document = "".join(f"{i:06d} " for i in range(4000))  # every piece of it is unlike every other
    data = load(Calibration(source=[document], num_samples=12, seq_len=70, held_out=6), tokenizer)
    fit = {n for row in data.sequences for n in tokenizer.decode(row).split()[1:-1]}
    held = {n for row in data.held_out for n in tokenizer.decode(row).split()[1:-1]}
    assert fit and held and not fit & held


def test_the_seed_chooses_and_the_fingerprint_tells(tokenizer):
    def run(seed):
        return load(Calibration(source=[PROSE], num_samples=8, seq_len=33, seed=seed), tokenizer)

    assert run(0).fingerprint == run(0).fingerprint != run(1).fingerprint
    rows = run(0).sequences
    assert fingerprint(rows) == run(0).fingerprint
    assert fingerprint(rows[::-1]) != fingerprint(rows), "the order is part of it"
    joined, split = [torch.tensor([1, 2, 3])], [torch.tensor([1, 2]), torch.tensor([3])]
    assert fingerprint(joined) != fingerprint(split), "so are the lengths"


def test_a_run_hands_its_seed_down():
    from pyprune.config import PruneConfig

    assert PruneConfig(seed=7).calibration.seed == 7
    assert PruneConfig(seed=7, calibration=Calibration(seed=3)).calibration.seed == 3


def test_bos_starts_every_sequence_where_the_tokenizer_starts_texts_with_it():
    data = load(Calibration(source=[PROSE], num_samples=6, seq_len=20), tiny.tokenizer(bos=True))
    assert all(row[0] == 1 and 1 not in row[1:] and len(row) == 20 for row in data.sequences)


def test_encoder_gets_one_text_a_sequence_with_special_tokens_and_no_padding():
    source = [*numbered(30), "x" * 500, "", "Sentence number 3 says something of its own."]
    data = load(
        Calibration(source=source, num_samples=28, seq_len=64, held_out=3), tiny.tokenizer(encoder=True), encoder=True
    )
    rows = data.sequences + data.held_out
    assert all(row[0] == 1 and row[-1] == 2 and 0 not in row for row in rows)
    assert len({len(row) for row in rows}) > 1 and max(map(len, rows)) <= 64
    assert len({tuple(row.tolist()) for row in rows}) == 31, "the repeated sentence counts once"


def test_token_ids_are_taken_as_given_and_in_order(tmp_path, tokenizer):
    ids = tiny.ids(12, 24)
    np.save(tmp_path / "ids.npy", ids.numpy().astype("int32"))
    for source in (ids, str(tmp_path / "ids.npy"), ids.numpy(), list(ids)):
        data = load(Calibration(source=source, num_samples=9, held_out=3, seq_len=24))
        assert torch.equal(torch.stack(data.sequences), ids[:9])
        assert torch.equal(torch.stack(data.held_out), ids[9:])


def test_with_every_row_fitted_held_out_text_comes_from_elsewhere_and_is_said(tokenizer):
    ids = tiny.ids(6, 24)
    data = load(Calibration(source=ids, num_samples=6, held_out=4), tokenizer, vocab_size=tiny.CHARACTERS)
    assert len(data.held_out) == 4 and all(len(row) == 24 for row in data.held_out)
    assert "4 of the held-out sequences are from" in data.description
    without = load(Calibration(source=ids, num_samples=6, held_out=4))
    assert without.held_out == [] and "held-out sequences: none" in without.description
    assert without.fingerprint == data.fingerprint


def test_padding_is_stripped():
    ids, mask = tiny.ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[0, 7:] = 0
    mask[2, :4] = 0
    for source in ((ids, mask), {"input_ids": ids, "attention_mask": mask}):
        rows = load(Calibration(source=source, num_samples=3, held_out=0)).sequences
        assert [row.tolist() for row in rows] == [ids[0, :7].tolist(), ids[1].tolist(), ids[2, 4:].tolist()]


def test_bare_sources(tokenizer):
    whole = coerce(tiny.ids(5, 40))
    assert (whole.num_samples, whole.seq_len) == (5, 40)
    assert coerce("some/dataset").source == "some/dataset" and coerce(None).source is None
    assert coerce({"num_samples": 3}).num_samples == 3
    assert coerce({"input_ids": tiny.ids(2, 9)}).num_samples == 2


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_data_files_are_read_through_datasets(tmp_path, tokenizer, suffix):
    import datasets

    path = tmp_path / f"texts.{suffix}"
    table = datasets.Dataset.from_dict({"title": ["t"] * 40, "text": numbered(40), "n": list(range(40))})
    if suffix in ("jsonl", "json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    assert list(texts.read(path, split="train", subset=None, text_column=None)) == numbered(40)
    assert list(texts.read(path, split="train", subset=None, text_column="title")) == ["t"] * 40
    with pytest.raises(ConfigError, match="text_column 'body' is no text column.*title, text"):
        list(texts.read(path, split="train", subset=None, text_column="body"))


def test_pairs_of_sentences_are_two_texts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"sentence1": "one", "sentence2": "two", "score": 1.0}) + "\n")
    assert list(texts.read(path, split="train", subset=None, text_column=None)) == ["one", "two"]


def test_saved_data_set_and_its_splits(tmp_path):
    import datasets

    rows = {"train": datasets.Dataset.from_dict({"text": ["a"]}), "test": datasets.Dataset.from_dict({"text": ["b"]})}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    assert list(texts.read(tmp_path / "saved", split="test", subset=None, text_column=None)) == ["b"]
    with pytest.raises(ConfigError, match="no split 'dev'"):
        list(texts.read(tmp_path / "saved", split="dev", subset=None, text_column=None))


def test_wikitext_gives_the_rows_of_the_hub_data_set(tmp_path):
    path = tmp_path / "wiki.test.txt"
    path.write_text(" \n = Title = \n \n He was a guest @-@ star . \n \n = = Early = = \n")
    rows = texts.read(path, split="test", subset=None, text_column=None)
    assert "\n\n".join(rows) == "\n\n = Title = \n\n\n\n\n He was a guest @-@ star . \n\n\n\n\n = = Early = = \n"
    (tmp_path / "prose.txt").write_text("One line.\n\nAnother.\n")
    assert list(texts.read(tmp_path / "prose.txt", split="test", subset=None, text_column=None)) == [
        "One line.\n\nAnother.\n"
    ]


def test_tokenising_a_part_gives_the_beginning_of_the_whole(tokenizer):
    documents = numbered(500)
    whole = tokenize(documents, tokenizer)
    assert torch.equal(tokenize(iter(documents), tokenizer, 300), whole[:300])
    assert torch.equal(tokenize(iter(documents), tokenizer, 10**6), whole)
    assert tokenizer.decode(whole) == "\n\n".join(documents)


@pytest.mark.parametrize(
    ("source", "fields", "sentence"),
    [
        (["short"], {}, "shorter than one sequence of 50 tokens"),
        ([PROSE[:300]], {}, "10 calibration samples of 50 tokens were asked for, but .* has only 6; .*num_samples=6"),
        (tiny.ids(4, 9), {}, "10 calibration samples were asked for, but .* has 4 rows; .*num_samples=4"),
        (torch.rand(12, 9), {}, "must be integers, got float32"),
        (
            torch.arange(24).reshape(2, 3, 4),
            {},
            r"must be a matrix \[samples, tokens\] or one sequence, got shape \[2, 3, 4\]",
        ),
        (torch.zeros(0, 64).long(), {}, r"empty token ids: shape \[0, 64\] holds no token"),
        (tiny.ids(12, 1), {}, "row 0 of .* has 1 tokens; a sequence needs at least 2"),
        ((tiny.ids(12, 9), torch.ones(12, 8)), {}, r"mask has shape \[12, 8\], the token ids \[12, 9\]"),
        (tiny.ids(12, 9) + 5, {}, r"token id \d+ in sequence \d+ is outside the model's vocabulary of 96"),
        (-tiny.ids(12, 9), {}, "is outside the model's vocabulary of 96"),
        ([1, "two"], {}, "text and token ids come as a path.*got int"),
        ({"ids": tiny.ids(1, 3)}, {}, "a mapping of token ids needs input_ids, got the keys ids"),
        ("missing.txt", {}, "no such file or folder: missing.txt"),
        ("missing.npy", {}, "no such file: missing.npy"),
        ("no-such/data-set", {}, "cannot load the data set 'no-such/data-set'"),
    ],
)
def test_refusals(tokenizer, source, fields, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        load(Calibration(source=source, num_samples=10, seq_len=50, **fields), tokenizer, vocab_size=96)
    assert "\n" not in str(refusal.value)


def test_text_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="calibration text needs a tokenizer"):
        load(Calibration(source=[PROSE]))


def test_files_that_are_not_what_they_seem(tmp_path, tokenizer):
    (tmp_path / "ids.npy").write_text("not an array")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "numbers.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "model.bin").write_bytes(b"\0")
    for name, sentence in [
        ("ids.npy", "not a .npy array"),
        ("latin.txt", "not UTF-8 text: .* at byte 3"),
        ("broken.jsonl", "cannot read|cannot load"),
        ("numbers.jsonl", "no text column: .* are n"),
        ("model.bin", "cannot read '.bin' files"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            load(Calibration(source=str(tmp_path / name), num_samples=1, seq_len=4), tokenizer)
