"""The only file that calls ``pyprune._C``; only ``ops`` calls this one. ``<op>_cpu`` and ``<op>_cuda``."""

from __future__ import annotations

import math
import os
import re

import torch  # before _C, so that both share torch's OpenMP runtime
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.devices import indexed
from pyprune.ops import reference
from pyprune.ops.classes import FEW_TOKENS
from pyprune.ops.packed import Packed

_missing: str | None = None
try:
    from pyprune import _C
except ImportError as error:
    _C = None
    _missing = f"the native module pyprune._C is not here ({error}): reinstall with a C++ compiler present"

_refused = None
if _C is not None and os.environ.get("PYPRUNE_ISA"):
    try:
        _C.use_cpu_level(os.environ["PYPRUNE_ISA"])
    except ValueError as error:
        _refused = f"PYPRUNE_ISA={os.environ['PYPRUNE_ISA']}: {error}; unset it or name one of those"


def unusable(name: str) -> str | None:
    """None if the back-end ``name`` (``cpu`` or ``cuda``) can run at all, else the reason in a sentence.

    Raises ConfigError where ``PYPRUNE_ISA`` asks for an instruction set that this processor does not have.
    """
    if _refused:
        raise ConfigError(_refused)
    if _C is None:
        return _missing
    if name == "cuda" and not _C.with_cuda:
        return "this build has no CUDA kernels (PYPRUNE_CUDA_ARCHS was off or unset when it was built)"
    if name == "cuda" and torch.cuda.is_available():
        if reason := _C.cuda_unusable():  # torch may come with an older toolkit than this build's
            return reason
        major, minor = torch.cuda.get_device_capability()
        if not _has_image(_C.cuda_architectures, major, minor):
            return (
                f"this build has kernels for {_C.cuda_architectures}, not for this GPU's compute capability "
                f"{major}.{minor}: rebuild with PYPRUNE_CUDA_ARCHS=native"
            )
    return None


def _has_image(architectures: str, major: int, minor: int) -> bool:
    """Whether CMake's list ("80-real;90a-real;120-virtual") covers a GPU: real code runs on its major version from its
    minor one on, ``a`` code on exactly its own, ``f`` code within its family, virtual code on anything newer."""
    for name, kind, form in re.findall(r"(\d+)([af]?)-?(real|virtual)?", architectures):
        have, gpu = (int(name[:-1]), int(name[-1])), (major, minor)
        same_major = have[0] == gpu[0] and have <= gpu
        if have == gpu or (kind != "a" and same_major) or (not kind and form != "real" and have <= gpu):
            return True
    return False


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAN_SCORE = "{0} has NaN scores, so there is no order to select by; {0} is unchanged"
NOT_FINITE = (
    "the sweep needs finite w and r and a positive diagonal of r (non-finite weights or activations, or a "
    "failed factorisation, come before it); w is unchanged"
)
TOO_DENSE = "not a 2:4 matrix: some group of 4 columns has more than 2 non-zeros"
BAD_META = "metadata is not that of a 2:4 matrix: a group of 4 columns names one place twice"


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _unit(x: Tensor) -> Tensor:
    """``x`` itself if a row's elements are neighbours, else a copy."""
    return x if x.stride(-1) == 1 and (x.shape[0] <= 1 or x.stride(0) >= 0) else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def gram_update_cpu(
    gram: Tensor,
    x: Tensor,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str = "float32",
) -> None:
    x, mask = _unit(x), _dense(mask)
    total = sums if sums is None or sums.is_contiguous() else sums.contiguous()
    _C.gram_update_cpu(
        gram.data_ptr(),
        x.data_ptr(),
        *x.shape,
        x.stride(0),
        TYPES[x.dtype],
        _address(total),
        _address(count),
        _address(mask),
        precision == "bfloat16",
        torch.get_num_threads(),
    )
    if sums is not None and total is not None and total is not sums:
        sums.copy_(total)


def cross_gram_update_cpu(cross: Tensor, y: Tensor, x: Tensor, *, mask: Tensor | None = None) -> None:
    y, x, mask = _unit(y), _unit(x), _dense(mask)
    _C.cross_gram_update_cpu(
        cross.data_ptr(),
        y.data_ptr(),
        y.shape[1],
        y.stride(0),
        x.data_ptr(),
        x.shape[1],
        x.stride(0),
        x.shape[0],
        TYPES[x.dtype],
        _address(mask),
        torch.get_num_threads(),
    )


