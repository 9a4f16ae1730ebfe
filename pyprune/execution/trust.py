"""What is done where a guard (:mod:`pyprune.ops.guards`) finds an op's result wrong.

The reference takes the op's place and does it again. If that passes the guard, the op was at fault: it is used no more,
and the report says so. If it does not, the data are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Set

import torch

from pyprune import ops

ALONE = frozenset(
    (
        "gram_update",
        "cross_gram_update",
        "column_moments",
        "linear",
        "rms_norm",
        "rotary",
        "swiglu",
        "attention",
    )
)
"""Ops whose guards look at no other op's work. A sweep is judged together with the updates between its parts."""


def by_reference(suspects: Set[str]) -> contextlib.AbstractContextManager:
    """Inside the ``with`` block the reference takes the place of these ops, or of all if one is not among ``ALONE``."""
    if suspects - ALONE:
        return ops.backend("reference")
    return ops.backend(",".join(f"{op}=reference" for op in sorted(suspects))) if suspects else contextlib.nullcontext()


def distrust(warn: Callable[[str], None], device: torch.device, index: int, op: str) -> None:
    """An op's result failed its guard where the reference's does not: use it no more, and say so."""
    name = ops.disqualify(op, device.type, f"its result failed a guard in block {index} of a run")
    warn(
        f"{op} by the {name} back-end gave a wrong result in block {index}: the block was done again by the "
        "reference, which takes its place; pyprune env --qualify tries it anew"
    )
