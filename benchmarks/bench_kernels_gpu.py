"""Triton kernels against PyTorch on one GPU, at the shapes of LLaMA-2-7B, LLaMA-2-70B and BERT-base.

    python benchmarks/bench_kernels_gpu.py [--junit tests.xml]   # figures of each op, marked red or green

Each row: µs (median of 20, L2 flushed), the first call's seconds (compilation included), the ratio to each PyTorch
baseline of the same run, the share of the floor, and the target. The floor of a memory-bound op is its bytes over the
measured bandwidth of a copy; of a product its FLOPs over ``--peak`` TFLOP/s. A row says whether its op is right here,
by the GPU tests or by ``first_contact.py smoke`` in the same ``$OUT``; the figure of a red one is no result.
"""

from __future__ import annotations

import argparse
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from common import read, write
from cuda_kernels import copy_bandwidth, microseconds

from pyprune import ops
from pyprune.ops import reference

TARGETS = {
    "gram_update": "≥ 1.5 over addmm at c ≥ 4096, ≥ 20 over the float32 product",
    "nm_mask": "≥ 0.8 of the floor",
    "select_mask": "≥ 10 over sort",
    "cholesky_solve": "≥ 3 for n ≤ 256, ≥ 1 at n = 1024",
    "obs_sweep": "≥ 20 over the column loop",
}
TESTS = {
    "gram_update": "test_gram",
    "cross_gram_update": "test_cross_gram",
    "column_moments": "test_column_moments",
    "select_mask": "test_select_mask",
    "nm_mask": "test_nm_mask",
    "compress_24": "test_semi_structured_layout",
    "obs_sweep": "test_obs_sweep",
    "cholesky_solve": "test_cholesky",
    "liar_update": "test_liar_update",
}


def nothing() -> None:
    pass


