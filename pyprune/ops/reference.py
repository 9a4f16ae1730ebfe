"""Plain PyTorch truth of every op in :mod:`pyprune.ops`.

Each function is the formula and nothing else: readable first, slow where that is clearer. Every other
back-end is tested against it. Signatures and in-place behaviour are those of ``ops``; arguments are
validated there, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.ops.packed import Packed, unpack_bitmask

CHUNK_TOKENS = 8192


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that do not count become zeros: to leave them out, a GPU would have to be asked how many there are."""
    return x if mask is None else torch.where(mask.unsqueeze(1), x, 0)


def _count(x: Tensor, mask: Tensor | None) -> Tensor | int:
    return len(x) if mask is None else mask.sum()


def _tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


def _add_product(total: Tensor, y: Tensor, x: Tensor) -> None:
    """``total += yᵀx`` with float32 sums; on a GPU 16-bit products run on its tensor cores, which keep such sums."""
    if _tensor_cores(x):
        total.copy_(torch.addmm(total, y.T, x, out_dtype=torch.float32))
    else:
        total.addmm_(y.float().T, x.float())


def gram_update(
    gram: Tensor,
    x: Tensor,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str = "float32",
) -> None:
    for chunk in _rows(x, mask).split(CHUNK_TOKENS):
        chunk = chunk.to(torch.bfloat16) if precision == "bfloat16" else chunk
        _add_product(gram, chunk, chunk)
        if sums is not None:
            sums += chunk.sum(0, dtype=torch.float32)
    if count is not None:
        count += _count(x, mask)


def cross_gram_update(cross: Tensor, y: Tensor, x: Tensor, *, mask: Tensor | None = None) -> None:
    y, x = _rows(y, mask), _rows(x, mask)
    for a, b in zip(y.split(CHUNK_TOKENS), x.split(CHUNK_TOKENS)):
        _add_product(cross, a, b)


def column_moments(x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.full((), len(x), device=x.device) if mask is None else mask.sum()
    x = _rows(x, mask).float()
    mean = x.sum(0) / count.clamp(min=1)
    return count, mean, _rows(x - mean, mask).square().sum(0)


def _lowest(score: Tensor, k: int) -> Tensor:
    """Boolean mask, True at the k lowest scores of each row; ties go to the lower index."""
    order = score.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def _score(w: Tensor, scale: Tensor | None) -> Tensor:
    score = w.float().abs()
    return score if scale is None else score * scale.float()


_late: dict[tuple[torch.device, str], Tensor] = {}


def _refuse(bad: Tensor, sentence: str) -> None:
    """Raise for data that an op cannot take. A GPU would have to be waited for: there :func:`check` raises, later."""
    if bad.is_cuda:
        key = bad.device, sentence
        _late[key] = bad | _late[key] if key in _late else bad
    elif bad:
        raise ValueError(f"{sentence}; w is unchanged")


def check(device: torch.device | str) -> None:
    """Raise what was found wrong with data on a GPU since the last look; waits for it."""
    told = {sentence: _late.pop((at, sentence)) for at, sentence in list(_late) if at == torch.device(device)}
    found = [sentence for sentence, bad in zip(told, torch.stack([*told.values()]).tolist()) if bad] if told else []
    if found:
        raise ValueError("; ".join(found))


def _ordered(score: Tensor) -> Tensor:
    _refuse(score.isnan().any(), "w has NaN scores, so there is no order to select by")
    return score


def select_mask(w: Tensor, k: int, *, scale: Tensor | None = None, scope: str = "row", apply: bool = False) -> Tensor:
    score = _ordered(_score(w, scale))
    keep = ~_lowest(score if scope == "row" else score.reshape(1, -1), k).reshape(w.shape)
    if apply:
        w.masked_fill_(~keep, 0)
    return keep


def nm_mask(w: Tensor, n: int, m: int, *, scale: Tensor | None = None, apply: bool = False) -> Tensor:
    score = _ordered(_score(w, scale))
    keep = ~_lowest(score.reshape(-1, m), m - n).reshape(w.shape)
    if apply:
        w.masked_fill_(~keep, 0)
    return keep


def compress_24(w: Tensor) -> tuple[Tensor, Tensor]:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    if w.numel() == 0:
        return w.new_empty(w.shape[0], w.shape[1] // 2), w.new_empty(w.shape[0], w.shape[1] // 16, dtype=torch.int16)
    if (w.reshape(-1, 4) != 0).sum(1).gt(2).any():
        raise ValueError("not a 2:4 matrix: some group of 4 columns has more than 2 non-zeros")
    return sparse_semi_structured_from_dense_cutlass(w.contiguous())


def expand_24(values: Tensor, meta: Tensor) -> Tensor:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    if values.numel() == 0:
        return values.new_empty(values.shape[0], values.shape[1] * 2)
    return sparse_semi_structured_to_dense_cutlass(values.contiguous(), meta.contiguous())


def obs_sweep(
    w: Tensor, r: Tensor, *, mask: Tensor | None = None, k: int | None = None, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    diagonal = r.diagonal()
    _refuse(
        ~(w.isfinite().all() & r.isfinite().all() & (diagonal > 0).all()),
        "the sweep needs finite w and r and a positive diagonal of r (non-finite weights or "
        "activations, or a failed factorisation, come before it)",
    )
    if k is not None:
        mask = select_mask(w, k, scale=1 / diagonal, scope="matrix")
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    error = torch.zeros_like(w)
    for j in range(w.shape[1]):
        if nm is not None and j % nm[1] == 0:
            group = slice(j, j + nm[1])
            keep[:, group] = nm_mask(w[:, group].contiguous(), *nm, scale=1 / diagonal[group])
        column = w[:, j]
        e = torch.where(keep[:, j], 0, column) / diagonal[j]
        w[:, j:] -= e[:, None] * r[j, j:]
        w[:, j].masked_fill_(~keep[:, j], 0)
        error[:, j] = e
    return keep, error, error.square().sum(1)


def trailing_update(w: Tensor, e: Tensor, r: Tensor) -> None:
    w.addmm_(e, r, alpha=-1)


def cholesky(a: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if damping is not None:
        a = a + damping.reshape(-1, 1, 1) * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    factor, info = torch.linalg.cholesky_ex(a)
    return torch.where((info == 0)[:, None, None], factor, torch.nan).tril(), info


def cholesky_solve(a: Tensor, b: Tensor, *, damping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    factor, info = cholesky(a, damping=damping)
    return torch.cholesky_solve(b, factor), info


def liar_update(
    weight: Tensor, keep: Tensor, drop: Tensor, q: Tensor, *, bias: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    kept, dropped = weight[:, keep].float(), weight[:, drop].float()
    updated = kept + dropped @ q.T
    if mean is not None:
        shift = dropped @ (mean[drop] - q.T @ mean[keep])
        bias = shift if bias is None else bias.float() + shift
    return updated, bias


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, w, bias)


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, unpack_bitmask(packed), bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: str = "narrow") -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "narrow":
        return weight * normed.to(x.dtype)
    return (normed * (1 + weight.float() if form == "offset" else weight.float())).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
