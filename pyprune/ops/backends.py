"""What implementations there are of each op, and which of them can run here.

A back-end is a module that holds functions named like the ops; ``AUTO`` says which of them ``auto`` may take for each
class of an op's sizes, and :mod:`pyprune.ops.choice` which one it takes.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch

from pyprune.config import BACKENDS, OPS
from pyprune.ops import classes, qualification, reference

FORWARDS = ("forward_float32", "forward_bfloat16")
"""Forward passes of blocks on a CPU, by type: ``pyprune`` (the products and attention of
:mod:`pyprune.execution.cpu_forward`) or ``torch``."""
OWN_FIRST: tuple[str, ...] = ("cpu", "reference")
LIBRARY_FIRST: tuple[str, ...] = ("reference", "cpu")

# Candidates by device type and class of an op, in the order in which they are taken where none is clearly faster. On a
# GPU nothing but the reference is taken before it has proved itself there; the reference is the library's product
# (cuBLAS, cuSOLVER), the last resort and, for large systems, the first choice.
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(classes.KEYS, OWN_FIRST)
    | dict.fromkeys(
        ("linear/few-rows", "cholesky/medium", "cholesky/large", "cholesky_solve/medium", "cholesky_solve/large"),
        LIBRARY_FIRST,
    ),
    "cuda": dict.fromkeys(classes.KEYS, ("cuda", "triton", "reference"))
    | dict.fromkeys(
        (
            "gram_update/float32",
            "gram_update/16-bit",
            "gram_update/16-bit-wide",
            "cross_gram_update/float32",
            "cross_gram_update/16-bit",
            "column_moments",
            "liar_update",
            *(f"{op}/{kind}" for op in ("rms_norm", "rotary", "swiglu") for kind in ("float32", "16-bit")),
        ),
        ("triton", "reference"),
    )
    | dict.fromkeys(
        ("cholesky/medium", "cholesky/large", "cholesky_solve/medium", "cholesky_solve/large"),
        ("reference", "cuda", "triton"),
    )
    | dict.fromkeys(
        (
            "trailing_update",
            "linear/few-rows",
            "linear/rows",
            "linear/rows-wide",
            "attention/float32",
            "attention/16-bit",
        ),
        ("reference",),
    )
    | dict.fromkeys(
        ("sparse_linear/few-tokens-2:4", "sparse_linear/tokens-2:4"), ("cuda", "triton", "semi_structured", "reference")
    ),
}


@dataclass(frozen=True)
class Backend:
    """Where an op's implementation lives: ``module:function``, imported on first use."""

    name: str
    module: str
    suffix: str = ""

    def load(self, op: str):
        return getattr(importlib.import_module(self.module), op + self.suffix, None)

    def candidate(self, op: str) -> dict[str, str]:
        """The implementation of ``op`` as plain data, for another process."""
        return {"name": self.name, "module": self.module, "function": op + self.suffix}

    def unusable(self, device: torch.device | str) -> str | None:
        """None if it takes tensors on ``device`` at all, else the reason in a sentence."""
        device = torch.device(device)
        if self.name == "reference":
            return None
        if self.name == "cpu" and device.type != "cpu":
            return f"the cpu back-end takes CPU tensors, not {device.type} ones"
        if self.name in ("cuda", "semi_structured") and device.type != "cuda":
            return f"the {self.name} back-end takes CUDA tensors, not {device.type} ones"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if self.name == "triton" and device.type == "cpu" and not interpreted:
            return "Triton runs on CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before the first import)"
        try:
            check = getattr(importlib.import_module(self.module), "unusable", None)
            return check(self.name) if check else None
        except ImportError as error:
            return f"{self.name} back-end cannot be imported: {error}"

    def why_not(self, op: str, device: torch.device | str) -> str | None:
        """The same for one op."""
        if (reason := self.unusable(device)) is not None:
            return reason
        return None if self.load(op) is not None else f"{op} has no {self.name} implementation"


TABLE = {
    "cuda": Backend("cuda", "pyprune.ops.native", "_cuda"),
    "triton": Backend("triton", "pyprune.triton_kernels"),
    "cpu": Backend("cpu", "pyprune.ops.native", "_cpu"),
    "reference": Backend("reference", "pyprune.ops.reference"),
    "semi_structured": Backend("semi_structured", "pyprune.ops.semi_structured"),
}
"""By name; ``semi_structured`` is none that a user names (``config.BACKENDS``): ``auto`` takes it where it has proved
itself."""


def candidates(device: str) -> qualification.Candidates:
    """Class of an op → what ``auto`` may take for tensors on a type of device, usable here; for a CPU the forward
    passes too."""
    found = {
        key: [
            TABLE[name].candidate(classes.op_of(key))
            for name in names
            if TABLE[name].why_not(classes.op_of(key), device) is None
        ]
        for key, names in AUTO[device].items()
    }
    if device == "cpu":
        plain = {"name": "torch", "module": "contextlib", "function": "nullcontext"}
        own = {"name": "pyprune", "module": "pyprune.execution.cpu_forward", "function": "ForwardMode"}
        found |= {op: [own, plain] for op in FORWARDS}
    return found


def status(device: torch.device | str = "cpu") -> dict[str, dict[str, str]]:
    """Op → back-end → ``"usable"`` or why not, for tensors on ``device``; what ``pyprune env`` prints."""
    return {op: {name: TABLE[name].why_not(op, device) or "usable" for name in BACKENDS} for op in OPS}


def raise_faults(device: torch.device | str) -> None:
    """Raise what GPU kernels have found wrong with their data since the last look; waits for ``device``.

    Kernels do not wait to report, so the orchestrator calls this once per block. Nothing to do on other devices.
    """
    if torch.device(device).type != "cuda":
        return
    reference.check(device)
    if TABLE["cuda"].why_not("obs_sweep", device) is None:
        importlib.import_module("pyprune.ops.native").check_cuda(device)
    if TABLE["triton"].why_not("obs_sweep", device) is None:
        importlib.import_module("pyprune.triton_kernels.faults").check(device)