def grams():
    """op, label, call, baselines, reset, bytes, FLOPs."""
    for tokens, c in ((16384, 768), (16384, 3072), (16384, 4096), (16384, 8192), (16384, 11008), (8192, 28672)):
        x = torch.randn(tokens, c, device="cuda", dtype=torch.bfloat16)
        gram, sums = torch.zeros(c, c, device="cuda"), torch.zeros(c, device="cuda")
        count = torch.tensor(0, device="cuda")
        baselines = {"addmm": lambda x=x, g=gram: torch.addmm(g, x.T, x, out_dtype=torch.float32)}
        if c <= 11008:
            baselines["float32 product"] = lambda x=x, g=gram: g.addmm_(x.float().T, x.float())
        yield (
            "gram_update",
            f"{tokens} × {c} bfloat16",
            lambda x=x, g=gram, s=sums, n=count: ops.gram_update(g, x, sums=s, count=n),
            baselines,
            gram.zero_,
            2 * x.numel() + 6 * c * c,
            tokens * c * c,
        )
    x = torch.randn(16384, 4096, device="cuda")
    gram = torch.zeros(4096, 4096, device="cuda")
    yield (
        "gram_update",
        "16384 × 4096 float32",
        lambda: ops.gram_update(gram, x),
        {"float32 product": lambda: gram.addmm_(x.T, x)},
        gram.zero_,
        4 * x.numel() + 6 * gram.numel(),
        3 * 16384 * 4096 * 4096,
    )
    y, z = (torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    yield (
        "cross_gram_update",
        "16384 × 4096 × 4096 bfloat16",
        lambda: ops.cross_gram_update(gram, y, z),
        {"addmm": lambda: torch.addmm(gram, y.T, z, out_dtype=torch.float32)},
        gram.zero_,
        4 * y.numel() + 8 * gram.numel(),
        2 * 16384 * 4096 * 4096,
    )


def streams():
    for tokens, c in ((16384, 768), (16384, 4096), (16384, 11008)):
        x = torch.randn(tokens, c, device="cuda", dtype=torch.bfloat16)
        yield (
            "column_moments",
            f"{tokens} × {c}",
            lambda x=x: ops.column_moments(x),
            {"var_mean": lambda x=x: torch.var_mean(x.float(), 0)},
            nothing,
            2 * x.numel(),
            0,
        )
    for rows, c in ((768, 768), (4096, 4096), (4096, 11008), (8192, 28672)):
        start = torch.randn(rows, c, device="cuda", dtype=torch.bfloat16)
        w, scale = start.clone(), torch.rand(c, device="cuda") + 0.1
        yield (
            "select_mask",
            f"{rows} × {c}, row",
            lambda w=w, s=scale, k=c // 2: ops.select_mask(w, k, scale=s),
            {"sort": lambda w=w, s=scale: torch.sort(w.float().abs() * s, dim=1, stable=True)},
            nothing,
            3 * w.numel(),
            0,
        )
        for n, m in ((2, 4), (4, 8)):
            yield (
                "nm_mask",
                f"{rows} × {c}, {n}:{m}, applied",
                lambda w=w, s=scale, n=n, m=m: ops.nm_mask(w, n, m, scale=s, apply=True),
                {"sort": lambda w=w, s=scale, n=n, m=m: reference.nm_mask(w, n, m, scale=s, apply=True)}
                if w.numel() < 2**26
                else {},
                lambda w=w, s=start: w.copy_(s),
                5 * w.numel(),
                0,
            )
    w = torch.randn(4096, 128, device="cuda")
    yield (
        "select_mask",
        "4096 × 128, matrix",
        lambda: ops.select_mask(w, w.numel() // 2, scope="matrix"),
        {"sort": lambda: torch.sort(w.abs().flatten(), stable=True)},
        nothing,
        5 * w.numel(),
        0,
    )
    pruned = torch.randn(11008, 4096, device="cuda", dtype=torch.bfloat16)
    reference.nm_mask(pruned, 2, 4, apply=True)
    yield (
        "compress_24",
        "11008 × 4096",
        lambda: ops.compress_24(pruned),
        {"torch": lambda: reference.compress_24(pruned)},
        nothing,
        pruned.numel() * 25 // 8,
        0,
    )


def solvers():
    for rows in (768, 4096, 12288, 22016):
        start = torch.randn(rows, 128, device="cuda")
        x = torch.randn(1024, 128, device="cuda")
        h = x.T @ x / 1024 + 0.01 * torch.eye(128, device="cuda")
        r = torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous()
        for label, choice in {"mask": {"mask": start > 0}, "2:4": {"nm": (2, 4)}}.items():
            w = start.clone()
            yield (
                "obs_sweep",
                f"{rows} × 128, {label}",
                lambda w=w, r=r, c=choice: ops.obs_sweep(w, r, **c),
                {"column loop": lambda w=w, r=r, c=choice: reference.obs_sweep(w, r, **c)},
                lambda w=w, s=start: w.copy_(s),
                13 * start.numel(),
                0,
            )
    for batch, n, k in (
        (512, 32, 64),
        (144, 64, 768),
        (64, 128, 128),
        (64, 256, 256),
        (16, 512, 512),
        (8, 1024, 1024),
        (2, 2048, 2048),
    ):
        x = torch.randn(batch, 2 * n, n, device="cuda")
        a, b = x.mT @ x / (2 * n), torch.randn(batch, n, k, device="cuda")
        yield (
            "cholesky_solve",
            f"{batch} × {n}, {k} right-hand sides",
            lambda a=a, b=b: ops.cholesky_solve(a, b),
            {"torch": lambda a=a, b=b: torch.cholesky_solve(b, torch.linalg.cholesky(a))},
            nothing,
            4 * batch * (2 * n * n + 2 * n * k),
            0,
        )
    for r, c, d in ((768, 3072, 921), (4096, 11008, 3302)):
        weight = torch.randn(r, c, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(c, device="cuda")
        drop, keep = order[:d].sort().values, order[d:].sort().values
        arguments = weight, keep, drop, torch.randn(c - d, d, device="cuda")
        more = dict(bias=torch.randn(r, device="cuda"), mean=torch.randn(c, device="cuda"))
        yield (
            "liar_update",
            f"{r} × {c}, {d} dropped",
            lambda a=arguments, m=more: ops.liar_update(*a, **m),
            {"torch": lambda a=arguments, m=more: reference.liar_update(*a, **m)},
            nothing,
            0,
            2 * r * d * (c - d),
        )


def colours(name: str, junit: Path | None, tests: dict[str, str]) -> dict[str, str]:
    """Op → green, or red with what failed, for a back-end, by its GPU tests and the smoke calls, as far as known."""
    found: dict[str, str] = {}
    for row in read("smoke"):
        op = row["op"].split("/")[0]
        if name in row["failed"]:
            found[op] = f"red: {row['failed'][name]}"
        elif name in row["errors"]:
            found.setdefault(op, "green")
    for case in ElementTree.parse(junit).iter("testcase") if junit and junit.is_file() else ():
        failed = case.find("failure") is not None or case.find("error") is not None
        for op, begins in tests.items():
            if failed and case.get("name", "").startswith(begins):
                found[op] = f"red: {case.get('name')}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, help="report of tests/ops/test_triton_gpu.py")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--peak", type=float, default=800, help="bfloat16 TFLOP/s of the chip, the floor of products")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU")
    colour = colours("triton", options.junit, TESTS)
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for source in (grams, streams, solvers):
        for op, label, call, baselines, reset, size, flops in source():
            if options.only not in op:
                continue
            row = {"op": op, "shape": label, "target": TARGETS.get(op), "tests": colour.get(op, "not known")}
            rows.append(row)
            try:
                with ops.backend("triton"):
                    reset()
                    begun = time.perf_counter()
                    call()
                    torch.cuda.synchronize()
                    row["first_call_s"] = round(time.perf_counter() - begun, 3)
                    row["us"] = [round(t, 1) for t in microseconds(call, reset)]
            except (RuntimeError, ValueError) as error:
                row["failed"] = f"{type(error).__name__}: {error}"
                print(f"{op:18} {label:36} {row['failed']}", flush=True)
                continue
            own = row["us"][1]
            floor = max(size / bandwidth, flops / (options.peak * 1e12)) * 1e6
            row["share_of_floor"] = round(floor / own, 3)
            for name, baseline in baselines.items():
                try:
                    row[f"{name}_us"] = round(microseconds(baseline, reset)[1], 1)
                    row[f"ratio_to_{name}"] = round(row[f"{name}_us"] / own, 2)
                except RuntimeError as error:  # out of memory, or an argument this torch does not have
                    row[f"{name}_error"] = str(error).splitlines()[0]
                    torch.cuda.empty_cache()
            ratios = {key[9:]: row[key] for key in row if key.startswith("ratio_to_")}
            print(
                f"{op:18} {label:36} {own:10.1f} µs  floor {row['share_of_floor']:6.1%}  {ratios}  "
                f"first call {row['first_call_s']} s  {row['tests']}",
                flush=True,
            )
            write("triton_kernels", rows, copy_gb_s=round(bandwidth / 1e9), peak_tflops=options.peak)
    print(write("triton_kernels", rows, copy_gb_s=round(bandwidth / 1e9), peak_tflops=options.peak))


if __name__ == "__main__":
    main()
