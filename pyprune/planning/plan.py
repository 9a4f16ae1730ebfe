"""What a run would take, before it is run: every weight and whether it is pruned, memory, disk, time.

Nothing is loaded: the model is built from its configuration without memory. Bytes are counted
(:mod:`pyprune.planning.costs`), seconds scaled from a rehearsal (:mod:`pyprune.planning.rehearsal`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyprune.config import ConfigError, Evaluation, PruneConfig
from pyprune.data import calibration
from pyprune.data.given import token_rows
from pyprune.effects import reads_sequences
from pyprune.evaluation.windows import refuse_text, window_tokens
from pyprune.execution.activation_store import available_memory
from pyprune.execution.device import pick_device, pick_dtype
from pyprune.execution.executor import SHARE, Resident
from pyprune.execution.residency import stays, weight_bytes
from pyprune.execution.unopened import Unopened
from pyprune.model import checkpoint
from pyprune.model.blocks import ModelView, WeightRef, check_apart, select_weights, uncovered, weights_of
from pyprune.model.names import matches
from pyprune.model.positions import Positions, positions_of
from pyprune.pipeline.checks import check_weights
from pyprune.pipeline.opening import models_whole, why_not_streamed
from pyprune.pipeline.phases import models_held
from pyprune.pipeline.prune import make_config
from pyprune.pipeline.sequences import calibration_data
from pyprune.pipeline.sparsities import Rules, Selected, check_patterns, kinds_for, weights_and_keys
from pyprune.planning.costs import (
    activations_of,
    disk_of,
    evaluation_windows,
    flops_of,
    kinds,
    memory_of,
    passes_of,
    runs_of,
    shapes_of,
    tokens_of,
    work_of,
)
from pyprune.planning.rehearsal import rehearsal_model, rehearse
from pyprune.reporting.record import config_for_report
from pyprune.sources import kind, split
from pyprune.sources import kinds as kinds_of
from pyprune.structured.groups import find_groups
from pyprune.structured.units import foreseen, group_paths, groups_and_keys

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyprune.keywords import Fields


def plan(
    model: str | Path | PruneConfig | dict | None = None,
    config: PruneConfig | dict | str | Path | None = None,
    **fields: Unpack[Fields],
) -> dict:
    """What :func:`pyprune.prune` would do: its arguments, for a model that has a name.

    Returns ``model``, ``settings``, ``weights`` (name, shape, ``prune``, ``why`` not), ``coverage``, ``achieved``
    (per sparsity, what was ``asked`` and what will be ``removed``), ``patterns`` (what each of ``targets`` and
    ``ignore`` names); ``memory_bytes``
    and, with a GPU, ``device_memory_bytes``, by part at the moment of the peak; ``free_bytes`` of both; ``disk_bytes``;
    ``calibration`` (``sequences``, ``tokens``, ``at_most`` where these are an upper bound), ``evaluation`` (``windows``
    and ``tokens``), ``passes``, ``streamed`` and ``streamed_because``;
    ``flops`` and ``seconds`` by phase; ``runs``, how often all blocks are gone through: for masks once per
    sparsity, all of which are counted. Text is read only where its length decides: an evaluation text of which
    everything is to be measured, and the calibration sequences of an encoder, each at its own length, if they lie here.
    Raises :class:`ConfigError` as :func:`pyprune.prune` would for everything that can be known without reading weights
    or data.
    """
    if isinstance(model, (PruneConfig, dict)):
        model, config = None, model
    if model is not None and not isinstance(model, (str, Path)):
        raise ConfigError(
            "a plan needs a model that has a name: a folder, a Hub id or a .gguf file, got a live "
            + type(model).__name__
        )
    config = make_config(config, fields if model is None else {**fields, "model": str(model)})
    asked = config.calibration
    if reads_sequences(config):
        config.calibration = calibration.coerce(config.calibration)
    name = config.model_name
    if config.output:
        checkpoint.check_output(config.output, allow=(".pyprune",))
    unopened = Unopened(name, config.dtype)
    view = unopened.view
    targeted = select_weights(view, config.targets, config.ignore)
    check_weights(view, targeted, config)
    refuse_text(config.evaluation, view)
    device = pick_device(config.device)
    gpu = device.type == "cuda"
    dtype = next(view.blocks.parameters()).dtype
    compute = pick_dtype(config.compute_dtype) or dtype
    rehearsed, narrowed = rehearsal_model(view.model.config, dtype)
    small = ModelView(rehearsed)
    check_apart(small)
    positions = positions_of(small)
    if config.evaluation.enabled and not view.is_encoder:
        config.evaluation = dataclasses.replace(config.evaluation, window=_window(config.evaluation, positions))
    fitting = calibration.within(asked, positions.count if positions else None)
    if reads_sequences(config) and fitting is not asked:
        config.calibration = calibration.coerce(fitting)
    if positions and not view.is_encoder and reads_sequences(config) and kinds_of(config.calibration.source) != {"ids"}:
        positions.check([config.calibration.tokens], "calibration sequences", "seq_len", lambda message: None)
    windows = evaluation_windows(view, config, functools.partial(_tokenizer, unopened))
    selected, rules, achieved = _to_prune(view, targeted, config, small, narrowed)
    weights, work = _weights(view, selected, targeted, config), work_of(view, selected, config)
    lengths = _lengths(unopened, config)
    tokens, at_most = tokens_of(config), lengths is None
    if lengths:  # bytes as of the longest sequence, seconds as of the average one
        tokens = sum(lengths)
        average = _of_length(config, math.ceil(tokens / len(lengths)))
        config = _of_length(config, max(lengths))
    else:
        average = config
    memory = available_memory()
    free = {"memory": memory, "device": torch.cuda.mem_get_info(device)[0] if gpu else None}
    streamed, why = unopened.streams(config.stream, why_not_streamed(config), models_whole(config))
    budget = memory / 2 if config.memory_budget_gb is None else config.memory_budget_gb * 1e9
    size = weight_bytes(view.model)
    keeps = gpu and not streamed and stays(models_held(config) * size, device)
    room = SHARE * (free["device"] - size * keeps) if free["device"] is not None else None
    in_files = max(0, int(activations_of(view, selected, config, compute, budget, room)[0] - budget))
    host, on_device = memory_of(view, selected, config, compute, streamed, gpu, budget, room or 0, keeps, windows)
    seconds = rehearse(average, view, work, small, streamed, windows)
    written = config_for_report(config)
    return {
        "model": {
            "name": name,
            "architecture": type(view.model).__name__,
            "blocks": len(view.blocks),
            "parameters": sum(p.numel() for p in view.model.parameters()),
            "dtype": str(dtype)[6:],
        },
        "settings": {
            **{
                name: written[name]
                for name in ("method", "criterion", "pattern", "sparsity", "reconstruct", "global_propagation")
            },
            "allocation": config.structured.allocation if config.is_structured else None,
        },
        "device": str(device),
        "compute_dtype": str(compute)[6:],
        "weights": weights,
        "coverage": view.coverage(selected),
        "achieved": achieved,
        "patterns": _patterns(view, config),
        "memory_bytes": {**host, "total": sum(host.values())},
        "device_memory_bytes": {**on_device, "total": sum(on_device.values())} if gpu else None,
        "free_bytes": free,
        "calibration": {
            "sequences": config.calibration.samples + config.calibration.self_generated,
            "tokens": tokens,
            "at_most": at_most,
        },
        "evaluation": {"windows": windows, "tokens": windows * config.evaluation.tokens},
        "runs": runs_of(config),
        "passes": {name: runs_of(config) * count for name, count in passes_of(config).counts().items()},
        "streamed": streamed,
        "streamed_because": why,
        "disk_bytes": {**disk_of(view, selected, config, streamed, in_files, rules), "free": _free_disk(config)},
        "flops": flops_of(view, work, average, windows),
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def _to_prune(
    view: ModelView, targeted: Selected, config: PruneConfig, small: ModelView, narrowed: bool
) -> tuple[Selected, Rules | None, list[dict]]:
    """Per block, the weights of those ``targeted`` that the run prunes; of sparsities by name the key of each; per
    sparsity what was asked and what goes. small: the rehearsal model; narrowed: its sizes are not the model's."""
    unknown: list[dict] = [{"asked": s, "removed": {}, "notes": []} for s in config.sparsities]
    if config.is_structured:
        few = find_groups(small, config.pattern, config.structured.head_scope)
        groups, keys = groups_and_keys(view, [few[min(i, len(few) - 1)] for i in range(len(view.blocks))], config)
        paths = [group_paths([block]) for block in groups]
        selected = [[ref for ref in refs if ref.path in own] for refs, own in zip(targeted, paths)]
        return selected, None, unknown if narrowed else foreseen(groups, config, keys)
    if not config.sparsity_by_name:
        return targeted, None, unknown
    check_patterns(view, targeted, config)
    alike = {path: kind for block in kinds_for(small, config, Resident()) for path, kind in block.items()}
    selected, rules = weights_and_keys(view, targeted, config, [alike for _ in view.blocks])
    check_weights(view, selected, config, rules)
    row = {"asked": config.sparsity, "removed": {}, "notes": [], "by_key": _by_key(view, config, rules)}
    return selected, rules, [row]


