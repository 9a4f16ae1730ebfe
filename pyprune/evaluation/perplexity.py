"""Perplexity of a model: the same code for dense and pruned ones.

Perplexity is ``exp(mean over windows of (mean over the window's predictions of −log p))``: windows do not overlap and
each is seen by itself, so a window of t tokens makes t − 1 predictions.

With a stride windows overlap, each scores only the tokens that the window before did not have, and perplexity is
``exp(mean over all scored tokens of −log p)``, as in "Perplexity of fixed-length models" of the transformers library's
documentation (there, a last window that is shorter is scored, too; here every window is whole).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyprune.config import ConfigError, Evaluation
from pyprune.data import builtin, given, texts
from pyprune.data.calibration import bos_prefix, need_tokenizer, tokenize
from pyprune.effects import shown
from pyprune.evaluation.domains import Asked
from pyprune.execution.device import cpu_has_bfloat16
from pyprune.model.attributes import vocabulary_size
from pyprune.model.blocks import ModelView, predicts_next_token
from pyprune.model.positions import Positions
from pyprune.model.recording import uncached
from pyprune.sources import kind, kinds

POSITIONS = 256
"""Logits of this many positions are widened to float32 at a time: the vocabulary is wide."""
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


def perplexity(model: nn.Module, windows: list[Tensor], *, scored: list[int] | None = None, **forward) -> float:
    """Perplexity of a causal language model over windows of token ids; NaN or inf if its logits are. Arguments as of
    :func:`losses_of`."""
    return perplexity_of(losses_of(model, windows, scored=scored, **forward), scored)


@torch.no_grad()
def losses_of(
    model: nn.Module,
    windows: list[Tensor],
    *,
    scored: list[int] | None = None,
    dtype: torch.dtype | str = "auto",
    batch_size: int = 1,
    progress=None,
) -> list[float]:
    """Mean −log p of every window's scored tokens, in the order of the windows.

    scored: how many of its last tokens each window scores, where windows overlap; None: all but its first.
    dtype: type of the weights and activations in the forward passes; the model's own parameters stay as they are.
    progress: called with (windows done, windows in all).
    """
    check_causal(model)
    if not windows:
        raise ConfigError("there are no windows to evaluate")
    device, training, done = device_of(model), model.training, 0
    losses: list[Tensor] = []
    model.eval()
    try:
        with _forward_in(model, forward_dtype(model, dtype)) as forward, uncached(model) as options:
            for batch in _batches(windows, batch_size):
                ids = torch.stack(batch).to(device)
                logits = forward(input_ids=ids, **options).logits
                counts = None if scored is None else scored[done : done + len(batch)]
                losses.append(window_losses(logits, ids, counts))
                done += len(batch)
                if progress is not None:
                    progress(done, len(windows))
    finally:
        model.train(training)
    return torch.cat(losses).tolist()  # read once: the device is not waited for window by window


def perplexity_of(losses: list[float], scored: list[int] | None = None) -> float:
    """exp of the mean over windows, or over the tokens that they scored; NaN where a loss is not finite, infinity where
    the exponential is too large."""
    if not all(map(math.isfinite, losses)):
        return math.nan
    counts = scored or [1] * len(losses)
    mean = math.fsum(count * loss for count, loss in zip(counts, losses)) / sum(counts)
    return math.exp(mean) if mean < 700 else math.inf


def warnings_for(rows: list[dict], whose: str) -> list[str]:
    """A sentence for every text on which the perplexity is not finite. whose: ``dense``, ``pruned``, …"""
    return [
        f"the {whose} model's perplexity on {row['text']} is not finite: its weights or activations overflow or "
        f"hold NaN in {row['dtype']}"
        for row in rows
        if row["perplexity"] is None or not math.isfinite(row["perplexity"])
    ]


def _batches(windows: list[Tensor], batch_size: int) -> Iterable[list[Tensor]]:
    """Consecutive windows of equal length, at most ``batch_size`` at a time."""
    batch: list[Tensor] = []
    for row in windows:
        if batch and (len(batch) == batch_size or len(row) != len(batch[0])):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def window_losses(logits: Tensor, ids: Tensor, scored: list[int] | None = None) -> Tensor:
    """Mean −log p of each window's next tokens, in float64: logits ``[windows, tokens, vocabulary]``.

    scored: how many of its last tokens count in each window; None: all but the first.
    """
    total = torch.zeros(len(ids), dtype=torch.float64, device=logits.device)
    last = ids.shape[1] - 1
    counts = torch.tensor([last] * len(ids) if scored is None else scored, device=logits.device)
    for start in range(0 if scored is None else last - max(scored), last, POSITIONS):
        stop = min(start + POSITIONS, last)
        part = logits[:, start:stop].float()
        losses = (
            F.cross_entropy(part.flatten(0, 1), ids[:, start + 1 : stop + 1].flatten(), reduction="none")
            .view(len(ids), -1)
            .double()
        )
        if scored is not None:
            positions = torch.arange(start, stop, device=logits.device)
            losses = losses.where(positions >= last - counts[:, None], 0)
        total += losses.sum(1)
    return total / counts


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def check_causal(model: nn.Module) -> None:
    """Raise ConfigError for a model that does not predict the next token."""
    if not predicts_next_token(model):
        raise ConfigError(
            f"{type(model).__name__} does not predict the next token, so it has no perplexity; evaluate "
            "it on its own task, or set evaluation.enabled=False"
        )


def forward_dtype(model: nn.Module, dtype: torch.dtype | str = "auto") -> torch.dtype:
    """The type of forward passes: ``auto`` is the model's own, except float32 on a CPU with bfloat16 products."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    parameter = next(model.parameters())
    if parameter.dtype == torch.float32 and parameter.device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return parameter.dtype


