"""Encoders: sentence vectors, STS-B, a linear head on frozen vectors, and forward passes without padding."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError

BATCH_TOKENS = 8192


def token_ids(tokenizer, texts: Sequence[str], max_length: int = 128) -> list[Tensor]:
    """One 1-D id tensor per text, special tokens included, without padding."""
    return [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]


def paired_inputs(model: nn.Module, tokenizer, *columns: Sequence[str], max_length: int = 128) -> list[dict]:
    """Inputs of one text per row, or of two in one sequence, as the tokenizer joins them; 1-D tensors, unpadded."""
    found = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in found]
    return [accepted(model, dict(zip(names, row))) for row in zip(*(found[name] for name in names))]


def accepted(model: nn.Module, row: dict) -> dict[str, Tensor]:
    """A row of token ids as tensors, without the token types where the model takes none."""
    known = inspect.signature(model.forward).parameters
    return {name: torch.tensor(ids) for name, ids in row.items() if name == "input_ids" or name in known}


@torch.no_grad()
def unpadded(
    model: nn.Module,
    inputs: Sequence[dict[str, Tensor]],
    read: Callable[[Any], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Any = None,
) -> list[Tensor]:
    """What ``read`` takes from the model's output (one entry per row of a batch), on the CPU, per input.

    Inputs of equal length run together, so nothing is padded; equal inputs run once. dtype: of the products.
    progress: called with (distinct inputs done, distinct inputs in all).
    """
    device = next(model.parameters()).device
    unique: dict[tuple[bytes, ...], list[int]] = {}
    for place, row in enumerate(inputs):
        unique.setdefault(tuple(part.numpy().tobytes() for part in row.values()), []).append(place)
    lengths: dict[int, list[list[int]]] = {}
    for places in unique.values():
        lengths.setdefault(len(inputs[places[0]]["input_ids"]), []).append(places)
    found: dict[int, Tensor] = {}
    done, was = 0, model.training
    model.eval()
    narrow = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    try:
        with narrow:
            for length, members in sorted(lengths.items()):
                step = max(1, BATCH_TOKENS // length)
                for start in range(0, len(members), step):
                    part = members[start : start + step]
                    names = inputs[part[0][0]]
                    batch = {name: torch.stack([inputs[p[0]][name] for p in part]).to(device) for name in names}
                    for places, value in zip(part, read(model(**batch)).cpu()):
                        found.update(dict.fromkeys(places, value))
                    done += len(part)
                    if progress is not None:
                        progress(done, len(unique))
    finally:
        model.train(was)
    return [found[place] for place in range(len(inputs))]


def encode(
    model: nn.Module, sequences: Sequence[Tensor], *, dtype: torch.dtype = torch.float32, progress: Any = None
) -> Tensor:
    """Mean-pooled last hidden states, float32 ``[sequences, hidden]``; of a model with a head, those of its body.

    dtype and progress: as of :func:`unpadded`.
    """
    if not sequences:
        raise ConfigError("there are no texts to embed")
    body = getattr(model, "base_model", model)
    rows = [{"input_ids": ids} for ids in sequences]
    return torch.stack(unpadded(body, rows, lambda out: out[0].float().mean(1), dtype=dtype, progress=progress))


def read_pairs(path: str | Path) -> tuple[list[str], list[str], Tensor]:
    """``{sentence1, sentence2, score}`` lines of a jsonl file. Raises ConfigError for any other."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        return (
            [r["sentence1"] for r in rows],
            [r["sentence2"] for r in rows],
            torch.tensor([float(r["score"]) for r in rows]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a jsonl of sentence1, sentence2 and score: {error!r}") from error


def similarities(
    model: nn.Module, tokenizer, first: Sequence[str], second: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cosine of the two sentences' vectors, float32 ``[pairs]``."""
    vectors = encode(model, token_ids(tokenizer, [*first, *second]), dtype=dtype)
    return nn.functional.cosine_similarity(vectors[: len(first)], vectors[len(first) :])


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation; ties share their mean rank."""
    a, b = (_ranks(v.double()) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30))


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def sts_spearman(model: nn.Module, tokenizer, pairs: str | Path | tuple, *, dtype: torch.dtype = torch.float32) -> dict:
    """STS-B: Spearman of cosine similarity against the human scores.

    pairs: a jsonl path or ``(first, second, scores)``. Returns ``{"spearman", "pairs", "similarities"}``.
    """
    first, second, scores = read_pairs(pairs) if isinstance(pairs, (str, Path)) else pairs
    found = similarities(model, tokenizer, first, second, dtype=dtype)
    return {"spearman": spearman(found, scores), "pairs": len(scores), "similarities": found}


def paired_bootstrap(statistic, rows: int, *, samples: int = 2000, seed: int = 0) -> dict:
    """Mean, standard error and 95 % interval of ``statistic(indices)`` over rows drawn with replacement.

    statistic: a difference between two models on the same rows, from an int64 tensor of row numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([statistic(torch.randint(rows, (rows,), generator=generator)) for _ in range(samples)])
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "difference": statistic(torch.arange(rows)),
        "standard_error": float(values.std()),
        "low": low,
        "high": high,
    }


def fit_head(vectors: Tensor, labels: Tensor, *, decay: float = 1e-4, steps: int = 100) -> Tensor:
    """Logistic regression on standardised vectors by L-BFGS; returns weights on raw vectors, the bias last.

    vectors: float32 ``[n, hidden]``; labels: int64 ``[n]`` from 0. Returns ``[hidden + 1]`` for two classes (of the
    second against the first), ``[hidden + 1, classes]`` for more.
    """
    mean, std = vectors.mean(0), vectors.std(0).clamp(min=1e-6)
    x = torch.cat([(vectors - mean) / std, torch.ones(len(vectors), 1)], dim=1)
    classes = int(labels.max()) + 1
    two = classes <= 2
    weight = torch.zeros(x.shape[1], *(() if two else (classes,)), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")
    target = labels.float() if two else labels.long()
    misfit = nn.functional.binary_cross_entropy_with_logits if two else nn.functional.cross_entropy

    def closure():
        optimiser.zero_grad()
        loss = misfit(x @ weight, target) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    scale = torch.cat([std, torch.ones(1)])
    w = weight.detach() / (scale if two else scale[:, None])
    return torch.cat([w[:-1], (w[-1] - mean @ w[:-1])[None]])


def predict(vectors: Tensor, head: Tensor) -> Tensor:
    """Logits of :func:`fit_head`'s classifier, ``[n]`` or ``[n, classes]``."""
    return vectors @ head[:-1] + head[-1]


def predicted_classes(vectors: Tensor, head: Tensor) -> Tensor:
    """Classes of :func:`fit_head`'s classifier, int64 ``[n]``."""
    logits = predict(vectors, head)
    return (logits > 0).long() if logits.ndim == 1 else logits.argmax(1)
