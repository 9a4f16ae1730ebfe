"""Candidates that do what a kernel on an unknown machine may do: test_qualification.py sees them found out."""

from __future__ import annotations

import os
import random
import time

import torch

from pyprune.ops import reference, trials


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


def between_rows(w, r, *, mask=None, k=None, nm=None):
    out = reference.obs_sweep(w, r, mask=mask, k=k, nm=nm)
    if w.stride(0) > w.shape[1]:
        torch.as_strided(w, (1,), (1,), w.storage_offset() + w.shape[1]).zero_()
    return out


def dense_only(w):
    values, meta = reference.compress_24(w)
    if not w.is_contiguous():
        values = values + 1
    return values, meta


def ruins(w, e, r):
    trials.ruined = lambda device: True
    raise ConnectionError("illegal memory access")
