"""BR, GP and CR on a model that is pruned already, masked or structured, by pyprune or by anything else.

The dense model gives the targets. Zeros of the pruned model's matrices stay exactly where they are; a structured model
has none and every weight of its smaller blocks trains. Blocks may differ in width inside, not in hidden size.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn

from pyprune import calibration as calibration_data
from pyprune.config import ConfigError, Reconstruction
from pyprune.evaluate import pick_device
from pyprune.model import ModelView, weights_of
from pyprune.prune import add_generated
from pyprune.reconstruct import Pairs, Trace, relative_error, train
from pyprune.refine import parameter_masks, training_dtype
from pyprune.stream import Activations, Executor
from pyprune.student import Student


def refine(model: nn.Module, dense: nn.Module, calibration=None, *, tokenizer=None, cross_block: bool = False,
           global_propagation: bool = True, settings: Reconstruction | None = None,
           compute_dtype: torch.dtype | None = None, device: str = "auto", seed: int = 0,
           progress: Callable[[int, int], None] | None = None,
           warn: Callable[[str], None] = warnings.warn) -> list[dict]:
    """Train ``model``, block by block and in place, to give the outputs of ``dense`` (paper R, arXiv 2406.15524).

    calibration: a :class:`pyprune.Calibration`, or its source (path, texts, token ids); ``tokenizer`` for text.
    settings: steps, learning rate, batch, selection by held-out error, as in :class:`pyprune.Reconstruction`.
    progress: called with (windows done, windows in all). warn: told when memory ran out and fewer sequences at a time
    go on.
    Returns one row a window: its blocks, relative error before and after on calibration and on held-out sequences.
    Raises ConfigError if the two models have not the same blocks, hidden size and vocabulary.
    """
    settings = settings or Reconstruction()
    student, teacher = ModelView(model), ModelView(dense)
    _check(student, teacher)
    chosen = calibration_data.coerce(calibration)
    if chosen.seed is None:
        chosen = dataclasses.replace(chosen, seed=seed)
    data = calibration_data.load(chosen, tokenizer, encoder=student.is_encoder,
                                 vocab_size=model.get_input_embeddings().num_embeddings)
    if chosen.self_generated:
        add_generated(data, chosen, dense, tokenizer)
    if (settings.select == "validation" or settings.early_stop) and not data.held_out:
        raise ConfigError("select='validation' and early_stop need held-out sequences: set held_out above 0, or give "
                          "more calibration text")
    where = pick_device(device)
    pupil, master = (Executor(view, device=where, compute_dtype=compute_dtype) for view in (student, teacher))
    pupil.warn = master.warn = warn
    texts = [sequences for sequences in (data.sequences + data.generated, data.held_out) if sequences]
    streams, targets = ([executor.embed(sequences) for sequences in texts] for executor in (pupil, master))
    last, rows = len(student.blocks) - 1, []
    windows = [[i] for i in range(last + 1)] if not cross_block else \
        [[0], *([i, i + 1] for i in range(last)), [last]]
    for k, window in enumerate(windows):
        if not global_propagation:
            for x, target in zip(streams, targets):
                _through(master, window, x, target)
        elif k == 0 or windows[k - 1][-1] != window[-1]:
            for target in targets:
                _through(master, window[-1:], target, target)
        blocks = [student.blocks[i] for i in window]
        net = Student(pupil, window, blocks, [_masks(block) for block in blocks],
                      training_dtype(pupil, settings.autocast))
        trace, before, after = _improve(net, list(zip(streams, targets)), settings, seed)
        if trace.micro_batch_size:  # the next window will not fit either
            settings = dataclasses.replace(settings, micro_batch_size=trace.micro_batch_size)
        rows.append({"blocks": window, "steps": trace.steps, "seconds": trace.seconds, "diverged": trace.diverged,
                     **{f"{when}_{name}": value for when, errors in (("before", before), ("after", after))
                        for name, value in zip(("calibration", "held_out"), errors)}})
        if len(window) == 2 or not cross_block and k < last:
            for x in streams:
                _through(pupil, window[:1], x, x)
        if progress:
            progress(k + 1, len(windows))
    return rows


def _improve(net: Student, pairs: Pairs, settings: Reconstruction,
             seed: int) -> tuple[Trace, list[float], list[float]]:
    """Train a window and write it; errors before and after are those of the model's own weights, in their type. With
    ``select="validation"`` a window that ends worse on held-out sequences stays as it was."""
    before, start = [relative_error(net, [pair]) for pair in pairs], net.snapshot()
    trace = train(net, pairs[:1], settings, seed=seed, held_out=pairs[1:] or None)
    net.commit()
    net.restore()
    after = [relative_error(net, [pair]) for pair in pairs]
    if settings.select == "validation" and not after[1] <= before[1]:
        net.restore(start)
        net.commit()
        after = before
    return trace, before, after


def _check(student: ModelView, teacher: ModelView) -> None:
    sizes = [(len(view.blocks), *view.model.get_input_embeddings().weight.shape) for view in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError("the pruned and the dense model must have the same blocks, vocabulary and hidden size, got "
                          f"{sizes[0]} and {sizes[1]}")


def _through(executor: Executor, window: list[int], source: Activations, target: Activations) -> None:
    """``source`` through consecutive blocks as they are, into ``target``, which may be ``source``."""
    for index in window:
        with executor.compute(index) as module, torch.no_grad():
            executor.run(index, module, source, target)
        source = target


def _masks(block: nn.Module) -> dict:
    """Keep masks of the matrices that hold zeros."""
    found = {ref: ref.view(block) != 0 for ref in weights_of(block)}
    return parameter_masks(block, {ref: mask for ref, mask in found.items() if not mask.all()})
