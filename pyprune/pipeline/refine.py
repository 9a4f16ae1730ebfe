"""``pyprune.refine``: block-wise reconstruction of a live model that is pruned already, by pyprune or anything else."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyprune.config import (
    Calibration,
    ConfigError,
    Evaluation,
    Reconstruction,
    check_dtype,
    check_effects,
    from_dict,
    to_dict,
)
from pyprune.data import calibration as calibration_data
from pyprune.data.calibration import CalibrationData
from pyprune.execution import distributed
from pyprune.execution.device import pick_device, pick_dtype
from pyprune.execution.executor import Executor
from pyprune.execution.journal import Journal
from pyprune.execution.progress import Progress
from pyprune.execution.run import Findings
from pyprune.keywords import refine_fields
from pyprune.model.attributes import embedding_width, vocabulary_size
from pyprune.model.blocks import ModelView, check_apart, check_finite, check_usable
from pyprune.model.positions import positions_of
from pyprune.packed.loading import opened
from pyprune.pipeline.block_loop import Loop, run_blocks
from pyprune.pipeline.prune import given_sections
from pyprune.pipeline.refine_work import RefineWork
from pyprune.pipeline.sequences import add_generated, lengths_of

NO_EFFECT = (lambda _: False, "refining solves no layers, it trains; only pyprune prune uses it")


def refine(
    model: Any,
    dense: Any = None,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    output: str | Path | None = None,
    cross_block: bool = False,
    global_propagation: bool = True,
    settings: Reconstruction | None = None,
    compute_dtype: torch.dtype | str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    **fields: Any,
) -> list[dict]:
    """Train ``model``, block by block, to give the outputs of ``dense`` (arXiv 2406.15524).

    model: a live model or the result of :func:`pyprune.prune`, trained in place; or a folder that pyprune wrote, whose
    refined model goes to the folder ``output``. dense: a live model, or what :func:`pyprune.load` takes; None: what the
    result or the folder says it was pruned from.
    calibration: a :class:`pyprune.Calibration`, or its source in any form that :func:`pyprune.prune` takes.
    fields: settings of calibration and training by the names of their options (``num_samples=``, ``epochs=``); with
    ``output`` also those of evaluation.
    tokenizer: needed for text. cross_block: train windows of two blocks instead of one.
    global_propagation: the targets are the dense model's own activations instead of its outputs on pruned inputs.
    settings: steps, learning rate, batch, selection by held-out error, as in :class:`pyprune.Reconstruction`.
    compute_dtype: number type of the forward passes; None is the weights' own. device: as in ``PruneConfig``.
    progress: is called with (blocks done, blocks in all). warn: is called with a sentence where the calibration data
    are thin, and when memory ran out and the run goes on with fewer sequences at a time.
    Under ``torchrun`` every process calls it with the same models; they share the calibration sequences.
    Returns one row per window: ``blocks``, ``steps``, ``seconds``, ``diverged`` and the relative errors of the window's
    output, ``before_calibration``, ``after_calibration``, ``before_held_out`` and ``after_held_out``.
    Raises ConfigError if the two models do not have the same blocks, hidden size and vocabulary.
    """
    asked = _settings(calibration, settings, fields)
    if isinstance(model, (str, Path)):
        return _refine_folder(
            model,
            output,
            dense=dense,
            cross_block=cross_block,
            global_propagation=global_propagation,
            compute_dtype=compute_dtype or "auto",
            device=device,
            seed=seed,
            reconstruction=asked.pop("settings"),
            **asked,
        )
    if output is not None or "evaluation" in asked:
        raise ConfigError(
            "output and evaluation settings are for a folder: a live model is trained in place; save it afterwards"
        )
    started, result = time.perf_counter(), model
    model, tokenizer = opened(model, tokenizer)
    if dense is None:
        dense = getattr(getattr(result, "config", None), "model", None) if result is not model else None
        if dense is None:
            raise ConfigError("refine needs the dense model, a live one or its name: pyprune.refine(pruned, dense)")
    named = str(dense) if isinstance(dense, (str, Path)) else type(dense).__name__
    dense, dense_tokenizer = opened(dense)
    tokenizer = tokenizer or dense_tokenizer
    calibration, settings = asked["calibration"], asked["settings"]
    compute_dtype = pick_dtype(check_dtype("auto" if compute_dtype is None else compute_dtype, "compute_dtype"))
    views = ModelView(model), ModelView(dense)
    for view in views:
        check_usable(view)
        check_finite(view.model.state_dict().items())
    data = sequences_for(*views, calibration, tokenizer, settings, seed)
    world, failed = distributed.start(), True
    found = Findings(warnings=list(data.warnings))
    try:
        where = pick_device(device)  # after the processes have taken a GPU each
        executors = [
            Executor(view, device=where, compute_dtype=compute_dtype, world=world, warn=found.warn) for view in views
        ]
        work = RefineWork(
            executors[0],
            executors[1],
            data,
            settings,
            cross_block=cross_block,
            global_propagation=global_propagation,
            seed=seed,
            found=found,
            journal=Journal(None),
        )
        with Progress(len(views[0].blocks), enabled=False, listener=progress) as bar:
            run_blocks(Loop(executors[0], work.journal, found, world, seed, None), work, bar)
        failed = False
    finally:
        world.close(failed)
        for message in found.warnings:
            warn(message)
    rows = [row for rows in work.windows for row in rows]
    if isinstance(getattr(result, "report", None), dict):
        result.report["refinement"] = {
            "dense": named,
            "cross_block": cross_block,
            "global_propagation": global_propagation,
            "settings": to_dict(settings),
            "windows": rows,
            "evaluation": [],
            "seconds": time.perf_counter() - started,
            "warnings": found.warnings,
        }
    return rows


def _settings(calibration: Any, settings: Reconstruction | None, fields: dict) -> dict[str, Any]:
    """``calibration`` and ``settings`` with the keywords that belong to them, and ``evaluation`` if any was given."""
    given = {**fields, **({} if calibration is None else {"calibration": calibration})}
    if settings is not None:
        given["reconstruction"] = settings
    sections = given_sections(given, [path for path in refine_fields() if "." in path])
    found = {"calibration": Calibration, "reconstruction": Reconstruction, "evaluation": Evaluation}
    made: dict[str, Any] = {
        name: value if isinstance(value := sections.get(name, {}), cls) else from_dict(cls, value, name)
        for name, cls in found.items()
        if name in sections or name != "evaluation"
    }
    made["settings"] = made.pop("reconstruction")
    return made


def _refine_folder(folder: str | Path, output: str | Path | None, **fields: Any) -> list[dict]:
    """Refine a checkpoint; what was measured lies in the output's ``refinement.json``."""
    from pyprune.pipeline.refine_checkpoint import refine_checkpoint

    if output is None:
        raise ConfigError(
            f"refine({str(folder)!r}) would lose what it trains: give output=, a folder for the refined model, or load "
            "the model first"
        )
    if fields["dense"] is not None and not isinstance(fields["dense"], (str, Path)):
        raise ConfigError("the dense model of a folder is named, by a folder, a Hub id or a .gguf file")
    return refine_checkpoint(folder, output, **fields)["windows"]


