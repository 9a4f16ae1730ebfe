"""One function per op: arguments are validated here, once, and a back-end is picked here, once.

Back-ends: ``cuda`` (``pyprune._C``, CUDA C++), ``triton`` (``pyprune.triton_kernels``), ``cpu`` (``pyprune._C``,
OpenMP) and ``reference`` (plain PyTorch). ``auto`` takes the one that :mod:`pyprune.ops.qualification` found right and
fastest on this machine among those of ``AUTO``, in each class of an op's sizes (:mod:`pyprune.ops.classes`); a back-end
the user names is used or refused. One CPU op leaves to PyTorch the types that it has no kernel for: see ``linear_cpu``
in :mod:`pyprune.ops.native`.

All functions take float32, bfloat16 or float16 matrices and accumulate in float32. ``mask`` is True where a weight
is kept, or a token counted.

This file holds the contracts: one function per op, its arguments checked. Beside it:

``reference``       every op in plain PyTorch, the truth that the others are tested against
``native``          the only file that calls the compiled module ``pyprune._C``
``qualification``   which candidate of an op ``auto`` takes on this machine, measured once and kept
``trials``          the cases that a candidate is checked and timed on
``classes``         the classes of an op's sizes that have a verdict of their own
``semi_structured`` products of 2:4 weights by PyTorch's kernels for sparse tensor cores
``packed``          weights as a bitmask and their non-zero values: the layout, to it and back
``guards``          what a run checks of its kernels' results

From outside: the functions of this file; what ``packed`` defines; ``native`` and ``qualification`` for ``pyprune env``.
May import: ``pyprune.triton_kernels``, ``config`` and the other modules without a package.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.config import BACKENDS, MAX_COLUMN_BLOCK, OPS, ConfigError, parse_backend
from pyprune.ops import classes, qualification, reference
from pyprune.ops.packed import FLOATS, Packed

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

_forced: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("pyprune_backend", default=None)


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


@contextlib.contextmanager
def backend(name: str):
    """Inside the ``with`` block every op runs on this back-end (or by op, as :func:`pyprune.config.parse_backend`
    reads it); ``"auto"`` restores the choice by device.

    Raises ``ValueError`` for an unknown name, and the op raises ``RuntimeError`` with the reason if it cannot run. A
    run settles that before it begins: :func:`settle`.
    """
    token = _forced.set(parse_backend(name))
    try:
        yield
    finally:
        _forced.reset(token)


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


def verdicts(device: str, *, measure: bool = True, again: bool = False) -> dict[str, dict]:
    """What ``auto`` takes for tensors on a type of device, by class of op, and why; see
    :func:`qualification.verdicts`."""
    return qualification.verdicts(device, candidates(device), measure=measure, again=again)


_pinned: contextvars.ContextVar[dict[str, dict[str, str]] | None] = contextvars.ContextVar(
    "pyprune_pinned", default=None
)
_settled: dict[tuple[str, bool], dict[str, str]] = {}


def taken(key: str, device: str) -> str:
    """Name of the candidate that a class of an op, or a forward pass of ``FORWARDS``, uses now for tensors on a type of
    device."""
    op = classes.op_of(key)
    forced = _forced.get() or {}
    if (name := forced.get(op, forced.get("", "auto"))) != "auto":
        return _named(op, name)
    pinned = (_pinned.get() or {}).get(device)
    if pinned is not None:
        return pinned.get(key, pinned.get(op, "reference"))  # an older version's record does not know of newer ops
    return _automatic(device)[key]


def taken_for(op: str, x: Tensor) -> str:
    """The same for an op whose classes are types of numbers, and tensors like ``x``."""
    return taken(classes.by_type(op, x.dtype), x.device.type)


def _named(op: str, name: str) -> str:
    """A back-end, or the forward passes that go with it."""
    return name if op in OPS else "torch" if name == "reference" else "pyprune"


def _automatic(device: str) -> dict[str, str]:
    """What this machine's measurements say, made if need be."""
    threads = device, torch.get_num_threads() == 1
    if threads not in _settled:
        _settled[threads] = {key: verdict["takes"] for key, verdict in verdicts(device).items()}
    return _settled[threads]


