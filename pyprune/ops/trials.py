"""What a candidate of an op shows on a machine before ``auto`` may take it: right results first, then its time.

Every case runs a candidate on fresh inputs of an odd or a typical size and knows the answer in float64. Memory that a
candidate allocates is filled with NaN before it sees it, what it changes in place lies between guard bands, and two
calls must agree to the bit. :mod:`pyprune.ops.qualification` runs :func:`main` in a process of its own, which a
candidate may crash, and reads the lines it prints.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyprune.ops import reference

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


class Guarded:
    """A tensor that is changed in place, between two bands that must not be."""

    def __init__(self, start: Tensor):
        size = start.numel()
        self.memory = torch.full((size + 2 * BAND,), GUARD, dtype=start.dtype, device=start.device)
        self.tensor = self.memory[BAND:BAND + size].view(start.shape)
        self.tensor.copy_(start)

    def checked(self) -> Tensor:
        if not (torch.all(self.memory[:BAND] == GUARD) and torch.all(self.memory[-BAND:] == GUARD)):
            raise Broken("wrote outside the tensor it was given")
        return self.tensor


def _normal(device, *shape, dtype=torch.float32, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def gram_update(device, tokens, c, dtype=torch.float32) -> Case:
    x, start = _normal(device, tokens, c, dtype=dtype), torch.eye(c, device=device)

    def call(implementation):
        gram, sums = Guarded(start), Guarded(torch.ones(c, device=device))
        count = torch.zeros((), dtype=torch.int64, device=device)
        implementation(gram.tensor, x, sums=sums.tensor, count=count)
        return gram.checked(), sums.checked(), count

    return Case(call, lambda: (start.double() + x.double().T @ x.double(), 1 + x.double().sum(0),
                               torch.tensor(tokens, device=device)))


def cross_gram_update(device, tokens, cy, cx) -> Case:
    y, x, start = _normal(device, tokens, cy), _normal(device, tokens, cx, seed=1), _normal(device, cy, cx, seed=2)

    def call(implementation):
        cross = Guarded(start)
        implementation(cross.tensor, y, x)
        return (cross.checked(),)

    return Case(call, lambda: (start.double() + y.double().T @ x.double(),))


def column_moments(device, tokens, c) -> Case:
    x, counted = _normal(device, tokens, c) + 3, torch.arange(tokens, device=device) % 5 > 0
    wide = x[counted].double()
    return Case(lambda implementation: implementation(x, mask=counted),
                lambda: (counted.sum(), wide.mean(0), (wide - wide.mean(0)).square().sum(0)))


def select_mask(device, rows, columns, scope, apply=True) -> Case:
    w, scale = _normal(device, rows, columns), _normal(device, columns, seed=1).abs() + 0.1
    k = (columns if scope == "row" else w.numel()) // 2

    def call(implementation):
        changed = Guarded(w)
        return implementation(changed.tensor, k, scale=scale, scope=scope, apply=apply), changed.checked()

    def want():
        changed = w.clone()
        return reference.select_mask(changed, k, scale=scale, scope=scope, apply=apply), changed.double()

    return Case(call, want, 0.0)


def nm_mask(device, rows, columns, n, m, apply=True) -> Case:
    w, scale = _normal(device, rows, columns), _normal(device, columns, seed=1).abs() + 0.1

    def call(implementation):
        changed = Guarded(w)
        return implementation(changed.tensor, n, m, scale=scale, apply=apply), changed.checked()

    def want():
        changed = w.clone()
        return reference.nm_mask(changed, n, m, scale=scale, apply=apply), changed.double()

    return Case(call, want, 0.0)


def _two_of_four(device, rows, columns, dtype) -> Tensor:
    w = _normal(device, rows, columns, dtype=dtype)
    reference.nm_mask(w, 2, 4, apply=True)
    return w


def compress_24(device, rows, columns, dtype) -> Case:
    w = _two_of_four(device, rows, columns, dtype)
    return Case(lambda implementation: implementation(w),
                lambda: tuple(t.double() if t.is_floating_point() else t for t in reference.compress_24(w)), 0.0)


def expand_24(device, rows, columns, dtype) -> Case:
    w = _two_of_four(device, rows, columns, dtype)
    packed = reference.compress_24(w)
    return Case(lambda implementation: (implementation(*packed),), lambda: (w.double(),), 0.0)


def obs_sweep(device, rows, columns, nm=None) -> Case:
    w = _normal(device, rows, columns)
    a = _normal(device, 4 * columns, columns, seed=1)
    r = torch.linalg.cholesky((a.T @ a / len(a)).double().inverse(), upper=True).float()
    mask = None if nm else _normal(device, rows, columns, seed=2) > 0

    def call(implementation):
        changed = Guarded(w)
        return *implementation(changed.tensor, r, mask=mask, nm=nm), changed.checked()

    def want():
        changed = w.double()
        return *reference.obs_sweep(changed, r.double(), mask=mask, nm=nm), changed

    return Case(call, want, 1e-4)


def trailing_update(device, rows, n, depth) -> Case:
    whole, e, r = _normal(device, rows, n + 5), _normal(device, rows, depth, seed=1), _normal(device, depth, n, seed=2)

    def call(implementation):
        changed = Guarded(whole)
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


def cholesky(device, batch, n, bad=False) -> Case:
    a, damping = _systems(device, batch, n)
    if bad:
        a[-1, n // 2, n // 2] = -1

    def want():
        factors, info = reference.cholesky(a.double(), damping=damping.double())
        return factors, info

    return Case(lambda implementation: implementation(a, damping=damping), want, 1e-4)


def cholesky_solve(device, batch, n, k) -> Case:
    a, damping = _systems(device, batch, n)
    b = _normal(device, batch, n, k, seed=1)
    return Case(lambda implementation: implementation(a, b, damping=damping),
                lambda: reference.cholesky_solve(a.double(), b.double(), damping=damping.double()), 1e-4)


def liar_update(device, rows, columns, kept) -> Case:
    weight, mean, bias = _normal(device, rows, columns), _normal(device, columns, seed=1), _normal(device, rows, seed=2)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3)).to(device)
    keep, drop = order[:kept].sort().values, order[kept:].sort().values
    q = _normal(device, kept, columns - kept, seed=4)

    def want():
        wide, d = weight.double(), weight[:, drop].double()
        shift = mean[drop].double() - q.double().T @ mean[keep].double()
        return wide[:, keep] + d @ q.double().T, bias.double() + d @ shift

    return Case(lambda implementation: implementation(weight, keep, drop, q, bias=bias, mean=mean), want)


def linear(device, rows, outputs, inputs) -> Case:
    x, w, bias = _normal(device, rows, inputs + 3)[:, :inputs], _normal(device, outputs, inputs, seed=1), \
        _normal(device, outputs, seed=2)
    return Case(lambda implementation: (implementation(x, w, bias),),
                lambda: (x.double() @ w.double().T + bias.double(),))


def _forward(dtype: torch.dtype, tolerance: float):
    def case(device, sequences, tokens, hidden, inner, heads, groups) -> Case:
        """A LLaMA block: attention with grouped key heads, and the gated layers."""
        d = hidden // heads
        shapes = [(hidden, hidden), (groups * d, hidden), (groups * d, hidden), (hidden, hidden), (inner, hidden),
                  (inner, hidden), (hidden, inner)]
        weights = [_normal(device, *shape, seed=i).div(shape[1] ** 0.5).to(dtype) for i, shape in enumerate(shapes)]
        x = _normal(device, sequences, tokens, hidden, dtype=dtype, seed=9)

        def block(x, weights):
            q, k, v, o, gate, up, down = weights
            normed = functional.rms_norm(x, (hidden,))
            queries, keys, values = (functional.linear(normed, w).view(*x.shape[:2], -1, d).transpose(1, 2)
                                     for w in (q, k, v))
            mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            x = x + functional.linear(mixed.transpose(1, 2).reshape(x.shape), o)
            normed = functional.rms_norm(x, (hidden,))
            return x + functional.linear(functional.silu(functional.linear(normed, gate))
                                         * functional.linear(normed, up), down)

        def call(mode):
            with torch.no_grad(), mode():
                return (block(x, weights),)

        return Case(call, lambda: (block(x.double(), [w.double() for w in weights]),), tolerance)
    return case


HALF, BRAIN = torch.float16, torch.bfloat16
CASES: dict[str, tuple[Callable[..., Case], list[tuple], list[tuple]]] = {
    "gram_update": (gram_update, [(63, 70), (130, 33, BRAIN)], [(2048, 576), (2048, 576, BRAIN)]),
    "cross_gram_update": (cross_gram_update, [(45, 20, 31)], [(2048, 576, 192)]),
    "column_moments": (column_moments, [(63, 70)], [(8192, 576)]),
    "select_mask": (select_mask, [(5, 71, "row"), (9, 33, "matrix")], [(576, 1536, "row", False)]),
    "nm_mask": (nm_mask, [(7, 64, 2, 4), (3, 40, 4, 8)], [(576, 1536, 2, 4, False)]),
    "compress_24": (compress_24, [(32, 64, BRAIN), (64, 32, HALF)], [(576, 1536, BRAIN)]),
    "expand_24": (expand_24, [(32, 64, BRAIN), (64, 32, HALF)], [(576, 1536, BRAIN)]),
    "obs_sweep": (obs_sweep, [(7, 37), (9, 40, (2, 4))], [(576, 128), (576, 128, (2, 4))]),
    "trailing_update": (trailing_update, [(13, 30, 7), (50, 61, 33)], [(576, 448, 128), (1536, 1024, 128)]),
    "cholesky": (cholesky, [(3, 17, True), (1, 150)], [(64, 64), (1, 576)]),
    "cholesky_solve": (cholesky_solve, [(3, 17, 2), (1, 150, 5)], [(64, 64, 64), (1, 576, 192)]),
    "liar_update": (liar_update, [(13, 40, 27)], [(576, 1536, 768)]),
    "linear": (linear, [(7, 20, 13), (100, 33, 50)], [(2048, 1536, 576), (2048, 576, 1536), (512, 192, 576)]),
    "forward_float32": (_forward(torch.float32, 1e-5), [(2, 150, 48, 80, 6, 2)], [(2, 512, 576, 1536, 9, 3)]),
    "forward_bfloat16": (_forward(torch.bfloat16, 2e-2), [(2, 150, 48, 80, 6, 2)], [(2, 512, 576, 1536, 9, 3)]),
}
"""Op → how a case is made, the sizes it is checked on, the sizes it is timed on."""


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
        for size in sizes:
            case = make(device, *size)
            first, second = case.call(implementation), case.call(implementation)
            worst = max(worst, _compare(first, case.want(), case.tolerance))
            if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second)):
                raise Broken("two calls on the same inputs gave different bits")
    finally:
        torch.use_deterministic_algorithms(False)
    return worst


def _seconds(case: Case, implementation: Callable, device) -> float:
    """Wall time; of a single thread CPU time, which other programs hardly change."""
    clock = time.thread_time if torch.get_num_threads() == 1 and device == "cpu" else time.perf_counter
    start = clock()
    case.call(implementation)
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - start


def times(op: str, implementations: dict[str, Callable], device, hurry: bool,
          entering: Callable[[str], None]) -> dict[str, list[float]]:
    """Candidate → its best seconds at every size; candidates take turns, so that a busy moment hits all of them."""
    make, _, sizes = CASES[op]
    found: dict[str, list[float]] = {name: [] for name in implementations}
    for size in sizes:
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
            found[name].append(spent)
    return found


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
