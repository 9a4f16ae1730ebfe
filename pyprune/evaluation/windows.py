"""The windows of text that perplexity is measured on: cut from text, or rows of token ids as they are given.

With a stride windows overlap, and each scores only the tokens that the window before did not have; otherwise each is
seen by itself.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyprune.config import ConfigError, Evaluation
from pyprune.data import builtin, given, texts
from pyprune.data.calibration import bos_prefix, need_tokenizer, tokenize
from pyprune.effects import shown
from pyprune.evaluation.domains import Asked
from pyprune.model.blocks import ModelView
from pyprune.model.positions import Positions
from pyprune.sources import kind, kinds

COUNTED = 400_000
"""Characters of a text that are tokenised to reckon how many tokens it has."""
CHARACTERS = 4
"""Characters per token of a text that no tokenizer is at hand for."""


class Text(NamedTuple):
    """Windows of one text, as dense and pruned models are measured on them."""

    name: str
    windows: list[Tensor]
    domain: str | None = None
    """As in :class:`pyprune.evaluation.domains.Asked`."""
    stride: int | None = None
    """Tokens from the beginning of a window to that of the next; None where windows do not overlap."""
    scored: list[int] | None = None
    """How many of its last tokens each window scores, where windows overlap; None: all that follow another."""
    split: str | None = None
    """Split and configuration of a data set; None for other sources."""
    subset: str | None = None

    def share(self, rank: int, count: int) -> Text:
        """One process's windows."""
        scored = None if self.scored is None else self.scored[rank::count]
        return self._replace(windows=self.windows[rank::count], scored=scored)


def windows(
    evaluation: Evaluation,
    tokenizer=None,
    *,
    source: Any = ...,
    vocab_size: int | None = None,
    tokens: int | None = None,
    most: int | None = ...,  # type: ignore[assignment]
) -> list[Tensor]:
    """Windows of one source: rows of token ids as given, or the text cut from its beginning.

    source: one of ``evaluation.text``; left out, ``evaluation.text`` itself. most: windows at most; left out,
    ``evaluation.max_windows``. Rows are cut into :func:`pieces` of ``evaluation.window``; one
    that no row is as long as is refused, unless another of the sources is text. Text is cut into windows of ``tokens``
    (None: ``evaluation.tokens``), which overlap with ``evaluation.stride``.
    A tokenizer that starts texts with BOS starts every window with it, unless ``evaluation.bos`` says otherwise.
    Raises :class:`ConfigError` if the text is shorter than one window.
    """
    source = evaluation.text if source is ... else source
    most = evaluation.max_windows if most is ... else most
    found = given.token_rows(source)
    if found is not None:
        texts.check_rows(found, texts.describe(source), "a window")
        if evaluation.window is not None and kinds(evaluation.text) == {"ids"}:
            texts.check_length(found, texts.describe(source), "window", evaluation.window)
        found = list(itertools.islice(pieces(found, evaluation.window), most))
    else:
        need_tokenizer(tokenizer, "evaluation text")
        source = builtin.REST if source is None else source
        documents = texts.read(
            source, split=evaluation.split, subset=evaluation.subset, text_column=evaluation.text_column
        )
        prefix = bos_prefix(tokenizer) if evaluation.bos else torch.empty(0, dtype=torch.long)
        length = tokens or evaluation.tokens
        step = advance(evaluation, length, len(prefix))
        found = _cut(documents, prefix, most, tokenizer, texts.describe(source), length, step)
    texts.check_vocabulary(found, vocab_size)
    return found


