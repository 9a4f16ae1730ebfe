"""Multiple choice by log-likelihood: the answer that a model finds most likely, as lm-eval scores it.

Items come from jsonl files, in a form of our own or in the published forms of ARC, PIQA, HellaSwag and BoolQ, with the
prompts of lm-eval's tasks of these names. A choice scores the sum of its tokens' log-probabilities behind the context
(``acc``), or that sum divided by the characters of the choice (``acc_norm``). Nothing is sampled; items that belong
together in length run together, padded on the right, where a causal model does not look.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.evaluation.block_by_block import Blockwise
from pyprune.evaluation.perplexity import check_causal, device_of
from pyprune.model.attributes import begin_token, end_tokens
from pyprune.model.positions import of_any, positions_of
from pyprune.model.recording import uncached

DELIMITER = " "
"""Between context and choice."""


@dataclass(frozen=True)
class Item:
    """One question."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Kind:
    """A form of file: how a row becomes an item, and the name that a report gives it."""

    name: str
    keys: tuple[str, ...]
    item: Callable[[dict], Item]


def _listed(row: dict) -> Item:
    """ARC, and the form of our own: ``question`` (or a whole ``context``), ``choices``, and the answer as a number, a
    label or the text of a choice."""
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, dict):  # as the authors of ARC publish it
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    elif choices and isinstance(choices[0], dict):
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    else:
        texts, labels = choices, []
    answer = next(row[key] for key in ("answer", "gold", "label", "answerKey") if key in row)
    if isinstance(answer, str):
        answer = labels.index(answer) if answer in labels else texts.index(answer)
    return Item(row.get("context", f"Question: {question}\nAnswer:"), tuple(texts), int(answer))


def _piqa(row: dict) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def _hellaswag(row: dict) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(_without_marks(context), tuple(map(_without_marks, row["endings"])), int(row["label"]))


def _without_marks(text: str) -> str:
    """WikiHow's marks, which part of HellaSwag still has, taken out as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(row: dict) -> Item:
    gold = row["answer"] if "answer" in row else row["label"]
    return Item(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(gold))


KINDS = (
    Kind("hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings"), _hellaswag),
    Kind("piqa", ("goal", "sol1", "sol2"), _piqa),
    Kind("boolq", ("passage", "question"), _boolq),
    Kind("choices", ("choices",), _listed),
    Kind("choices", ("question",), _listed),
)


def read_items(path: str | Path) -> list[Item]:
    """The items of a jsonl file, or of a folder with one. PIQA's answers may lie beside it, one a line, in
    ``<name>-labels.lst``. Raises :class:`ConfigError` for anything else, with the line."""
    path = file_of(path)
    rows = read_rows(path)
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.is_file() and "label" not in rows[0]:
        answers = labels.read_text().split()
        if len(answers) != len(rows):
            raise ConfigError(f"{labels} has {len(answers)} answers, {path} has {len(rows)} items")
        rows = [{**row, "label": answer} for row, answer in zip(rows, answers)]
    kind = kind_of(rows[0])
    if kind is None:
        raise ConfigError(
            f"{path} is no multiple-choice task: its keys are {', '.join(rows[0])}; give question, choices and answer, "
            "or the published form of ARC, PIQA, HellaSwag or BoolQ"
        )
    items = []
    for number, row in enumerate(rows, 1):
        try:
            item = kind.item(row)
        except (KeyError, ValueError, TypeError, IndexError, StopIteration, AttributeError) as error:
            raise ConfigError(f"item {number} of {path} is not one of {kind.name}: {error!r}") from error
        if not 0 <= item.gold < len(item.choices) or len(item.choices) < 2:
            raise ConfigError(f"item {number} of {path} has answer {item.gold} of {len(item.choices)} choices")
        items.append(item)
    return items


def kind_of(row: dict) -> Kind | None:
    return next((kind for kind in KINDS if all(key in row for key in kind.keys)), None)


def file_of(path: str | Path) -> Path:
    """The jsonl file that a path names, itself or the only one in a folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            raise ConfigError(f"{path} holds {len(found)} .jsonl files; name the one to measure")
        return found[0]
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    return path


def read_rows(path: Path) -> list[dict]:
    """The rows of a jsonl file that has some."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not a .jsonl file: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} holds no rows with keys")
    return rows


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, cut where lm-eval cuts: white space at the end of the context
    belongs to the continuation, and the two are tokenised as one text."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        begin = begin_token(tokenizer)
        ends = end_tokens(tokenizer)
        first = ends if begin is None else begin
        if not isinstance(first, int):
            raise ConfigError(
                "the tokenizer has neither a BOS nor an EOS token, so a text without a context has no start"
            )
        return [first], tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
    whole, head = (tokenizer(text, verbose=False)["input_ids"] for text in (context + continuation, context))
    return head, whole[len(head) :]


class Likelihood(NamedTuple):
    """What a model says of a continuation behind its context."""

    logp: float
    """The sum of its tokens' log-probabilities."""
    greedy: bool
    """Whether each of its tokens is the most likely one."""


