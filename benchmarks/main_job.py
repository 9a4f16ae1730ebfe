"""The main job against the published loop, side by side in one run: perplexity, CPU seconds, wall seconds.

SmolLM2-135M, 64 calibration sequences of 512 tokens, perplexity on 24 WikiText-2 windows of 1024 (bfloat16 forward),
the very token ids in ``PYPRUNE_DATA``. The floor is two forward passes of every block over the calibration tokens, or
one where ``inputs`` is sequential or dense, batched, in the row's compute type, by the fastest forward there is here,
nothing else; ``share`` is the floor's CPU seconds over those of the pruning call. CPU seconds are user + system of all
threads: on a busy machine they say more than wall time.

    python -m benchmarks.main_job --methods sparsegpt wanda --patterns unstructured 2:4
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch

import pyprune
from benchmarks import common, published_loop
from pyprune.config import Calibration, Evaluation, parse_nm
from pyprune.evaluation.perplexity import perplexity
from pyprune.execution.executor import Executor
from pyprune.execution.heap import kept_warm
from pyprune.model.blocks import ModelView

NAME = "main_job"
PASSES = {"propagated": 2, "sequential": 1, "dense": 1}
"""Forward passes over each block that the inputs of the statistics take."""
DEFAULTS = {"inputs": "propagated"}
"""Of rows that do not say it."""


def floor(model, samples: torch.Tensor, dtype: torch.dtype) -> common.Spent:
    """Two forward passes of every block over the calibration tokens."""
    executor = Executor(ModelView(model), compute_dtype=dtype)
    with kept_warm(), common.Spent() as spent:
        stream = executor.embed(list(samples))
        for _ in range(2):
            for index in range(len(executor.view.blocks)):
                with executor.compute(index) as module:
                    executor.run(index, module, stream)
    return spent


def ours(
    model, samples: torch.Tensor, method: str, pattern: str, dtype: str, inputs: str
) -> tuple[object, common.Spent, dict]:
    calibration = Calibration(source=samples, num_samples=len(samples), seq_len=samples.shape[1], held_out=0)
    with common.Spent() as spent:
        result = pyprune.prune(
            model,
            method=method,
            pattern=pattern,
            calibration=calibration,
            compute_dtype=dtype,
            inputs=inputs,
            evaluation=Evaluation(enabled=False),
            in_place=True,
            progress=False,
        )
    return result.model, spent, result.report["seconds"]


def published(model, samples: torch.Tensor, method: str, pattern: str) -> tuple[object, common.Spent, dict]:
    with common.Spent() as spent:
        timer = published_loop.prune(model, samples, method=method, nm=parse_nm(pattern))
    return model, spent, timer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--compute", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--inputs", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", help="folder of the result, and of a partial one to go on with")
    options = parser.parse_args()

    samples = torch.from_numpy(np.load(common.data("calibration", "wiki_64x512.npy"))).long()[: options.samples]
    held = torch.from_numpy(np.load(common.data("evaluation", "wt2_test_24x1024.npy"))).long()
    windows = list(held[: options.windows])
    dense, _ = common.load_model(options.model)
    rows = common.read(NAME, options.out)
    setting = {"model": options.model, "samples": len(samples), "seq_len": samples.shape[1], "windows": len(windows)}

    def todo(**key) -> bool:
        wanted = {**setting, **key}
        return not any(all(row.get(k, DEFAULTS.get(k)) == v for k, v in wanted.items()) for row in rows)

    def keep(**row) -> None:
        rows.append({**setting, **row})
        common.write(NAME, rows, options.out)
        print(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row.items()
                if not isinstance(v, dict)
            ),
            flush=True,
        )

    if todo(tool="dense"):
        keep(tool="dense", perplexity=perplexity(dense, windows))
    floors: dict[str, common.Spent] = {}
    for method in options.methods:
        for pattern in options.patterns:
            for tool, dtype, inputs in [
                ("published loop", "float32", "propagated"),
                *(("pyprune", d, i) for d in options.compute for i in options.inputs),
            ]:
                key = dict(tool=tool, method=method, pattern=pattern, compute=dtype, inputs=inputs)
                if not todo(**key):
                    continue
                if dtype not in floors:
                    floors[dtype] = floor(dense, samples, getattr(torch, dtype))
                model = copy.deepcopy(dense)
                model, spent, phases = (
                    published(model, samples, method, pattern)
                    if tool != "pyprune"
                    else ours(model, samples, method, pattern, dtype, inputs)
                )
                cpu, wall = (seconds * PASSES[inputs] / 2 for seconds in (floors[dtype].cpu, floors[dtype].wall))
                keep(
                    **key,
                    perplexity=perplexity(model, windows),
                    cpu_seconds=spent.cpu,
                    wall_seconds=spent.wall,
                    floor_cpu_seconds=cpu,
                    floor_wall_seconds=wall,
                    share=cpu / spent.cpu,
                    phases=phases,
                )
    print(table(rows, setting))


def table(rows: list[dict], setting: dict) -> str:
    """Markdown: each row's speed-up over the published loop of the same method and pattern, in CPU seconds."""
    rows = [row for row in rows if all(row.get(k) == v for k, v in setting.items())]
    base = {(r["method"], r["pattern"]): r for r in rows if r["tool"] == "published loop"}
    lines = [
        "| tool | inputs | method | pattern | compute | perplexity | CPU s | wall s | faster | floor share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["tool"] == "dense":
            lines.append(f"| dense | | | | | {r['perplexity']:.2f} | | | | |")
            continue
        reference = base.get((r["method"], r["pattern"]))
        faster = f"{reference['cpu_seconds'] / r['cpu_seconds']:.2f}×" if reference else ""
        lines.append(
            f"| {r['tool']} | {r.get('inputs', 'propagated')} | {r['method']} | {r['pattern']} | "
            f"{r['compute']} | {r['perplexity']:.2f} | {r['cpu_seconds']:.0f} | {r['wall_seconds']:.0f} | "
            f"{faster} | {r['share']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    common.command_line(main)
