"""CPU ops against PyTorch code for the same result: milliseconds, ratio, and the share of the floor reached.

    python benchmarks/bench_ops_cpu.py [--only sweep] [--out DIR]     # table and JSON; calls take turns
    python benchmarks/bench_ops_cpu.py --isa own avx2                 # the same table for several instruction sets
    pytest benchmarks/bench_ops_cpu.py --benchmark-group-by=group     # pytest-benchmark's own statistics

Every case is checked first: no figure over a wrong result. The floor is the larger of FLOPs over what the register tile
sustains from the first-level cache and bytes over what a copy of 128 MB moves, both measured in the same run; a case
that fits the third-level cache may beat the latter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from common import fastest, write  # noqa: E402

from pyprune import ops  # noqa: E402
from pyprune.masks.solvers import Factor, obs_prune  # noqa: E402
from pyprune.ops import native  # noqa: E402
from pyprune.ops.packed import pack_bitmask  # noqa: E402

ISAS = {
    "own": {},
    "avx2": dict(
        PYPRUNE_ISA="avx2", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"
    ),
}
"""What makes our kernels and PyTorch's keep to an instruction set; ``own`` is all that the processor has."""


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[[], Tensor]
    baseline: Callable[[], Tensor]
    target: float
    """Ratio asked for."""
    flops: float = 0
    bytes: float = 0
    tolerance: float = 1e-4
    """Largest relative Frobenius distance of the two results (masks: share of entries that differ)."""
    bf16: bool = False
    """FLOPs are bfloat16 products."""


def gram(dtype: torch.dtype) -> Case:
    tokens, c = 16384, 1536
    x, out = torch.randn(tokens, c).to(dtype), torch.zeros(c, c)
    x32 = x.float()

    def ours():
        ops.gram_update(out.zero_(), x)
        return out

    bf16 = dtype == torch.bfloat16
    return Case(
        f"gram_update {tokens}×{c} {str(dtype)[6:]} (baseline: float32 X.T @ X)",
        ours,
        lambda: x32.T @ x32,
        5 if bf16 else 1.6,
        flops=tokens * c * (c + 1),
        bytes=x.nbytes + out.nbytes,
        bf16=bf16,
    )


