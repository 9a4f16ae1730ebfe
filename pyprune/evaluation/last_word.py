"""Last words, as LAMBADA asks for them: whether a model's most likely continuation of a passage is the passage's last
word (Paperno et al., arXiv 1606.06031). Perplexity can stay low on a text of which a model no longer knows what it is
about; the last word of a passage shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.config import ConfigError
from pyprune.data import builtin
from pyprune.evaluation.block_by_block import Blockwise
from pyprune.evaluation.choices import encode_pair, loglikelihoods, mean_and_error

NAME = "last-word"
"""The task on passages of the novel that comes with pyprune: text that nothing is calibrated on by default."""
WORDS = 40
"""Passages are whole sentences, at least so many words together."""


def of_text(paragraphs: Iterable[str]) -> list[tuple[str, str]]:
    """Context and last word, a space before it, of each passage of a text."""
    found: list[tuple[str, str]] = []
    passage: list[str] = []
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])[\"”'’]*\s+", " ".join(paragraph.split())):
            passage += sentence.split()
            if len(passage) < WORDS:
                continue
            last = re.match(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", passage[-1])
            if last is not None:
                found.append((" ".join(passage[:-1]), " " + last[0]))
            passage = []
    return found


def of_rows(rows: Iterable[dict], name: str) -> list[tuple[str, str]]:
    """The same of rows with a ``text`` each, cut at the last space, as LAMBADA is published and lm-eval cuts it."""
    found = [str(row["text"]).rpartition(" ") for row in rows]
    for number, (context, _, word) in enumerate(found, 1):
        if not context.strip() or not word.strip():
            raise ConfigError(f"item {number} of {name} has no last word behind a context")
    return [(context, " " + word) for context, _, word in found]


def of_file(path: Path) -> list[tuple[str, str]]:
    """The passages of a ``.txt`` file, or of the novel where the path is the task's own name."""
    if path.name == NAME:
        return of_text(builtin.paragraphs(builtin.NOVEL))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    found = of_text(re.split(r"\n\s*\n", text))
    if not found:
        raise ConfigError(f"{path} has no passage of {WORDS} words")
    return found


def score(
    model: nn.Module | Blockwise,
    tokenizer,
    passages: list[tuple[str, str]],
    *,
    batch_size: int = 16,
    progress: Any = None,
) -> dict:
    """Share of the passages whose last word is the most likely continuation, token by token: ``{"items", "acc",
    "acc_standard_error"}`` and the single values under ``"per_item"``."""
    pairs = [encode_pair(tokenizer, *passage) for passage in passages]
    found = loglikelihoods(model, pairs, batch_size=batch_size, progress=progress)
    right = [float(one.greedy) for one in found]
    mean, error = mean_and_error(right)
    return {"items": len(right), "acc": mean, "acc_standard_error": error, "per_item": {"acc": right}}
