"""Triton kernels in the interpreter, for another process: as conftest.py sets it up. One of them has a fault."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
import conftest  # noqa: E402, F401  (imports the kernels as interpreted ones, and repairs the interpreter's bfloat16)

from pyprune.triton_kernels import *  # noqa: E402, F403
from pyprune.triton_kernels import cholesky  # noqa: E402

os.environ["TRITON_INTERPRET"] = "1"  # conftest takes it away again


def cholesky_that_forgets(a, *, damping=None):
    factor, info = cholesky(a, damping=damping)
    partial = torch.empty_like(factor)
    partial[:, :-1] = factor[:, :-1]
    return partial, info
