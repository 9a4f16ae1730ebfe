"""What a run costs as something grows: width, tokens, blocks, processes, sparsity; and memory against model size.

Each series is fitted by a power law (least squares on logarithms); the exponent and, where matplotlib is installed, a
plot say what to expect of a larger job. A block of a 1B- and of a 7B-shaped model is pruned for real, and the whole run
is predicted from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import ROOT, Spent
from benchmarks.jobs import TINY, Job, Shape, model, pruned
from benchmarks.rows import Row

WIDTHS = {"smoke": (32, 64), "quick": (128, 256, 512), "full": (256, 512, 1024, 2048)}
TOKENS = {"smoke": (2, 4), "quick": (2, 4, 8, 16), "full": (4, 8, 16, 32, 64)}
BLOCKS = {"smoke": (1, 2), "quick": (1, 2, 4), "full": (1, 2, 4, 8)}
PROCESSES = {"smoke": (1,), "quick": (1, 2), "full": (1, 2)}
SPARSITIES = {"smoke": (0.5,), "quick": (0.3, 0.5, 0.7), "full": (0.1, 0.3, 0.5, 0.7, 0.9)}
MEMORY = {"smoke": (1, 2), "quick": (2, 4, 8), "full": (2, 4, 8, 16)}
"""Blocks of the models whose streamed runs are watched."""
WHOLE = {
    "1B": (Shape(2048, 8192, 32, 8, 1, 2, 512), 16),
    "7B": (Shape(4096, 11008, 32, 32, 1, 2, 512), 32),
}
"""One block of LLaMA-3.2-1B's and of LLaMA-2-7B's shape, and how many blocks the model has."""
ABSCISSAS = {
    "width": "hidden size",
    "tokens": "calibration tokens",
    "sparsity": "share of zeros",
    "memory of a streamed run": "MB of the model",
}
SPAN = 8
"""Factor that an axis of seconds or bytes spans at least, so that a flat series looks flat."""
BASE = {"smoke": Shape(32, 96, 4, 2, 1, 4, 32), "quick": Shape(256, 704, 4, 2, 2, 8, 256)}
BASE["full"] = Shape(576, 1536, 9, 3, 2, 16, 512)


def series(job: Job) -> Iterator[tuple[str, float, Shape, dict]]:
    """Name, abscissa, shape and settings of every run."""
    base = BASE[job.preset]
    for width in WIDTHS[job.preset]:
        heads = max(1, width // 64)
        yield "width", width, dataclasses.replace(base, hidden=width, inner=3 * width, heads=heads, key_heads=heads), {}
    for count in TOKENS[job.preset]:
        yield "tokens", count * base.tokens, dataclasses.replace(base, sequences=count), {}
    for count in BLOCKS[job.preset]:
        yield "blocks", count, dataclasses.replace(base, blocks=count), {}
    for sparsity in SPARSITIES[job.preset]:
        yield "sparsity", sparsity, base, {"sparsity": sparsity}


def names(job: Job) -> list[str]:
    """Of everything that the group measures at a preset; ``job.only`` chooses from it."""
    found = [*dict.fromkeys(name for name, *_ in series(job)), "processes", "memory of a streamed run"]
    return found + [f"one block, {name}" for name in WHOLE if job.preset == "full"]


def scaling(job: Job) -> Iterator[list[Row]]:
    """The series and blocks whose name contains ``job.only``."""
    pruned(model(TINY, job.device), TINY, job.device)  # imports and first uses are nobody's seconds
    for name, x, shape, settings in series(job):
        if job.only not in name:
            continue
        dense = model(shape, job.device)
        with Spent() as spent:
            pruned(dense, shape, job.device, compute_dtype="float32", **settings)
        yield [_row(job, name, shape, spent.cpu if job.device == "cpu" else spent.wall, x)]
    if job.only in "processes":
        for count in PROCESSES[job.preset]:
            yield [_row(job, "processes", BASE[job.preset], _in_processes(BASE[job.preset], count), count)]
    if job.only in "memory of a streamed run":
        for blocks in MEMORY[job.preset]:
            yield [_memory(job, dataclasses.replace(BASE[job.preset], blocks=blocks))]
    for name, (shape, blocks) in WHOLE.items():
        if job.preset == "full" and job.only in f"one block, {name}":
            yield [_predicted(job, name, shape, blocks)]


def _row(job: Job, name: str, shape: Shape, seconds: float, x: float) -> Row:
    clock = "cpu" if job.device == "cpu" and name != "processes" else "wall"
    case = f"{shape}" if name != "sparsity" else f"{shape}, sparsity {x:g}"
    case = case if name != "processes" else f"{shape}, {x:g} process{'' if x == 1 else 'es'}"
    return Row("scaling", name, case, "float32", job.device, "pyprune", [seconds], clock=clock, figures={"x": x})


def _predicted(job: Job, name: str, shape: Shape, blocks: int) -> Row:
    """One block for real; the whole of 128 × 2,048 tokens by its seconds per token, and solves per block. With one
    thread phases are in the processor's seconds, whatever else goes on."""
    dense = model(shape, job.device)
    alone = job.device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    with unittest.mock.patch("time.perf_counter", now), Spent() as spent:
        report = pruned(dense, shape, job.device).report
    seconds = report["seconds"]
    tokens = shape.sequences * shape.tokens
    per_token = (seconds.get("forward", 0.0) + seconds.get("statistics", 0.0)) / tokens
    whole = blocks * (seconds.get("solve", 0.0) + per_token * 128 * 2048)
    row = _row(job, f"one block, {name}", shape, spent.cpu if job.device == "cpu" else spent.wall, 1)
    row.figures = {**{f"{key}_seconds": value for key, value in seconds.items()}, "predicted_whole_seconds": whole}
    return row


