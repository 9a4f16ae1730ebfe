"""Candidates that do what a kernel on an unknown machine may do; tests/ops/test_qualification.py sees them rejected."""

from __future__ import annotations

import os
import random
import time

import torch

from pyprune.ops import reference


def wrong(gram, x, *, sums=None, count=None, mask=None, precision="float32"):
    reference.gram_update(gram, x, sums=sums, count=count, mask=mask, precision=precision)
    gram[0, -1] += 1


def unwritten(x, w, bias=None):
    out = torch.empty(x.shape[0], w.shape[0])
    out[:-1] = reference.linear(x, w, bias)[:-1]
    return out


def outside(cross, y, x, *, mask=None):
    reference.cross_gram_update(cross, y, x, mask=mask)
    torch.as_strided(cross, (1,), (1,), cross.storage_offset() + cross.numel()).zero_()


def fickle(a, *, damping=None):
    factor, info = reference.cholesky(a, damping=damping)
    return factor * (1 + 1e-6 * random.random()), info


def raising(w, n, m, *, scale=None, apply=False):
    raise ValueError("no image for this processor")


def crash(x, *, mask=None):
    os.abort()


def hang(a, b, *, damping=None):
    time.sleep(600)


def slow(w, k, *, scale=None, scope="row", apply=False):
    time.sleep(0.02)
    sum(i * i for i in range(300_000))
    return reference.select_mask(w, k, scale=scale, scope=scope, apply=apply)