def check_backend(text: str, device: str) -> str | None:
    """A sentence if some op cannot run on the back-end that was asked for all of them, and takes ``auto``'s instead.

    Raises ConfigError, before any work, if that back-end cannot run here at all, or not the op it was named for.
    """
    named = parse_backend(text)
    absent = {}
    for name in {named[""]} if "" in named else ():
        if (reason := TABLE[name].unusable(device)) is not None:
            raise ConfigError(f"backend {text!r} cannot run on {device}: {reason}; pyprune env shows what can")
        absent = {op: name for op in OPS if op not in named and TABLE[name].why_not(op, device) is not None}
    refused = {
        op: reason
        for op, name in named.items()
        if op and name != "auto" and (reason := TABLE[name].why_not(op, device)) is not None
    }
    if refused:
        raise ConfigError(
            f"backend {text!r} cannot run on {device}: {'; '.join(dict.fromkeys(refused.values()))}; "
            "pyprune env shows what can"
        )
    if not absent:
        return None
    return f"the {named['']} back-end has no {', no '.join(absent)}: there the choice is automatic"


def settle(
    device: str,
    recorded: dict[str, dict[str, str]] | None = None,
    asked: str = "auto",
    repeated: dict[str, dict[str, str]] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, str]]:
    """What a run on a type of device takes, device → class of op → name, for :func:`pinned`: what an interrupted one
    recorded, else what was asked for or is in force now, else what the run took that this one repeats, else what this
    machine's measurements say, made if need be.

    warn: hears where ``repeated`` cannot be followed here. Raises ConfigError where ``recorded`` and ``asked`` cannot.
    """
    if recorded:
        _check_recorded(recorded)
        return {kind: _trusted(kind, choices) for kind, choices in recorded.items()}
    check_backend(asked, device)
    named, found = parse_backend(asked) or _forced.get() or {}, {}
    before = (repeated or {}).get(device, {})
    lost: dict[tuple[str, str], list[str]] = {}
    known = verdicts(device, measure=False) if before else {}
    for key in candidates(device):
        op = classes.op_of(key)
        name = named.get(op, named.get("", "auto"))
        if name != "auto" and op in OPS and op not in named and TABLE[name].why_not(op, device) is not None:
            name = "auto"
        was = before.get(key, before.get(op)) if name == "auto" else None
        reason = _unfit(op, was, device) or known.get(key, {}).get("failed", {}).get(was) if was else None
        if was and not reason:
            found[key] = was
            continue
        found[key] = _automatic(device)[key] if name == "auto" else _named(op, name)
        if was and reason:
            lost.setdefault((was, reason), []).append(f"{key} takes {found[key]}")
    for (was, reason), instead in lost.items():
        warn(
            f"the repeated run took the {was} back-end, which cannot be taken here ({reason}): {', '.join(instead)}; "
            "the result may differ from that run's by rounding"
        )
    if repeated and not before:
        warn(
            f"the repeated run took its back-ends on {', '.join(repeated)}: on {device} the choice is automatic, and "
            "the result may differ from that run's by rounding"
        )
    return {device: found}


def _unfit(op: str, name: str, device: str) -> str | None:
    """Why what another run took for an op, or as a forward pass, cannot be taken here."""
    known = TABLE if op in OPS else ("pyprune", "torch")
    if name not in known:
        return f"there is no back-end {name!r} for it"
    return TABLE[name].why_not(op, device) if op in OPS else None


def _trusted(device: str, choices: dict[str, str]) -> dict[str, str]:
    """The reference in place of what has failed on this machine since."""
    known = verdicts(device, measure=False)
    return {key: "reference" if name in known.get(key, {}).get("failed", {}) else name for key, name in choices.items()}


def _check_recorded(recorded: dict[str, dict[str, str]]) -> None:
    for device, choices in recorded.items():
        known = {*OPS, *candidates(device)}
        for key, name in choices.items():
            op = classes.op_of(key)
            if key not in known or (op in OPS and (reason := TABLE[name].why_not(op, device)) is not None):
                raise ConfigError(
                    f"the interrupted run took the {name} back-end for {key}, which cannot run here: "
                    f"{reason if key in known else 'there is no such op'}; resume it where it began, or "
                    "start anew in another folder"
                )


