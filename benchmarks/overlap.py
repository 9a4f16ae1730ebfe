"""What moving activations costs: compute alone, copies alone, and the pipeline of both.

A sequence of LLaMA-7B-shaped blocks on a GPU (smaller ones on a CPU) is passed over stored activations three ways: with
the batches already on the device, with the copies only, and as ``Executor.run`` does it. On a GPU the pipeline should
take at most 1.1 times the longer of the two; on a CPU, where a batch is a view of the store and the copies alone write
views onto themselves, what the store adds should stay below 5 % of the run. ``--trace`` writes a torch profiler trace
that shows the streams.

    python -m benchmarks.overlap [--trace overlap_trace.json] [--blocks 2] [--sequences 32]
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable

import torch
import transformers

from benchmarks.common import write
from pyprune.model import ModelView
from pyprune.stream import Executor

TARGET_GPU, TARGET_CPU = 1.1, 0.05


def model(device: torch.device, blocks: int) -> tuple[torch.nn.Module, int]:
    """Random weights of LLaMA-7B's block shape on a GPU, of SmolLM2's on a CPU, and the sequence length."""
    shape = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32) if device.type == "cuda" else \
        dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    length = 2048 if device.type == "cuda" else 512
    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=blocks, max_position_embeddings=length, **shape)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval(), length


def best(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Seconds, the fastest of ``repeats`` after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(blocks: int, sequences: int, repeats: int, trace: str | None) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
                    executor.write(activations, batch, hidden)
                executor.drain()

        def pipeline() -> None:
            for index, module in enumerate(modules):
                executor.run(index, module, activations, activations)

        # interleaved, so that what else the machine does hits all three
        seconds: dict[str, list[float]] = {"compute": [], "copies": [], "pipeline": []}
        for _ in range(repeats):
            for name, work in (("compute", compute), ("copies", copies), ("pipeline", pipeline)):
                seconds[name].append(best(work, device, 1))
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
    moved = 2 * blocks * sum(data.numel() * data.element_size() for data in activations.data.values())
    return {**row, "blocks": blocks, "sequences": sequences, "length": length, "device": str(device),
            "bytes_moved": moved, "copy_gb_per_second": moved / row["copies"] / 1e9,
            "ratio_to_longer": row["pipeline"] / max(row["compute"], row["copies"]),
            "overhead": row["pipeline"] / row["compute"] - 1,
            "target": f"ratio_to_longer <= {TARGET_GPU}" if device.type == "cuda" else f"overhead <= {TARGET_CPU}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32 if not torch.cuda.is_available() else 128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trace")
    arguments = parser.parse_args()
    row = measure(arguments.blocks, arguments.sequences, arguments.repeats, arguments.trace)
    print(f"compute {row['compute']:.3f} s, copies {row['copies']:.3f} s ({row['copy_gb_per_second']:.1f} GB/s), "
          f"pipeline {row['pipeline']:.3f} s: {row['ratio_to_longer']:.3f} of the longer, overhead "
          f"{row['overhead']:+.1%} (target {row['target']})")
    write("overlap", [row])


if __name__ == "__main__":
    main()
