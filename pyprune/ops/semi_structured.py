"""Products of packed 2:4 weights by the sparse tensor cores of NVIDIA GPUs, through PyTorch's CUTLASS kernels.

A 2:4 weight's packed values, row by row, are what these kernels multiply; only their metadata, one bit per weight, is
made anew and kept beside them. They take bfloat16 and float16, and at this time GPUs of compute capability 8.x only: a
candidate for ``auto`` alone, taken where its trials pass and it is the faster one.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from pyprune.ops import reference
from pyprune.ops.packed import Packed, unpack_bitmask

PADDED = 8
"""Tokens come in multiples of this; zeros make up for those that are missing."""

_metadata: weakref.WeakKeyDictionary[Packed, tuple[tuple | None, Tensor]] = weakref.WeakKeyDictionary()
"""With the state of the weight that it is that of."""


def unusable(name: str) -> str | None:
    """None if there is a GPU that may have the kernels, else the reason in a sentence."""
    if torch.version.cuda is None or not torch.cuda.device_count():
        return "sparse tensor cores need an NVIDIA GPU, and a torch built for it"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"sparse tensor cores need compute capability 8.0, this GPU has {major}.{minor}"


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """packed: with :attr:`Packed.semi_structured`."""
    rows, columns = packed.shape
    tokens = math.prod(x.shape[:-1])
    flat = torch.nn.functional.pad(x.reshape(tokens, columns), (0, 0, 0, -tokens % PADDED)).contiguous()
    values, meta = packed.values.view(rows, columns // 2), _metadata_of(packed)
    if bias is None:
        product = torch._sparse_semi_structured_mm(values, meta, flat.T)
    else:
        product = torch._sparse_semi_structured_addmm(bias, values, meta, flat.T)
    return product[:, :tokens].T.contiguous().view(*x.shape[:-1], rows)


def _metadata_of(packed: Packed) -> Tensor:
    """int16 ``[rows, columns / 16]``, in the layout of :func:`pyprune.ops.compress_24`."""
    packed.check()
    state, meta = _metadata.get(packed, (None, None))
    if meta is None or state != packed._checked:
        meta = reference.compress_24(unpack_bitmask(packed))[1]
        _metadata[packed] = packed._checked, meta
    return meta
