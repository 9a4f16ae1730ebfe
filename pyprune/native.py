"""The only file that calls ``pyprune._C``; only ``ops`` calls this one. ``<op>_cpu`` and ``<op>_cuda``."""

from __future__ import annotations

import math

import torch  # before _C, so that both share torch's OpenMP runtime
from torch import Tensor

from pyprune import reference

try:
    from pyprune import _C
except ImportError as error:
    _C = None
    _missing = f"the native module pyprune._C is not here ({error}): reinstall with a C++ compiler present"
else:
    _missing = None


def unusable(name: str) -> str | None:
    """None if the back-end ``name`` (``cpu`` or ``cuda``) can run at all, else the reason in a sentence."""
    if _C is None:
        return _missing
    if name == "cuda" and not _C.with_cuda:
        return "this build has no CUDA kernels (PYPRUNE_CUDA_ARCHS was off or unset when it was built)"
    return None


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAN_SCORE = "{0} has NaN scores, so there is no order to select by; {0} is unchanged"
NOT_FINITE = ("the sweep needs finite w and r and a positive diagonal of r (non-finite weights or activations, or a "
              "failed factorisation, come before it); w is unchanged")
TOO_DENSE = "not a 2:4 matrix: some group of 4 columns has more than 2 non-zeros"
BAD_META = "metadata is not that of a 2:4 matrix: a group of 4 columns names one place twice"
# Measured on two Zen 5 cores: below this many rows packing w costs more than the product gains; above this n a
# factor per lane outgrows the second-level cache and LAPACK wins.
LINEAR_MIN_ROWS = 48
CHOLESKY_MAX_N = 128


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _unit(x: Tensor) -> Tensor:
    """``x`` itself if a row's elements are neighbours, else a copy."""
    return x if x.stride(-1) == 1 and (x.shape[0] <= 1 or x.stride(0) >= 0) else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---- CPU -----------------------------------------------------------------------------------------------------------

def gram_update_cpu(gram: Tensor, x: Tensor, *, sums: Tensor | None = None, count: Tensor | None = None,
                    mask: Tensor | None = None, precision: str = "float32") -> None:
    x, mask = _unit(x), _dense(mask)
    total = sums if sums is None or sums.is_contiguous() else sums.contiguous()
    _C.gram_update_cpu(gram.data_ptr(), x.data_ptr(), *x.shape, x.stride(0), TYPES[x.dtype], _address(total),
                       _address(count), _address(mask), precision == "bfloat16", torch.get_num_threads())
    if total is not sums:
        sums.copy_(total)


def cross_gram_update_cpu(cross: Tensor, y: Tensor, x: Tensor, *, mask: Tensor | None = None) -> None:
    y, x, mask = _unit(y), _unit(x), _dense(mask)
    _C.cross_gram_update_cpu(cross.data_ptr(), y.data_ptr(), y.shape[1], y.stride(0), x.data_ptr(), x.shape[1],
                             x.stride(0), x.shape[0], TYPES[x.dtype], _address(mask), torch.get_num_threads())


