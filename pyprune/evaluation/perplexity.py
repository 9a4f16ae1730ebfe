"""Perplexity of a model: the same code for dense and pruned ones.

Perplexity is ``exp(mean over windows of (mean over the window's predictions of −log p))``: windows do not overlap and
each is seen by itself, so a window of t tokens makes t − 1 predictions.

With a stride windows overlap, each scores only the tokens that the window before did not have, and perplexity is
``exp(mean over all scored tokens of −log p)``, as in "Perplexity of fixed-length models" of the transformers library's
documentation (there, a last window that is shorter is scored, too; here every window is whole).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyprune.config import ConfigError, Evaluation
from pyprune.evaluation.windows import Text
from pyprune.execution.device import cpu_has_bfloat16
from pyprune.model.attributes import vocabulary_size
from pyprune.model.blocks import predicts_next_token
from pyprune.model.recording import uncached

POSITIONS = 256
"""Logits of this many positions are widened to float32 at a time: the vocabulary is wide."""


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
            f"{type(model).__name__} does not predict the next token, so it has no perplexity; measure "
            "tasks instead: `pyprune eval MODEL --tasks NAMES`"
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
