"""Triton launches on the current device and its stream, whatever the tensors' own: ops make theirs current."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor


def on_device(op: Callable) -> Callable:
    """``op`` with the GPU of its first tensor current while it launches."""

    @functools.wraps(op)
    def launched(*arguments, **options):
        device = next(x.device for x in (*arguments, *options.values()) if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return op(*arguments, **options)

    return launched