def column_moments_cpu(x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x, mask = _unit(x), _dense(mask)
    mean, m2 = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    count = _C.column_moments_cpu(x.data_ptr(), *x.shape, x.stride(0), TYPES[x.dtype], _address(mask),
                                  mean.data_ptr(), m2.data_ptr(), torch.get_num_threads())
    return torch.tensor(count, dtype=torch.int64), mean, m2


def select_mask_cpu(w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row",
                    apply: bool = False) -> Tensor:
    work, scale = _unit(w), _dense(scale)
    mask = torch.empty(w.shape, dtype=torch.bool)
    if not _C.select_mask_cpu(work.data_ptr(), work.stride(0), *w.shape, TYPES[w.dtype], _address(scale), k,
                              scope == "row", apply, mask.data_ptr(), torch.get_num_threads()):
        raise ValueError(NAN_SCORE.format("w"))
    if apply and work is not w:
        w.copy_(work)
    return mask


def nm_mask_cpu(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    work, scale = _unit(w), _dense(scale)
    mask = torch.empty(w.shape, dtype=torch.bool)
    if not _C.nm_mask_cpu(work.data_ptr(), work.stride(0), *w.shape, TYPES[w.dtype], _address(scale), n, m, apply,
                          mask.data_ptr(), torch.get_num_threads()):
        raise ValueError(NAN_SCORE.format("w"))
    if apply and work is not w:
        w.copy_(work)
    return mask


def compress_24_cpu(w: Tensor) -> tuple[Tensor, Tensor]:
    w = _unit(w)
    rows, columns = w.shape
    values = torch.empty((rows, columns // 2), dtype=w.dtype)
    meta = torch.empty((rows, columns // 16), dtype=torch.int16)
    if not _C.compress_24_cpu(w.data_ptr(), w.stride(0), rows, columns, values.data_ptr(), meta.data_ptr(),
                              torch.get_num_threads()):
        raise ValueError(TOO_DENSE)
    return values, meta


def expand_24_cpu(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    w = torch.empty((values.shape[0], values.shape[1] * 2), dtype=values.dtype)
    if not _C.expand_24_cpu(values.data_ptr(), meta.data_ptr(), *w.shape, w.data_ptr(), torch.get_num_threads()):
        raise ValueError(BAD_META)
    return w


def obs_sweep_cpu(w: Tensor, r: Tensor, *, mask: Tensor | None = None, k: int | None = None,
                  nm: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if k is not None:
        mask = select_mask_cpu(w, k, scale=1 / r.diagonal(), scope="matrix")
    keep = torch.empty(w.shape, dtype=torch.bool) if mask is None else mask.contiguous().clone() if k is None else mask
    r = _unit(r)
    n, m = nm or (0, 0)
    error, loss = torch.empty(w.shape), torch.empty(w.shape[0])
    if not _C.obs_sweep_cpu(w.data_ptr(), w.stride(0), r.data_ptr(), r.stride(0), *w.shape, keep.data_ptr(), n, m,
                            error.data_ptr(), loss.data_ptr(), torch.get_num_threads()):
        raise ValueError(NOT_FINITE)
    return keep, error, loss


def cholesky_cpu(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, n = a.shape[:2]
    if n > CHOLESKY_MAX_N:
        return reference.cholesky(a, damping=damping)
    a, damping = a.contiguous(), _dense(damping)
    factor, info = torch.empty(a.shape), torch.empty(batch, dtype=torch.int32)
    _C.cholesky_cpu(a.data_ptr(), _address(damping), factor.data_ptr(), 0, 0, info.data_ptr(), batch, n, 0,
                    torch.get_num_threads())
    return factor, info


def cholesky_solve_cpu(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, n = a.shape[:2]
    if n > CHOLESKY_MAX_N:
        return reference.cholesky_solve(a, b, damping=damping)
    a, b, damping = a.contiguous(), b.contiguous(), _dense(damping)
    x, info = torch.empty(b.shape), torch.empty(batch, dtype=torch.int32)
    _C.cholesky_cpu(a.data_ptr(), _address(damping), 0, b.data_ptr(), x.data_ptr(), info.data_ptr(), batch, n,
                    b.shape[2], torch.get_num_threads())
    return x, info


def liar_update_cpu(weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, *, bias: Tensor | None = None,
                    mean: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    updated = weight.index_select(1, keep).float().contiguous()
    dropped = weight.index_select(1, drop).float().contiguous()
    q = q.contiguous()
    _C.linear_cpu(dropped.data_ptr(), drop.numel(), q.data_ptr(), drop.numel(), 0, updated.data_ptr(), keep.numel(),
                  weight.shape[0], keep.numel(), drop.numel(), True, torch.get_num_threads())
    if mean is not None:
        shift = dropped @ (mean[drop] - q.T @ mean[keep])
        bias = shift if bias is None else bias.float() + shift
    return updated, bias


def linear_cpu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = w.shape
    rows = math.prod(x.shape[:-1])
    if x.dtype != torch.float32 or rows < LINEAR_MIN_ROWS:
        return reference.linear(x, w, bias)
    flat, w, bias = _unit(x.reshape(rows, inputs)), _unit(w), _dense(bias)
    out = torch.empty((*x.shape[:-1], outputs))
    _C.linear_cpu(flat.data_ptr(), flat.stride(0), w.data_ptr(), w.stride(0), _address(bias), out.data_ptr(), outputs,
                  rows, outputs, inputs, False, torch.get_num_threads())
    return out


# ---- CUDA ----------------------------------------------------------------------------------------------------------