def column_moments_cpu(x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x, mask = _unit(x), _dense(mask)
    mean, m2 = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    count = _C.column_moments_cpu(
        x.data_ptr(),
        *x.shape,
        x.stride(0),
        TYPES[x.dtype],
        _address(mask),
        mean.data_ptr(),
        m2.data_ptr(),
        torch.get_num_threads(),
    )
    return torch.tensor(count, dtype=torch.int64), mean, m2


def select_mask_cpu(
    w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row", apply: bool = False
) -> Tensor:
    work, scale = _unit(w), _dense(scale)
    mask = torch.empty(w.shape, dtype=torch.bool)
    if not _C.select_mask_cpu(
        work.data_ptr(),
        work.stride(0),
        *w.shape,
        TYPES[w.dtype],
        _address(scale),
        k,
        scope == "row",
        apply,
        mask.data_ptr(),
        torch.get_num_threads(),
    ):
        raise ValueError(NAN_SCORE.format("w"))
    if apply and work is not w:
        w.copy_(work)
    return mask


def nm_mask_cpu(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    work, scale = _unit(w), _dense(scale)
    mask = torch.empty(w.shape, dtype=torch.bool)
    if not _C.nm_mask_cpu(
        work.data_ptr(),
        work.stride(0),
        *w.shape,
        TYPES[w.dtype],
        _address(scale),
        n,
        m,
        apply,
        mask.data_ptr(),
        torch.get_num_threads(),
    ):
        raise ValueError(NAN_SCORE.format("w"))
    if apply and work is not w:
        w.copy_(work)
    return mask


def compress_24_cpu(w: Tensor) -> tuple[Tensor, Tensor]:
    w = _unit(w)
    rows, columns = w.shape
    values = torch.empty((rows, columns // 2), dtype=w.dtype)
    meta = torch.empty((rows, columns // 16), dtype=torch.int16)
    if not _C.compress_24_cpu(
        w.data_ptr(), w.stride(0), rows, columns, values.data_ptr(), meta.data_ptr(), torch.get_num_threads()
    ):
        raise ValueError(TOO_DENSE)
    return values, meta


def expand_24_cpu(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    w = torch.empty((values.shape[0], values.shape[1] * 2), dtype=values.dtype)
    if not _C.expand_24_cpu(values.data_ptr(), meta.data_ptr(), *w.shape, w.data_ptr(), torch.get_num_threads()):
        raise ValueError(BAD_META)
    return w


def obs_sweep_cpu(
    w: Tensor, r: Tensor, *, mask: Tensor | None = None, k: int | None = None, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if k is not None:
        mask = select_mask_cpu(w, k, scale=1 / r.diagonal(), scope="matrix")
    if mask is None:
        keep = torch.empty(w.shape, dtype=torch.bool)
    else:
        keep = mask.contiguous() if k is not None else mask.contiguous().clone()  # the caller's mask stays as it is
    r = _unit(r)
    n, m = nm or (0, 0)
    error, loss = torch.empty(w.shape), torch.empty(w.shape[0])
    if not _C.obs_sweep_cpu(
        w.data_ptr(),
        w.stride(0),
        r.data_ptr(),
        r.stride(0),
        *w.shape,
        keep.data_ptr(),
        n,
        m,
        error.data_ptr(),
        loss.data_ptr(),
        torch.get_num_threads(),
    ):
        raise ValueError(NOT_FINITE)
    return keep, error, loss


def trailing_update_cpu(w: Tensor, e: Tensor, r: Tensor) -> None:
    e, r = _unit(e), _unit(r)
    _C.trailing_update_cpu(
        w.data_ptr(),
        w.stride(0),
        e.data_ptr(),
        e.stride(0),
        r.data_ptr(),
        r.stride(0),
        *w.shape,
        e.shape[1],
        torch.get_num_threads(),
    )


def cholesky_cpu(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, n = a.shape[:2]
    a, damping = a.contiguous(), _dense(damping)
    factor, info = torch.empty(a.shape), torch.empty(batch, dtype=torch.int32)
    _C.cholesky_cpu(
        a.data_ptr(), _address(damping), factor.data_ptr(), 0, 0, info.data_ptr(), batch, n, 0, torch.get_num_threads()
    )
    return factor, info


def cholesky_solve_cpu(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, n = a.shape[:2]
    a, b, damping = a.contiguous(), b.contiguous(), _dense(damping)
    x, info = torch.empty(b.shape), torch.empty(batch, dtype=torch.int32)
    _C.cholesky_cpu(
        a.data_ptr(),
        _address(damping),
        0,
        b.data_ptr(),
        x.data_ptr(),
        info.data_ptr(),
        batch,
        n,
        b.shape[2],
        torch.get_num_threads(),
    )
    return x, info


def liar_update_cpu(
    weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, *, bias: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    updated = weight.index_select(1, keep).float().contiguous()
    dropped = weight.index_select(1, drop).float().contiguous()
    q = q.contiguous()
    _C.linear_cpu(
        dropped.data_ptr(),
        drop.numel(),
        q.data_ptr(),
        drop.numel(),
        0,
        updated.data_ptr(),
        keep.numel(),
        weight.shape[0],
        keep.numel(),
        drop.numel(),
        True,
        torch.get_num_threads(),
    )
    if mean is not None:
        shift = dropped @ (mean[drop] - q.T @ mean[keep])
        bias = shift if bias is None else bias.float() + shift
    return updated, bias


def linear_cpu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = w.shape
    rows = math.prod(x.shape[:-1])
    if x.dtype != torch.float32:
        return reference.linear(x, w, bias)
    flat, w, bias = _unit(x.reshape(rows, inputs)), _unit(w), _dense(bias)
    out = torch.empty((*x.shape[:-1], outputs))
    _C.linear_cpu(
        flat.data_ptr(),
        flat.stride(0),
        w.data_ptr(),
        w.stride(0),
        _address(bias),
        out.data_ptr(),
        outputs,
        rows,
        outputs,
        inputs,
        False,
        torch.get_num_threads(),
    )
    return out


def attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """The result lies ``[b, t, h, e]`` in memory, as the projection behind it reads it."""
    batch, heads, queries, width = q.shape
    key_heads, keys, value_width = v.shape[1:]
    q, k, v = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q, k, v))
    kind, strides = 0, q.stride()
    if mask is not None:
        kind, mask = (1, mask) if mask.dtype == torch.bool else (2, mask.float())
        mask = mask.expand(*mask.shape[:-1], keys)
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(batch, heads, queries, keys)
        strides = mask.stride()
    out = torch.empty((batch, queries, heads, value_width), dtype=q.dtype).transpose(1, 2)
    _C.attention_cpu(
        q.data_ptr(),
        q.stride()[:3],
        k.data_ptr(),
        k.stride()[:3],
        v.data_ptr(),
        v.stride()[:3],
        _address(mask),
        strides[:3],
        kind,
        out.data_ptr(),
        out.stride()[:3],
        (batch, heads, key_heads, queries, keys, width, value_width),
        TYPES[q.dtype],
        causal,
        width**-0.5 if scale is None else scale,
        torch.get_num_threads(),
    )
    return out


EXPANDED = 2**20
"""Weights that are expanded at a time for many tokens: they are multiplied while they lie in a cache."""


def _view(packed: Packed) -> tuple:
    return (
        packed.mask.data_ptr(),
        packed.mask.shape[1],
        packed.values.data_ptr(),
        packed.offsets.data_ptr(),
        *packed.shape,
        TYPES[packed.dtype],
    )


def sparse_linear_cpu(x: Tensor, packed: Packed, bias: Tensor | None = None, *, own_product: bool = True) -> Tensor:
    """own_product: whether ``linear_cpu`` multiplies many float32 tokens, or torch."""
    outputs, inputs = packed.shape
    tokens = math.prod(x.shape[:-1])
    flat = x.reshape(tokens, inputs)
    if tokens > FEW_TOKENS:
        return _product_by_parts(flat, packed, bias, own_product).view(*x.shape[:-1], outputs)
    flat, bias = _unit(flat), _dense(bias)
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    _C.sparse_linear_cpu(
        *_view(packed),
        flat.data_ptr(),
        flat.stride(0),
        tokens,
        _address(bias),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@torch.no_grad()
def _product_by_parts(x: Tensor, packed: Packed, bias: Tensor | None, own_product: bool) -> Tensor:
    """Some rows of the weight at a time, expanded into one small matrix that a dense product takes."""
    outputs, inputs = packed.shape
    step, threads = max(64, EXPANDED // max(1, inputs)), torch.get_num_threads()
    dense, out = torch.empty((min(step, outputs), inputs), dtype=x.dtype), torch.empty(len(x), outputs, dtype=x.dtype)
    x, bias = _unit(x), _dense(bias)
    for first in range(0, outputs, step):
        count = min(step, outputs - first)
        part, target = None if bias is None else bias[first : first + count], out[:, first : first + count]
        _C.expand_bitmask_cpu(*_view(packed), first, count, dense.data_ptr(), threads)
        if own_product and x.dtype == torch.float32:
            _C.linear_cpu(
                x.data_ptr(),
                x.stride(0),
                dense.data_ptr(),
                inputs,
                _address(part),
                target.data_ptr(),
                outputs,
                len(x),
                count,
                inputs,
                False,
                threads,
            )
        elif part is None:
            torch.mm(x, dense[:count].T, out=target)
        else:
            torch.addmm(part, x, dense[:count].T, out=target)
    return out


# Kernels run on torch's current stream and nothing waits for them. What only the data can show to be wrong is found on
# the device and written to pinned host memory; as with CUDA's own errors, the next call on that device raises it, or
# check_cuda. What the faulty call left alone: the whole weight (select_mask with scope "matrix", a bad r in obs_sweep),
# that row (select_mask, obs_sweep), that group (nm_mask).

NORM_FORMS = {"narrow": 0, "wide": 1, "offset": 2}


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, *, form: str = "narrow") -> Tensor:
    flat, weight = _unit(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])), weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    _C.rms_norm_cpu(
        flat.data_ptr(),
        flat.stride(0),
        *flat.shape,
        TYPES[x.dtype],
        weight.data_ptr(),
        eps,
        NORM_FORMS[form],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def rotary_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    out = torch.empty_like(x)
    _C.rotary_cpu(
        x.data_ptr(),
        x.shape,
        x.stride()[:3],
        out.data_ptr(),
        out.stride()[:3],
        cos.data_ptr(),
        _batch_strides(cos),
        sin.data_ptr(),
        _batch_strides(sin),
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def _batch_strides(table: Tensor) -> tuple[int, int]:
    """Of batch and tokens; one row serves a whole batch."""
    return table.stride(0) if len(table) > 1 else 0, table.stride(1)


def swiglu_cpu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _C.swiglu_cpu(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), TYPES[gate.dtype], torch.get_num_threads()
    )
    return out


FAULTS = {
    "select_mask": NAN_SCORE.format("w"),
    "nm_mask": NAN_SCORE.format("w"),
    "compress_24": TOO_DENSE,
    "expand_24": BAD_META,
    "obs_sweep": NOT_FINITE,
}
_faults: dict[torch.device, Tensor] = {}


def check_cuda(device: torch.device | str = "cuda") -> None:
    """Wait for ``device`` and raise ``ValueError`` for bad data that CUDA ops have met since the last look."""
    device = indexed(device)
    torch.cuda.synchronize(device)
    _raise_faults(device)


def _raise_faults(device: torch.device) -> None:
    words = _faults.get(device)
    if words is None or not any(words.tolist()):
        return
    met = [op for op, found in zip(FAULTS, words.tolist()) if found]
    words.zero_()
    raise ValueError(f"found on {device} after the call returned: " + "; ".join(f"{op}: {FAULTS[op]}" for op in met))


def _fault(op: str, device: torch.device) -> int:
    """Where the kernels of ``op`` report; raises what earlier calls have reported."""
    if device not in _faults:
        _faults[device] = torch.zeros(len(FAULTS), dtype=torch.int32, pin_memory=device.type == "cuda")
    _raise_faults(device)
    return _faults[device].data_ptr() + 4 * list(FAULTS).index(op)


def _launch(op: str, device: torch.device, *arguments) -> None:
    with torch.cuda.device(device):
        getattr(_C, f"{op}_cuda")(device.index, *arguments, torch.cuda.current_stream(device).cuda_stream)


def select_mask_cuda(
    w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row", apply: bool = False
) -> Tensor:
    work, scale = _unit(w), _dense(scale)
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    workspace = torch.empty(_C.cuda_select_workspace if scope == "matrix" else 0, dtype=torch.int32, device=w.device)
    _launch(
        "select_mask",
        w.device,
        work.data_ptr(),
        TYPES[w.dtype],
        *w.shape,
        work.stride(0),
        _address(scale),
        k,
        apply,
        keep.data_ptr(),
        _fault("select_mask", w.device),
        workspace.data_ptr(),
    )
    if apply and work is not w:
        w.copy_(work)
    return keep


def nm_mask_cuda(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    work, scale = _unit(w), _dense(scale)
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    _launch(
        "nm_mask",
        w.device,
        work.data_ptr(),
        TYPES[w.dtype],
        *w.shape,
        work.stride(0),
        _address(scale),
        n,
        m,
        apply,
        keep.data_ptr(),
        _fault("nm_mask", w.device),
    )
    if apply and work is not w:
        w.copy_(work)
    return keep


def compress_24_cuda(w: Tensor) -> tuple[Tensor, Tensor]:
    w = _unit(w)
    rows, columns = w.shape
    values = torch.empty((rows, columns // 2), dtype=w.dtype, device=w.device)
    meta = torch.empty((rows, columns // 16), dtype=torch.int16, device=w.device)
    _launch(
        "compress_24",
        w.device,
        w.data_ptr(),
        rows,
        columns,
        w.stride(0),
        values.data_ptr(),
        meta.data_ptr(),
        _fault("compress_24", w.device),
    )
    return values, meta


def expand_24_cuda(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    w = torch.empty((values.shape[0], values.shape[1] * 2), dtype=values.dtype, device=values.device)
    _launch(
        "expand_24", w.device, values.data_ptr(), meta.data_ptr(), *w.shape, w.data_ptr(), _fault("expand_24", w.device)
    )
    return w


def sparse_linear_cuda(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = packed.shape
    tokens = math.prod(x.shape[:-1])
    if tokens > FEW_TOKENS:
        dense = torch.empty(packed.shape, dtype=x.dtype, device=x.device)
        _launch("expand_bitmask", x.device, *_view(packed), dense.data_ptr())
        return torch.nn.functional.linear(x, dense, bias)
    flat, bias = _unit(x.reshape(tokens, inputs)), _dense(bias)
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    _launch(
        "sparse_linear",
        x.device,
        *_view(packed),
        flat.data_ptr(),
        flat.stride(0),
        tokens,
        _address(bias),
        out.data_ptr(),
    )
    return out


def obs_sweep_cuda(
    w: Tensor, r: Tensor, *, mask: Tensor | None = None, k: int | None = None, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A launch takes 128 columns: wider blocks are swept in pieces, the update between them one product each."""
    fault = _fault("obs_sweep", w.device)
    rows, columns = w.shape
    n, m = nm or (0, 1)
    if m > _C.cuda_sweep_columns:
        raise ValueError(
            f"the cuda back-end chooses among at most {_C.cuda_sweep_columns} weights while it sweeps, "
            f"got {n}:{m}; choose the mask first or use another back-end"
        )
    if k is not None:
        mask = select_mask_cuda(w, k, scale=1 / r.diagonal(), scope="matrix")
    piece = _C.cuda_sweep_columns // m * m
    if columns > piece:  # a bad r must not reach w by the products either: its zero diagonal stops every piece
        r = torch.where(r.isfinite().all() & (r.diagonal() > 0).all(), r, 0)
    r, mask = _unit(r), _dense(mask)
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    error = torch.empty(w.shape, device=w.device)
    loss = torch.empty((-(-columns // piece), rows), device=w.device)
    for i, start in enumerate(range(0, columns, piece)):
        part = slice(start, min(start + piece, columns))
        chosen = 0 if mask is None else mask[:, part].data_ptr()
        _launch(
            "obs_sweep",
            w.device,
            w[:, part].data_ptr(),
            rows,
            part.stop - start,
            w.stride(0),
            r[part, part].data_ptr(),
            r.stride(0),
            chosen,
            n,
            m,
            keep[:, part].data_ptr(),
            error[:, part].data_ptr(),
            columns,
            loss[i].data_ptr(),
            fault,
        )
        if part.stop < columns:
            w[:, part.stop :].addmm_(error[:, part], r[part, part.stop :], alpha=-1)
    return keep, error, loss[0] if len(loss) == 1 else loss.sum(0)


def cholesky_cuda(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    a, damping = a.contiguous(), _dense(damping)
    factor, info = torch.empty_like(a), torch.empty(len(a), dtype=torch.int32, device=a.device)
    _launch("cholesky", a.device, a.data_ptr(), _address(damping), *a.shape[:2], factor.data_ptr(), info.data_ptr())
    return factor, info


def cholesky_solve_cuda(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    factor, info = cholesky_cuda(a, damping=damping)
    b = b.contiguous()
    x = torch.empty_like(b)
    _launch("cholesky_solve", a.device, factor.data_ptr(), info.data_ptr(), b.data_ptr(), *b.shape, x.data_ptr())
    return x, info
