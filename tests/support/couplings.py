"""Coupled groups on plain tensors, inputs that predict one another, and what their repair is given."""

from __future__ import annotations

import torch

from pyprune.model.blocks import WeightRef
from pyprune.structured.groups import Coupled
from pyprune.structured.liar import Problem
from pyprune.structured.moments import Split


def neurons(c: int) -> Coupled:
    return Coupled("neurons", WeightRef("down.weight"), torch.arange(c)[:, None], (), torch.zeros(c, dtype=torch.long))


def heads(count: int, width: int, pools: int = 1) -> Coupled:
    return Coupled(
        "heads",
        WeightRef("o.weight"),
        torch.arange(count * width).reshape(count, width),
        (),
        torch.arange(count) * pools // count,
        count,
        count,
    )


def correlated(tokens: int, c: int, seed: int = 0, rank: int | None = None, mean: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rank = rank or c
    return (
        torch.randn(tokens, rank, generator=g) @ torch.randn(rank, c, generator=g) / rank**0.5
        + 0.3 * torch.randn(tokens, c, generator=g)
        + mean * torch.randn(c, generator=g)
    )


def split_of(x: torch.Tensor, e: torch.Tensor | None = None, held_every: int = 5, batches: int = 3) -> Split:
    out = Split.make(x.shape[1], 0 if e is None else e.shape[1])
    held = torch.arange(len(x)) % held_every == held_every - 1
    for rows in torch.arange(len(x)).chunk(batches):
        out.update(x[rows], held[rows], None if e is None else e[rows])
    return out


def problem(x, e=None, out: int = 12, bias: bool = True, seed: int = 1, group=None) -> Problem:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, x.shape[1], generator=g)
    shift = torch.randn(out, generator=g) if bias else None
    return Problem(weight, shift, group or neurons(x.shape[1]), split_of(x, e))
