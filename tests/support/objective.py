"""Correlated inputs of a layer, their damped Hessian in float64, and what a change of weights costs."""

from __future__ import annotations

import torch

from pyprune.masks.statistics import Statistics

DAMPING = 0.01


def inputs(tokens=400, columns=48, seed=0):
    """Inputs ``[tokens, columns]`` that mostly live in a third of the dimensions, so that columns predict others."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, max(2, columns // 3), generator=generator)
    mix = torch.randn(latent.shape[1], columns, generator=generator)
    return latent @ mix + 0.5 * torch.randn(tokens, columns, generator=generator)


def statistics(x, moments=False):
    s = Statistics(x.shape[1], x.device, want_gram=not moments, want_moments=moments)
    s.update(x)
    return s


def hessian(x, damping=DAMPING):
    h = x.double().T @ x.double() / len(x)
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.double)


def objective(delta, h):
    delta = delta.double()
    return torch.einsum("ri,ij,rj->", delta, h, delta).item()