def pieces(rows: Iterable[Tensor], window: int | None) -> Iterator[Tensor]:
    """Rows of token ids as windows: a row that holds several gives them one after the other, without what is left at
    its end; a shorter one, and any where no window is asked for, is one."""
    for row in rows:
        if window is None or len(row) < 2 * window:
            yield row[:window]
        else:
            yield from row[: len(row) // window * window].split(window)


def _cut(
    documents: Iterable[str], prefix: Tensor, most: int | None, tokenizer, name: str, tokens: int, step: int
) -> list[Tensor]:
    content = tokens - len(prefix)
    enough = None if most is None else content + (most - 1) * step
    ids = tokenize(documents, tokenizer, enough)
    if len(ids) < content:
        raise ConfigError(
            f"evaluation text from {name} has {len(ids)} tokens, fewer than one window of "
            f"{tokens}; give more text or a smaller window"
        )
    return [torch.cat([prefix, ids[i : i + content]]) for i in range(0, len(ids) - content + 1, step)]


def count_windows(evaluation: Evaluation, tokenizer, asked: Asked, tokens: int) -> int:
    """About how many windows :func:`windows` gives of one source: exactly for token ids, and for a text that is short;
    of a longer one the beginning is tokenised and the rest reckoned by its characters.

    tokenizer: None reckons all of them, as no text is read with it. Reads the source; ConfigError where it cannot.
    """
    source = builtin.REST if asked.source is None else asked.source
    rows = given.token_rows(source)
    if rows is not None:
        found = sum(1 for _ in pieces(rows, evaluation.window))
        return found if asked.most is None else min(found, asked.most)
    documents = texts.read(source, split=evaluation.split, subset=evaluation.subset, text_column=evaluation.text_column)
    whole = "\n\n".join(documents)
    count, prefix = len(whole) / CHARACTERS, 0
    if tokenizer is not None and whole:
        start = whole[:COUNTED]
        read = len(tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"])
        count = read * len(whole) / len(start)
        prefix = len(bos_prefix(tokenizer)) if evaluation.bos else 0
    found = max(0, int((count - (tokens - prefix)) // advance(evaluation, tokens, prefix)) + 1)
    return found if asked.most is None else min(found, asked.most)


def advance(evaluation: Evaluation, tokens: int, prefix: int) -> int:
    """Tokens of text from a window of ``tokens``, ``prefix`` of them BOS, to the next; at most all that it has."""
    content = tokens - prefix
    return content if evaluation.stride is None else min(evaluation.stride, content)


def windows_of(
    asked: list[Asked],
    evaluation: Evaluation,
    tokenizer=None,
    encoder: bool = False,
    *,
    unseen: list[Tensor] | None = None,
    vocab_size: int | None = None,
    positions: Positions | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> list[Text]:
    """The windows of every text that is asked for, to be measured on the dense and on the pruned model.

    unseen: sequences of the calibration's source that it does not see. positions: of the model; ``warn`` is called
    where they made windows shorter, or where windows exceed them.
    Texts that nobody named are left out where there is no tokenizer to read them with, and where they are shorter than
    a window. Empty for encoders and when disabled.
    """
    if encoder or not evaluation.enabled:
        return []
    tokens = window_tokens(evaluation, positions)
    evaluation.check_stride(tokens)
    if positions and evaluation.window:
        positions.check([evaluation.window], "evaluation windows", "window", lambda message: None)
    found: list[Text] = []
    for one in asked:
        if one.source is None:
            rows = [row[: evaluation.window] for row in (unseen or [])[: one.most]]
            if rows:
                found.append(Text("text of the calibration's source that it does not see", rows, one.domain))
            continue
        name, own = texts.describe(one.source), kind(one.source) == "builtin"
        if own and tokenizer is None:
            continue
        length = len(found[0].windows[0]) if own and found else tokens  # ratios compare at one length
        try:
            rows = windows(
                evaluation, tokenizer, source=one.source, vocab_size=vocab_size, tokens=length, most=one.most
            )
        except ConfigError as error:
            if not own:
                raise
            warn(f"not measured: {error}")
            continue
        found.append(_described(name, rows, one, evaluation, tokenizer))
    cut = any(len(text.windows[0]) == tokens for text in found) and kinds(evaluation.text) != {"ids"}
    if positions and evaluation.window is None and tokens < evaluation.tokens and cut:
        warn(
            f"evaluation windows have {tokens} tokens, not {evaluation.tokens}: {positions.model} has no more positions"
        )
    if positions:
        positions.check({len(row) for text in found for row in text.windows}, "evaluation windows", "window", warn)
    return found


def _described(name: str, rows: list[Tensor], asked: Asked, evaluation: Evaluation, tokenizer) -> Text:
    """The windows of a source, with what a report says of them."""
    of_set = kind(asked.source) == "data set"
    text = Text(
        name,
        rows,
        asked.domain,
        split=evaluation.split if of_set else None,
        subset=evaluation.subset if of_set else None,
    )
    if evaluation.stride is None or given.token_rows(asked.source) is not None:
        return text
    length, prefix = len(rows[0]), len(bos_prefix(tokenizer)) if evaluation.bos else 0
    step = advance(evaluation, length, prefix)
    if step == length - prefix:
        return text
    return text._replace(stride=step, scored=[length - 1, *[step] * (len(rows) - 1)])


def window_tokens(evaluation: Evaluation, positions: Positions | None) -> int:
    """Tokens of a window of text: what is asked, else the usual number or what the model has positions for."""
    if evaluation.window is not None:
        return evaluation.window
    return min(evaluation.tokens, positions.count) if positions else evaluation.tokens


def refuse_text(evaluation: Evaluation, view: ModelView) -> None:
    """Raise ConfigError for an evaluation text that was named for a model that has no perplexity."""
    if view.is_encoder and evaluation.text is not None:
        raise ConfigError(
            f"evaluation.text={shown(evaluation.text)} would do nothing: {type(view.model).__name__} "
            "does not predict the next token, so it has no perplexity; leave it out"
        )
