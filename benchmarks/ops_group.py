"""Every op on every back-end that is usable here, beside PyTorch, at the sizes of a preset.

Cases come from the ops' own trials (:mod:`pyprune.ops.trials`): the same inputs, and the same check against float64,
which says whether a row is green or red. The baselines are PyTorch's: ``eager`` is the shortest eager code for the same
result, ``compile`` the same through ``torch.compile``, where it compiles.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from benchmarks.rows import Row, against, bounded
from benchmarks.timing import Clock, take_turns
from pyprune import ops
from pyprune.config import ConfigError
from pyprune.ops import classes, reference, trials
from pyprune.ops.packed import Packed, unpack_bitmask

BRAIN, HALF = torch.bfloat16, torch.float16
SKIPPED = ("forward_float32", "forward_bfloat16")
"""Trials of whole blocks; the pruning group measures these."""
FULL: dict[str, dict[str, list[tuple]]] = {
    "cpu": {
        "gram_update/float32": [(16384, 576), (16384, 1536)],
        "gram_update/16-bit": [(16384, 1536, BRAIN)],
        "gram_update/16-bit-wide": [(8192, 4096, BRAIN)],
        "cross_gram_update/float32": [(8192, 1536, 576)],
        "column_moments": [(16384, 576), (16384, 4096)],
        "select_mask/row": [(576, 1536, "row", False), (4096, 4096, "row", False)],
        "select_mask/matrix": [(1536, 576, "matrix", False), (4096, 4096, "matrix", False)],
        "nm_mask": [(576, 1536, 2, 4), (4096, 4096, 2, 4), (4096, 4096, 4, 8)],
        "compress_24": [(4096, 4096, BRAIN)],
        "expand_24": [(4096, 4096, BRAIN)],
        "obs_sweep": [(576, 128), (4096, 128), (4096, 128, (2, 4))],
        "trailing_update": [(4096, 3968, 128)],
        "cholesky/small": [(256, 64)],
        "cholesky/large": [(1, 1536)],
        "cholesky_solve/small": [(256, 64, 1), (256, 64, 64)],
        "cholesky_solve/large": [(1, 1536, 576)],
        "liar_update": [(576, 1536, 768), (4096, 4096, 2048)],
        "linear/few-rows": [(1, 1536, 576), (16, 4096, 4096)],
        "linear/rows": [(4096, 1536, 576), (4096, 576, 1536), (4096, 576, 576)],
        "linear/rows-wide": [(2048, 4096, 4096)],
        "sparse_linear/one-token": [(1, 4096, 4096, BRAIN), (1, 4096, 4096)],
        "sparse_linear/few-tokens": [(4, 4096, 4096, BRAIN), (16, 4096, 4096, BRAIN)],
        "sparse_linear/tokens": [(512, 4096, 4096, BRAIN)],
        "rms_norm/float32": [(4096, 576)],
        "rms_norm/16-bit": [(4096, 576, BRAIN), (4096, 4096, BRAIN)],
        "rotary/float32": [(8, 9, 512, 64)],
        "rotary/16-bit": [(8, 9, 512, 64, BRAIN)],
        "swiglu/float32": [(4096, 1536)],
        "swiglu/16-bit": [(4096, 1536, BRAIN)],
        "attention/float32": [(4, 9, 3, 512, 64, torch.float32), (1, 32, 8, 2048, 128, torch.float32)],
        "attention/16-bit": [(4, 9, 3, 512, 64, BRAIN), (1, 32, 8, 2048, 128, BRAIN)],
    },
    "cuda": {
        "gram_update/float32": [(16384, 4096)],
        "gram_update/16-bit": [(16384, 768, BRAIN), (16384, 1536, BRAIN)],
        "gram_update/16-bit-wide": [
            (16384, 3072, BRAIN),
            (16384, 4096, BRAIN),
            (16384, 8192, BRAIN),
            (16384, 11008, BRAIN),
            (8192, 28672, BRAIN),
        ],
        "cross_gram_update/16-bit": [(16384, 4096, 4096, BRAIN)],
        "column_moments": [(16384, 768), (16384, 4096), (16384, 11008)],
        "select_mask/row": [(768, 768, "row", False), (4096, 11008, "row", False), (8192, 28672, "row", False)],
        "nm_mask": [(4096, 11008, 2, 4), (8192, 28672, 2, 4), (4096, 11008, 4, 8)],
        "compress_24": [(11008, 4096, BRAIN)],
        "expand_24": [(11008, 4096, BRAIN)],
        "obs_sweep": [
            *((rows, 128, *nm) for rows in (768, 4096, 12288, 22016) for nm in ((), ((2, 4),))),
            (4096, 128, (4, 8)),
            (4096, 128, (1, 2)),
        ],
        "cholesky/small": [(256, 64), (64, 128)],
        "cholesky/large": [(4, 1024), (64, 1024)],
        "cholesky_solve/small": [(512, 32, 64), (144, 64, 768), (64, 128, 128)],
        "cholesky_solve/medium": [(64, 256, 256), (16, 512, 512)],
        "cholesky_solve/large": [(8, 1024, 1024), (2, 2048, 2048), (1, 5504, 4096)],
        "liar_update": [(768, 3072, 2151), (4096, 11008, 7706)],
        "rms_norm/16-bit": [(16384, 768, BRAIN), (16384, 4096, BRAIN), (524288, 128, BRAIN)],
        "rotary/16-bit": [(8, 32, 2048, 128, BRAIN), (8, 8, 2048, 128, BRAIN)],
        "swiglu/16-bit": [(16384, 11008, BRAIN)],
    },
}
"""The sizes of the preset ``full``, of SmolLM2 and a little more on a CPU, of LLaMA-2-7B and 70B on a GPU; where an op
has none, those that its trials are timed on."""


def gram_work(tokens, c, dtype=torch.float32):
    return tokens * c * (c + 1), tokens * c * dtype.itemsize + 4 * c * c


def cross_gram_work(tokens, cy, cx, dtype=torch.float32):
    return 2 * tokens * cy * cx, tokens * (cy + cx) * dtype.itemsize + 8 * cy * cx


def selection_work(rows, columns, scope, apply=True):
    return 0, (9 if apply else 5) * rows * columns


def nm_work(rows, columns, n, m, apply=True):
    return 0, (9 if apply else 5) * rows * columns


def cholesky_work(batch, n, *_):
    return batch * n**3 / 3, 8 * batch * n * n


def solve_work(batch, n, k):
    return batch * (n**3 / 3 + 2 * n * n * k), 4 * batch * (n * n + 2 * n * k)


def packed_work(rows, columns, dtype, *_):
    return 0, rows * columns * dtype.itemsize * 25 // 16


def sparse_work(tokens, out, into, dtype=torch.float32):
    """Half of the weights are stored."""
    weight = out * into * (dtype.itemsize / 2 + 1 / 8)
    return 2 * tokens * out * into, weight + tokens * (out + into) * dtype.itemsize


def attention_work(
    batch: int, heads: int, groups: int, tokens: int, width: int, dtype: torch.dtype, causal: bool = True
) -> tuple[float, float]:
    pairs = tokens * (tokens + 1) / 2 if causal else tokens**2
    return 4 * batch * heads * pairs * width, 2 * batch * tokens * (heads + groups) * width * dtype.itemsize


WORK: dict[str, Callable[..., tuple[float, float]]] = {
    "gram_update": gram_work,
    "cross_gram_update": cross_gram_work,
    "column_moments": lambda tokens, c: (0, 4 * tokens * c),
    "select_mask": selection_work,
    "nm_mask": nm_work,
    "compress_24": packed_work,
    "expand_24": packed_work,
    "obs_sweep": lambda rows, columns, nm=None: (rows * columns**2, 13 * rows * columns),
    "trailing_update": lambda rows, n, depth: (2 * rows * n * depth, 4 * (2 * rows * n + (rows + n) * depth)),
    "cholesky": cholesky_work,
    "cholesky_solve": solve_work,
    "liar_update": lambda r, c, k: (2 * r * k * (c - k), 4 * (r * c + k * (c - k) + r * k)),
    "linear": lambda rows, out, into: (2 * rows * out * into, 4 * (rows * into + out * into + rows * out)),
    "sparse_linear": sparse_work,
    "rms_norm": lambda rows, c, dtype=torch.float32, form="": (4 * rows * c, 2 * rows * c * dtype.itemsize),
    "rotary": lambda b, h, t, d, dtype=torch.float32: (3 * b * h * t * d, 2 * (h + 1) * b * t * d * dtype.itemsize),
    "swiglu": lambda rows, c, dtype=torch.float32: (5 * rows * c, 3 * rows * c * dtype.itemsize),
    "attention": attention_work,
}
"""Op → floating-point operations and bytes of a case, from the size that its trial takes."""


def full_gram(gram: Tensor, x: Tensor, *, sums: Tensor | None = None, count: Tensor | None = None) -> None:
    """What SparseGPT's scripts do: float32 inputs, the whole square."""
    wide = x.float()
    gram += wide.T @ wide
    if sums is not None:
        sums += wide.sum(0)
    if count is not None:
        count += len(x)


