"""Last words of passages: how passages are cut, and a score with a known answer."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from pyprune.config import ConfigError
from pyprune.evaluation import last_word
from pyprune.evaluation.choices import encode_pair
from pyprune.evaluation.task_runs import evaluate_tasks


def test_passages_are_whole_sentences_and_end_before_their_last_word():
    short, long = "It was so.", " ".join(f"word{k}" for k in range(38)) + " the well-known end."
    found = last_word.of_text([short, f"{long} {short}", long + '"'])
    assert found == [
        (f"It was so. {long.rpartition(' ')[0]}", " end"),
        (f"It was so. {long.rpartition(' ')[0]}", " end"),
    ], "sentences are gathered over paragraphs; punctuation and quotes are no part of the word"
    numbers = " ".join(["word"] * 45) + " 1867."
    assert last_word.of_text([numbers]) == [], "a number is no word"


def test_the_novel_gives_passages_of_its_own():
    found = last_word.of_file(last_word.Path(last_word.NAME))
    assert len(found) > 150 and all(len(context.split()) >= last_word.WORDS - 1 for context, _ in found)
    assert all(word[0] == " " and word[1].isalpha() and word[-1].isalpha() for _, word in found)


def test_a_score_is_the_share_of_words_that_greedy_decoding_gives(tokenizer):
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    passages = []
    for k, context in enumerate(("one two", "three", "four five six", "seven")):
        ids, word = encode_pair(tokenizer, context, " x")[0], ""
        for _ in range(2):
            with torch.no_grad():
                ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
            word += tokenizer.decode(ids[-1:])
        wrong = "q" if word[-1] != "q" else "z"
        passages.append((context, word if k % 2 else word[:-1] + wrong))
    assert all(len(encode_pair(tokenizer, *one)[1]) == 2 for one in passages)
    found = last_word.score(model, tokenizer, passages, batch_size=3)
    assert found["per_item"]["acc"] == [0, 1, 0, 1] and found["acc"] == 0.5 and found["items"] == 4


def test_tasks_by_name_and_file(folder, tmp_path):
    rows = [{"text": "the fox jumps over the dog", "domain": "x"}, {"text": "nobody minds  it", "domain": "x"}]
    assert last_word.of_rows(rows, "f") == [("the fox jumps over the", " dog"), ("nobody minds ", " it")]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "book.txt").write_text(("The quick brown fox jumps over the lazy dog again. " * 20 + "\n\n") * 2)
    tasks = ["last-word", str(tmp_path / "lambada.jsonl"), str(tmp_path / "book.txt")]
    found = evaluate_tasks(str(folder), tasks, against=str(folder), limit=6, stream="always")
    assert [row["items"] for row in found] == [6, 2, 6]
    assert all(row["paired"]["acc"] == {**row["paired"]["acc"], "difference": 0.0, "mcnemar_p": 1.0} for row in found)


def test_refusals(folder, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "one.jsonl").write_text('{"text": "word"}\n')
    with pytest.raises(ConfigError, match="no passage of 40 words"):
        evaluate_tasks(str(folder), [str(tmp_path / "short.txt")])
    with pytest.raises(ConfigError, match="item 1 of .* has no last word"):
        evaluate_tasks(str(folder), [str(tmp_path / "one.jsonl")])
    with pytest.raises(ConfigError, match="asks for last words, and BertModel"):
        evaluate_tasks(tiny.model("bert"), ["last-word"], tokenizer=tiny.tokenizer(encoder=True))