@contextlib.contextmanager
def pinned(choices: dict[str, dict[str, str]]):
    """Inside the ``with`` block ops take these, as :func:`settle` gave them."""
    tokens = _pinned.set(choices), _forced.set(None)
    try:
        yield
    finally:
        _forced.reset(tokens[1])
        _pinned.reset(tokens[0])


def disqualify(op: str, device: str, reason: str) -> str:
    """No more of what ``op`` takes now on a type of device: the reference from here on in this run, and the next
    candidate in every later one on this machine, until ``pyprune env --qualify``. Returns its name."""
    names = {taken(key, device) for key in classes.keys_of(op)} - {"reference"}
    for name in sorted(names):
        qualification.disqualify(device, candidates(device), classes.keys_of(op), name, reason)
    for choices in ((_pinned.get() or {}).get(device), *(c for (d, _), c in _settled.items() if d == device)):
        if choices is not None:
            choices.update(dict.fromkeys(classes.keys_of(op), "reference"))
    return ", ".join(sorted(names)) or "reference"


_chosen: dict[tuple[str, str, str], object] = {}


def _implementation(name_of_class: str, device: torch.device):
    name, op = taken(name_of_class, device.type), classes.op_of(name_of_class)
    key = (op, device.type, name)
    if key not in _chosen:
        if (reason := TABLE[name].why_not(op, device)) is not None:
            raise RuntimeError(f"back-end {name!r} was asked for {op} but cannot run: {reason}")
        _chosen[key] = TABLE[name].load(op)
    return _chosen[key]


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


