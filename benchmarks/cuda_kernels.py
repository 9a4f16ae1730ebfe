"""CUDA kernels against PyTorch on one GPU: µs, GB/s or GFLOP/s, share of the floor, ratio to the baseline of that run.

    python benchmarks/cuda_kernels.py [--only obs_sweep]     # a row says whether its op is right here, by `smoke`

The L2 is flushed before every repetition, the median of 20 is reported, with the quartiles. The floor of a memory-bound
op is its bytes over the bandwidth that a copy of 1 GiB reaches in the same run; the sweep's and the factorisation's
floor is their FLOPs over 60 TFLOP/s of float32 (an H100's; printed as a share only).
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import read, write

from pyprune import ops
from pyprune.ops import reference

REPEATS = 20
FLOAT32_RATE = 60e12
_flush = None


def microseconds(call, reset=lambda: None) -> tuple[float, float, float]:
    """Quartiles of the device time of ``call``; ``reset`` runs before each repetition, untimed."""
    global _flush
    _flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda") if _flush is None else _flush
    times = []
    for i in range(REPEATS + 3):
        reset()
        _flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3)
    return tuple(torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist())


def copy_bandwidth() -> float:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (microseconds(lambda: b.copy_(a))[1] * 1e-6)


def sweeps():
    for rows in (4096, 12288, 22016):
        start = torch.randn(rows, 128, device="cuda")
        x = torch.randn(1024, 128, device="cuda")
        h = x.T @ x / 1024 + 0.01 * torch.eye(128, device="cuda")
        r = torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous()
        for label, choice in {
            "mask": {"mask": start > 0},
            "2:4": {"nm": (2, 4)},
            "4:8": {"nm": (4, 8)},
            "1:2, general kernel": {"nm": (1, 2)},
            "k, with selection": {"k": rows * 64},
        }.items():
            w = start.clone()
            yield (
                "obs_sweep",
                f"{rows} × 128, {label}",
                lambda w=w, r=r, c=choice: ops.obs_sweep(w, r, **c),
                lambda w=w, r=r, c=choice: reference.obs_sweep(w, r, **c),
                lambda w=w, s=start: w.copy_(s),
                13 * start.numel(),
                rows * 128 * 128,
            )


def selections():
    for scope, rows, columns in (
        ("row", 4096, 4096),
        ("row", 11008, 4096),
        ("matrix", 4096, 128),
        ("matrix", 4096, 4096),
    ):
        w = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        scale = torch.rand(columns, device="cuda")
        k = columns // 2 if scope == "row" else w.numel() // 2
        yield (
            "select_mask",
            f"{rows} × {columns}, {scope}",
            lambda w=w, s=scale, k=k, a=scope: ops.select_mask(w, k, scale=s, scope=a),
            lambda w=w, s=scale, k=k, a=scope: reference.select_mask(w, k, scale=s, scope=a),
            lambda: None,
            3 * w.numel(),
            0,
        )


def groups():
    for n, m in ((2, 4), (4, 8)):
        start = torch.randn(11008, 4096, device="cuda", dtype=torch.bfloat16)
        w, scale = start.clone(), torch.rand(4096, device="cuda")
        yield (
            "nm_mask",
            f"11008 × 4096, {n}:{m}, applied",
            lambda w=w, s=scale, n=n, m=m: ops.nm_mask(w, n, m, scale=s, apply=True),
            lambda w=w, s=scale, n=n, m=m: reference.nm_mask(w, n, m, scale=s, apply=True),
            lambda w=w, s=start: w.copy_(s),
            5 * w.numel(),
            0,
        )
    sparse = start.clone()
    reference.nm_mask(sparse, 2, 4, apply=True)
    yield (
        "compress_24",
        "11008 × 4096",
        lambda: ops.compress_24(sparse),
        lambda: reference.compress_24(sparse),
        lambda: None,
        sparse.numel() * 25 // 8,
        0,
    )


def systems():
    for batch, n in ((256, 64), (64, 128), (16, 512), (4, 1024), (64, 1024)):
        x = torch.randn(batch, 2 * n, n, device="cuda")
        a, b = x.mT @ x / (2 * n), torch.randn(batch, n, n, device="cuda")
        yield (
            "cholesky",
            f"{batch} × {n}",
            lambda a=a: ops.cholesky(a),
            lambda a=a: torch.linalg.cholesky_ex(a),
            lambda: None,
            8 * a.numel(),
            batch * n**3 // 3,
        )
        yield (
            "cholesky_solve",
            f"{batch} × {n}, {n} right-hand sides",
            lambda a=a, b=b: ops.cholesky_solve(a, b),
            lambda a=a, b=b: torch.cholesky_solve(b, torch.linalg.cholesky_ex(a)[0]),
            lambda: None,
            12 * a.numel(),
            batch * (n**3 // 3 + 2 * n**3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one op")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cuda_kernels.py needs an NVIDIA GPU")
    smoke = {row["op"].split("/")[0]: row for row in read("smoke")}
    bandwidth, rows = copy_bandwidth(), []
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for make in (sweeps, selections, groups, systems):
        for op, label, call, baseline, reset, nbytes, flops in make():
            if options.only not in (None, op):
                continue
            found = smoke.get(op, {"errors": {}, "failed": {}})
            tests = found["failed"].get("cuda") or ("green" if "cuda" in found["errors"] else "not known")
            try:
                with ops.backend("cuda"):
                    low, mid, high = microseconds(call, reset)
            except (RuntimeError, ValueError) as error:
                rows.append({"op": op, "case": label, "tests": tests, "failed": f"{type(error).__name__}: {error}"})
                continue
            base = microseconds(baseline, reset)[1]
            floor = max(nbytes / bandwidth, flops / FLOAT32_RATE) * 1e6
            rows.append(
                {
                    "op": op,
                    "case": label,
                    "tests": tests,
                    "us": mid,
                    "us_quartiles": [low, high],
                    "torch_us": base,
                    "ratio": base / mid,
                    "gb_s": nbytes / mid / 1e3,
                    "tflop_s": flops / mid / 1e6,
                    "floor_us": floor,
                    "share_of_floor": floor / mid,
                }
            )
            print(
                f"{op:15s} {label:32s} {mid:9.1f} µs  torch {base:10.1f} µs  {base / mid:6.1f}×  "
                f"{nbytes / mid / 1e3:7.0f} GB/s  {floor / mid:5.0%} of the floor's rate  {tests}",
                flush=True,
            )
            write("cuda_kernels", [{"copy_tb_s": bandwidth / 1e12}, *rows])
    print(write("cuda_kernels", [{"copy_tb_s": bandwidth / 1e12}, *rows]))


if __name__ == "__main__":
    main()
