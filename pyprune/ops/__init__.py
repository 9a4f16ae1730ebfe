"""One function per op: its contract, which validates the arguments, once, and calls the back-end that is chosen.

Back-ends: ``cuda`` (``pyprune._C``, CUDA C++), ``triton`` (``pyprune.triton_kernels``), ``cpu`` (``pyprune._C``,
OpenMP) and ``reference`` (plain PyTorch). ``auto`` takes the one that :mod:`pyprune.ops.qualification` found right and
fastest on this machine among those of ``AUTO``, in each class of an op's sizes (:mod:`pyprune.ops.classes`); a back-end
the user names is used or refused. One CPU op leaves to PyTorch the types that it has no kernel for: see ``linear_cpu``
in :mod:`pyprune.ops.native`.

All functions take float32, bfloat16 or float16 matrices and accumulate in float32. ``mask`` is True where a weight
is kept, or a token counted.

This file holds the contracts, and names what callers need to choose a back-end (``__all__``). Beside it:

``arguments``       the checks of arguments that several ops share
``backends``        what implementations there are of each op, and which can run here
``choice``          which one runs now: named by the user, fixed for a run, or measured
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

import torch
from torch import Tensor

from pyprune.config import BACKENDS, MAX_COLUMN_BLOCK, OPS
from pyprune.ops import classes, reference
from pyprune.ops.arguments import (
    FLOATS,
    check_accumulator,
    check_attention_mask,
    check_group,
    check_like,
    check_matrix,
    check_numbers,
    check_rows,
    check_systems,
    check_written,
)
from pyprune.ops.backends import AUTO, FORWARDS, TABLE, Backend, candidates, raise_faults, status
from pyprune.ops.choice import (
    backend,
    check_backend,
    differentiates,
    disqualify,
    implementation,
    pinned,
    settle,
    taken,
    taken_for,
    verdicts,
)
from pyprune.ops.packed import Packed

__all__ = [
    *OPS,
    "AUTO",
    "BACKENDS",
    "FLOATS",
    "FORWARDS",
    "NORM_FORMS",
    "OPS",
    "TABLE",
    "Backend",
    "backend",
    "candidates",
    "check_backend",
    "disqualify",
    "pinned",
    "raise_faults",
    "settle",
    "status",
    "taken",
    "taken_for",
    "verdicts",
]

NORM_FORMS = ("narrow", "wide", "offset")


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
    check_matrix("x", x)
    tokens, c = x.shape
    check_accumulator("gram", gram, (c, c), x.device)
    check_like("sums", sums, (c,), torch.float32, x.device)
    if sums is not None:
        check_written("sums", sums)
    check_like("count", count, (), torch.int64, x.device)
    check_like("mask", mask, (tokens,), torch.bool, x.device)
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    update = implementation(classes.gram(x, precision), x.device)
    update(gram, x, sums=sums, count=count, mask=mask, precision=precision)


def cross_gram_update(cross: Tensor, y: Tensor, x: Tensor, *, mask: Tensor | None = None) -> None:
    """``cross += yᵀx`` in place. cross: float32 ``[cy, cx]``; y: ``[tokens, cy]``; x: ``[tokens, cx]``, same dtype."""
    check_matrix("x", x)
    check_matrix("y", y)
    if y.shape[0] != x.shape[0] or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"y and x need the same tokens, dtype and device, got {tuple(y.shape)} {y.dtype} {y.device} "
            f"and {tuple(x.shape)} {x.dtype} {x.device}"
        )
    check_accumulator("cross", cross, (y.shape[1], x.shape[1]), x.device)
    check_like("mask", mask, (x.shape[0],), torch.bool, x.device)
    implementation(classes.by_type("cross_gram_update", x.dtype), x.device)(cross, y, x, mask=mask)


def column_moments(x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token count (int64 scalar), mean ``[c]`` and centred sum of squares ``[c]`` (float32) of ``x [tokens, c]``.

    The three merge across batches by Chan's formula without cancellation (``statistics.Moments``); the column
    norm of Wanda is ``sqrt(m2 + count·mean²)``, the variance of WIFV ``m2 / count``.
    """
    check_matrix("x", x)
    check_like("mask", mask, (x.shape[0],), torch.bool, x.device)
    return implementation("column_moments", x.device)(x, mask=mask)