def _matrix(name: str, x: Tensor, dtypes=FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")


def _numbers(name: str, x: Tensor, dimensions: int) -> None:
    """``dimensions`` exactly if more than one, else at least."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim < dimensions or (dimensions > 1 and x.ndim != dimensions):
        raise ValueError(
            f"{name} must have {dimensions} dimensions{' or more' if dimensions == 1 else ''}, got {x.ndim}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in FLOATS)}, got {str(x.dtype)[6:]}")


def _like(name: str, x: Tensor | None, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} must be {str(dtype)[6:]} {tuple(shape)} on {device}, "
            f"got {str(x.dtype)[6:]} {tuple(x.shape)} on {x.device}"
        )


def _accumulator(name: str, x: Tensor, shape: tuple, device: torch.device) -> None:
    _like(name, x, shape, torch.float32, device)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def _written(name: str, x: Tensor) -> None:
    """An in-place argument whose elements share memory would be written twice."""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride <= span:
            raise ValueError(
                f"{name} is changed in place, but its elements overlap: shape {tuple(x.shape)}, strides {x.stride()}"
            )
        span += stride * (size - 1)


def _group(n: int, m: int, columns: int) -> None:
    if not 0 < n < m:
        raise ValueError(f"N:M needs 0 < N < M, got {n}:{m}")
    if columns % m:
        raise ValueError(f"{n}:{m} needs a width divisible by {m}, got {columns}")


def gram_update(
    gram: Tensor,
    x: Tensor,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str = "float32",
) -> None:
    """``gram += xᵀx`` (symmetric, in place), with ``sums += Σx`` and ``count += tokens`` in the same pass.

    gram: float32 ``[c, c]``, contiguous; x: ``[tokens, c]``, any strides; sums: float32 ``[c]``; count: int64 scalar
    tensor; mask: bool ``[tokens]``, True where the token counts. ``precision="bfloat16"`` rounds float32 inputs to
    bfloat16 first (products stay exact, sums are float32); bfloat16 inputs lose nothing by it.
    Source: the Hessian of the layer-wise error is 2·gram (SparseGPT, arXiv 2301.00774).
    """
    _matrix("x", x)
    tokens, c = x.shape
    _accumulator("gram", gram, (c, c), x.device)
    _like("sums", sums, (c,), torch.float32, x.device)
    if sums is not None:
        _written("sums", sums)
    _like("count", count, (), torch.int64, x.device)
    _like("mask", mask, (tokens,), torch.bool, x.device)
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    implementation = _implementation(classes.gram(x, precision), x.device)
    implementation(gram, x, sums=sums, count=count, mask=mask, precision=precision)


def cross_gram_update(cross: Tensor, y: Tensor, x: Tensor, *, mask: Tensor | None = None) -> None:
    """``cross += yᵀx`` in place. cross: float32 ``[cy, cx]``; y: ``[tokens, cy]``; x: ``[tokens, cx]``, same dtype."""
    _matrix("x", x)
    _matrix("y", y)
    if y.shape[0] != x.shape[0] or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"y and x need the same tokens, dtype and device, got {tuple(y.shape)} {y.dtype} {y.device} "
            f"and {tuple(x.shape)} {x.dtype} {x.device}"
        )
    _accumulator("cross", cross, (y.shape[1], x.shape[1]), x.device)
    _like("mask", mask, (x.shape[0],), torch.bool, x.device)
    _implementation(classes.by_type("cross_gram_update", x.dtype), x.device)(cross, y, x, mask=mask)


def column_moments(x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token count (int64 scalar), mean ``[c]`` and centred sum of squares ``[c]`` (float32) of ``x [tokens, c]``.

    The three merge across batches by Chan's formula without cancellation (``statistics.Moments``); the column
    norm of Wanda is ``sqrt(m2 + count·mean²)``, the variance of WIFV ``m2 / count``.
    """
    _matrix("x", x)
    _like("mask", mask, (x.shape[0],), torch.bool, x.device)
    return _implementation("column_moments", x.device)(x, mask=mask)


def select_mask(w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row", apply: bool = False) -> Tensor:
    """Keep mask that drops exactly the k lowest ``|w| · scale`` per row, or of the whole matrix.

    w: ``[r, c]``, any strides; scale: float32 ``[c]`` or None; scope: ``"row"`` or ``"matrix"``; ties go to the lower
    (row-major) index; ``apply`` zeroes w in the same pass. Exact selection, no sort. NaN scores are an error.
    """
    _matrix("w", w)
    _like("scale", scale, (w.shape[1],), torch.float32, w.device)
    if apply:
        _written("w", w)
    if scope not in ("row", "matrix"):
        raise ValueError(f"scope must be row or matrix, got {scope!r}")
    size = w.shape[1] if scope == "row" else w.numel()
    if not 0 <= k <= size:
        raise ValueError(f"k must be in [0, {size}] for scope {scope!r} of a {tuple(w.shape)} matrix, got {k}")
    return _implementation(classes.selection(scope), w.device)(w, int(k), scale=scale, scope=scope, apply=apply)


def nm_mask(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    """Keep mask of the n largest ``|w| · scale`` in every m consecutive columns; ``apply`` zeroes w in the same pass.

    w: ``[r, c]`` with m dividing c, m ≤ 16; scale: float32 ``[c]``: None for magnitude, column norms for Wanda,
    ``1/R_jj`` for the OBS saliency. Ties drop the lower index. Dropped weights become +0.0.
    """
    _matrix("w", w)
    _group(n, m, w.shape[1])
    if m > 16:
        raise ValueError(f"M up to 16 is supported, got {n}:{m}")
    _like("scale", scale, (w.shape[1],), torch.float32, w.device)
    if apply:
        _written("w", w)
    return _implementation("nm_mask", w.device)(w, n, m, scale=scale, apply=apply)


def compress_24(w: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 matrix ``[r, c]`` (bfloat16 or float16, r % 32 == 0, c % 32 == 0) → values ``[r, c/2]`` and metadata int16
    in the CUTLASS-reordered layout of ``torch.sparse.SparseSemiStructuredTensor``, so that it multiplies as it is."""
    _matrix("w", w, (torch.bfloat16, torch.float16))
    if w.shape[0] % 32 or w.shape[1] % 32:
        raise ValueError(f"2:4 compression needs rows % 32 == 0 and columns % 32 == 0, got {tuple(w.shape)}")
    return _implementation("compress_24", w.device)(w)


def expand_24(values: Tensor, meta: Tensor) -> Tensor:
    """Inverse of :func:`compress_24`: dense ``[r, c]``."""
    _matrix("values", values, (torch.bfloat16, torch.float16))
    if values.shape[0] % 32 or values.shape[1] % 16:
        raise ValueError(f"values of a 2:4 matrix need rows % 32 == 0 and columns % 16 == 0, got {tuple(values.shape)}")
    _like("meta", meta, (values.shape[0], values.shape[1] // 8), torch.int16, values.device)
    return _implementation("expand_24", values.device)(values, meta)


def obs_sweep(
    w: Tensor, r: Tensor, *, mask: Tensor | None = None, k: int | None = None, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """OBS sweep of one column block (SparseGPT, arXiv 2301.00774, algorithm 1), in place on ``w``.

    w: float32 ``[rows, b]``, unit column stride, b ≤ 1024, finite; r: float32 ``[b, b]``, the block of the upper
    Cholesky factor of H⁻¹, finite with a positive diagonal (else ``ValueError``, w unchanged).
    Exactly one of: mask bool ``[rows, b]``; k, the count to drop by ``|w|/r_jj`` over the whole block; nm = (N, M),
    chosen per group as the sweep reaches it. For columns j left to right ``e = (w_j − keep·w_j) / r_jj``,
    ``w[:, j:] −= e · r[j, j:]``; dropped weights end as exact zeros.
    Returns the keep mask bool ``[rows, b]``, the errors e float32 ``[rows, b]`` (the trailing update is
    ``W_right −= e @ R[block, right]``) and the loss ``Σ_j e²`` float32 ``[rows]``.
    """
    _matrix("w", w, (torch.float32,))
    _written("w", w)
    _like("r", r, (w.shape[1], w.shape[1]), torch.float32, w.device)
    _like("mask", mask, tuple(w.shape), torch.bool, w.device)
    if w.shape[1] > MAX_COLUMN_BLOCK:
        raise ValueError(f"a column block has at most {MAX_COLUMN_BLOCK} columns, got {w.shape[1]}")
    if w.shape[1] > 1 and w.stride(1) != 1:
        raise ValueError(f"w needs unit column stride, got strides {w.stride()}")
    if (mask is not None) + (k is not None) + (nm is not None) != 1:
        raise ValueError("give exactly one of mask, k and nm")
    if k is not None and not 0 <= k <= w.numel():
        raise ValueError(f"k must be in [0, {w.numel()}], got {k}")
    if nm is not None:
        _group(*nm, w.shape[1])
    return _implementation("obs_sweep", w.device)(w, r, mask=mask, k=k, nm=nm)


def trailing_update(w: Tensor, e: Tensor, r: Tensor) -> None:
    """``w −= e @ r`` in place: what the columns right of a swept column block owe to its errors.

    w: float32 ``[rows, n]``, unit column stride (a view of the matrix); e: ``[rows, b]``; r: ``[b, n]``, both float32.
    """
    _matrix("w", w, (torch.float32,))
    _matrix("e", e, (torch.float32,))
    _written("w", w)
    _like("e", e, (w.shape[0], e.shape[1]), torch.float32, w.device)
    _like("r", r, (e.shape[1], w.shape[1]), torch.float32, w.device)
    if w.shape[1] > 1 and w.stride(1) != 1:
        raise ValueError(f"w needs unit column stride, got strides {w.stride()}")
    _implementation("trailing_update", w.device)(w, e, r)


def _systems(a: Tensor, damping: Tensor | None) -> None:
    if not isinstance(a, Tensor) or a.dtype != torch.float32:
        raise TypeError("a must be a float32 tensor")
    if a.ndim != 3 or a.shape[1] != a.shape[2]:
        raise ValueError(f"a must be [batch, n, n], got {tuple(a.shape)}")
    _like("damping", damping, (a.shape[0],), torch.float32, a.device)


def cholesky(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of ``a + damping·I``. a: float32 ``[batch, n, n]`` (lower triangle read); damping:
    float32 ``[batch]``. Returns L ``[batch, n, n]`` and info int32 ``[batch]`` as LAPACK's: 0, or the order of the
    leading minor that is not positive (that matrix's L is then NaN)."""
    _systems(a, damping)
    return _implementation(classes.systems("cholesky", a), a.device)(a, damping=damping)


def cholesky_solve(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve ``(a + damping·I) x = b`` for a batch of SPD systems. a: float32 ``[batch, n, n]``; b: float32
    ``[batch, n, k]``; returns x ``[batch, n, k]`` and info ``[batch]`` (see :func:`cholesky`; x is NaN where it is
    not 0)."""
    _systems(a, damping)
    if not isinstance(b, Tensor) or b.ndim != 3 or b.shape[:2] != a.shape[:2]:
        raise ValueError(f"b must be [batch, n, k] matching a {tuple(a.shape)}, got {tuple(getattr(b, 'shape', ()))}")
    _like("b", b, tuple(b.shape), torch.float32, a.device)
    return _implementation(classes.systems("cholesky_solve", a), a.device)(a, b, damping=damping)


def liar_update(
    weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, *, bias: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """LIAR's interpolation (arXiv 2407.13331): ``W' = W_K + W_D Qᵀ``, ``b' = b + W_D (μ_D − Qᵀ μ_K)``.

    weight: ``[r, c]``; keep int64 ``[K]``; drop int64 ``[D]``; q float32 ``[K, D]``; mean float32 ``[c]`` or None for
    the bias-free form (b' is then b); bias float32 ``[r]`` or None. Returns W' float32 ``[r, K]`` and b'.
    """
    _matrix("weight", weight)
    _like("keep", keep, (keep.numel(),), torch.int64, weight.device)
    _like("drop", drop, (drop.numel(),), torch.int64, weight.device)
    _like("q", q, (keep.numel(), drop.numel()), torch.float32, weight.device)
    _like("mean", mean, (weight.shape[1],), torch.float32, weight.device)
    _like("bias", bias, (weight.shape[0],), torch.float32, weight.device)
    return _implementation("liar_update", weight.device)(weight, keep, drop, q, bias=bias, mean=mean)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x wᵀ + bias`` as ``torch.nn.functional.linear``; x: ``[…, k]``, w: ``[n, k]``, bias ``[n]``, one dtype.

    Here because the float32 product of the torch CPU wheel reaches about half of what the processor can do. Where a
    gradient is wanted the reference runs, unless a back-end is named.
    """
    _matrix("w", w)
    if (
        not isinstance(x, Tensor)
        or x.ndim < 1
        or x.shape[-1] != w.shape[1]
        or x.dtype != w.dtype
        or x.device != w.device
    ):
        raise ValueError(
            f"x must be {str(w.dtype)[6:]} [..., {w.shape[1]}] on {w.device}, got "
            f"{str(getattr(x, 'dtype', type(x).__name__))[6:]} {tuple(getattr(x, 'shape', ()))}"
        )
    _like("bias", bias, (w.shape[0],), w.dtype, w.device)
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias))
    if wants_gradient and not _forced.get():
        return TABLE["reference"].load("linear")(x, w, bias)
    return _implementation(classes.product(x, w.numel()), x.device)(x, w, bias)


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias`` as :func:`linear`, for a W ``[n, k]`` that :func:`pyprune.ops.packed.pack_bitmask` packed.

    x: ``[…, k]`` and bias ``[n]`` in W's type and on its device. Sums are float32. One to sixteen tokens cost about the
    bytes of the packed weight; for more it is expanded part by part and multiplied as a dense one. Where a gradient is
    wanted (of x, or of the values) the reference runs, unless a back-end is named.
    Raises :class:`pyprune.ops.packed.DamagedWeight` with the row, before anything is read, if mask, offsets and values
    disagree.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must be a Packed, as pack_bitmask makes it, got {type(packed).__name__}")
    packed.check()
    rows, columns = packed.shape
    if (
        not isinstance(x, Tensor)
        or x.ndim < 1
        or x.shape[-1] != columns
        or x.dtype != packed.dtype
        or x.device != packed.device
    ):
        raise ValueError(
            f"x must be {str(packed.dtype)[6:]} [..., {columns}] on {packed.device}, got "
            f"{str(getattr(x, 'dtype', type(x).__name__))[6:]} {tuple(getattr(x, 'shape', ()))}"
        )
    _like("bias", bias, (rows,), packed.dtype, packed.device)
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, packed.values, bias)
    )
    if wants_gradient and not _forced.get():
        return TABLE["reference"].load("sparse_linear")(x, packed, bias)
    key = classes.sparse_product(x, packed)
    implementation = _implementation(key, x.device)
    if key.startswith("sparse_linear/tokens") and taken(key, x.device.type) == "cpu":  # by parts, and dense products
        return implementation(x, packed, bias, own_product=taken(classes.product(x, 0), "cpu") == "cpu")
    return implementation(x, packed, bias)


NORM_FORMS = ("narrow", "wide", "offset")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: str = "narrow") -> Tensor:
    """``x / sqrt(mean x² + eps) · weight`` over the last dimension, sums in float32 (RMSNorm, arXiv 1910.07467).

    x: ``[…, c]``; weight: ``[c]`` of x's type and device. form: ``narrow`` rounds to x's type before the product with
    the weight and after it, ``wide`` after it alone, ``offset`` as ``wide`` with ``1 + weight``. Returns ``[…, c]`` in
    x's type. Kernels give no gradient here, nor in :func:`rotary` and :func:`swiglu`.
    """
    _numbers("x", x, 1)
    _like("weight", weight, (x.shape[-1],), x.dtype, x.device)
    if form not in NORM_FORMS:
        raise ValueError(f"form must be one of {', '.join(NORM_FORMS)}, got {form!r}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return _implementation(classes.by_type("rms_norm", x.dtype), x.device)(x, weight, eps, form=form)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of queries or keys (arXiv 2104.09864): ``x · cos + (−x₂, x₁) · sin``, x₁ and x₂ the halves of x.

    x: ``[batch, heads, tokens, d]``, any strides, d even; cos and sin: ``[batch or 1, tokens, d]`` of x's type and
    device. All products and the sum are rounded to that type. Returns ``[batch, heads, tokens, d]``, laid out as x, if
    x is dense.
    """
    _numbers("x", x, 4)
    batch, _, tokens, d = x.shape
    if d % 2:
        raise ValueError(f"rotary embedding needs an even number of columns, got {d}")
    for name, table in (("cos", cos), ("sin", sin)):
        rows = 1 if isinstance(table, Tensor) and table.ndim == 3 and len(table) == 1 else batch
        _like(name, table, (rows, tokens, d), x.dtype, x.device)
    return _implementation(classes.by_type("rotary", x.dtype), x.device)(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` (arXiv 2002.05202), silu rounded to the tensors' type first; gate and up: ``[…, c]``, of one
    shape, type and device. Returns a new tensor of that shape."""
    _numbers("gate", gate, 1)
    _like("up", up, tuple(gate.shape), gate.dtype, gate.device)
    return _implementation(classes.by_type("swiglu", gate.dtype), gate.device)(gate, up)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ + mask) v`` as ``torch.nn.functional.scaled_dot_product_attention`` without dropout.

    q: ``[b, h, t, d]``; k: ``[b, g, s, d]``; v: ``[b, g, s, e]``, where g divides h and consecutive h/g query heads
    read one key head; one dtype, any strides. causal: query i sees the keys up to i; mask: bool, True where a key is
    seen, or of q's dtype and added, with a shape that expands to ``[b, h, t, s]``; not both. scale: positive, 1/√d if
    None. Returns ``[b, h, t, e]``; scores, softmax and sums are float32; a row that sees no key is zero. Where a
    gradient is wanted the reference runs, unless a back-end is named.
    """
    shapes = [tuple(getattr(x, "shape", ())) for x in (q, k, v)]
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v must be [batch, heads, tokens, width], got {shapes}")
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            "q, k and v must be float32, bfloat16 or float16, of one dtype and on one device, got "
            f"{[f'{str(x.dtype)[6:]} on {x.device}' for x in (q, k, v)]}"
        )
    fits = q.shape[0] == k.shape[0] == v.shape[0] and q.shape[3] == k.shape[3] and k.shape[1:3] == v.shape[1:3]
    if not fits or 0 in (k.shape[1], q.shape[3], v.shape[3]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q [b, h, t, d], k [b, g, s, d] and v [b, g, s, e] need one b, d and s, and g dividing h, got {shapes}"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if mask is not None:
        if causal:
            raise ValueError("give a mask or causal=True, not both: put the causal part into the mask")
        _attention_mask(mask, q, k)
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if wants_gradient and not _forced.get():
        return reference.attention(q, k, v, mask=mask, causal=causal, scale=scale)
    return _implementation(classes.by_type("attention", q.dtype), q.device)(
        q, k, v, mask=mask, causal=causal, scale=scale
    )


def _attention_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    full = (*q.shape[:3], k.shape[2])
    expands = mask.ndim <= 4 and all(m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full)))
    if mask.dtype not in (torch.bool, q.dtype) or mask.device != q.device or not expands:
        raise ValueError(
            f"mask must be bool or {str(q.dtype)[6:]} on {q.device}, of a shape that expands to {full}, got "
            f"{str(mask.dtype)[6:]} {tuple(mask.shape)} on {mask.device}"
        )
