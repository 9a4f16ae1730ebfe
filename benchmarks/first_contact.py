"""Steps of ``benchmarks/gpu_run.sh``: what a GPU that nobody has seen can do, op by op, block by block, test by test.

    python -m benchmarks study first_contact ceilings|smoke|block|tests … [--device cpu]

Each step writes its JSON to ``$OUT`` as it goes, so that one that is ended leaves what it had. ``--device cpu`` is the
rehearsal: the same steps at tiny shapes, with Triton's interpreter where ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time

import torch

from benchmarks.common import ROOT, command_line, result_path, write

GROUPS = (
    ("gram_update", "cross_gram_update", "column_moments"),
    ("select_mask", "nm_mask", "obs_sweep"),
    ("compress_24", "expand_24"),
    ("cholesky", "cholesky_solve"),
    ("liar_update", "linear", "trailing_update"),
)
"""Ops that are tried in one process, the most wanted first."""
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
BLOCKS = 32


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call, device: str, repeats: int = 10) -> float:
    """Least wall seconds of a call, the device's work included."""
    best = float("inf")
    for i in range(repeats + 2):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        if i >= 2:
            best = min(best, time.perf_counter() - begun)
    return best


def ceilings(device: str) -> None:
    """What a copy and the library's products reach here."""
    size, n = (1 << 30, 8192) if device != "cpu" else (1 << 20, 128)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows = [{"what": "copy", "tb_s": 2 * size / seconds(lambda: target.copy_(source), device) / 1e12}]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        spent = seconds(lambda a=a, b=b: a @ b, device)
        rows.append({"what": f"product {n}³ {str(dtype)[6:]}", "tflop_s": 2 * n**3 / spent / 1e12})
        write("ceilings", rows, device=device)
    print(rows)


def smoke(device: str, only: str) -> None:
    """Every class of every op on every back-end, in a process that it may take down: right or not, and how fast."""
    from pyprune import ops
    from pyprune.ops import classes, qualification

    rows = []
    for group in GROUPS:
        keys = [key for op in group for key in classes.keys_of(op) if only in key]
        found = {
            key: [
                ops.TABLE[name].candidate(classes.op_of(key))
                for name in ops.BACKENDS
                if ops.TABLE[name].why_not(classes.op_of(key), device) is None
            ]
            for key in keys
        }
        if not found:
            continue
        try:
            records = qualification._measure(device, found)
        except qualification.Unmeasured as error:
            records = {key: {"errors": {}, "failed": {"every": str(error)}, "seconds": {}} for key in keys}
        for key, record in records.items():
            rows.append({"op": key, **record})
            green = ", ".join(f"{name} {error:.0e}" for name, error in record["errors"].items())
            print(f"{key:26} green: {green or 'none'}  red: {record['failed'] or 'none'}", flush=True)
        write("smoke", rows, device=device)


def model(shape: dict):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=4096, **shape)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def block(device: str, backends: list[str]) -> None:
    """One block of LLaMA-2-7B's shape through ``pyprune.prune``, by back-end; what a whole run would take from it."""
    import pyprune
    from pyprune.config import ConfigError

    shape, samples, tokens = (LLAMA, 128, 2048) if device != "cpu" else (TINY, 4, 32)
    rows = []

    def run(backend: str, count: int):
        generator = torch.Generator().manual_seed(1)
        ids = list(torch.randint(0, shape["vocab_size"], (count, tokens), generator=generator))
        return pyprune.prune(
            model(shape),
            calibration=ids,
            evaluation={"enabled": False},
            backend=backend,
            device=device,
            progress=False,
            in_place=True,
            probe_samples=0,
        )

    for backend in backends:
        row = {"backend": backend, "tokens": samples * tokens}
        rows.append(row)
        try:
            run(backend, min(samples, 4))  # compiles, measures, fills caches
            wait(device)
            begun = time.perf_counter()
            report = run(backend, samples).report
        except (ConfigError, RuntimeError) as error:
            row["failed"] = f"{type(error).__name__}: {error}"
            write("block", rows, device=device)
            print(row, flush=True)
            continue
        row |= {
            "run_s": time.perf_counter() - begun,
            "block_s": report["blocks"][0]["seconds"],
            "seconds": report["seconds"],
            "backends": report["backends"],
            "warnings": report["warnings"],
            "peak_device_memory_bytes": report["peak_device_memory_bytes"],
            "predicted_run_s": BLOCKS * report["blocks"][0]["seconds"],
        }
        write("block", rows, device=device)
        print(f"{backend:10} block {row['block_s']:.3f} s, run predicted {row['predicted_run_s']:.0f} s", flush=True)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as trace:
        run(backends[0], min(samples, 16))
    trace.export_chrome_trace(str(result_path("block_trace", suffix=".json.gz")))
    by = "self_cuda_time_total" if device != "cpu" else "self_cpu_time_total"
    result_path("block_profile", suffix=".txt").write_text(trace.key_averages().table(sort_by=by, row_limit=40))


def tests(path: str, name: str, processes: int) -> int:
    """A test file spread over processes, so that compilations do not wait for each other; JUnit report per process."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", path], cwd=ROOT, capture_output=True, text=True
    )
    found = [line for line in listed.stdout.splitlines() if "::" in line]
    print(f"{len(found)} tests of {path} in {processes} processes", flush=True)
    if not found:
        print(listed.stdout[-2000:] + listed.stderr[-2000:])
        return 1
    running = []
    for i in range(min(processes, len(found))):
        log = result_path(f"{name}_{i}", suffix=".log").open("w")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={result_path(f'{name}_{i}', suffix='.xml')}",
            *found[i::processes],
        ]
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    worst = max(child.wait() for child in running)
    write(name, [{"tests": len(found), "processes": len(running), "worst_status": worst}])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("ceilings", "smoke", "block", "tests"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="smoke: classes of ops whose name contains this")
    parser.add_argument("--backends", default="auto,triton,reference", help="block: one after the other")
    parser.add_argument("--file", default="tests/ops/test_triton_gpu.py", help="tests: the file")
    parser.add_argument("--name", default="triton_tests", help="tests: begins the names of the reports")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    options = parser.parse_args()
    if options.step == "ceilings":
        ceilings(options.device)
    elif options.step == "smoke":
        if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            importlib.import_module("pyprune.triton_kernels")
        smoke(options.device, options.only)
    elif options.step == "block":
        block(options.device, options.backends.split(","))
    else:
        sys.exit(tests(options.file, options.name, options.processes))


if __name__ == "__main__":
    command_line(main)
