"""How long a run will take, from a rehearsal: two blocks of the very architecture, random weights, a few sequences.

The rehearsal is :func:`pyprune.prune` itself on this machine; its phases are scaled to all blocks and sequences by
what :mod:`pyprune.planning.costs` counts. Blocks too large to rehearse in a second or two are narrowed first.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import Calibration, Evaluation, PruneConfig
from pyprune.effects import measures_errors, reads_sequences, trains
from pyprune.execution.device import pick_device
from pyprune.execution.executor import target_tokens
from pyprune.model.attributes import (
    halve_sizes,
    positions_named,
    set_vocabulary,
    shortened,
    token_embedding,
    vocabulary_size,
)
from pyprune.model.blocks import ModelView, read_on, weights_of
from pyprune.model.shards import Shard, write_shard
from pyprune.model.skeleton import skeleton
from pyprune.pipeline.prune import prune
from pyprune.planning.costs import Work, passes_of, probe_sequences, runs_of, tokens_of, work_of, writes_once

LARGEST = 4e6
"""Parameters of a block that is rehearsed as it is; a larger one is narrowed to about this."""
BATCHES, PATIENCE, REPEATS = 2, 1.5, 3
"""Batches of a rehearsal. It is repeated until so many seconds or runs are spent; the fastest counts."""


SAMPLED, STEPS = 32, 8
"""Sequences that are sampled together, and tokens of each in a rehearsal."""


def rehearse(
    config: PruneConfig, view: ModelView, work: Work, own: ModelView, streamed: bool = False, windows: int = 0
) -> dict[str, float]:
    """Estimated seconds by phase of the whole run, of all its sparsities.

    work: of the model of ``view``, which may be without weights. own: its :func:`rehearsal_model`. windows: that
    perplexity will be measured on.
    """
    times = runs_of(config)
    config = (config.singles() or [config])[0]
    calibration = config.calibration
    longest = positions_named(view.model.config) or max(calibration.tokens, config.evaluation.tokens)
    length, window = min(calibration.tokens, longest), min(config.evaluation.tokens, longest)
    total = max(tokens_of(config) // calibration.tokens, 1)
    batch = config.batch_size or max(1, target_tokens(pick_device(config.device)) // length)
    count = min(total, BATCHES * batch)
    probes = min(config.probe_samples, 1) if measures_errors(config) else 0

    def ids(rows: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(5, vocabulary_size(own.model), (rows, tokens), generator=generator)

    def settings(rows: int, tokens: int, evaluation: Evaluation, epochs: int) -> PruneConfig:
        changed: dict[str, Any] = {"calibration": Calibration(), "evaluation": evaluation}
        if reads_sequences(config):
            changed["calibration"] = Calibration(source=ids(rows + probes, tokens), num_samples=rows, held_out=probes)
        if measures_errors(config):
            changed["probe_samples"] = probes
        if trains(config):
            changed["reconstruction"] = dataclasses.replace(config.reconstruction, epochs=epochs)
        if named := config.sparsity_by_name:
            changed["sparsity"] = max(named.values())  # its two blocks need not have these names
        return dataclasses.replace(config, model=None, output=None, targets=[], ignore=[], stream="never", **changed)

    prune(own.model, settings(1, 16, Evaluation(enabled=False), 0), progress=False)  # what only the first run pays
    texts = Evaluation(enabled=False)
    if config.evaluation.enabled and not view.is_encoder:
        texts = Evaluation(text=ids(1, window), dtype=config.evaluation.dtype, batch_size=config.evaluation.batch_size)
    asked = settings(count, length, texts, min(1, config.reconstruction.epochs))
    runs: list[dict] = []
    began = time.perf_counter()
    while not runs or (len(runs) < REPEATS and time.perf_counter() - began < PATIENCE):
        runs.append(prune(own.model, asked, progress=False).report["seconds"])
    found = {phase: min(run.get(phase, 0.0) for run in runs) for phase in runs[0]}

    small = work_of(own, [weights_of(b) for b in own.blocks], config)
    blocks = len(view.order)
    wider = blocks / 2 * work.passing(length) / small.passing(length)
    steps = [math.ceil(n / batch) for n in (count, total)]
    passes = [forward_units(n, depth, view, config) for n, depth in zip(steps, (2, blocks))]
    more = total / count
    scale = {
        "forward": passes[1] / passes[0] * more * steps[0] / steps[1] * wider * 2 / blocks,
        "probe": wider * probe_sequences(config) / max(probe_sequences(asked), 1),
        "statistics": blocks / 2 * more * work.statistics / max(small.statistics, 1),
        "solve": view.distinct / own.distinct * work.solve / max(small.solve, 1),
        "reconstruct": more * wider * max(config.reconstruction.epochs, 1),
        "gradients": more * wider,
    }
    outside = ("evaluation", "load", "write", "calibration")
    seconds = {phase: times * value * scale.get(phase, wider) for phase, value in found.items() if phase not in outside}
    seconds["evaluation"] = (
        (1 + times)
        / 2  # the rehearsal measures the dense model and one pruned one
        * found.get("evaluation", 0.0)
        * windows
        * (config.evaluation.tokens / window)
        * (blocks * work.passing(window) + work.head)
        / (2 * small.passing(window) + small.head)
    )
    seconds["sampling"] = sampling_seconds(config, view, work, own, small)
    stored = sum(p.numel() * p.element_size() for p in view.model.parameters())
    rates = disk_rates(config.output)
    seconds["load"] = stored / rates["read"]
    if config.output:
        seconds["write"] = times * (1 if writes_once(view, config, streamed) else 2) * stored / rates["write"]
    return {phase: value for phase, value in seconds.items() if value}


@torch.no_grad()
def sampling_seconds(config: PruneConfig, view: ModelView, work: Work, own: ModelView, small: Work) -> float:
    """Seconds until the dense model has sampled its calibration sequences; 0 where a file has some of them already.

    work, small: of ``view`` and of ``own``, in which a few tokens are sampled.
    """
    settings = config.calibration
    path = settings.self_generated_path
    if not settings.self_generated or (path and Path(path).is_file()):
        return 0.0
    count = min(settings.self_generated, SAMPLED)
    tokens, cache = torch.full((count, 1), 5), None
    _, cache = read_on(own.model, tokens, cache)  # what only the first step pays
    began = time.perf_counter()
    for _ in range(STEPS):
        _, cache = read_on(own.model, tokens, cache)
    step = (time.perf_counter() - began) / STEPS
    larger = (len(view.order) * work.passing(settings.tokens) + work.head) / (2 * small.passing(STEPS) + small.head)
    return math.ceil(settings.self_generated / count) * settings.tokens * step * larger


def forward_units(steps: int, blocks: int, view: ModelView, config: PruneConfig) -> float:
    """Passes of a batch through a block: the statistics pass ends before the last product from its second batch on
    where nobody asks for its output, and the last block is not propagated."""
    passes = passes_of(config)
    if not passes.forward:
        return 1.0
    refs = weights_of(view.blocks[0])
    sizes = [math.prod(ref.view(view.blocks[0]).shape) for ref in refs]
    whole = passes.keeps_outputs or any(ref.expert is not None for ref in refs)
    stopped = 1.0 if whole else 1 - sizes[-1] / sum(sizes)
    return (
        passes.statistics * blocks * (1 + (steps - 1) * stopped)
        + passes.propagation * (blocks - 1) * steps
        + (passes.dense + passes.allocation) * blocks * steps
    )


def rehearsal_model(config: Any, dtype: torch.dtype) -> tuple[nn.Module, bool]:
    """Two blocks of an architecture with random weights, and whether they are narrower than the real ones. A
    large vocabulary is made smaller beside them."""
    small, narrowed = shortened(config, blocks=2, experts=8)
    while True:
        model = skeleton(small, dtype)
        view = ModelView(model)
        if max(sum(p.numel() for p in block.parameters()) for block in view.blocks) <= LARGEST:
            break
        halve_sizes(small)
        narrowed = True
    if token_embedding(model).weight.numel() > 2 * LARGEST:
        set_vocabulary(small, 4096)
        model = skeleton(small, dtype)
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    value = torch.randn(p.shape, generator=generator) * 0.02 if p.ndim > 1 else torch.ones(p.shape)
                    made[id(p)] = nn.Parameter(value.to(dtype), requires_grad=False)
                module._parameters[name] = made[id(p)]
    return model, narrowed


def disk_rates(folder: str | Path | None, size: int = 32 * 2**20) -> dict[str, float]:
    """Bytes a second at which shards are written and read where the output goes: checksum and fsync included, and the
    page cache asked to forget what was written."""

    place = Path(folder or tempfile.gettempdir()).expanduser().absolute()
    place = next(p for p in (place, *place.parents) if p.is_dir())
    with tempfile.TemporaryDirectory(dir=place, prefix=".pyprune-plan-") as inside:
        path = Path(inside) / "x.safetensors"
        data = torch.zeros(size, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        write_shard(path, {"x": data})
        written = time.perf_counter() - start
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
        start = time.perf_counter()
        Shard(path).read("x")
        return {"write": size / written, "read": size / (time.perf_counter() - start)}
