"""Rates of this machine that a run rests on, and what one block then takes on 1, 8 and 64 processes.

Measured with the project's own code: forward passes, Gram products, solves (FLOP/s as :mod:`pyprune.planning.costs`
counts them), the activation store, shards on disk with their checksum, and sums and broadcasts between processes (gloo;
NCCL where there are two GPUs or more). ``--again`` adds a run to the last result; of several runs the best counts, as
whatever else the machine does only slows it down. ``--table`` computes the table of docs/scaling.md from the result,
``--sheet`` from the data sheet of an H100 instead: peaks, which are a bound and no prediction.

    python -m benchmarks.rates [--again]
    python -m benchmarks.rates --table [--sheet] [--samples 128] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import transformers

from benchmarks.common import command_line, read, write
from pyprune import ops
from pyprune.config import ConfigError, PruneConfig
from pyprune.execution.activation_store import Store
from pyprune.execution.device import cpu_has_bfloat16
from pyprune.execution.distributed import World
from pyprune.execution.executor import Activations, Executor, target_tokens
from pyprune.masks.solvers import inverse_factor, obs_prune
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.skeleton import skeleton
from pyprune.planning.costs import work_of
from pyprune.planning.rehearsal import disk_rates

SHEET = {
    "forward": 989e12,
    "gram": 989e12,
    "solve": 67e12,
    "copy_in": 64e9,
    "copy_out": 64e9,
    "reduce": 450e9,
    "broadcast": 450e9,
    "between": 50e9,
}
"""H100 SXM: bfloat16 and float32 FLOP/s; in bytes/s PCIe 5 ×16, NVLink one way, 400 Gb/s a GPU between machines."""
PER_MACHINE = 8
"""GPUs that NVLink joins."""


def best(work: Callable[[], object], cuda: bool, repeats: int = 5) -> float:
    """Seconds, the fastest of ``repeats`` after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def compute_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a block's forward pass, of Gram products, and of factorisation and sweep."""
    cuda = device.type == "cuda"
    h, f = (4096, 11008) if cuda else (1024, 2752)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=1,
        num_attention_heads=h // 128,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    view = ModelView(transformers.LlamaForCausalLM(config).to(dtype).eval())
    executor = Executor(view, device=device)
    tokens = target_tokens(device)
    length = min(tokens, 2048)
    rows = tokens // length
    with executor.compute(0) as module:
        hidden = executor.embed(list(torch.randint(0, 512, (rows, length)))).data[length].to(device)
        forward = best(lambda: executor.forward(0, module, hidden), cuda)
    work = work_of(view, [weights_of(view.blocks[0])], PruneConfig())

    x = torch.randn(tokens, f, device=device).to(dtype)
    gram = torch.zeros(f, f, device=device)
    precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    gathered = best(lambda: ops.gram_update(gram, x, precision=precision), cuda)
    gram = x.float().T @ x.float()
    weight = torch.randn(h, f, device=device)

    def solve() -> None:
        obs_prune(weight.clone(), inverse_factor(gram, len(x), 0.01), sparsity=0.5)

    return {
        "forward": rows * length * work.passing(length) / forward,
        "gram": tokens * f**2 / gathered,
        "solve": (2 * f**3 + 2 * h * f**2) / best(solve, cuda),
    }


