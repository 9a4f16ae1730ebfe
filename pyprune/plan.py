"""What a run would take, before it is run: every weight and whether it is pruned, memory, disk, time.

Nothing is loaded: the model is built from its configuration without memory. Bytes are counted, seconds scaled from a
rehearsal (:mod:`pyprune.planning`).
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from pyprune import checkpoint
from pyprune.config import ConfigError, PruneConfig, override
from pyprune.evaluate import pick_device
from pyprune.model import ModelView, WeightRef, select_weights, uncovered, weights_of
from pyprune.planning import memory_of, passes_of, rehearse, will_stream
from pyprune.texts import sources


def plan(config: PruneConfig | dict) -> dict:
    """What :func:`pyprune.prune` would do with this configuration, which names its model.

    Returns ``model``, ``weights`` (name, shape, ``prune``, ``why`` not), ``coverage``, ``memory_bytes`` and
    ``device_memory_bytes`` by part, ``disk_bytes``, ``passes``, ``streamed``, ``flops`` and ``seconds`` by phase.
    Raises :class:`ConfigError` as :func:`pyprune.prune` would for everything that can be known without reading weights
    or data.
    """
    config = override(config, {}) if isinstance(config, PruneConfig) else override(None, config)
    if config.model is None:
        raise ConfigError("no model: give a Hub id, a local folder or a .gguf file")
    if config.output:
        checkpoint.check_output(config.output, allow=".pyprune")
    view = ModelView(_skeleton(config))
    selected = select_weights(view, config.targets, config.ignore)
    device = pick_device(config.device)
    dtype = next(view.blocks.parameters()).dtype
    compute = dtype if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)
    weights, flops = _weights(view, selected, config), _flops(view, selected, config)
    seconds = rehearse(view.model.config, config, view, selected, dtype)
    parameters = sum(p.numel() for p in view.model.parameters())
    streamed, why = will_stream(config, parameters * dtype.itemsize)
    host, on_device = memory_of(view, selected, config, compute, streamed)
    if device.type == "cpu":
        host, on_device = {**host, **on_device}, {}
    return {
        "model": {"name": config.model, "architecture": type(view.model).__name__, "blocks": len(view.blocks),
                  "parameters": parameters, "dtype": str(dtype)[6:]},
        "device": str(device), "compute_dtype": str(compute)[6:],
        "weights": weights, "coverage": view.coverage(selected),
        "memory_bytes": {**host, "total": sum(host.values())},
        "device_memory_bytes": {**on_device, "total": sum(on_device.values())} if on_device else None,
        "passes": passes_of(config), "streamed": streamed, "streamed_because": why,
        "disk_bytes": _disk(config, parameters * dtype.itemsize),
        "flops": flops, "seconds": {**seconds, "total": sum(seconds.values())},
    }


def _skeleton(config: PruneConfig) -> torch.nn.Module:
    from pyprune.weights import skeleton

    source = checkpoint.resolve(config.model)
    found = checkpoint.load_config(config.model)
    if source.gguf_file and not found.architectures:
        import transformers

        found.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(found)].__name__]
    named = getattr(found, "dtype", None) if config.dtype == "auto" else getattr(torch, config.dtype)
    return skeleton(found, named if isinstance(named, torch.dtype) else torch.float32)


def _weights(view: ModelView, selected: list[list[WeightRef]], config: PruneConfig) -> list[dict]:
    rows = []
    for i, (block, refs) in enumerate(zip(view.blocks, selected)):
        for ref in weights_of(block):
            shape = list(ref.view(block).shape)
            if ref in refs and config.nm and shape[1] % config.nm[1]:
                raise ConfigError(f"pattern {config.pattern} does not divide the {shape[1]} inputs of "
                                  f"{view.name(i, ref)}; choose another pattern or ignore that weight")
            rows.append({"name": view.name(i, ref), "shape": shape, "prune": ref in refs,
                         "why": None if ref in refs else "not among targets, or ignored"})
        rows += [{"name": f"{view.path}.{i}.{name}", "shape": list(block.get_parameter(name).shape), "prune": False,
                  "why": "no matrix that a linear layer multiplies by"} for name in uncovered(block, weights_of(block))]
    return rows


def _inputs(block, refs: list[WeightRef]) -> list[int]:
    """Widths of the distinct inputs of a block's weights, near enough: neighbours of one module and width share theirs,
    but for its last weight, which consumes what the others produce."""
    groups: dict[tuple[str, int, bool], int] = {}
    for place, ref in enumerate(refs):
        parent = ref.module_path.rpartition(".")[0]
        last = place + 1 == len(refs) or refs[place + 1].module_path.rpartition(".")[0] != parent
        groups[parent, ref.view(block).shape[1], last] = ref.view(block).shape[1]
    return list(groups.values())


def _flops(view: ModelView, selected: list[list[WeightRef]], config: PruneConfig) -> dict[str, float]:
    """FLOPs by phase; a phase that does not happen is left out."""
    calibration, tokens = config.calibration, _tokens(config)
    matrices = sum(p.numel() for p in view.blocks.parameters() if p.ndim >= 2)
    forward = 2 * tokens * matrices
    uses_data = config.is_structured or config.method != "magnitude" or config.reconstruct != "none"
    passes = (2 if config.inputs == "propagated" else 1) if uses_data else 0
    probes = 2 * config.probe_samples * calibration.seq_len * 2 * matrices
    found = {"forward": passes * forward + 2 * probes, "gram": 0.0, "solve": 0.0}
    if config.is_structured or config.method == "sparsegpt" or config.reconstruct == "layer":
        for block, refs in zip(view.blocks, selected):
            widths = _inputs(block, refs)
            found["gram"] += sum(tokens * c * c for c in widths)
            found["solve"] += sum(float(c) ** 3 for c in widths)
            found["solve"] += sum(math.prod(ref.view(block).shape) * ref.view(block).shape[1] for ref in refs)
    if config.reconstruct in ("block", "cross_block"):
        found["reconstruct"] = 3 * forward * config.reconstruction.epochs * (1 + (config.reconstruct == "cross_block"))
    if config.evaluation.enabled and not view.is_encoder:
        windows = config.evaluation.max_windows or 0
        found["evaluation"] = 2 * len(sources(config.evaluation.text)) * windows * config.evaluation.window * 2 * sum(
            p.numel() for p in view.model.parameters())
    return {phase: count for phase, count in found.items() if count}


def _tokens(config: PruneConfig) -> int:
    return (config.calibration.num_samples + config.calibration.self_generated) * config.calibration.seq_len


def _disk(config: PruneConfig, checkpoint_bytes: int) -> dict:
    """Finished blocks are kept beside the checkpoint that is assembled from them until that is whole."""
    place = Path(config.output or ".").expanduser().absolute()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.is_dir())).free
    return {"checkpoint": checkpoint_bytes, "while_running": 2 * checkpoint_bytes, "free": free}
