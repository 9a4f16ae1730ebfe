"""What moving activations costs: compute alone, copies alone, and the pipeline of both.

A sequence of LLaMA-7B-shaped blocks on a GPU (smaller ones on a CPU) is passed over stored activations three ways: with
the batches already on the device, with the copies only, and as ``Executor.run`` does it. On a GPU the pipeline should
take at most 1.1 times the longer of the two. On a CPU a batch is a view of the store, so only results are copied, and
what the store adds should stay below 5 % of the run. ``--trace`` writes a torch profiler trace that shows the streams.

    python -m benchmarks.overlap [--trace overlap_trace.json] [--blocks 2] [--sequences 32]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from benchmarks.common import command_line, write
from pyprune.execution.executor import Executor
from pyprune.model.blocks import ModelView

TARGET_GPU, TARGET_CPU = 1.1, 0.05


def model(device: torch.device, blocks: int) -> tuple[torch.nn.Module, int]:
    """Random weights of LLaMA-7B's block shape on a GPU, of SmolLM2's on a CPU, and the sequence length."""
    shape = (
        dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
        if device.type == "cuda"
        else dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    )
    length = 2048 if device.type == "cuda" else 512
    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=blocks, max_position_embeddings=length, **shape)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval(), length


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds by the clock on a GPU; on a CPU those of the processor, to which other processes add little."""
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(blocks: int, sequences: int, repeats: int, trace: str | None) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for one another spend processor time too
    live, length = model(device, blocks)
    executor = Executor(ModelView(live), device=device)
    activations = executor.embed(list(torch.randint(0, 512, (sequences, length))))
    batches = activations.batches(executor.batch_size)
    resident = {(b.length, b.start): activations.read(b).to(device, copy=True) for b in batches}
    with contextlib.ExitStack() as stack:
        modules = [stack.enter_context(executor.compute(i)) for i in range(blocks)]

        def compute() -> None:
            for index, module in enumerate(modules):
                for batch in batches:
                    executor.forward(index, module, resident[batch.length, batch.start])

        def copies() -> None:
            for _ in modules:
                for batch, hidden in executor.stream(activations):
                    executor.write(
                        activations, batch, hidden if device.type == "cuda" else resident[batch.length, batch.start]
                    )  # a view would be written onto itself
                executor.drain()

        def pipeline() -> None:
            for index, module in enumerate(modules):
                executor.run(index, module, activations, activations)

        works = {"compute": compute, "copies": copies, "pipeline": pipeline}
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(repeats + 1):  # in turns, so that what else the machine does hits all three
            for name, work in works.items():
                spent = seconds_of(work, device)
                if repeat:
                    seconds[name].append(spent)
        if trace:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=kinds) as profile:
                pipeline()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            profile.export_chrome_trace(trace)
    row = {name: min(values) for name, values in seconds.items()}
    moved = blocks * sum(data.numel() * data.element_size() for data in activations.data.values())
    moved *= 2 if device.type == "cuda" else 1
    return {
        **row,
        "blocks": blocks,
        "sequences": sequences,
        "length": length,
        "device": str(device),
        "bytes_moved": moved,
        "copy_gb_per_second": moved / row["copies"] / 1e9,
        "ratio_to_longer": row["pipeline"] / max(row["compute"], row["copies"]),
        "overhead": statistics.median(p / c for p, c in zip(seconds["pipeline"], seconds["compute"])) - 1,
        "copies_share": row["copies"] / row["compute"],
        "all": seconds,
        "target": f"ratio_to_longer <= {TARGET_GPU}" if device.type == "cuda" else f"overhead <= {TARGET_CPU}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace")
    arguments = parser.parse_args()
    row = measure(arguments.blocks, arguments.sequences, arguments.repeats, arguments.trace)
    print(
        f"compute {row['compute']:.3f} s, copies {row['copies']:.3f} s ({row['copy_gb_per_second']:.1f} GB/s), "
        f"pipeline {row['pipeline']:.3f} s: {row['ratio_to_longer']:.3f} of the longer; the store "
        f"copies for {row['copies_share']:.1%} of the compute, the pipeline takes {row['overhead']:+.1%} "
        f"(target {row['target']})"
    )
    write("overlap", [row])


if __name__ == "__main__":
    command_line(main)
