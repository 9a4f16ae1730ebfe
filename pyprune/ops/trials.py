"""What a candidate of an op shows on a machine before ``auto`` may take it: right results first, then its time.

Every case runs a candidate on fresh inputs of an odd or a typical size, dense and as views into wider memory, and knows
the answer in float64. Memory that a candidate allocates is filled with NaN before it sees it, what it changes in place
lies between guard bands, and two calls must agree to the bit, on a GPU the second one on another stream.
:mod:`pyprune.ops.qualification` runs :func:`main` in a process of its own, which a candidate may crash, and reads the
lines it prints.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyprune.ops import reference
from pyprune.ops.packed import pack_bitmask

MARK = "pyprune-trial "
"""Begins a line that the parent reads; libraries may print others."""
GUARD, BAND = 1234.5, 64
ROUNDS, CLEAR = 7, 1.6
"""Timed calls per candidate, two where one is ``CLEAR`` times as fast as the other."""
SECONDS = 20.0
"""From here on two calls have to do: a busy machine must not keep its user waiting."""


class Broken(Exception):
    """A candidate did what it must not do; says what."""


@dataclass(frozen=True)
class Case:
    """One problem: how a candidate is called, and what must come out."""

    call: Callable[[Callable], tuple]
    """Calls an implementation on fresh copies of the inputs; all that it returned or changed."""
    want: Callable[[], tuple]
    """The same results; floating ones in float64."""
    tolerance: float = 1e-5
    """Largest error of a floating result, relative to its Frobenius norm; other results must be equal."""
    whole: bool = False
    """The time is that of the case, not of what it hands the candidate."""


class Guarded:
    """A tensor that is changed in place, between two bands that must not be; with a ``gap``, also between the rows."""

    def __init__(self, start: Tensor, gap: int = 0):
        width = start.shape[-1] + gap if gap else 0
        size = start.numel() if not gap else start.shape[0] * width
        self.memory = torch.full((size + 2 * BAND,), GUARD, dtype=start.dtype, device=start.device)
        inside = self.memory[BAND : BAND + size]
        whole = inside.view(start.shape[0], width) if gap else inside.view(start.shape)
        self.tensor, self.between = whole[..., : start.shape[-1]], whole[..., start.shape[-1] :]
        if start.ndim:
            self.tensor.copy_(start)

    def checked(self) -> Tensor:
        for part in (self.memory[:BAND], self.memory[-BAND:], self.between):
            if not torch.all(part == GUARD):
                raise Broken("wrote outside the tensor it was given")
        return self.tensor


def _normal(device, *shape, dtype=torch.float32, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def _within(x: Tensor, gap: int) -> Tensor:
    """``x`` as a view that begins inside a row of a wider matrix; itself without a gap."""
    if not gap:
        return x
    whole = x.new_full((x.shape[0], x.shape[1] + gap), 7.0)
    whole[:, 1 : 1 + x.shape[1]] = x
    return whole[:, 1 : 1 + x.shape[1]]


def gram_update(device, tokens, c, dtype=torch.float32, gap=0) -> Case:
    x, start = _within(_normal(device, tokens, c, dtype=dtype), gap), torch.eye(c, device=device)

    def call(implementation):
        gram, sums = Guarded(start), Guarded(torch.ones(c, device=device))
        count = torch.zeros((), dtype=torch.int64, device=device)
        implementation(gram.tensor, x, sums=sums.tensor, count=count)
        return gram.checked(), sums.checked(), count

    return Case(
        call,
        lambda: (
            start.double() + x.double().T @ x.double(),
            1 + x.double().sum(0),
            torch.tensor(tokens, device=device),
        ),
    )


def cross_gram_update(device, tokens, cy, cx, dtype=torch.float32, gap=0) -> Case:
    y, x = _normal(device, tokens, cy, dtype=dtype), _within(_normal(device, tokens, cx, dtype=dtype, seed=1), gap)
    start = _normal(device, cy, cx, seed=2)

    def call(implementation):
        cross = Guarded(start)
        implementation(cross.tensor, y, x)
        return (cross.checked(),)

    return Case(call, lambda: (start.double() + y.double().T @ x.double(),))


def column_moments(device, tokens, c, gap=0) -> Case:
    x, counted = _within(_normal(device, tokens, c) + 3, gap), torch.arange(tokens, device=device) % 5 > 0
    wide = x[counted].double()
    return Case(
        lambda implementation: implementation(x, mask=counted),
        lambda: (counted.sum(), wide.mean(0), (wide - wide.mean(0)).square().sum(0)),
    )


def select_mask(device, rows, columns, scope, apply=True, gap=0) -> Case:
    w, scale = _normal(device, rows, columns), _normal(device, columns, seed=1).abs() + 0.1
    k = (columns if scope == "row" else w.numel()) // 2

    def call(implementation):
        changed = Guarded(w, gap)
        return implementation(changed.tensor, k, scale=scale, scope=scope, apply=apply), changed.checked()

    def want():
        changed = w.clone()
        return reference.select_mask(changed, k, scale=scale, scope=scope, apply=apply), changed.double()

    return Case(call, want, 0.0)


def nm_mask(device, rows, columns, n, m, apply=True, gap=0) -> Case:
    w, scale = _normal(device, rows, columns), _normal(device, columns, seed=1).abs() + 0.1

    def call(implementation):
        changed = Guarded(w, gap)
        return implementation(changed.tensor, n, m, scale=scale, apply=apply), changed.checked()

    def want():
        changed = w.clone()
        return reference.nm_mask(changed, n, m, scale=scale, apply=apply), changed.double()

    return Case(call, want, 0.0)


def _two_of_four(device, rows, columns, dtype) -> Tensor:
    w = _normal(device, rows, columns, dtype=dtype)
    reference.nm_mask(w, 2, 4, apply=True)
    return w


def compress_24(device, rows, columns, dtype, gap=0) -> Case:
    w = _within(_two_of_four(device, rows, columns, dtype), gap)
    return Case(
        lambda implementation: implementation(w),
        lambda: tuple(t.double() if t.is_floating_point() else t for t in reference.compress_24(w)),
        0.0,
    )


def expand_24(device, rows, columns, dtype, gap=0) -> Case:
    w = _two_of_four(device, rows, columns, dtype)
    values, meta = reference.compress_24(w)
    packed = _within(values, gap), meta
    return Case(lambda implementation: (implementation(*packed),), lambda: (w.double(),), 0.0)


def obs_sweep(device, rows, columns, nm=None, gap=0) -> Case:
    w = _normal(device, rows, columns)
    a = _normal(device, 4 * columns, columns, seed=1)
    r = _within(torch.linalg.cholesky((a.T @ a / len(a)).double().inverse(), upper=True).float(), gap)
    mask = None if nm else _normal(device, rows, columns, seed=2) > 0

    def call(implementation):
        changed = Guarded(w, gap)
        return *implementation(changed.tensor, r, mask=mask, nm=nm), changed.checked()

    def want():
        changed = w.double()
        return *reference.obs_sweep(changed, r.double(), mask=mask, nm=nm), changed

    return Case(call, want, 1e-4)


def trailing_update(device, rows, n, depth, gap=0) -> Case:
    whole, e, r = _normal(device, rows, n + 5), _normal(device, rows, depth, seed=1), _normal(device, depth, n, seed=2)

    def call(implementation):
        changed = Guarded(whole, gap)
        implementation(changed.tensor[:, 5:], e, r)
        return (changed.checked(),)

    def want():
        wide = whole.double()
        wide[:, 5:] -= e.double() @ r.double()
        return (wide,)

    return Case(call, want)


def _systems(device, batch, n) -> tuple[Tensor, Tensor]:
    x = _normal(device, batch, 2 * n, n)
    return x.transpose(1, 2) @ x / (2 * n), torch.full((batch,), 0.05, device=device)


def cholesky(device, batch, n, bad=False, gap=0) -> Case:
    a, damping = _systems(device, batch, n)
    if bad:
        a[-1, n // 2, n // 2] = -1
    a = a.mT.contiguous().mT if gap else a

    def want():
        factors, info = reference.cholesky(a.double(), damping=damping.double())
        return factors, info

    return Case(lambda implementation: implementation(a, damping=damping), want, 1e-4)


def cholesky_solve(device, batch, n, k, gap=0) -> Case:
    a, damping = _systems(device, batch, n)
    b = _normal(device, batch, n, k, seed=1)
    b = b.mT.contiguous().mT if gap else b
    return Case(
        lambda implementation: implementation(a, b, damping=damping),
        lambda: reference.cholesky_solve(a.double(), b.double(), damping=damping.double()),
        1e-4,
    )


def liar_update(device, rows, columns, kept, gap=0) -> Case:
    weight = _within(_normal(device, rows, columns), gap)
    mean, bias = _normal(device, columns, seed=1), _normal(device, rows, seed=2)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3)).to(device)
    keep, drop = order[:kept].sort().values, order[kept:].sort().values
    q = _normal(device, kept, columns - kept, seed=4)

    def want():
        wide, d = weight.double(), weight[:, drop].double()
        shift = mean[drop].double() - q.double().T @ mean[keep].double()
        return wide[:, keep] + d @ q.double().T, bias.double() + d @ shift

    return Case(lambda implementation: implementation(weight, keep, drop, q, bias=bias, mean=mean), want)


def linear(device, rows, outputs, inputs, gap=0) -> Case:
    x, w = _within(_normal(device, rows, inputs), gap), _within(_normal(device, outputs, inputs, seed=1), gap)
    bias = _normal(device, outputs, seed=2)
    return Case(
        lambda implementation: (implementation(x, w, bias),), lambda: (x.double() @ w.double().T + bias.double(),)
    )


def sparse_linear(device, tokens, outputs, inputs, dtype=torch.float32, gap=0) -> Case:
    """Half of the weights are zero, with an empty and a full row."""
    x, bias = _within(_normal(device, tokens, inputs, dtype=dtype), gap), _normal(device, outputs, dtype=dtype, seed=2)
    w = _normal(device, outputs, inputs, dtype=dtype, seed=1)
    dropped = _normal(device, outputs, inputs, seed=3) < 0
    dropped[0], dropped[-1] = False, True
    packed = pack_bitmask(w.masked_fill(dropped, 0))

    def want():
        return (x.double() @ w.masked_fill(dropped, 0).double().T + bias.double(),)

    rounding = 1e-5 if dtype == torch.float32 else 4e-3 if dtype == torch.bfloat16 else 5e-4
    return Case(lambda implementation: (implementation(x, packed, bias),), want, rounding)


def rms_norm(device, rows, columns, dtype=torch.float32, form="narrow", gap=0) -> Case:
    x = _within(_normal(device, rows, columns, dtype=dtype), gap)
    weight = (_normal(device, columns, seed=1) + 2).to(dtype)

    def want():
        wide, w = x.double(), weight.double() + (form == "offset")
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * w,)

    return Case(lambda implementation: (implementation(x, weight, 1e-5, form=form),), want, _rounding(dtype))


def rotary(device, batch, heads, tokens, d, dtype=torch.float32, gap=0) -> Case:
    """Queries as they are handed over: ``[batch, tokens, heads, d]``, transposed."""
    x = _normal(device, batch * tokens, heads * d, dtype=dtype)
    x = _within(x, gap).view(batch, tokens, heads, d).transpose(1, 2)
    cos, sin = (
        _normal(device, 1, tokens, d, dtype=dtype, seed=1),
        _normal(device, batch, tokens, d, dtype=dtype, seed=2),
    )

    def want():
        first, second = x.double().chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return (x.double() * cos.double()[:, None] + turned * sin.double()[:, None],)

    return Case(lambda implementation: (implementation(x, cos, sin),), want, _rounding(dtype))


def swiglu(device, rows, columns, dtype=torch.float32, gap=0) -> Case:
    gate, up = (_within(_normal(device, rows, columns, dtype=dtype, seed=i), gap) for i in range(2))
    return Case(
        lambda implementation: (implementation(gate, up),),
        lambda: (functional.silu(gate.double()) * up.double(),),
        _rounding(dtype),
    )


def _rounding(dtype: torch.dtype) -> float:
    """Of a result in a type, and once more on the way to it."""
    return {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]


def sparse_linear_24(device, tokens, outputs, inputs, dtype, gap=0) -> Case:
    x, bias = _within(_normal(device, tokens, inputs, dtype=dtype), gap), _normal(device, outputs, dtype=dtype, seed=2)
    w = _normal(device, outputs, inputs, dtype=dtype, seed=1)
    w = torch.where(w == 0, 1, w)
    reference.nm_mask(w, 2, 4, apply=True)
    packed = pack_bitmask(w)
    return Case(
        lambda implementation: (implementation(x, packed, bias),),
        lambda: (x.double() @ w.double().T + bias.double(),),
        4e-3 if dtype == torch.bfloat16 else 5e-4,
    )


def attention(device, batch, heads, groups, tokens, width, dtype, causal=True, gap=0) -> Case:
    """Projections as they lie in memory, tokens before heads; without ``causal`` a mask that shows some keys."""
    shapes = [(batch * tokens, count * width) for count in (heads, groups, groups)]
    q, k, v = (
        _within(_normal(device, *shape, dtype=dtype, seed=i), gap).view(batch, tokens, -1, width).transpose(1, 2)
        for i, shape in enumerate(shapes)
    )
    mask = None if causal else _normal(device, batch, 1, tokens, tokens, seed=3) > -1

    def want():
        scores = q.double() @ k.double().repeat_interleave(heads // groups, 1).mT * width**-0.5
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril() if mask is None else mask
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v.double().repeat_interleave(heads // groups, 1),)

    tolerance = 2e-6 if dtype == torch.float32 else 5e-3 if dtype == torch.bfloat16 else 1e-3
    return Case(lambda implementation: (implementation(q, k, v, mask=mask, causal=causal),), want, tolerance)


def _forward(dtype: torch.dtype, tolerance: float):
    def case(device, sequences, tokens, hidden, inner, heads, groups, gap=0) -> Case:
        """A LLaMA block: attention with grouped key heads, and the gated layers."""
        d = hidden // heads
        shapes = [
            (hidden, hidden),
            (groups * d, hidden),
            (groups * d, hidden),
            (hidden, hidden),
            (inner, hidden),
            (inner, hidden),
            (hidden, inner),
        ]
        weights = [_normal(device, *shape, seed=i).div(shape[1] ** 0.5).to(dtype) for i, shape in enumerate(shapes)]
        x = _normal(device, sequences, tokens, hidden, dtype=dtype, seed=9)

        def block(x, weights):
            q, k, v, o, gate, up, down = weights
            normed = functional.rms_norm(x, (hidden,))
            queries, keys, values = (
                functional.linear(normed, w).view(*x.shape[:2], -1, d).transpose(1, 2) for w in (q, k, v)
            )
            mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            x = x + functional.linear(mixed.transpose(1, 2).reshape(x.shape), o)
            normed = functional.rms_norm(x, (hidden,))
            return x + functional.linear(
                functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up), down
            )

        def call(mode):
            with torch.no_grad(), mode():
                return (block(x, weights),)

        return Case(call, lambda: (block(x.double(), [w.double() for w in weights]),), tolerance, whole=True)

    return case


HALF, BRAIN = torch.float16, torch.bfloat16
CASES: dict[str, tuple[Callable[..., Case], list[tuple], list[tuple]]] = {
    "gram_update/float32": (gram_update, [(63, 70)], [(2048, 576)]),
    "gram_update/16-bit": (gram_update, [(130, 33, BRAIN), (65, 48, HALF)], [(2048, 576, BRAIN)]),
    "gram_update/16-bit-wide": (gram_update, [(40, 2056, BRAIN)], [(512, 2048, BRAIN)]),
    "cross_gram_update/float32": (cross_gram_update, [(45, 20, 31)], [(2048, 576, 192)]),
    "cross_gram_update/16-bit": (cross_gram_update, [(45, 20, 31, BRAIN)], [(2048, 576, 192, BRAIN)]),
    "column_moments": (column_moments, [(63, 70)], [(8192, 576)]),
    "select_mask/row": (select_mask, [(5, 71, "row")], [(576, 1536, "row", False)]),
    "select_mask/matrix": (select_mask, [(9, 33, "matrix")], [(576, 1536, "matrix", False)]),
    "nm_mask": (nm_mask, [(7, 64, 2, 4), (3, 40, 4, 8)], [(576, 1536, 2, 4, False)]),
    "compress_24": (compress_24, [(32, 64, BRAIN), (64, 32, HALF)], [(576, 1536, BRAIN)]),
    "expand_24": (expand_24, [(32, 64, BRAIN), (64, 32, HALF)], [(576, 1536, BRAIN)]),
    "obs_sweep": (obs_sweep, [(7, 37), (9, 40, (2, 4))], [(576, 128), (576, 128, (2, 4))]),
    "trailing_update": (trailing_update, [(13, 30, 7), (50, 61, 33)], [(576, 448, 128), (1536, 1024, 128)]),
    "cholesky/small": (cholesky, [(3, 17, True)], [(64, 64), (16, 128)]),
    "cholesky/medium": (cholesky, [(8, 140, True)], [(16, 256)]),
    "cholesky/large": (cholesky, [(1, 530)], [(1, 640)]),
    "cholesky_solve/small": (cholesky_solve, [(3, 17, 2)], [(64, 64, 64), (256, 64, 1)]),
    "cholesky_solve/medium": (cholesky_solve, [(8, 140, 5)], [(16, 256, 64)]),
    "cholesky_solve/large": (cholesky_solve, [(1, 530, 3)], [(1, 640, 192)]),
    "liar_update": (liar_update, [(13, 40, 27)], [(576, 1536, 768)]),
    "linear/few-rows": (linear, [(7, 20, 13)], [(8, 1536, 576), (32, 576, 1536)]),
    "linear/rows": (linear, [(100, 33, 50)], [(2048, 1536, 576), (2048, 576, 1536), (512, 192, 576)]),
    "linear/rows-wide": (linear, [(50, 2050, 2052)], [(384, 4096, 4096)]),
    "sparse_linear/one-token": (
        sparse_linear,
        [(1, 37, 1003, BRAIN), (1, 9, 70, HALF), (1, 20, 131)],
        [(1, 1536, 1536, BRAIN), (1, 1536, 1536)],
    ),
    "sparse_linear/few-tokens": (
        sparse_linear,
        [(3, 37, 203, BRAIN), (7, 9, 70, HALF), (16, 20, 131), (13, 33, 4104, BRAIN)],
        [(4, 1536, 1536, BRAIN), (16, 1536, 1536, BRAIN)],
    ),
    "sparse_linear/tokens": (
        sparse_linear,
        [(17, 37, 203, BRAIN), (33, 9, 70, HALF), (70, 120, 131)],
        [(256, 1536, 1536, BRAIN), (256, 1536, 1536)],
    ),
    "rms_norm/float32": (rms_norm, [(13, 70), (5, 33, torch.float32, "offset")], [(2048, 576)]),
    "rms_norm/16-bit": (
        rms_norm,
        [(9, 130, HALF, "offset"), (5, 33, BRAIN, "wide"), (70, 576, BRAIN)],
        [(2048, 576, BRAIN)],
    ),
    "rotary/float32": (rotary, [(2, 3, 5, 10)], [(4, 9, 512, 64)]),
    "rotary/16-bit": (rotary, [(2, 3, 7, 64, BRAIN), (1, 2, 5, 6, HALF)], [(4, 9, 512, 64, BRAIN)]),
    "swiglu/float32": (swiglu, [(13, 70)], [(2048, 1536)]),
    "swiglu/16-bit": (swiglu, [(5, 33, BRAIN), (9, 130, HALF)], [(2048, 1536, BRAIN)]),
    "sparse_linear/few-tokens-2:4": (sparse_linear_24, [(3, 32, 64, HALF)], [(16, 1536, 1536, BRAIN)]),
    "sparse_linear/tokens-2:4": (sparse_linear_24, [(21, 96, 320, BRAIN)], [(256, 1536, 1536, BRAIN)]),
    "attention/float32": (
        attention,
        [(2, 6, 2, 70, 24, torch.float32), (1, 3, 3, 37, 33, torch.float32, False), (1, 2, 1, 600, 8, torch.float32)],
        [(2, 9, 3, 512, 64, torch.float32), (4, 12, 12, 128, 32, torch.float32, False)],
    ),
    "attention/16-bit": (
        attention,
        [(2, 6, 2, 70, 24, BRAIN), (1, 3, 3, 37, 33, BRAIN, False), (1, 4, 2, 50, 40, HALF), (1, 2, 1, 600, 8, BRAIN)],
        [(2, 9, 3, 512, 64, BRAIN), (4, 12, 12, 128, 32, BRAIN, False)],
    ),
    "forward_float32": (_forward(torch.float32, 1e-5), [(2, 150, 48, 80, 6, 2)], [(2, 512, 576, 1536, 9, 3)]),
    "forward_bfloat16": (_forward(torch.bfloat16, 2e-2), [(2, 150, 48, 80, 6, 2)], [(2, 512, 576, 1536, 9, 3)]),
}
"""Class of an op → how a case is made, the sizes it is checked on, the sizes it is timed on."""
TIMED_ON_A_GPU: dict[str, list[tuple]] = {
    "gram_update/float32": [(4096, 1024), (4096, 4096)],
    "gram_update/16-bit": [(8192, 768, BRAIN), (8192, 1024, BRAIN)],
    "gram_update/16-bit-wide": [(8192, 4096, BRAIN), (4096, 11008, BRAIN)],
    "cross_gram_update/float32": [(4096, 2048, 2048)],
    "cross_gram_update/16-bit": [(8192, 4096, 4096, BRAIN)],
    "column_moments": [(8192, 4096)],
    "select_mask/row": [(4096, 4096, "row", False)],
    "select_mask/matrix": [(4096, 128, "matrix", False), (4096, 4096, "matrix", False)],
    "nm_mask": [(4096, 4096, 2, 4, False)],
    "compress_24": [(4096, 4096, BRAIN)],
    "expand_24": [(4096, 4096, BRAIN)],
    "obs_sweep": [(4096, 128), (12288, 128, (2, 4))],
    "cholesky/small": [(256, 64), (64, 128)],
    "cholesky/medium": [(64, 256), (16, 512)],
    "cholesky/large": [(4, 1024), (1, 2048)],
    "cholesky_solve/small": [(256, 64, 64), (64, 128, 128)],
    "cholesky_solve/medium": [(64, 256, 256), (16, 512, 512)],
    "cholesky_solve/large": [(4, 1024, 1024), (1, 2048, 1024)],
    "liar_update": [(4096, 11008, 7706)],
    "sparse_linear/one-token": [(1, 4096, 4096, BRAIN), (1, 11008, 4096, BRAIN)],
    "sparse_linear/few-tokens": [(4, 4096, 4096, BRAIN), (16, 4096, 4096, BRAIN)],
    "sparse_linear/tokens": [(512, 4096, 4096, BRAIN)],
    "rms_norm/float32": [(16384, 4096)],
    "rms_norm/16-bit": [(16384, 4096, BRAIN), (262144, 128, BRAIN)],
    "rotary/float32": [(8, 32, 2048, 128)],
    "rotary/16-bit": [(8, 32, 2048, 128, BRAIN)],
    "swiglu/float32": [(8192, 11008)],
    "swiglu/16-bit": [(8192, 11008, BRAIN)],
    "sparse_linear/few-tokens-2:4": [(4, 4096, 4096, BRAIN), (16, 4096, 4096, BRAIN)],
    "sparse_linear/tokens-2:4": [(512, 4096, 4096, BRAIN)],
}
"""The sizes there; those above where it has none."""


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def _compare(got: tuple, want: tuple, tolerance: float) -> float:
    """The largest relative error of the floating results; raises Broken where one is not right."""
    worst = 0.0
    for index, (value, true) in enumerate(zip(got, want, strict=True)):
        if not true.is_floating_point():
            if not torch.equal(value, true.to(value.dtype)):
                raise Broken(f"result {index} is not what the reference gives")
            continue
        if not torch.equal(value.isnan(), true.isnan()):
            raise Broken(f"result {index} has NaN where none belongs, or none where it does: not all of it was written")
        difference = (value.double() - true).nan_to_num(0.0)
        error = float(difference.norm() / true.nan_to_num(0.0).norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise Broken(f"result {index} is off by {error:.1e}, of {tolerance:.0e} allowed")
        worst = max(worst, error)
    return worst


def check(op: str, implementation: Callable, device) -> float:
    """The largest error over the cases of an op; raises Broken, or what the candidate raises."""
    make, sizes, _ = CASES[op]
    worst = 0.0
    torch.use_deterministic_algorithms(True, warn_only=True)  # with this, torch.empty is filled with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # torch makes it late
    try:
        for size, gap in [(size, gap) for size in sizes for gap in (0, 3)]:
            case = make(device, *size, gap=gap)
            first = case.call(implementation)
            worst = max(worst, _compare(first, case.want(), case.tolerance))
            with _another_stream(device):
                second = case.call(implementation)
                same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second))
            if not same:
                raise Broken("two calls on the same inputs gave different bits")
    finally:
        torch.use_deterministic_algorithms(False)
    return worst


@contextlib.contextmanager
def _another_stream(device) -> Iterator[None]:
    """A stream that does not wait for the one before, which is kept busy: what a candidate leaves there comes late."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda._sleep(20_000_000)  # some ten milliseconds
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)