def select_mask(w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row", apply: bool = False) -> Tensor:
    """Keep mask that drops exactly the k lowest ``|w| · scale`` per row, or of the whole matrix.

    w: ``[r, c]``, any strides; scale: float32 ``[c]`` or None; scope: ``"row"`` or ``"matrix"``; ties go to the lower
    (row-major) index; ``apply`` zeroes w in the same pass. Exact selection, no sort. NaN scores are an error.
    """
    check_matrix("w", w)
    check_like("scale", scale, (w.shape[1],), torch.float32, w.device)
    if apply:
        check_written("w", w)
    if scope not in ("row", "matrix"):
        raise ValueError(f"scope must be row or matrix, got {scope!r}")
    size = w.shape[1] if scope == "row" else w.numel()
    if not 0 <= k <= size:
        raise ValueError(f"k must be in [0, {size}] for scope {scope!r} of a {tuple(w.shape)} matrix, got {k}")
    return implementation(classes.selection(scope), w.device)(w, int(k), scale=scale, scope=scope, apply=apply)


def nm_mask(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    """Keep mask of the n largest ``|w| · scale`` in every m consecutive columns; ``apply`` zeroes w in the same pass.

    w: ``[r, c]`` with m dividing c, m ≤ 16; scale: float32 ``[c]``: None for magnitude, column norms for Wanda,
    ``1/R_jj`` for the OBS saliency. Ties drop the lower index. Dropped weights become +0.0.
    """
    check_matrix("w", w)
    check_group(n, m, w.shape[1])
    if m > 16:
        raise ValueError(f"M up to 16 is supported, got {n}:{m}")
    check_like("scale", scale, (w.shape[1],), torch.float32, w.device)
    if apply:
        check_written("w", w)
    return implementation("nm_mask", w.device)(w, n, m, scale=scale, apply=apply)


def compress_24(w: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 matrix ``[r, c]`` (bfloat16 or float16, r % 32 == 0, c % 32 == 0) → values ``[r, c/2]`` and metadata int16
    in the CUTLASS-reordered layout of ``torch.sparse.SparseSemiStructuredTensor``, so that it multiplies as it is."""
    check_matrix("w", w, (torch.bfloat16, torch.float16))
    if w.shape[0] % 32 or w.shape[1] % 32:
        raise ValueError(f"2:4 compression needs rows % 32 == 0 and columns % 32 == 0, got {tuple(w.shape)}")
    return implementation("compress_24", w.device)(w)


def expand_24(values: Tensor, meta: Tensor) -> Tensor:
    """Inverse of :func:`compress_24`: dense ``[r, c]``."""
    check_matrix("values", values, (torch.bfloat16, torch.float16))
    if values.shape[0] % 32 or values.shape[1] % 16:
        raise ValueError(f"values of a 2:4 matrix need rows % 32 == 0 and columns % 16 == 0, got {tuple(values.shape)}")
    check_like("meta", meta, (values.shape[0], values.shape[1] // 8), torch.int16, values.device)
    return implementation("expand_24", values.device)(values, meta)


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
    check_matrix("w", w, (torch.float32,))
    check_written("w", w)
    check_like("r", r, (w.shape[1], w.shape[1]), torch.float32, w.device)
    check_like("mask", mask, tuple(w.shape), torch.bool, w.device)
    if w.shape[1] > MAX_COLUMN_BLOCK:
        raise ValueError(f"a column block has at most {MAX_COLUMN_BLOCK} columns, got {w.shape[1]}")
    if w.shape[1] > 1 and w.stride(1) != 1:
        raise ValueError(f"w needs unit column stride, got strides {w.stride()}")
    if (mask is not None) + (k is not None) + (nm is not None) != 1:
        raise ValueError("give exactly one of mask, k and nm")
    if k is not None and not 0 <= k <= w.numel():
        raise ValueError(f"k must be in [0, {w.numel()}], got {k}")
    if nm is not None:
        check_group(*nm, w.shape[1])
    return implementation("obs_sweep", w.device)(w, r, mask=mask, k=k, nm=nm)


def trailing_update(w: Tensor, e: Tensor, r: Tensor) -> None:
    """``w −= e @ r`` in place: what the columns right of a swept column block owe to its errors.

    w: float32 ``[rows, n]``, unit column stride (a view of the matrix); e: ``[rows, b]``; r: ``[b, n]``, both float32.
    """
    check_matrix("w", w, (torch.float32,))
    check_matrix("e", e, (torch.float32,))
    check_written("w", w)
    check_like("e", e, (w.shape[0], e.shape[1]), torch.float32, w.device)
    check_like("r", r, (e.shape[1], w.shape[1]), torch.float32, w.device)
    if w.shape[1] > 1 and w.stride(1) != 1:
        raise ValueError(f"w needs unit column stride, got strides {w.stride()}")
    implementation("trailing_update", w.device)(w, e, r)


def cholesky(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of ``a + damping·I``. a: float32 ``[batch, n, n]`` (lower triangle read); damping:
    float32 ``[batch]``. Returns L ``[batch, n, n]`` and info int32 ``[batch]`` as LAPACK's: 0, or the order of the
    leading minor that is not positive (that matrix's L is then NaN)."""
    check_systems(a, damping)
    return implementation(classes.systems("cholesky", a), a.device)(a, damping=damping)


def cholesky_solve(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve ``(a + damping·I) x = b`` for a batch of SPD systems. a: float32 ``[batch, n, n]``; b: float32
    ``[batch, n, k]``; returns x ``[batch, n, k]`` and info ``[batch]`` (see :func:`cholesky`; x is NaN where it is
    not 0)."""
    check_systems(a, damping)
    if not isinstance(b, Tensor) or b.ndim != 3 or b.shape[:2] != a.shape[:2]:
        raise ValueError(f"b must be [batch, n, k] matching a {tuple(a.shape)}, got {tuple(getattr(b, 'shape', ()))}")
    check_like("b", b, tuple(b.shape), torch.float32, a.device)
    return implementation(classes.systems("cholesky_solve", a), a.device)(a, b, damping=damping)


def liar_update(
    weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, *, bias: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """LIAR's interpolation (arXiv 2407.13331): ``W' = W_K + W_D Qᵀ``, ``b' = b + W_D (μ_D − Qᵀ μ_K)``.

    weight: ``[r, c]``; keep int64 ``[K]``; drop int64 ``[D]``; q float32 ``[K, D]``; mean float32 ``[c]`` or None for
    the bias-free form (b' is then b); bias float32 ``[r]`` or None. Returns W' float32 ``[r, K]`` and b'.
    """
    check_matrix("weight", weight)
    check_like("keep", keep, (keep.numel(),), torch.int64, weight.device)
    check_like("drop", drop, (drop.numel(),), torch.int64, weight.device)
    check_like("q", q, (keep.numel(), drop.numel()), torch.float32, weight.device)
    check_like("mean", mean, (weight.shape[1],), torch.float32, weight.device)
    check_like("bias", bias, (weight.shape[0],), torch.float32, weight.device)
    return implementation("liar_update", weight.device)(weight, keep, drop, q, bias=bias, mean=mean)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x wᵀ + bias`` as ``torch.nn.functional.linear``; x: ``[…, k]``, w: ``[n, k]``, bias ``[n]``, one dtype.

    Here because the float32 product of the torch CPU wheel reaches about half of what the processor can do. Where a
    gradient is wanted the reference runs, unless a back-end is named.
    """
    check_matrix("w", w)
    check_rows("x", x, w.shape[1], w.dtype, w.device)
    check_like("bias", bias, (w.shape[0],), w.dtype, w.device)
    if differentiates(x, w, bias):
        return reference.linear(x, w, bias)
    return implementation(classes.product(x, w.numel()), x.device)(x, w, bias)


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
    check_rows("x", x, columns, packed.dtype, packed.device)
    check_like("bias", bias, (rows,), packed.dtype, packed.device)
    if differentiates(x, packed.values, bias):
        return reference.sparse_linear(x, packed, bias)
    key = classes.sparse_product(x, packed)
    multiply = implementation(key, x.device)
    if key.startswith("sparse_linear/tokens") and taken(key, x.device.type) == "cpu":  # by parts, and dense products
        return multiply(x, packed, bias, own_product=taken(classes.product(x, 0), "cpu") == "cpu")
    return multiply(x, packed, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: str = "narrow") -> Tensor:
    """``x / sqrt(mean x² + eps) · weight`` over the last dimension, sums in float32 (RMSNorm, arXiv 1910.07467).

    x: ``[…, c]``; weight: ``[c]`` of x's type and device. form: ``narrow`` rounds to x's type before the product with
    the weight and after it, ``wide`` after it alone, ``offset`` as ``wide`` with ``1 + weight``. Returns ``[…, c]`` in
    x's type. Kernels give no gradient here, nor in :func:`rotary` and :func:`swiglu`.
    """
    check_numbers("x", x, 1)
    check_like("weight", weight, (x.shape[-1],), x.dtype, x.device)
    if form not in NORM_FORMS:
        raise ValueError(f"form must be one of {', '.join(NORM_FORMS)}, got {form!r}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return implementation(classes.by_type("rms_norm", x.dtype), x.device)(x, weight, eps, form=form)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of queries or keys (arXiv 2104.09864): ``x · cos + (−x₂, x₁) · sin``, x₁ and x₂ the halves of x.

    x: ``[batch, heads, tokens, d]``, any strides, d even; cos and sin: ``[batch or 1, tokens, d]`` of x's type and
    device. All products and the sum are rounded to that type. Returns ``[batch, heads, tokens, d]``, laid out as x, if
    x is dense.
    """
    check_numbers("x", x, 4)
    batch, _, tokens, d = x.shape
    if d % 2:
        raise ValueError(f"rotary embedding needs an even number of columns, got {d}")
    for name, table in (("cos", cos), ("sin", sin)):
        rows = 1 if isinstance(table, Tensor) and table.ndim == 3 and len(table) == 1 else batch
        check_like(name, table, (rows, tokens, d), x.dtype, x.device)
    return implementation(classes.by_type("rotary", x.dtype), x.device)(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` (arXiv 2002.05202), silu rounded to the tensors' type first; gate and up: ``[…, c]``, of one
    shape, type and device. Returns a new tensor of that shape."""
    check_numbers("gate", gate, 1)
    check_like("up", up, tuple(gate.shape), gate.dtype, gate.device)
    return implementation(classes.by_type("swiglu", gate.dtype), gate.device)(gate, up)


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
        check_attention_mask(mask, q, k)
    if differentiates(q, k, v, mask):
        return reference.attention(q, k, v, mask=mask, causal=causal, scale=scale)
    return implementation(classes.by_type("attention", q.dtype), q.device)(
        q, k, v, mask=mask, causal=causal, scale=scale
    )
