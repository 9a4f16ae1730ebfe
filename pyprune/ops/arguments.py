"""Checks of the arguments of ops: ``TypeError`` or ``ValueError`` with the argument's name, what it must be and what
it is."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of numbers that ops take; all of them accumulate in float32."""


def check_matrix(name: str, x: Tensor, dtypes=FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")


def check_numbers(name: str, x: Tensor, dimensions: int) -> None:
    """``dimensions`` exactly if more than one, else at least."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim < dimensions or (dimensions > 1 and x.ndim != dimensions):
        raise ValueError(
            f"{name} must have {dimensions} dimensions{' or more' if dimensions == 1 else ''}, got {x.ndim}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in FLOATS)}, got {str(x.dtype)[6:]}")


def check_like(name: str, x: Tensor | None, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} must be {str(dtype)[6:]} {tuple(shape)} on {device}, "
            f"got {str(x.dtype)[6:]} {tuple(x.shape)} on {x.device}"
        )


def check_rows(name: str, x: Tensor, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """The left side of a product, ``[…, columns]``."""
    fits = isinstance(x, Tensor) and x.ndim >= 1 and x.shape[-1] == columns
    if not fits or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} must be {str(dtype)[6:]} [..., {columns}] on {device}, got "
            f"{str(getattr(x, 'dtype', type(x).__name__)).removeprefix('torch.')} {tuple(getattr(x, 'shape', ()))}"
            + (f" on {x.device}" if isinstance(x, Tensor) else "")
        )


def check_accumulator(name: str, x: Tensor, shape: tuple, device: torch.device) -> None:
    check_like(name, x, shape, torch.float32, device)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def check_written(name: str, x: Tensor) -> None:
    """An in-place argument whose elements share memory would be written twice."""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride <= span:
            raise ValueError(
                f"{name} is changed in place, but its elements overlap: shape {tuple(x.shape)}, strides {x.stride()}"
            )
        span += stride * (size - 1)


def check_group(n: int, m: int, columns: int) -> None:
    if not 0 < n < m:
        raise ValueError(f"N:M needs 0 < N < M, got {n}:{m}")
    if columns % m:
        raise ValueError(f"{n}:{m} needs a width divisible by {m}, got {columns}")


def check_systems(a: Tensor, damping: Tensor | None) -> None:
    if not isinstance(a, Tensor) or a.dtype != torch.float32:
        raise TypeError("a must be a float32 tensor")
    if a.ndim != 3 or a.shape[1] != a.shape[2]:
        raise ValueError(f"a must be [batch, n, n], got {tuple(a.shape)}")
    check_like("damping", damping, (a.shape[0],), torch.float32, a.device)


def check_attention_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    full = (*q.shape[:3], k.shape[2])
    expands = mask.ndim <= 4 and all(m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full)))
    if mask.dtype not in (torch.bool, q.dtype) or mask.device != q.device or not expands:
        raise ValueError(
            f"mask must be bool or {str(q.dtype)[6:]} on {q.device}, of a shape that expands to {full}, got "
            f"{str(mask.dtype)[6:]} {tuple(mask.shape)} on {mask.device}"
        )