def _seconds(case: Case, implementation: Callable, device) -> float:
    """Of what the candidate does: on a CPU wall time, of a single thread CPU time, which other programs hardly change;
    on a GPU the time between two events."""
    spent: list[float] = []
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(*arguments, **options):
        if device == "cpu":
            start = clock()
            out = implementation(*arguments, **options)
            spent.append(clock() - start)
            return out
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        out = implementation(*arguments, **options)
        last.record()
        last.synchronize()
        spent.append(first.elapsed_time(last) * 1e-3)
        return out

    if case.whole:
        start = clock()
        case.call(implementation)
        return clock() - start
    case.call(timed)
    return sum(spent)


def times(
    op: str, implementations: dict[str, Callable], device, hurry: bool, entering: Callable[[str], None]
) -> dict[str, list[float]]:
    """Candidate → its best seconds at every size; candidates take turns, so that a busy moment hits all of them."""
    make, _, sizes = CASES[op]
    found: dict[str, list[float]] = {name: [] for name in implementations}
    for size in sizes if device == "cpu" else TIMED_ON_A_GPU.get(op, sizes):
        case = make(device, *size)
        best = dict.fromkeys(implementations, float("inf"))
        for turn in range(-1, 2 if hurry else ROUNDS):
            for name, implementation in implementations.items():
                entering(name)
                spent = _seconds(case, implementation, device)
                if turn >= 0:  # the first call warms up
                    best[name] = min(best[name], spent)
            if turn >= 1 and max(best.values()) > CLEAR * sorted(best.values())[-2]:
                break
        for name, spent in best.items():
            found[name].append(max(spent, 1e-9))
    return found


