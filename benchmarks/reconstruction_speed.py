"""Block reconstruction with global propagation (BR+GP) against a transcription of the published loop.

The first ``--blocks`` blocks of SmolLM2-135M as a model of their own, the very calibration tokens in ``PYPRUNE_DATA``,
the same number of optimiser steps, batch and learning rate, SparseGPT masks at 50 %. Both loops run whole: statistics,
masks, targets, training, propagation. ``train`` is the training alone, with the error passes the published loop makes
around it. The error is measured on both results by the same code: mean squared
difference of each block's output from the dense model's, in float32, on the calibration tokens and on unseen ones.

    python -m benchmarks.reconstruction_speed --blocks 2 --epochs 3 --batch-size 4

On a GPU (``--device cuda``) the published loop runs under bfloat16 autocast, as published; wall time is what counts.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch

import pyprune
from benchmarks import common, published_loop
from pyprune.config import Calibration, Evaluation, Reconstruction

NAME = "reconstruction_speed"


def first_blocks(model, count: int):
    """The model with only its first blocks."""
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:count]
    short.config.num_hidden_layers = count
    return short


@torch.no_grad()
def block_errors(dense, pruned, samples: torch.Tensor) -> list[float]:
    """Mean squared error of each block's output against the dense model's, both from the embeddings on."""
    states = []
    for model in (dense, pruned):
        x, arguments = published_loop.first_inputs(model, samples)
        outputs = []
        for block in model.model.layers:
            x = torch.cat([published_loop.forward([block], part[None], arguments) for part in x])
            outputs.append(x)
        states.append(outputs)
    return [(a - b).square().mean().item() for a, b in zip(*states)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--cross", action="store_true", help="windows of two blocks (CR)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out")
    options = parser.parse_args()
    tokens = torch.from_numpy(np.load(common.data("calibration", "wiki_64x512.npy"))).long()
    samples, unseen = tokens[: options.samples], tokens[60:]
    dense = first_blocks(common.load_model(options.model)[0], options.blocks).to(options.device)
    on_gpu = options.device != "cpu"
    rows = []

    def keep(tool: str, compute: str, model, spent: common.Spent, train: float, steps: int) -> None:
        base = rows[0] if rows else None
        rows.append(
            {
                "tool": tool,
                "compute": compute,
                "cpu_seconds": spent.cpu,
                "wall_seconds": spent.wall,
                "train_wall_seconds": train,
                "steps": steps,
                "error": block_errors(dense, model, samples),
                "error_unseen": block_errors(dense, model, unseen),
            }
        )
        row = rows[-1]
        if base:
            row["faster_cpu"] = base["cpu_seconds"] / spent.cpu
            row["faster_wall"] = base["wall_seconds"] / spent.wall
            row["faster_train_wall"] = base["train_wall_seconds"] / train
        print(row, flush=True)

    model = copy.deepcopy(dense)
    with common.Spent() as spent:
        timer, _ = published_loop.reconstruct(
            model,
            samples,
            propagate=True,
            cross=options.cross,
            epochs=options.epochs,
            batch_size=options.batch_size,
            autocast=on_gpu,
        )
    windows = options.blocks + 1 if options.cross else options.blocks
    steps = -(-len(samples) // options.batch_size) * options.epochs * windows
    keep("published loop", "autocast" if on_gpu else "float32", model, spent, timer.seconds["train"], steps)
    for compute in ("float32", "bfloat16"):
        calibration = Calibration(source=samples, num_samples=len(samples), seq_len=samples.shape[1], held_out=0)
        settings = Reconstruction(epochs=options.epochs, batch_size=options.batch_size, autocast=compute)
        with common.Spent() as spent:
            result = pyprune.prune(
                copy.deepcopy(dense),
                reconstruct="cross_block" if options.cross else "block",
                global_propagation=True,
                calibration=calibration,
                compute_dtype=compute,
                reconstruction=settings,
                evaluation=Evaluation(enabled=False),
                in_place=True,
                progress=False,
                device=options.device,
            )
        training = [t for row in result.report["blocks"] for t in row["training"]]
        keep(
            "pyprune",
            compute,
            result.model,
            spent,
            sum(t["seconds"] for t in training),
            sum(t["steps"] for t in training),
        )
    setting = {key: value for key, value in vars(options).items() if key != "out"}
    print(common.write(NAME, rows, options.out, setting=setting))


if __name__ == "__main__":
    common.command_line(main)