def sequences_for(
    pruned: ModelView,
    dense: ModelView,
    calibration,
    tokenizer,
    settings: Reconstruction,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationData:
    """Calibration and held-out sequences for a pair of models; ConfigError where anything does not fit."""
    sizes = [(len(view.blocks), vocabulary_size(view.model), embedding_width(view.model)) for view in (pruned, dense)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            "the pruned and the dense model must have the same blocks, vocabulary and hidden size, got "
            f"{sizes[0]} and {sizes[1]}"
        )
    check_apart(pruned, dense)
    chosen: Calibration = calibration_data.coerce(calibration)
    if chosen.seed is None:
        chosen = dataclasses.replace(chosen, seed=seed)
    check_effects(chosen, {"self_generated_for": NO_EFFECT}, "calibration")
    check_effects(settings, {"layerwise_target": NO_EFFECT}, "reconstruction")
    data = calibration_data.load(
        chosen, tokenizer, encoder=pruned.is_encoder, vocab_size=sizes[0][1], model_config=pruned.model.config
    )
    if positions := positions_of(pruned):
        positions.check(lengths_of(data, chosen), "calibration sequences", "seq_len", data.warnings.append)
    if chosen.self_generated:
        add_generated(data, chosen, dense.model, tokenizer, progress)
    if (settings.select == "validation" or settings.early_stop) and not data.held_out:
        raise ConfigError(
            "select='validation' and early_stop need held-out sequences: set held_out above 0, or give "
            "more calibration text"
        )
    return data