def sorted_mask(w: Tensor, k: int, *, scale: Tensor, scope: str = "row", apply: bool = False) -> Tensor:
    """What Wanda's scripts do: a full sort."""
    score = w.abs() * scale
    if scope == "row":
        drop = torch.sort(score, dim=1, stable=True).indices[:, :k]
        mask = torch.ones_like(w, dtype=torch.bool).scatter_(1, drop, False)
    else:
        drop = torch.sort(score.flatten(), stable=True).indices[:k]
        mask = torch.ones(w.numel(), dtype=torch.bool, device=w.device).scatter_(0, drop, False).view(w.shape)
    if apply:
        w.masked_fill_(~mask, 0)
    return mask


def topk_mask(w: Tensor, n: int, m: int, *, scale: Tensor, apply: bool = False) -> Tensor:
    """What the scripts do for all groups at once: the smallest of each by topk, scattered."""
    score = (w.abs() * scale).view(-1, m)
    drop = score.topk(m - n, dim=1, largest=False).indices
    mask = torch.ones_like(score, dtype=torch.bool).scatter_(1, drop, False).view(w.shape)
    if apply:
        w.masked_fill_(~mask, 0)
    return mask


_dense: WeakKeyDictionary[Packed, Tensor] = WeakKeyDictionary()