def ruined(device) -> bool:
    """Whether the device answers no more: an illegal access takes its context, and what follows would fail for it."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def load(candidate: dict, op: str) -> Callable:
    """The function that a candidate's ``module``, ``function`` name."""
    return getattr(importlib.import_module(candidate["module"]), candidate["function"])


def _say(event: dict) -> None:
    print(MARK + json.dumps(event), flush=True)


def run(jobs: list[dict], device: str) -> None:
    """Check and time every job's candidates, saying which one is tried before every step that it could crash."""
    began = time.perf_counter()
    for job in jobs:
        op, right = job["op"], {}
        for candidate in job["candidates"]:
            name = candidate["name"]
            _say({"op": op, "trying": name})
            try:
                implementation = getattr(importlib.import_module(candidate["module"]), candidate["function"])
                _say({"op": op, "name": name, "error": check(op, implementation, device)})
                right[name] = implementation
            except Exception as error:  # whatever a candidate raises disqualifies it, and only it
                text = " ".join(str(error).split())
                kind = "" if isinstance(error, Broken) else f"{type(error).__name__}: "
                _say({"op": op, "name": name, "failed": kind + text})
                if ruined(device):
                    os._exit(1)  # the others get a process, and a context, of their own
        if len(right) > 1:
            hurry = time.perf_counter() - began > SECONDS
            found = times(op, right, device, hurry, functools.partial(_trying, op))
            _say({"op": op, "seconds": found})
        _say({"op": op, "done": True})


def _trying(op: str, name: str) -> None:
    _say({"op": op, "trying": name})


def main() -> None:
    """Read ``{"device", "threads", "jobs"}`` from standard input; print one line per event."""
    order = json.load(sys.stdin)
    torch.set_num_threads(order["threads"])
    _say({"ready": True})
    run(order["jobs"], order["device"])
