"""Triton back-end of every op in :mod:`pyprune.ops`: same names, same signatures, same in-place behaviour.

Installed as ``pyprune.triton_kernels``. Importing it launches nothing. Arguments are validated in ``ops``; what only
these kernels require is checked here and raised as ``ValueError``.
"""

from __future__ import annotations

if __name__ == "triton_kernels":
    # vLLM and SGLang import a top-level `triton_kernels` that is the Triton project's own: ours must not shadow it.
    raise ImportError("import pyprune.triton_kernels: the top-level name triton_kernels belongs to another project")

from pyprune.triton_kernels.between import rms_norm, rotary, swiglu
from pyprune.triton_kernels.cholesky import cholesky, cholesky_solve
from pyprune.triton_kernels.compress import compress_24, expand_24, nm_compress_24
from pyprune.triton_kernels.gram import cross_gram_update, gram_update
from pyprune.triton_kernels.liar import liar_update
from pyprune.triton_kernels.moments import column_moments
from pyprune.triton_kernels.nm import nm_mask
from pyprune.triton_kernels.products import attention, linear, trailing_update
from pyprune.triton_kernels.select import select_mask
from pyprune.triton_kernels.sparse import sparse_linear
from pyprune.triton_kernels.sweep import obs_sweep

__all__ = [
    "attention",
    "cholesky",
    "cholesky_solve",
    "column_moments",
    "compress_24",
    "cross_gram_update",
    "expand_24",
    "gram_update",
    "liar_update",
    "linear",
    "nm_compress_24",
    "nm_mask",
    "obs_sweep",
    "rms_norm",
    "rotary",
    "select_mask",
    "sparse_linear",
    "swiglu",
    "trailing_update",
]
