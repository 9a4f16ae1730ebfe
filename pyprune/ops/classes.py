"""Size classes of ops: the same kernel is not the fastest at every size, so ``auto`` may take another one in each.

A class is a part of an op's calls told by type and size alone. Where the classes begin is fixed here; which back-end is
the right one in each is measured (:mod:`pyprune.ops.qualification`). ``op/class`` is the key of an op's class, the op's
name that of an op without classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyprune.config import OPS
from pyprune.ops.packed import Packed

FEW_ROWS, WIDE_WEIGHT = 48, 2**22
"""Rows of a product below which packing its weight may not pay; numbers in a weight that no cache holds."""
WIDE_GRAM = 2048
"""Columns from which a kernel that computes one triangle of a Gram matrix has enough of them to gain by it."""
SMALL_SYSTEM, MEDIUM_SYSTEM, MANY_SYSTEMS = 128, 512, 8
"""Orders of systems that one core or multiprocessor keeps to itself, and that a blocked kernel may still win."""
FEW_TOKENS = 16
"""Tokens up to which the weight's own bytes are most of what a product costs."""

CLASSES: dict[str, tuple[str, ...]] = {
    "gram_update": ("float32", "16-bit", "16-bit-wide"),
    "cross_gram_update": ("float32", "16-bit"),
    "select_mask": ("row", "matrix"),
    "cholesky": ("small", "medium", "large"),
    "cholesky_solve": ("small", "medium", "large"),
    "linear": ("few-rows", "rows", "rows-wide"),
    "sparse_linear": ("one-token", "few-tokens", "tokens", "few-tokens-2:4", "tokens-2:4"),
    "rms_norm": ("float32", "16-bit"),
    "rotary": ("float32", "16-bit"),
    "swiglu": ("float32", "16-bit"),
    "attention": ("float32", "16-bit"),
}
KEYS = tuple(f"{op}/{name}" if name else op for op in OPS for name in CLASSES.get(op, ("",)))


def op_of(key: str) -> str:
    return key.split("/")[0]


def keys_of(op: str) -> list[str]:
    return [key for key in KEYS if op_of(key) == op]


def gram(x: Tensor, precision: str) -> str:
    if x.dtype == torch.float32 and precision == "float32":
        return "gram_update/float32"
    return "gram_update/16-bit-wide" if x.shape[1] >= WIDE_GRAM else "gram_update/16-bit"


def by_type(op: str, dtype: torch.dtype) -> str:
    return f"{op}/float32" if dtype == torch.float32 else f"{op}/16-bit"


def selection(scope: str) -> str:
    return f"select_mask/{scope}"


def systems(op: str, a: Tensor) -> str:
    """``large`` are also a few systems of medium order: there is nothing to spread over lanes or multiprocessors."""
    batch, n = a.shape[:2]
    if n <= SMALL_SYSTEM:
        return f"{op}/small"
    return f"{op}/medium" if n <= MEDIUM_SYSTEM and batch >= MANY_SYSTEMS else f"{op}/large"


def product(x: Tensor, weights: int) -> str:
    if math.prod(x.shape[:-1]) < FEW_ROWS:
        return "linear/few-rows"
    return "linear/rows-wide" if weights >= WIDE_WEIGHT else "linear/rows"


def sparse_product(x: Tensor, packed: Packed) -> str:
    tokens = math.prod(x.shape[:-1])
    if tokens <= 1:
        return "sparse_linear/one-token"
    key = "sparse_linear/few-tokens" if tokens <= FEW_TOKENS else "sparse_linear/tokens"
    return f"{key}-2:4" if packed.semi_structured else key
