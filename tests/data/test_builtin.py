"""Texts that come with pyprune: there on every machine, and what is measured on is never calibrated on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pyprune.config import Calibration, ConfigError
from pyprune.data import builtin, calibration, texts


def test_no_two_texts_share_a_paragraph_and_all_are_long_enough():
    found = {name: {" ".join(p.split()) for p in builtin.paragraphs(name)} for name in builtin.TEXTS}
    assert all(not found[a] & found[b] for a, b in itertools.combinations(found, 2))
    assert all(
        sum(map(len, part)) > 65_000 for part in found.values()
    )  # eight windows of 1,024 tokens of a large vocabulary
    assert all(paragraph.strip() for part in found.values() for paragraph in part)


def test_every_shipped_file_has_its_rights_written_beside_it():
    folder = Path(builtin.__file__).parent / "prose"
    notes = (folder / "LICENCES.md").read_text()
    files = {path.name for path in folder.glob("*.txt")}
    assert files == {"essays.txt", "novel.txt"} and all(f"`{name}`" in notes for name in files)
    assert sum((folder / name).stat().st_size for name in files) < 200_000


def test_an_unknown_text_is_refused_with_those_that_exist(tokenizer):
    with pytest.raises(ConfigError, match="there is no text 'builtin:poem'; built in are builtin:documentation"):
        calibration.load(Calibration(source="builtin:poem"), tokenizer)


def test_a_run_that_names_no_text_is_calibrated_on_equal_shares_of_both(tokenizer):
    data = calibration.load(Calibration(num_samples=12, seq_len=64, held_out=4), tokenizer)
    wholes = [
        "".join(tokenizer.decode(tokenizer("\n\n".join(builtin.paragraphs(name)))["input_ids"]))
        for name in builtin.CALIBRATION
    ]
    where = [[tokenizer.decode(row) in whole for whole in wholes] for row in data.sequences + data.held_out]
    assert [sum(column) for column in zip(*where[:12])] == [6, 6]
    assert [sum(column) for column in zip(*where[12:])] == [2, 2]
    assert "documentation" in data.description and "Jargon File" in data.description
    seen = {tuple(row.tolist()) for row in data.sequences + data.held_out}
    assert len(data.unseen) == 8 and not any(tuple(row.tolist()) in seen for row in data.unseen)


def test_several_sources_give_equal_shares_and_a_small_one_what_it_has(tokenizer, tmp_path):
    for name, letter, count in (("a.txt", "a", 400), ("b.txt", "b", 60)):
        (tmp_path / name).write_text("".join(f"{letter}{i:05d} " for i in range(count)))
    source = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    data = calibration.load(Calibration(source=source, num_samples=20, seq_len=50, held_out=0), tokenizer)
    letters = ["b" in tokenizer.decode(row) for row in data.sequences]
    assert len(letters) == 20 and sum(letters) == 8, "b.txt has 8 whole sequences"
    assert letters[:16] == [False, True] * 8
    assert data.description.startswith(" and ".join(source))


def test_a_list_of_words_is_text_and_a_list_of_names_is_a_mixture(tmp_path):
    (tmp_path / "a b.txt").write_text("x")
    names = [str(tmp_path / "a b.txt"), "data.jsonl", "owner/name", "builtin:essays", "ids.npy"]
    assert texts.mixture(names) == names
    for one in (["yes", "no"], ["a sentence of text.", "another"], ["data.jsonl", "prose it is"], "a.txt", ["a.txt"]):
        assert texts.mixture(one) == [one]
