"""What a run will take, from a rehearsal: two blocks of the very architecture, random weights, a few sequences.

The rehearsal is :func:`pyprune.prune` itself on this machine; its phases are scaled to all blocks and sequences by
counts and FLOPs. Blocks too large to rehearse in seconds are narrowed first and scaled by FLOPs. Bytes are arithmetic:
no weights are read, so any configuration can be planned, however large.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig
from pyprune.model import ModelView, WeightRef, weights_of
from pyprune.store import DEPTH, available_memory
from pyprune.stream import TARGET_TOKENS

LARGEST = 24e6
"""Parameters of a block that is rehearsed as it is; a larger one is narrowed to about this."""
BATCHES, REPEATS = 3, 2
"""Batches of a rehearsal; how often it is run, the fastest counting."""
PROCESS = 700 * 2**20
"""Bytes of a process that has imported torch and transformers and done nothing."""


@dataclasses.dataclass
class Work:
    """FLOPs of one block and of the head, by what they scale with."""

    forward: float
    """A token through the block's matrices that are active for it."""
    gram: float
    """A token into the block's Gram matrices."""
    solve: float
    """Factorisations and sweeps."""
    head: float
    """A token through the output layer."""


def work_of(view: ModelView, selected: list[list[WeightRef]]) -> Work:
    """Average over the blocks of a model, which may be without weights."""
    forward = gram = solve = 0.0
    config = view.model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or experts
    for block, refs in zip(view.blocks, selected):
        share = {ref.path: active / experts if ref.expert is not None else 1.0 for ref in weights_of(block)}
        forward += sum(2 * p.numel() * share.get(name, 1.0) for name, p in block.named_parameters() if p.ndim >= 2)
        for width, count, shared in inputs_of(block, refs):
            gram += width**2 * shared * (active / experts if count > 1 else 1)
            solve += 2 * width**3 * shared
        solve += sum(2 * math.prod(ref.view(block).shape) * ref.view(block).shape[1] for ref in refs)
    head = getattr(view.model, "get_output_embeddings", lambda: None)()
    blocks = len(view.blocks)
    return Work(forward / blocks, gram / blocks, solve / blocks, 0.0 if head is None else 2.0 * head.weight.numel())


def inputs_of(block: nn.Module, refs: list[WeightRef]) -> list[tuple[int, int, int]]:
    """(width, experts of its kind, inputs) of the distinct inputs of a block's weights: neighbours of one module and
    width share theirs, but for its last weight, which consumes what the others produce; every expert has its own."""
    groups: dict[tuple, tuple[int, int, int]] = {}
    for place, ref in enumerate(refs):
        width = ref.view(block).shape[1]
        if ref.expert is not None:
            experts = ref.parameter(block).shape[0]
            groups[ref.path, width] = (width, experts, experts)
            continue
        parent = ref.module_path.rpartition(".")[0]
        last = place + 1 == len(refs) or refs[place + 1].module_path.rpartition(".")[0] != parent
        groups[parent, width, last] = (width, 1, 1)
    return list(groups.values())


# ---- time ----------------------------------------------------------------------------------------------------------