def dense_product(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The dense layer that the packed one stands for; the first call, which does not count, unpacks its weight."""
    if packed not in _dense:
        _dense[packed] = unpack_bitmask(packed)
    return torch.nn.functional.linear(x, _dense[packed], bias)


EAGER: dict[str, Callable] = {
    "gram_update": full_gram,
    "select_mask": sorted_mask,
    "nm_mask": topk_mask,
    "sparse_linear": dense_product,
}
"""The eager code of a baseline, where it is another than the plain reference of the op, which then is a contender."""
BASELINES = ("eager", "compile")


@dataclass(frozen=True)
class Wanted:
    """What of the group a run measures."""

    device: str
    preset: str
    only: str = ""
    compile: bool = False
    backends: tuple[str, ...] = ()
    """None named: all that are usable."""


def sizes(key: str, wanted: Wanted) -> list[tuple]:
    _, checked, timed = trials.CASES[key]
    if wanted.preset == "smoke":
        return checked[-1:]
    kind = "cpu" if wanted.device == "cpu" else "cuda"
    found = timed if kind == "cpu" else trials.TIMED_ON_A_GPU.get(key, timed)
    return FULL[kind].get(key, found) if wanted.preset == "full" else found


def names() -> list[str]:
    """Ops with their classes of sizes, as ``--only`` chooses from them."""
    return [key for key in trials.CASES if key not in SKIPPED]


def cases(wanted: Wanted) -> Iterator[tuple[str, tuple]]:
    """Key and size of each case."""
    for key in names():
        if wanted.only in key:
            for size in sizes(key, wanted):
                yield key, size


def expected(wanted: Wanted) -> Iterator[tuple[str, str, str, str]]:
    """Op, shape, type and back-end of every row that will be measured."""
    for key, size in cases(wanted):
        for name in contenders(key, wanted):
            yield key, label(key, size), str(dtype_of(size))[6:], name


def dtype_of(size: tuple) -> torch.dtype:
    return next((part for part in size if isinstance(part, torch.dtype)), torch.float32)


def label(key: str, size: tuple) -> str:
    """``2048×576``, ``576×128 2:4``, ``4096×4096 row mask only``."""
    if key == "nm_mask":
        size = (*size[:2], size[2:4], *size[4:])
    numbers = "×".join(str(part) for part in size if isinstance(part, int) and not isinstance(part, bool))
    words = [part for part in size if isinstance(part, str)]
    words += [":".join(map(str, part)) for part in size if isinstance(part, tuple)]
    words += ["mask only"] if any(part is False for part in size) else []
    return " ".join([numbers, *words])


def contenders(key: str, wanted: Wanted) -> dict[str, Callable]:
    """Back-ends of ours that are usable, and the baselines."""
    op = classes.op_of(key)
    found = {
        name: ops.TABLE[name].load(op)
        for name in ops.BACKENDS
        if name != "reference"
        and (not wanted.backends or name in wanted.backends)
        and ops.TABLE[name].why_not(op, wanted.device) is None
    }
    eager = EAGER.get(op, getattr(reference, op))
    if "reference" in wanted.backends or (op in EAGER and not wanted.backends):
        found["reference"] = getattr(reference, op)
    found["eager"] = eager
    if wanted.compile:
        found["compile"] = torch.compile(eager, dynamic=False)
    return found


def check_backends(wanted: Wanted) -> None:
    """Raises ConfigError for a back-end that does not exist."""
    for name in wanted.backends:
        if name not in ops.BACKENDS:
            raise ConfigError(f"unknown back-end {name!r}; choose from {', '.join(ops.BACKENDS)}")


def check_usable(wanted: Wanted) -> None:
    """Raises ConfigError for a back-end that computes none of the ops on this machine."""
    measured = dict.fromkeys(classes.op_of(key) for key, _ in cases(wanted))
    for name in wanted.backends:
        reasons = [ops.TABLE[name].why_not(op, wanted.device) for op in measured]
        if reasons and all(reasons):
            raise ConfigError(f"back-end {name!r} computes none of these ops: {reasons[0]}")


@functools.cache
def correctness(key: str, name: str, implementation: Callable, device: str) -> str:
    """Green or red, by the op's own trial, once for all sizes."""
    if name in BASELINES:
        return "green"
    try:
        trials.check(key, implementation, device)
    except Exception as error:  # whatever a candidate raises makes it red, and only it
        return f"red: {' '.join(str(error).split())}"
    return "green"


def measure(key: str, size: tuple, wanted: Wanted, ceilings: dict[str, float], seconds: float) -> list[Row]:
    """Rows of one case, every contender's; a contender that raises is red and has no samples."""
    make = trials.CASES[key][0]
    case = make(wanted.device, *size)
    clock = Clock(wanted.device)
    flops, moved = WORK[classes.op_of(key)](*size)
    rows, calls = [], {}
    for name, implementation in contenders(key, wanted).items():
        row = Row(
            "ops",
            key,
            label(key, size),
            str(dtype_of(size))[6:],
            wanted.device,
            name,
            [],
            clock=clock.name,
            flops=flops,
            bytes=moved,
        )
        rows.append(row)
        call = _timed(case, implementation, clock)
        begun = time.perf_counter()
        try:
            call()
        except Exception as error:  # does not compile, does not take this size
            row.correct = f"red: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if wanted.device != "cpu":
            row.figures["first_call_seconds"] = time.perf_counter() - begun  # kernels are compiled and tuned in it
        row.correct = correctness(key, name, implementation, wanted.device)
        calls[name] = call
    if calls:
        taken = take_turns(calls, samples=3 if wanted.preset == "smoke" else 15, seconds=seconds)
        for row in rows:
            row.samples = taken.get(row.backend, [])
    return bounded(against(rows, "eager"), ceilings)


def _timed(case: trials.Case, implementation: Callable, clock: Clock) -> Callable[[], float]:
    """One run of a case; the seconds are those of the implementation, not of the fresh inputs it is given."""

    def call() -> float:
        spent = []

        def inner(*arguments, **options):
            out: list = []
            spent.append(clock(lambda: out.append(implementation(*arguments, **options))))
            return out[0]

        case.call(inner)
        return math.fsum(spent)

    return call


def dtypes(wanted: Wanted) -> list[torch.dtype]:
    """Types of the products that the group measures."""
    return sorted({dtype_of(size) for _, size in cases(wanted)}, key=str)


def prepare(wanted: Wanted) -> None:
    """Triton's kernels are there to be measured, in its interpreter too."""
    if "triton" in wanted.backends:
        importlib.import_module("pyprune.triton_kernels")
