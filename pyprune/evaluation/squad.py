"""SQuAD (arXiv 1606.05250, 1806.03822): exact match and F1 of the answers of a question-answering head.

Answers are compared as the official script (version 2) does; it equals version 1.1 where all questions have answers.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.evaluation import choices, tasks
from pyprune.model.positions import of_any

MAX_LENGTH, STRIDE, MAX_QUESTION, MAX_ANSWER = 384, 128, 64, 30
"""Tokens: of question and piece of context, shared by neighbouring pieces, of a question, of an answer; as BERT's."""


@dataclass(frozen=True)
class Item:
    """A question about a text; ``answers`` is empty where the text does not answer it."""

    question: str
    context: str
    answers: tuple[str, ...]


def is_row(row: dict) -> bool:
    return {"question", "context", "answers"} <= set(row)


def read_items(path: Path) -> list[Item]:
    """Items of the official .json file, or of .jsonl rows with question, context and answers."""
    try:
        rows = _official(json.loads(path.read_text("utf-8"))) if path.suffix == ".json" else choices.read_rows(path)
        items = [Item(row["question"], row["context"], _texts(row["answers"])) for row in rows]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not of SQuAD's form (question, context, answers): {error!r}") from error
    if not items:
        raise ConfigError(f"{path} holds no questions")
    return items


def _official(found: dict) -> list[dict]:
    return [
        {**question, "context": paragraph["context"]}
        for article in found["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _texts(answers: Any) -> tuple[str, ...]:
    return tuple(answers["text"]) if isinstance(answers, dict) else tuple(answer["text"] for answer in answers)


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, white space as single spaces: the official normalisation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str) -> float:
    """F1 of the words of two answers, as bags; of an empty one, whether both are empty."""
    found, wanted = normalised(answer).split(), normalised(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def best(metric, answer: str, golds: tuple[str, ...]) -> float:
    """The best score against any gold answer that is not empty after normalisation; against none, if there is none."""
    return max(metric(answer, gold) for gold in [g for g in golds if normalised(g)] or [""])


def best_span(start: Tensor, end: Tensor, longest: int = MAX_ANSWER) -> tuple[float, int, int]:
    """The highest ``start[i] + end[j]`` with i ≤ j < i + longest, and its i and j. Logits ``[tokens]``."""
    scores = start[:, None] + end[None, :]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(longest - 1)
    scores = scores.masked_fill(~allowed, -torch.inf)
    place = int(scores.argmax())
    i, j = divmod(place, len(end))
    return float(scores[i, j]), i, j


def answers_of(model: nn.Module, tokenizer, items: list[Item], *, progress: Any = None) -> list[str]:
    """The best span of every item's context. Contexts that are too long go in overlapping pieces. Where an item has
    no answer, the model may answer none: if the first token's span scores above every other in all pieces."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("SQuAD needs a fast tokenizer (tokenizer.json), which knows the places of tokens in the text")
    positions = of_any(model)
    length = min([MAX_LENGTH, tokenizer.model_max_length, *([positions.count] if positions else [])])
    inputs: list[dict[str, Tensor]] = []
    places: list[tuple[int, int, list]] = []  # item, first context token, offsets of the context tokens
    for number, item in enumerate(items):
        for piece, first, offsets in _pieces(tokenizer, item, length):
            inputs.append(tasks.accepted(model, piece))
            places.append((number, first, offsets))
    logits = tasks.unpadded(
        model, inputs, lambda out: torch.stack([out.start_logits, out.end_logits], 1).float(), progress=progress
    )
    found = [(-float("inf"), "")] * len(items)
    none = [float("inf")] * len(items)
    for (number, first, offsets), (start, end) in zip(places, logits):
        none[number] = min(none[number], float(start[0] + end[0]))
        inside = slice(first, first + len(offsets))
        score, i, j = best_span(start[inside], end[inside])
        if score > found[number][0]:
            found[number] = score, items[number].context[offsets[i][0] : offsets[j][1]]
    unanswered = any(not item.answers for item in items)
    return ["" if unanswered and none[n] > score else text for n, (score, text) in enumerate(found)]


def _pieces(tokenizer, item: Item, length: int):
    """Token ids of question and piece of context, the place of the context's first token, and its tokens' offsets."""
    question = item.question.strip()
    spans = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    most = min(MAX_QUESTION, length // 2)
    if len(spans) > most:
        question = question[: spans[most - 1][1]]
    room = length - min(len(spans), most) - tokenizer.num_special_tokens_to_add(pair=True)
    found = tokenizer(
        question,
        item.context,
        truncation="only_second",
        max_length=length,
        stride=min(STRIDE, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for piece, ids in enumerate(found["input_ids"]):
        context = [place for place, part in enumerate(found.sequence_ids(piece)) if part == 1]
        if not context:
            raise ConfigError(f"the context of question {item.question!r} is empty")
        row = {"input_ids": ids}
        if "token_type_ids" in found:
            row["token_type_ids"] = found["token_type_ids"][piece]
        yield row, context[0], [found["offset_mapping"][piece][place] for place in context]


def measure(model: nn.Module, tokenizer, items: list[Item], *, progress: Any = None) -> dict:
    """Exact match and F1, 0 to 1, with standard errors and the values per item."""
    answers = answers_of(model, tokenizer, items, progress=progress)
    row: dict[str, Any] = {"items": len(items), "per_item": {}}
    for name, metric in (("exact_match", exact_match), ("f1", f1)):
        values = [best(metric, answer, item.answers) for answer, item in zip(answers, items)]
        row[name], row[f"{name}_standard_error"] = choices.mean_and_error(values)
        row["per_item"][name] = values
    return row