def store_rates(device: torch.device, dtype: torch.dtype, size: int = 2**28) -> dict[str, float]:
    """Bytes/s of activations to the device and back through the executor, and from and to the files of a store."""
    cuda = device.type == "cuda"
    length, hidden = 512, 1024
    sequences = [torch.zeros(length, dtype=torch.long)] * (size // (length * hidden * dtype.itemsize))
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    executor = Executor(ModelView(transformers.LlamaForCausalLM(config).to(dtype)), device=device)
    found = {}
    with tempfile.TemporaryDirectory(prefix=".pyprune-rates-") as folder:
        for kind, store in (("", Store(2 * size, pin=cuda)), ("_file", Store(0, folder, pin=cuda))):
            activations = Activations(sequences, hidden, dtype, store, target_tokens(device))
            for data in activations.data.values():
                data.zero_()
            total = activations.tokens * hidden * dtype.itemsize
            made = torch.zeros(max(b.size for b in activations.batches()), length, hidden, dtype=dtype, device=device)

            def copy_in(activations=activations) -> None:
                for _, x in executor.stream(activations):
                    if not cuda:
                        x.view(torch.int16).max()  # on a CPU a batch is a view of the store: reading it is the copy

            def copy_out(activations=activations, made=made) -> None:
                for batch in activations.batches():
                    executor.write(activations, batch, made[: batch.size])
                executor.drain()

            found["copy_in" + kind] = total / best(copy_in, cuda)
            found["copy_out" + kind] = total / best(copy_out, cuda)
    return found


def link_rates(cuda: bool, size: int = 2**28) -> dict[str, float | int | str]:
    """Bytes/s through a process in a sum and a broadcast, between two processes here, or all GPUs."""
    count = torch.cuda.device_count() if cuda else 2
    if count < 2:
        return {"processes": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        torch.multiprocessing.spawn(_collectives, (count, port, cuda, size, file.name), nprocs=count)
        return json.load(file)


def _collectives(rank: int, count: int, port: int, cuda: bool, size: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=count)
    data = torch.zeros(size // 4, device="cuda" if cuda else "cpu")

    def timed(work: Callable[[], object]) -> float:
        def together() -> None:
            work()
            dist.barrier()

        return best(together, cuda)

    found = {
        "processes": count,
        "by": dist.get_backend(),
        "reduce": 2 * (count - 1) / count * size / timed(lambda: dist.all_reduce(data)),
        "broadcast": size / timed(lambda: dist.broadcast(data, src=0)),
    }
    if rank == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def measure(folder: str | None) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or cpu_has_bfloat16() else torch.float32
    disk = disk_rates(folder, 2**28)
    return {
        "device": str(device),
        "dtype": str(dtype)[6:],
        **compute_rates(device, dtype),
        **store_rates(device, dtype),
        "disk_write": disk["write"],
        "disk_read": disk["read"],
        **link_rates(device.type == "cuda"),
    }


def seconds_of(rates: dict, processes: int, samples: int, length: int) -> dict[str, float]:
    """Seconds of each part of one LLaMA-2-7B-shaped block under SparseGPT, bfloat16; ``sum`` is what a block takes.

    Activations and shards move in the background: they count as far as they take longer than what they hide behind.
    """
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        vocab_size=8,
        num_attention_heads=32,
        architectures=["LlamaForCausalLM"],
    )
    view = ModelView(skeleton(config, torch.bfloat16))
    work = work_of(view, [weights_of(view.blocks[0])], PruneConfig())
    h, f, n = 4096, 11008, processes
    weights = work.forward / 2
    tokens, token = samples * length / n, work.passing(length)
    # the statistics pass ends before the down projection
    forward = tokens * (2 * token - 2 * h * f) / rates["forward"]
    probes = 4 * length * (3 * token - 2 * h * f) / rates["forward"]
    gram = tokens * work.statistics / rates["gram"]
    # a sum of B bytes moves 2(N − 1)/N · B through every process
    moved = 0 if n == 1 else 2 * (n - 1) / n * 4 * (3 * h**2 + f**2)
    wide = "between" in rates and n > PER_MACHINE
    world = World()
    world.size = n
    groups = [(h, 3 * h), (h, h), (h, 2 * f), (f, h)]
    costs = [2 * width**3 + 2 * rows * width**2 for width, rows in groups]
    load = [0.0] * n
    for owner, cost in zip(world.deal(costs), costs):
        load[owner] += cost
    activations = tokens * h * 2
    copies = max(2 * activations / rates["copy_in"], activations / rates["copy_out"])
    found = {
        "forward passes": forward,
        "error probes": probes,
        "Gram products": gram,
        "sum of Gram matrices": moved / rates["between" if wide else "reduce"] if n > 1 else 0.0,
        "factorisations and sweeps": max(load) / rates["solve"],
        "broadcast of weights and masks": 3 * weights / rates["between" if wide else "broadcast"] if n > 1 else 0.0,
        "activations, beyond the forward passes": max(0.0, copies - forward),
    }
    busy = sum(found.values())
    if "disk_write" in rates:
        disk = 2 * weights * max(1 / rates["disk_write"], 1 / rates["disk_read"])
        found["shards, beyond all of that"] = max(0.0, disk - busy)
    return {**found, "sum": sum(found.values())}


def table(rates: dict, samples: int, length: int, counts: tuple[int, ...] = (1, 8, 64)) -> str:
    """Markdown."""

    def text(value: float) -> str:
        return (
            "–"
            if value == 0
            else f"{value * 1e3:.3g} ms"
            if value < 1
            else f"{value:.3g} s"
            if value < 100
            else f"{value:,.0f} s"
        )

    columns = [seconds_of(rates, n, samples, length) for n in counts]
    lines = [
        "| one block, " + f"{samples} × {length} tokens | " + " | ".join(f"{n}" for n in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for part in columns[0]:
        label = f"**{part}**" if part == "sum" else part
        lines.append(f"| {label} | " + " | ".join(text(column[part]) for column in columns) + " |")
    return "\n".join(lines)


def rates_text(rates: dict) -> str:
    """Markdown list of what was measured, in units that people use."""
    units = {"forward": (1e12, "TFLOP/s"), "gram": (1e12, "TFLOP/s"), "solve": (1e12, "TFLOP/s")}
    lines = []
    for name, value in rates.items():
        if isinstance(value, float):
            scale, unit = units.get(name, (1e9, "GB/s"))
            lines.append(f"- {name.replace('_', ' ')}: {value / scale:.3g} {unit}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="add to the last result")
    parser.add_argument("--table", action="store_true", help="compute the table from the last result")
    parser.add_argument("--sheet", action="store_true", help="from the data sheet of an H100, not from a result")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--folder", help="where the disk is measured; default: the system's temporary folder")
    arguments = parser.parse_args()
    if not arguments.table and not arguments.sheet:
        rates = measure(arguments.folder)
        print(json.dumps(rates, indent=1))
        write("rates", [*(read("rates") if arguments.again else []), rates])
        return
    if not (rows := [SHEET] if arguments.sheet else read("rates")):
        raise ConfigError("nothing was measured yet: run python -m benchmarks study rates first")
    rates = {
        name: max(row[name] for row in rows) if isinstance(value, float) else value for name, value in rows[0].items()
    }
    if not arguments.sheet and "reduce" not in rates:
        print("one GPU: what lies between GPUs is a data sheet's\n")
        rates = {**rates, **{name: SHEET[name] for name in ("reduce", "broadcast", "between")}}
    print(rates_text(rates) + "\n\n" + table(rates, arguments.samples, arguments.tokens))


if __name__ == "__main__":
    command_line(main)