def _window(evaluation: Evaluation, positions: Positions | None) -> int:
    """Tokens of an evaluation window; of token ids, which keep whole rows, the longest row's."""
    if evaluation.window is None and kinds_of(evaluation.text) == {"ids"}:
        return max(len(row) for source in split(evaluation.text) for row in token_rows(source) or ())
    return window_tokens(evaluation, positions)


def _lengths(unopened: Unopened, config: PruneConfig) -> list[int] | None:
    """Tokens of each calibration sequence where they differ and can be read here; empty where all have as many as was
    asked for, or none are read; None where that is only their upper bound."""
    sources, view = {kind(source) for source in calibration.sources_of(config.calibration)}, unopened.view
    if not reads_sequences(config) or not (view.is_encoder or "ids" in sources):
        return []
    tokenizer = _tokenizer(unopened)
    if config.calibration.self_generated or "data set" in sources or (tokenizer is None and sources != {"ids"}):
        return None
    return [len(row) for row in calibration_data(config, view, tokenizer).sequences]


def _of_length(config: PruneConfig, tokens: int) -> PruneConfig:
    """The same for calibration sequences of so many tokens."""
    return dataclasses.replace(config, calibration=dataclasses.replace(config.calibration, seq_len=max(2, tokens)))


def _tokenizer(unopened: Unopened) -> Any:
    """The tokenizer of a model; None of a GGUF file, of which it takes as long to read as the weights."""
    return None if unopened.source.gguf_file else checkpoint.load_tokenizer(unopened.source)


