"""``pyprune.refine``: block-wise reconstruction of a live model that is pruned already, by pyprune or anything else."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn

from pyprune.config import Calibration, ConfigError, Reconstruction, check_effects
from pyprune.data import calibration as calibration_data
from pyprune.data.calibration import CalibrationData
from pyprune.execution import distributed
from pyprune.execution.device import pick_device
from pyprune.execution.executor import Executor
from pyprune.execution.journal import Journal
from pyprune.execution.run import Findings
from pyprune.model.attributes import embedding_width, vocabulary_size
from pyprune.model.blocks import ModelView, check_apart, check_finite, check_usable
from pyprune.model.positions import positions_of
from pyprune.pipeline.block_loop import Loop, run_blocks
from pyprune.pipeline.progress import Progress
from pyprune.pipeline.prune import add_generated, lengths_of
from pyprune.pipeline.refine_work import RefineWork

NO_EFFECT = (lambda _: False, "refining solves no layers, it trains; only pyprune prune uses it")


def refine(
    model: nn.Module,
    dense: nn.Module,
    calibration=None,
    *,
    tokenizer=None,
    cross_block: bool = False,
    global_propagation: bool = True,
    settings: Reconstruction | None = None,
    compute_dtype: torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> list[dict]:
    """Train ``model``, block by block and in place, to give the outputs of ``dense`` (arXiv 2406.15524).

    calibration: a :class:`pyprune.Calibration`, or its source: a path, texts, or int64 token ids ``[samples, tokens]``.
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
    settings = settings or Reconstruction()
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
    return [row for rows in work.windows for row in rows]


def sequences_for(
    pruned: ModelView, dense: ModelView, calibration, tokenizer, settings: Reconstruction, seed: int
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
        add_generated(data, chosen, dense.model, tokenizer)
    if (settings.select == "validation" or settings.early_stop) and not data.held_out:
        raise ConfigError(
            "select='validation' and early_stop need held-out sequences: set held_out above 0, or give "
            "more calibration text"
        )
    return data