def _in_processes(shape: Shape, count: int) -> float:
    """Wall seconds of the pruning call in the slowest of some processes, each with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "dense")
        model(shape).save_pretrained(source)
        worker = Path(folder, "worker.py")
        worker.write_text(WORKER)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", str(worker)]
        done = subprocess.run(
            [*command, str(source), str(Path(folder, "out")), str(shape.sequences), str(shape.tokens)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"{count} processes failed: {done.stderr[-500:]}")
    return max(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds "))


def _memory(job: Job, shape: Shape) -> Row:
    """Peak resident bytes of a streamed run, above those of a process that has only imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "dense")
        live = model(shape)
        live.save_pretrained(source, max_shard_size="20MB")
        size = sum(p.numel() * p.element_size() for p in live.parameters())
        worker = Path(folder, "worker.py")
        worker.write_text(WORKER)
        command = [sys.executable, str(worker), str(source), str(Path(folder, "out"))]
        done = subprocess.run(
            [*command, str(shape.sequences), str(shape.tokens)], capture_output=True, text=True, cwd=ROOT
        )
    if done.returncode:
        raise RuntimeError(f"the streamed run failed: {done.stderr[-500:]}")
    said = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in ("seconds", "before", "peak"))
    row = _row(job, "memory of a streamed run", shape, float(said["seconds"]), size)
    row.clock = "wall"
    row.figures |= {"model_bytes": size, "peak_bytes": float(said["peak"]) - float(said["before"])}
    return row


WORKER = """
import sys, time
import torch, transformers
import pyprune

source, out, sequences, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)

def resident(name):  # ru_maxrss would begin with that of the process that started this one
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def run(source, out, ids):
    pyprune.prune(source, output=out, calibration=ids, evaluation={"enabled": False}, stream="always",
                  compute_dtype="float32", probe_samples=0, progress=False)

def ids(sequences, tokens):
    return torch.randint(0, 512, (sequences, tokens), generator=torch.Generator().manual_seed(1))

small = dict(hidden_size=32, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2, vocab_size=512)
pyprune.prune(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)), calibration=ids(4, 16),
              evaluation={"enabled": False}, progress=False)  # imports and first uses are nobody's seconds and bytes
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest so far is what there is now
before, start = resident("VmRSS"), time.perf_counter()
run(source, out, ids(sequences, tokens))
print("seconds", time.perf_counter() - start)
print("before", before)
print("peak", resident("VmHWM"))
"""


def fits(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Series → exponent of its power law and the points that it rests on; of memory, bytes per byte of the model."""
    found = {}
    for name in dict.fromkeys(row.name for row in rows if row.group == "scaling"):
        points = [(row.figures["x"], _ordinate(row)) for row in rows if row.name == name and "x" in row.figures]
        points = [(x, y) for x, y in points if x > 0 and y > 0]
        if len({x for x, _ in points}) < 2:
            continue
        slope = _slope([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
        found[name] = {"exponent": round(slope, 3), "points": len(points)}
    return found


def _ordinate(row: Row) -> float:
    return row.figures.get("peak_bytes", row.median)


def _slope(x: list[float], y: list[float]) -> float:
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    return math.fsum((a - mx) * (b - my) for a, b in zip(x, y)) / math.fsum((a - mx) ** 2 for a in x)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: list[Row], path: Path) -> bool:
    """One panel per series, on logarithmic axes; False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    exponents = fits(rows)
    if not exponents:
        return False
    matplotlib.rcParams["svg.hashsalt"] = "pyprune"
    columns = min(3, len(exponents))
    lines = -(-len(exponents) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.7 * lines), squeeze=False)
    for panel in axes.flat[len(exponents) :]:
        panel.set_visible(False)
    for panel, (name, fit) in zip(axes.flat, exponents.items()):
        points = sorted((row.figures["x"], _ordinate(row)) for row in rows if row.name == name)
        x, y = zip(*points)
        middle = [math.exp(math.fsum(map(math.log, values)) / len(values)) for values in (x, y)]
        panel.loglog(x, y, "o", color="#2563eb", markersize=4)
        panel.loglog(x, [middle[1] * (at / middle[0]) ** fit["exponent"] for at in x], color="#93c5fd", linewidth=1.2)
        panel.set_title(f"{name}: exponent {fit['exponent']:.2f}", fontsize=8.5)
        panel.set_xlabel(ABSCISSAS.get(name, name), fontsize=8)
        clock = next(row.clock for row in rows if row.name == name)
        panel.set_ylabel("peak MB" if name.startswith("memory") else f"seconds ({clock})", fontsize=8)
        panel.grid(True, which="major", linewidth=0.3)
        bytes_too = name.startswith("memory")
        panel.set_xticks(x, [_number(at / 1e6 if bytes_too else at) for at in x])
        ends = [y[0], y[-1]] if max(y) > 1.1 * min(y) else [y[0]]
        panel.set_yticks(ends, [_number(at / 1e6 if bytes_too else at) for at in ends])
        half = max(max(y) / min(y) * 1.3, SPAN) ** 0.5
        centre = (max(y) * min(y)) ** 0.5
        panel.set_ylim(centre / half, centre * half)
        panel.minorticks_off()
        panel.tick_params(labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True