def rehearsal_model(config: Any, dtype: torch.dtype) -> tuple[nn.Module, bool]:
    """Two blocks of an architecture with random weights, and whether they are narrower than the real ones."""
    from pyprune.weights import skeleton

    small, narrowed = copy.deepcopy(config), False
    small.num_hidden_layers = 2
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    for name in ("num_experts", "num_local_experts"):
        if (getattr(small, name, None) or 0) > 8:
            setattr(small, name, 8)
            narrowed = True
    while True:
        model = skeleton(small, dtype)
        view = ModelView(model)
        if max(sum(p.numel() for p in block.parameters()) for block in view.blocks) <= LARGEST:
            break
        for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "word_embed_proj_dim", "ffn_dim", "n_inner"):
            value = getattr(small, name, None)
            if isinstance(value, int) and value > 1:
                setattr(small, name, value // 2)
        narrowed = True
    if model.get_input_embeddings().weight.numel() > 2 * LARGEST:
        small.vocab_size, narrowed = 4096, True
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


def rehearse(hf_config: Any, config: PruneConfig, view: ModelView, selected: list[list[WeightRef]],
             dtype: torch.dtype) -> dict[str, float]:
    """Estimated seconds by phase of the whole run."""
    from pyprune.prune import prune

    calibration = config.calibration
    model, _ = rehearsal_model(hf_config, dtype)
    own = ModelView(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(hf_config, "max_position_embeddings", None) or max(calibration.seq_len, config.evaluation.window)
    length = min(calibration.seq_len, longest)
    total = calibration.num_samples + (calibration.self_generated if calibration.self_generated_for == "all" else 0)
    batch = config.batch_size or max(1, TARGET_TOKENS // length)
    count = min(max(total, 1), BATCHES * batch)

    def ids(rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(5, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))

    windows, window = 2, min(config.evaluation.window, longest)
    evaluation = dataclasses.replace(config.evaluation, text=ids(windows, window))
    held_out = min(calibration.held_out, config.probe_samples)
    fields = {**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, "model": None, "output": None,
              "targets": [], "ignore": [], "evaluation": Evaluation(enabled=False), "stream": "never"}
    warm = Calibration(source=ids(1 + held_out, 16), num_samples=1, seq_len=16, held_out=held_out)
    prune(model, PruneConfig(**{**fields, "calibration": warm}), progress=False)
    full = Calibration(source=ids(count + held_out, length), num_samples=count, seq_len=length, held_out=held_out)
    full = PruneConfig(**{**fields, "calibration": full, "evaluation": evaluation})
    runs = [prune(model, full, progress=False).report["seconds"] for _ in range(REPEATS)]
    found = {phase: min(run.get(phase, 0.0) for run in runs) for phase in runs[0]}
    small, large = work_of(own, [weights_of(b) for b in own.blocks]), work_of(view, selected)
    blocks, more = len(view.blocks), max(total, 1) / count
    steps = [math.ceil(n / batch) for n in (count, max(total, 1))]
    passes = [forward_units(n, depth, view, config) for n, depth in zip(steps, (2, blocks))]
    scale = {
        "forward": passes[1] / passes[0] * (more * steps[0] / steps[1]) * large.forward / small.forward,
        "probe": blocks / 2 * large.forward / small.forward,
        "statistics": blocks / 2 * more * large.gram / max(small.gram, 1),
        "solve": blocks / 2 * large.solve / max(small.solve, 1),
        "reconstruct": blocks / 2 * more * large.forward / small.forward,
    }
    outside = ("evaluation", "load", "write", "calibration")
    seconds = {phase: value * scale.get(phase, blocks / 2 * large.forward / small.forward)
               for phase, value in found.items() if phase not in outside}
    if config.evaluation.enabled and not own.is_encoder:
        from pyprune.texts import sources

        asked = len(sources(config.evaluation.text)) * (config.evaluation.max_windows or 0)
        seconds["evaluation"] = found.get("evaluation", 0.0) * asked / windows * config.evaluation.window / window * (
            (blocks * large.forward + large.head) / (2 * small.forward + small.head))
    stored = sum(p.numel() * p.element_size() for p in view.model.parameters())
    read, write = disk_rates(config)
    seconds["load"] = stored / read
    if config.output:
        seconds["write"] = 2 * stored / write
    return {phase: value for phase, value in seconds.items() if value}


def forward_units(steps: int, blocks: int, view: ModelView, config: PruneConfig) -> float:
    """Passes of a batch through a block: the statistics pass ends before the last product from its second batch on,
    and the last block is not propagated."""
    if config.inputs == "dense":
        return steps * blocks
    refs = weights_of(view.blocks[0])
    sizes = [math.prod(ref.view(view.blocks[0]).shape) for ref in refs]
    stopped = 1.0 if any(ref.expert is not None for ref in refs) else 1 - sizes[-1] / sum(sizes)
    return blocks * (1 + (steps - 1) * stopped) + (blocks - 1) * steps


def disk_rates(config: PruneConfig, size: int = 32 * 2**20) -> tuple[float, float]:
    """Bytes a second that shards are read and written at, checksum and fsync included, where the output goes."""
    from pyprune.shards import Shard, write_shard

    place = Path(config.output or tempfile.gettempdir()).expanduser().absolute()
    place = next(p for p in (place, *place.parents) if p.is_dir())
    with tempfile.TemporaryDirectory(dir=place, prefix=".pyprune-plan-") as folder:
        path = Path(folder) / "x.safetensors"
        start = time.perf_counter()
        write_shard(path, {"x": torch.zeros(size, dtype=torch.uint8)})
        middle = time.perf_counter()
        Shard(path).read("x")
        return size / (time.perf_counter() - middle), size / (middle - start)


# ---- bytes ---------------------------------------------------------------------------------------------------------

def memory_of(view: ModelView, selected: list[list[WeightRef]], config: PruneConfig, compute: torch.dtype,
              streamed: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes by part, of the host and of a GPU; on a CPU run both lie in host memory."""
    hidden = view.model.get_input_embeddings().weight.shape[1]
    calibration = config.calibration
    tokens = (calibration.num_samples + calibration.self_generated) * calibration.seq_len
    batch = config.batch_size or max(1, TARGET_TOKENS // calibration.seq_len)
    numels = [sum(p.numel() for p in block.parameters()) for block in view.blocks]
    own = next(view.blocks.parameters()).dtype.itemsize
    rest = sum(p.numel() for p in view.model.parameters()) - sum(numels)
    widths = [inputs_of(block, refs) for block, refs in zip(view.blocks, selected)]
    grams = max((sum(4 * w * w * k for w, _, k in block) for block in widths), default=0)
    widest = max((w for block in widths for w, _, _ in block), default=0)
    matrix = max((math.prod(ref.view(b).shape) for b, refs in zip(view.blocks, selected) for ref in refs), default=0)
    factors = 6 * 4 * widest * widest if config.method == "sparsegpt" or config.reconstruct != "none" else 0
    if config.method != "sparsegpt" and config.reconstruct == "none" and not config.is_structured:
        grams = 0
    trains = config.reconstruct in ("block", "cross_block")
    streams = (2 if config.global_propagation or trains else 1) + (config.reconstruct == "cross_block")
    window = 2 if config.reconstruct == "cross_block" else 1
    device = {
        "block": 2 * max(numels) * compute.itemsize,
        "statistics": grams,
        "solve": factors + 3 * 4 * matrix,
        "batches": (DEPTH + 6) * batch * calibration.seq_len * max(hidden, widest) * compute.itemsize,
        "training": window * max(numels) * 20 if trains else 0,
    }
    logits = 0 if view.is_encoder or not config.evaluation.enabled else \
        config.evaluation.batch_size * config.evaluation.window * view.model.get_input_embeddings().weight.shape[0] * 4
    host = {
        "process": PROCESS,
        "weights": (rest + 2 * max(numels)) * own if streamed else (rest + sum(numels)) * own,
        "activations": streams * tokens * hidden * compute.itemsize,
        "evaluation": logits,
    }
    return host, device


def will_stream(config: PruneConfig, stored: int) -> tuple[bool, str]:
    """Whether the weights would be streamed, and why (names in the files may still forbid it)."""
    from pyprune.weights import SHARE, _obstacle

    obstacle = _obstacle(config)
    if config.stream == "never":
        return False, "stream is never"
    if obstacle is not None:
        if config.stream == "always":
            raise ConfigError(f"{config.model} cannot be streamed: {obstacle}")
        return False, obstacle
    if config.stream == "always":
        return True, "stream is always"
    free = available_memory()
    return (True, f"{stored / 1e9:.1f} GB of weights are more than half of the {free / 1e9:.1f} GB that are free") \
        if stored >= SHARE * free else (False, "it fits into memory")


def passes_of(config: PruneConfig) -> dict[str, int]:
    """Forward passes of the calibration data through every block."""
    if not config.is_structured and config.method == "magnitude" and config.reconstruct == "none":
        return {"statistics": 0, "propagation": 0, "dense": 0}
    trains = config.reconstruct in ("block", "cross_block")
    return {"statistics": 1, "propagation": int(config.inputs == "propagated"),
            "dense": int(trains or config.global_propagation),
            "training": 0 if not trains else config.reconstruction.epochs * (1 + (config.reconstruct == "cross_block"))}