def published_sweep(w: Tensor, r: Tensor, nm: tuple[int, int] | None) -> Tensor:
    """SparseGPT's column loop in PyTorch, 50 % per block of 128 columns or N:M; about a dozen launches per column."""
    w = w.clone()
    for start in range(0, w.shape[1], 128):
        block, rb = w[:, start : start + 128].clone(), r[start : start + 128, start : start + 128]
        errors, swept = torch.zeros_like(block), torch.zeros_like(block)
        drop = torch.zeros_like(block, dtype=torch.bool)
        if nm is None:
            score = block**2 / rb.diagonal() ** 2
            drop = score <= score.flatten().sort().values[score.numel() // 2 - 1]
        for j in range(block.shape[1]):
            if nm and j % nm[1] == 0:
                score = block[:, j : j + nm[1]] ** 2 / rb.diagonal()[j : j + nm[1]] ** 2
                drop.scatter_(1, j + score.topk(nm[1] - nm[0], dim=1, largest=False).indices, True)
            column = block[:, j]
            kept = column.clone()
            kept[drop[:, j]] = 0
            swept[:, j] = kept
            error = (column - kept) / rb[j, j]
            block[:, j:] -= error.unsqueeze(1).matmul(rb[j, j:].unsqueeze(0))
            errors[:, j] = error
        w[:, start : start + 128] = swept
        w[:, start + 128 :] -= errors.matmul(r[start : start + 128, start + 128 :])
    return w


def sweep(rows: int, c: int, nm: tuple[int, int] | None) -> Case:
    w, x = torch.randn(rows, c), torch.randn(2 * c, c)
    h = x.T @ x / len(x) + 0.01 * torch.eye(c)
    r = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    factor = Factor(r, torch.zeros(c, dtype=torch.bool), 0.01)

    def ours():
        result = w.clone()
        obs_prune(result, factor, **({"nm": nm} if nm else {"sparsity": 0.5}))
        return result

    return Case(
        f"OBS sweep of a {rows}×{c} matrix, {'2:4' if nm else '50 %'}",
        ours,
        lambda: published_sweep(w, r, nm),
        10,
        flops=rows * c * c,
        bytes=2 * w.nbytes,
        tolerance=0.02,
    )


def row_mask(rows: int, c: int) -> Case:
    w, norm = torch.randn(rows, c), torch.rand(c) + 0.1

    def baseline():
        order = (w.abs() * norm).sort(dim=1).indices
        return torch.ones_like(w, dtype=torch.bool).scatter_(1, order[:, : c // 2], False)

    return Case(
        f"Wanda row mask {rows}×{c}",
        lambda: ops.select_mask(w, c // 2, scale=norm),
        baseline,
        5,
        bytes=5 * w.numel(),
        tolerance=0,
    )


def matrix_mask(rows: int, c: int) -> Case:
    w = torch.randn(rows, c)
    k = w.numel() // 2
    return Case(
        f"magnitude mask of a whole {rows}×{c}",
        lambda: ops.select_mask(w, k, scope="matrix"),
        lambda: w.abs() > w.abs().flatten().sort().values[k - 1],
        5,
        bytes=5 * w.numel(),
        tolerance=1e-6,
    )


def nm(rows: int, c: int) -> Case:
    w, norm = torch.randn(rows, c), torch.rand(c) + 0.1

    def baseline():
        index = (w.abs() * norm).view(-1, 4).topk(2, dim=1, largest=False).indices
        return w.view(-1, 4).scatter(1, index, 0).view_as(w)

    work = w.clone()

    def ours():
        work.copy_(w)
        ops.nm_mask(work, 2, 4, scale=norm, apply=True)
        return work

    # both include the copy that keeps w; the kernel's own read of w, write of w and mask, and the look for NaN
    return Case(f"2:4 mask and apply {rows}×{c}", ours, baseline, 5, bytes=(8 + 4 + 9) * w.numel(), tolerance=0)


def solve(batch: int, n: int, k: int) -> Case:
    x = torch.randn(batch, n, 2 * n)
    a, b = x @ x.mT / n + 0.1 * torch.eye(n), torch.randn(batch, n, k)
    return Case(
        f"Cholesky solve, {batch} systems of n = {n}, {k} right-hand sides",
        lambda: ops.cholesky_solve(a, b)[0],
        lambda: torch.cholesky_solve(b, torch.linalg.cholesky_ex(a)[0]),
        3,
        flops=batch * (n**3 / 3 + 2 * n * n * k),
        bytes=a.nbytes + 2 * b.nbytes,
        tolerance=1e-3,
    )


def linear(rows: int, inputs: int, outputs: int) -> Case:
    x, w, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    return Case(
        f"linear {rows}×{inputs}→{outputs} float32",
        lambda: ops.linear(x, w, bias),
        lambda: functional.linear(x, w, bias),
        1.3,
        flops=2 * rows * inputs * outputs,
        bytes=4 * (rows * inputs + inputs * outputs + rows * outputs),
    )


def attention(batch: int, heads: int, groups: int, tokens: int, width: int, dtype: torch.dtype) -> Case:
    """Causal."""
    q, k, v = (torch.randn(batch, tokens, n, width).to(dtype).transpose(1, 2) for n in (heads, groups, groups))
    return Case(
        f"attention {batch}×{tokens}, {heads} heads on {groups} of {width}, {str(dtype)[6:]}",
        lambda: ops.attention(q, k, v, causal=True).flatten(0, 2),
        lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).flatten(0, 2),
        1.5,
        flops=2 * batch * heads * tokens * (tokens + 1) * width,
        bytes=2 * q.nbytes + 2 * k.nbytes,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        bf16=dtype == torch.bfloat16,
    )


def moments(tokens: int, c: int) -> Case:
    x = torch.randn(tokens, c)
    return Case(
        f"column_moments {tokens}×{c}",
        lambda: ops.column_moments(x)[2],
        lambda: torch.var_mean(x, 0, correction=0)[0] * tokens,
        1,
        bytes=x.nbytes,
    )


def compress(rows: int, c: int) -> Case:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as convert

    w = torch.randn(rows, c).bfloat16()
    ops.nm_mask(w, 2, 4, apply=True)
    return Case(
        f"compress_24 {rows}×{c} bfloat16",
        lambda: ops.compress_24(w)[1],
        lambda: convert(w)[1],
        1,
        bytes=w.nbytes * 1.625,
        tolerance=0,
    )


def packed(size: int, sparsity: float, dtype: torch.dtype) -> Case:
    """One token. The dense product is PyTorch's in bfloat16, its weights and the packed ones used in rotation, so that
    they come from memory."""
    w, x = torch.randn(size, size), torch.randn(1, size)
    ops.select_mask(w, int(sparsity * size), apply=True)
    first = pack_bitmask(w.to(dtype))
    turns = itertools.cycle([first] + [pack_bitmask(w.to(dtype)) for _ in range(5)])
    dense = itertools.cycle([w.bfloat16() for _ in range(4)])
    own, theirs = x.to(dtype), x.bfloat16()
    return Case(
        f"sparse_linear {size}×{size}, {sparsity:.0%} {str(dtype)[6:]} (baseline: dense bfloat16)",
        lambda: ops.sparse_linear(own, next(turns)),
        lambda: functional.linear(theirs, next(dense)),
        {0.5: 1.4, 0.7: 2.0}[sparsity],
        flops=2 * len(first.values),
        bytes=first.nbytes,
        tolerance=1e-2,  # both in bfloat16
        bf16=dtype == torch.bfloat16,
    )


CASES = {
    "gram float32": lambda: gram(torch.float32),
    "gram bfloat16": lambda: gram(torch.bfloat16),
    "linear up": lambda: linear(4096, 576, 1536),
    "linear down": lambda: linear(4096, 1536, 576),
    "linear square": lambda: linear(4096, 576, 576),
    "attention float32": lambda: attention(4, 9, 3, 512, 64, torch.float32),
    "attention bfloat16": lambda: attention(4, 9, 3, 512, 64, torch.bfloat16),
    "sweep 576x1536 50%": lambda: sweep(576, 1536, None),
    "sweep 576x1536 2:4": lambda: sweep(576, 1536, (2, 4)),
    "sweep 4096x4096 50%": lambda: sweep(4096, 4096, None),
    "sweep 4096x4096 2:4": lambda: sweep(4096, 4096, (2, 4)),
    "row mask small": lambda: row_mask(576, 1536),
    "row mask large": lambda: row_mask(4096, 4096),
    "matrix mask": lambda: matrix_mask(1536, 576),
    "nm small": lambda: nm(576, 1536),
    "nm large": lambda: nm(4096, 4096),
    "solve 256x64": lambda: solve(256, 64, 1),
    "solve 256x64 wide": lambda: solve(256, 64, 64),
    "moments": lambda: moments(16384, 576),
    "compress": lambda: compress(4096, 4096),
    "packed 4096 50%": lambda: packed(4096, 0.5, torch.bfloat16),
    "packed 4096 70%": lambda: packed(4096, 0.7, torch.bfloat16),
}


def check(case: Case) -> None:
    """The two results agree, or there is nothing to compare the speed of."""
    found, truth = case.ours(), case.baseline()
    if truth.dtype in (torch.bool, torch.int16):
        distance = float((found != truth).double().mean())
    else:
        distance = float((found.double() - truth.double()).norm() / truth.double().norm())
    if distance > case.tolerance:
        raise AssertionError(f"{case.name}: results differ by {distance:.1e}, more than {case.tolerance:.0e}")


def raise_ceilings(ceiling: dict[str, float]) -> None:
    """FLOP/s of the register tile (float32, bfloat16) and bytes/s of a large copy; the best seen so far counts."""
    threads, done = torch.get_num_threads(), {}
    source = torch.zeros(2**25)
    target = torch.empty_like(source)
    calls = {
        "float32": lambda: done.update(float32=native._C.cpu_tile_flops(False, 3000, threads)),
        "bfloat16": lambda: done.update(bfloat16=native._C.cpu_tile_flops(True, 3000, threads)),
        "copy": lambda: target.copy_(source),
    }
    best = fastest(calls, repeats=6)
    done["copy"] = 2 * source.nbytes
    for name, amount in done.items():
        ceiling[name] = max(ceiling.get(name, 0), amount / best[name])


@torch.no_grad()
def measure(case: Case) -> dict:
    check(case)
    best = fastest({"ours": case.ours, "baseline": case.baseline}, repeats=9, seconds=12)
    return {
        "op": case.name,
        "ours_ms": best["ours"] * 1e3,
        "baseline_ms": best["baseline"] * 1e3,
        "ratio": best["baseline"] / best["ours"],
        "target": case.target,
        "gflops": case.flops / best["ours"] / 1e9,
        "gbytes_per_s": case.bytes / best["ours"] / 1e9,
    }


def add_floor(row: dict, flops: float, moved: float, bf16: bool, ceiling: dict[str, float]) -> None:
    """After all cases, with the best ceilings of the whole run: a busy moment must not lower a floor."""
    compute, memory = flops / ceiling["bfloat16" if bf16 else "float32"], moved / ceiling["copy"]
    row["floor_ms"], row["floor_is"] = max((compute * 1e3, "FLOPs"), (memory * 1e3, "bytes"))
    row["share_of_floor"] = row["floor_ms"] / row["ours_ms"]


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("name", [name for name in CASES if "4096" not in name])
def test_cpu_ops(benchmark, name, side):
    torch.manual_seed(0)
    case = CASES[name]()
    check(case)
    benchmark.group = case.name
    benchmark.pedantic(getattr(case, side), rounds=5, warmup_rounds=1)


def side_by_side(isas: list[str], only: str, out: str | None) -> None:
    """The table once per instruction set, each measured by a process of its own, and the ratios beside each other."""
    found: dict[str, dict] = {}
    for isa in isas:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--only", only, "--out", folder]
            subprocess.run(command, env={**os.environ, **ISAS[isa]}, check=True, stdout=subprocess.DEVNULL)
            [path] = Path(folder).glob("*.json")
            found[isa] = json.loads(path.read_text())
    tables = {isa: {row["op"]: row for row in kept["rows"]} for isa, kept in found.items()}
    print(f"{'times as fast as PyTorch, share of the floor':72} " + " ".join(f"{isa:>16}" for isa in isas))
    for op in tables[isas[0]]:
        shown = (f"{tables[isa][op]['ratio']:8.2f}× {tables[isa][op]['share_of_floor']:6.0%}" for isa in isas)
        print(f"{op:72} " + " ".join(shown))
    rows = [{"isa": isa, **row} for isa in isas for row in tables[isa].values()]
    ceilings = {isa: kept["ceilings"] for isa, kept in found.items()}
    write("bench_ops_cpu_isa", rows, out, ceilings=ceilings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", help="folder of the JSON file; default $OUT or benchmarks/results")
    parser.add_argument("--isa", nargs="+", choices=ISAS, help="instruction sets to compare, each in its own process")
    options = parser.parse_args()
    if options.isa:
        side_by_side(options.isa, options.only, options.out)
        return
    if (reason := native.unusable("cpu")) is not None:
        sys.exit(reason)
    torch.manual_seed(0)
    ceiling: dict[str, float] = {}
    measured = []
    for name, build in CASES.items():
        if options.only in name:
            raise_ceilings(ceiling)
            case = build()
            row = measure(case)
            measured.append((row, case.flops, case.bytes, case.bf16))
            print(f"{row['op']:72} {row['ratio']:6.1f}×", file=sys.stderr, flush=True)
    print(
        ", ".join(f"{name} {value / 1e9:.0f} G{'B' if name == 'copy' else 'FLOP'}/s" for name, value in ceiling.items())
    )
    for row, *work in measured:
        add_floor(row, *work, ceiling)
        print(
            f"{row['op']:72} {row['ours_ms']:9.2f} ms {row['baseline_ms']:9.2f} ms  {row['ratio']:6.1f}× "
            f"(asked {row['target']:g}×)  floor {row['floor_ms']:8.2f} ms of {row['floor_is']}, "
            f"{row['share_of_floor']:4.0%}"
        )
    rows = [row for row, *_ in measured]
    write("bench_ops_cpu" if not options.only else "bench_ops_cpu_part", rows, options.out, ceilings=ceiling)


if __name__ == "__main__":
    main()
