"""Encoders and tasks: sentence vectors, STS-B, and a linear head on frozen vectors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError

BATCH_TOKENS = 8192


def token_ids(tokenizer, texts: Sequence[str], max_length: int = 128) -> list[Tensor]:
    """One 1-D id tensor per text, special tokens included, without padding."""
    return [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]


@torch.no_grad()
def encode(model: nn.Module, sequences: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean-pooled last hidden states, float32 ``[sequences, hidden]``.

    Sequences of equal length run together, so nothing is padded; equal sequences run once. dtype: of the products.
    """
    device = next(model.parameters()).device
    unique: dict[bytes, list[int]] = {}
    for row, ids in enumerate(sequences):
        unique.setdefault(ids.numpy().tobytes(), []).append(row)
    lengths: dict[int, list[list[int]]] = {}
    for rows in unique.values():
        lengths.setdefault(len(sequences[rows[0]]), []).append(rows)
    out: Tensor | None = None
    was = model.training
    model.eval()
    narrow = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with narrow:
        for length, members in sorted(lengths.items()):
            step = max(1, BATCH_TOKENS // length)
            for start in range(0, len(members), step):
                part = members[start : start + step]
                ids = torch.stack([sequences[rows[0]] for rows in part]).to(device)
                vectors = model(ids)[0].float().mean(1).cpu()
                if out is None:
                    out = torch.empty(len(sequences), vectors.shape[1])
                for rows, vector in zip(part, vectors):
                    out[rows] = vector
    model.train(was)
    if out is None:
        raise ConfigError("there are no texts to embed")
    return out


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
    """Logistic regression on standardised vectors by L-BFGS; returns ``[hidden + 1]`` weights on raw vectors.

    vectors: float32 ``[n, hidden]``; labels: 0 or 1 ``[n]``.
    """
    mean, std = vectors.mean(0), vectors.std(0).clamp(min=1e-6)
    x = torch.cat([(vectors - mean) / std, torch.ones(len(vectors), 1)], dim=1)
    weight = torch.zeros(x.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")
    target = labels.float()

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(x @ weight, target) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    w = weight.detach()
    return torch.cat([w[:-1] / std, (w[-1] - (w[:-1] * mean / std).sum())[None]])


def predict(vectors: Tensor, head: Tensor) -> Tensor:
    """Logits of :func:`fit_head`'s classifier, ``[n]``."""
    return vectors @ head[:-1] + head[-1]