@contextlib.contextmanager
def _forward_in(model: nn.Module, dtype: torch.dtype):
    """A forward function that sees the parameters in ``dtype``; the copy is shared where they are that already.

    Only parameters are cast: buffers such as rotary frequencies keep their precision, as after ``from_pretrained``.
    """
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        yield model
        return
    cast = {name: p.detach().to(dtype) for name, p in model.named_parameters() if p.is_floating_point()}
    yield lambda **inputs: torch.func.functional_call(model, cast, (), inputs)


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


def measure(model: nn.Module, named: list[Text], evaluation: Evaluation, progress=None) -> list[dict]:
    """One row per text: perplexity (NaN where the logits are not finite), the losses of its windows, its conditions."""
    rows: list[dict] = []
    whole, before = sum(len(text.windows) for text in named), 0
    for text in named:
        dtype, start = forward_dtype(model, evaluation.dtype), time.perf_counter()
        told = _after(before, whole, progress)
        losses = losses_of(
            model, text.windows, scored=text.scored, dtype=dtype, batch_size=evaluation.batch_size, progress=told
        )
        before += len(text.windows)
        rows.append(row_of(text, losses, dtype, time.perf_counter() - start))
    return rows


def row_of(text: Text, losses: list[float], dtype: torch.dtype, seconds: float) -> dict:
    """What is known of one text after its windows were measured."""
    return {
        "text": text.name,
        "split": text.split,
        "subset": text.subset,
        "domain": text.domain,
        "perplexity": perplexity_of(losses, text.scored),
        "losses": losses,
        **({} if text.scored is None else {"scored": text.scored}),
        "windows": len(text.windows),
        "window": len(text.windows[0]),
        "stride": text.stride,
        "tokens": sum(text.scored or (len(window) - 1 for window in text.windows)),
        "dtype": str(dtype)[6:],
        "seconds": seconds,
    }


def _after(before: int, whole: int, progress) -> Callable[[int, int], None] | None:
    """Progress over several texts, of which ``before`` windows of ``whole`` are done."""
    return None if progress is None else lambda done, _: progress(before + done, whole)


@contextlib.contextmanager
def placed(model: nn.Module, device: torch.device, evaluation: Evaluation) -> Iterator[bool]:
    """The model on ``device`` for the duration; yields False, and leaves it where it is, if it does not fit there."""
    home = device_of(model)
    if device.type != "cuda" or home.type == "cuda":
        yield True
        return
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logits = evaluation.batch_size * evaluation.tokens * vocabulary_size(model) * 6
    if 1.2 * weights + 2 * logits > torch.cuda.mem_get_info(device)[0]:
        yield False
        return
    try:
        model.to(device)
        yield True
    finally:
        model.to(home)
        torch.cuda.empty_cache()