def _by_key(view: ModelView, config: PruneConfig, rules: Rules | None) -> list[dict]:
    """By key of a mapping of sparsities, what is asked for and how many weights it concerns."""
    sizes: dict[str, int] = {}
    for block, keys in zip(view.blocks, rules or []):
        for ref, key in keys.items():
            sizes[key] = sizes.get(key, 0) + ref.view(block).numel()
    asked = config.sparsity_by_name
    return [{"key": key, "asked": asked[key], "weights": size} for key, size in sizes.items()]


def _weights(
    view: ModelView, selected: list[list[WeightRef]], targeted: list[list[WeightRef]], config: PruneConfig
) -> list[dict]:
    found: list[list[dict]] = [[] for _ in view.blocks]
    for block, refs, alike in kinds(view, selected):
        everything, plain, chosen = weights_of(block, routers=True), set(weights_of(block)), set(refs)
        shapes = shapes_of(block, everything)
        rest = [(name, list(block.get_parameter(name).shape)) for name in uncovered(block, everything)]
        for i in alike:
            for ref, shape in zip(everything, shapes):
                prune = ref in chosen
                found[i].append(
                    {
                        "name": view.name(i, ref),
                        "shape": list(shape),
                        "prune": prune,
                        "why": None
                        if prune
                        else f"no part of its {config.pattern}"
                        if ref in targeted[i] and config.is_structured and not config.sparsity_by_name
                        else "no key of sparsity names it"
                        if ref in targeted[i]
                        else "not among targets, or ignored"
                        if ref in plain
                        else "routes to experts: pruned if a target names such layers alone",
                    }
                )
            found[i] += [
                {
                    "name": view.full_name(i, name),
                    "shape": shape,
                    "prune": False,
                    "why": "no matrix that a linear layer multiplies by",
                }
                for name, shape in rest
            ]
    return [row for rows in found for row in rows]


def _patterns(view: ModelView, config: PruneConfig) -> list[dict]:
    """What each pattern of ``targets`` and ``ignore`` names: how many weights of the blocks, and some of them."""
    names = [view.name(i, ref) for i, block in enumerate(view.blocks) for ref in weights_of(block)]
    rows = []
    for field in ("targets", "ignore"):
        for pattern in getattr(config, field):
            found = [name for name in names if matches(name, [pattern])]
            rows.append(
                {
                    "field": field,
                    "pattern": pattern,
                    "weights": len(found),
                    "examples": found if len(found) < 4 else [*found[:2], found[-1]],
                }
            )
    return rows


def _free_disk(config: PruneConfig) -> int:
    place = Path(config.output or ".").expanduser().absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.is_dir())).free
