"""``pyprune.refine``: block-wise reconstruction of a live model that is pruned already, by pyprune or anything else."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyprune import ops
from pyprune.config import ConfigError, Reconstruction, check_dtype
from pyprune.data import calibration as calibration_data
from pyprune.execution import distributed
from pyprune.execution.device import pick_device, pick_dtype
from pyprune.execution.executor import Executor
from pyprune.execution.journal import Journal
from pyprune.execution.progress import Progress
from pyprune.execution.run import Findings
from pyprune.keywords import refine_fields
from pyprune.model.blocks import ModelView, check_finite, check_usable
from pyprune.packed.loading import opened
from pyprune.pipeline.block_loop import Loop, run_blocks
from pyprune.pipeline.prune import given_sections
from pyprune.pipeline.refine_checkpoint import refine_checkpoint
from pyprune.pipeline.refine_request import Refinement, live, recipe
from pyprune.pipeline.refine_work import RefineWork
from pyprune.pipeline.sequences import sequences_of_pair
from pyprune.pipeline.session import settle_backends
from pyprune.pipeline.tracking import Track, tracker


def refine(
    model: Any = None,
    dense: Any = None,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    output: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    cross_block: bool | None = None,
    global_propagation: bool | None = None,
    settings: Reconstruction | None = None,
    compute_dtype: torch.dtype | str | None = None,
    device: str | None = None,
    seed: int | None = None,
    track: Track | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    **fields: Any,
) -> list[dict]:
    """Train ``model``, block by block, to give the outputs of ``dense`` (arXiv 2406.15524).

    model: a live model or the result of :func:`pyprune.prune`, trained in place; or a folder that pyprune wrote, whose
    refined model goes to the folder ``output``. dense: a live model, or what :func:`pyprune.load` takes; None: what the
    result, the folder or ``config`` says it was pruned from.
    calibration: a :class:`pyprune.Calibration`, or its source in any form that :func:`pyprune.prune` takes.
    config: the path of a ``refine.yaml`` to repeat, or a mapping of its fields; all other arguments override it. With
    a live model its folders are left aside.
    fields: settings of calibration and training by the names of their options (``num_samples=``, ``epochs=``); with
    ``output`` also those of evaluation.
    tokenizer: needed for text. cross_block: train windows of two blocks instead of one (default False).
    global_propagation: the targets are the dense model's own activations instead of its outputs on pruned inputs
    (default True).
    settings: steps, learning rate, batch, selection by held-out error, as in :class:`pyprune.Reconstruction`.
    compute_dtype: number type of the forward passes; None is the weights' own. device: as in ``PruneConfig``. seed: of
    all random choices, 0 by default.
    track: called with (block, scalars by name) after each block, or ``"tensorboard:FOLDER"``, as for
    :func:`pyprune.prune`. progress: is called with (blocks done, blocks in all). warn: is called with a sentence where
    the calibration data are thin, and when memory ran out and the run goes on with fewer sequences at a time.
    Under ``torchrun`` every process calls it with the same models; they share the calibration sequences.
    Returns one row per window: ``blocks``, ``steps``, ``seconds``, ``diverged`` and the relative errors of the window's
    output, ``before_calibration``, ``after_calibration``, ``before_held_out`` and ``after_held_out``. A result of
    :func:`pyprune.prune` has it all in ``report["refinement"]``, with the errors of its blocks before and after, and
    writes a ``refine.yaml`` that repeats it when it is saved.
    Raises ConfigError if the two models do not have the same blocks, hidden size and vocabulary.
    """
    asked = {
        "cross_block": cross_block,
        "global_propagation": global_propagation,
        "compute_dtype": compute_dtype,
        "device": device,
        "seed": seed,
        **_sections(calibration, settings, fields),
    }
    if model is None or isinstance(model, (str, Path)):
        return _refine_folder(model, output, dense=dense, config=config, track=track, **asked)
    if output is not None or "evaluation" in asked:
        raise ConfigError(
            "output and evaluation settings are for a folder: a live model is trained in place; save it afterwards"
        )
    request = live(config, asked)
    if dense is None:
        pruned_from = None if isinstance(model, torch.nn.Module) else getattr(model, "config", None)
        dense = request.dense or getattr(pruned_from, "model", None)
    if dense is None:
        raise ConfigError("refine needs the dense model, a live one or its name: pyprune.refine(pruned, dense)")
    request.dense = str(dense) if isinstance(dense, (str, Path)) else None
    return _refine_live(request, model, dense, tokenizer, track, progress, warn)


def _refine_live(
    request: Refinement, result: Any, dense: Any, tokenizer: Any, track: Any, progress: Any, warn: Callable[[str], None]
) -> list[dict]:
    """Train a model in memory; what a result reports of it is in its report afterwards."""
    started = time.perf_counter()
    request.calibration = calibration_data.settled(request.calibration)
    model, tokenizer = opened(result, tokenizer)
    named = request.dense or type(dense).__name__
    dense, dense_tokenizer = opened(dense)
    tokenizer = tokenizer or dense_tokenizer
    views = ModelView(model), ModelView(dense)
    for view in views:
        check_usable(view)
        check_finite(view.model.state_dict().items())
    data = sequences_of_pair(*views, request, tokenizer)
    world, failed = distributed.start(), True
    found, journal = Findings(warnings=list(data.warnings)), Journal(None)
    try:
        where = pick_device(request.device)  # after the processes have taken a GPU each
        backends = settle_backends(journal, world, where, repeated=request.backends, warn=found.warn)
        dtype = pick_dtype(check_dtype(request.compute_dtype, "compute_dtype"))
        executors = [Executor(view, device=where, compute_dtype=dtype, world=world, warn=found.warn) for view in views]
        work = RefineWork(executors[0], executors[1], data, request, found, journal)
        with (
            ops.pinned(backends),
            tracker(track, world.leads) as told,
            Progress(len(views[0].blocks), enabled=False, listener=progress) as bar,
        ):
            run_blocks(Loop(executors[0], journal, found, world, request.seed, None, told), work, bar)
        failed = False
    finally:
        world.close(failed)
        for message in found.warnings:
            warn(message)
    rows = [row for rows in work.windows for row in rows]
    if isinstance(getattr(result, "report", None), dict):
        result.report["refinement"] = {
            "model": None,
            "dense": named,
            **request.asked(),
            "fingerprint": data.fingerprint,
            "windows": rows,
            "blocks": work.errors,
            "evaluation": [],
            "backends": backends,
            "seconds": time.perf_counter() - started,
            "warnings": found.warnings,
            "recipe": recipe(request, backends),
            "repeatable": request.repeatable,
        }
    return rows


def _sections(calibration: Any, settings: Reconstruction | None, fields: dict) -> dict[str, Any]:
    """``calibration``, ``reconstruction`` and ``evaluation``, as far as they or keywords of theirs were given."""
    given = {**fields, **({} if calibration is None else {"calibration": calibration})}
    if settings is not None:
        given["reconstruction"] = settings
    return given_sections(given, [path for path in refine_fields() if "." in path])


def _refine_folder(folder: str | Path | None, output: str | Path | None, **fields: Any) -> list[dict]:
    """Refine a checkpoint; what was measured lies in the output's ``refinement.json``."""
    if folder is None and fields["config"] is None:
        raise ConfigError("refine needs the pruned model: a live one, a result, a folder, or config=, a refine.yaml")
    if output is None:
        raise ConfigError(
            f"refine({'' if folder is None else repr(str(folder))}) would lose what it trains: give output=, a folder "
            "for the refined model, or load the model first"
        )
    if fields["dense"] is not None and not isinstance(fields["dense"], (str, Path)):
        raise ConfigError("the dense model of a folder is named, by a folder, a Hub id or a .gguf file")
    return refine_checkpoint(folder, output, **fields)["windows"]