def loglikelihoods(
    model: nn.Module | Blockwise,
    pairs: list[tuple[list[int], list[int]]],
    *,
    batch_size: int = 16,
    progress: Any = None,
) -> list[Likelihood]:
    """How likely every continuation is behind its context, in the order given.

    pairs: token ids of context and continuation; a pair longer than the model's positions loses the beginning of its
    context. Pairs run from the longest to the shortest, ``batch_size`` at a time, so memory shows at once; a streamed
    model reads its weights once for all of them.
    progress: called with what is done and all there is, in pairs, or in blocks of a streamed model.
    """
    live = model.view.model if isinstance(model, Blockwise) else model
    check_causal(live)
    positions = positions_of(model.view) if isinstance(model, Blockwise) else of_any(live)
    longest = positions.count if positions else None
    cut = [(context + after)[:-1] for context, after in pairs]
    cut = [row if longest is None else row[-longest:] for row in cut]
    order = sorted(range(len(pairs)), key=lambda i: -len(cut[i]))
    rows = []
    for start in range(0, len(order), batch_size):
        batch = [cut[i] for i in order[start : start + batch_size]]
        rows += [torch.tensor(row + [0] * (len(batch[0]) - len(row))) for row in batch]
    passes = (
        model.logits(rows, dtype=next(live.parameters()).dtype, batch_size=batch_size, progress=progress)
        if isinstance(model, Blockwise)
        else _passes(model, rows, batch_size, progress)
    )
    places: list[int] = []
    told: list[Tensor] = []
    for numbers, _, logits in passes:
        for place, number in enumerate(numbers):
            i = order[number]
            places.append(i)
            told.append(_likelihood(logits[place], len(cut[i]), pairs[i][1]))
    found = dict(zip(places, torch.stack(told).tolist())) if told else {}
    return [Likelihood(found[i][0], bool(found[i][1])) for i in range(len(pairs))]


@torch.no_grad()
def _passes(model: nn.Module, rows: list[Tensor], batch_size: int, progress: Any) -> Iterator[tuple]:
    """What :meth:`Blockwise.logits` yields, of a model in memory."""
    device, training = device_of(model), model.training
    model.eval()
    try:
        with uncached(model) as options:
            for start in range(0, len(rows), batch_size):
                ids = torch.stack(rows[start : start + batch_size]).to(device)
                yield range(start, start + len(ids)), ids, model(input_ids=ids, **options).logits
                if progress is not None:
                    progress(start + len(ids), len(rows))
    finally:
        model.train(training)


def _likelihood(logits: Tensor, length: int, continuation: list[int]) -> Tensor:
    """log p of the continuation whose last token follows position ``length − 1``, and 1 where each of its tokens is the
    most likely one, float64 ``[2]``; logits ``[tokens, vocabulary]``."""
    wanted = torch.tensor(continuation, device=logits.device)[-length:]
    scores = logits[length - len(wanted) : length].float().log_softmax(-1)
    greedy = (scores.argmax(-1) == wanted).all()
    return torch.stack([scores.gather(1, wanted[:, None]).double().sum(), greedy.double()])


def score(
    model: nn.Module | Blockwise, tokenizer, items: list[Item], *, batch_size: int = 16, progress: Any = None
) -> dict:
    """Accuracy of a model on multiple-choice items: ``{"items", "acc", "acc_standard_error", "acc_norm", …}`` and, by
    metric, the per-item values under ``"per_item"``."""
    pairs = [encode_pair(tokenizer, item.context, DELIMITER + choice) for item in items for choice in item.choices]
    values = iter(loglikelihoods(model, pairs, batch_size=batch_size, progress=progress))
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for item in items:
        scores = [next(values).logp for _ in item.choices]
        normed = [value / len(choice) for value, choice in zip(scores, item.choices)]
        for name, of in (("acc", scores), ("acc_norm", normed)):
            right[name].append(float(max(range(len(of)), key=of.__getitem__) == item.gold))
    found: dict[str, Any] = {"items": len(items)}
    for name, values_of in right.items():
        found[name], found[f"{name}_standard_error"] = mean_and_error(values_of)
    return {**found, "per_item": right}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error; None for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def paired(dense: list[float], pruned: list[float]) -> dict:
    """Two models on the same items: the mean difference, its standard error, and for right-or-wrong values the exact
    p-value of McNemar's test, that the two err equally often where only one of them errs."""
    differences = [p - d for d, p in zip(dense, pruned)]
    mean, error = mean_and_error(differences)
    found = {"difference": mean, "standard_error": error}
    if {*dense, *pruned} <= {0.0, 1.0}:
        lost, won = differences.count(-1.0), differences.count(1.0)
        found |= {"only_dense": lost, "only_pruned": won, "mcnemar_p": mcnemar(lost, won)}
    return found


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value: both numbers from one binomial distribution with probability one half."""
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**total)
