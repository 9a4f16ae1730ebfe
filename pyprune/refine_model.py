"""BR, GP and CR on a model that is pruned already, masked or structured, by pyprune or by anything else.

The dense model gives the targets. Zeros of the pruned model's matrices stay exactly where they are; a structured model
has none and every weight of its smaller blocks trains. Blocks may differ in width inside, not in hidden size.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pyprune import calibration as calibration_data
from pyprune import distributed
from pyprune.calibration import CalibrationData
from pyprune.config import Calibration, ConfigError, Reconstruction, check_effects
from pyprune.evaluate import pick_device
from pyprune.journal import Journal, shard_path
from pyprune.model import ModelView, check_apart, check_finite, check_usable, weights_of
from pyprune.positions import positions_of
from pyprune.progress import Progress
from pyprune.prune import add_generated, lengths_of
from pyprune.reconstruct import Trace, error_sums, train
from pyprune.refine import parameter_masks, training_dtype
from pyprune.statistics import ratio
from pyprune.steps import read_back, settled, tensors_of
from pyprune.stream import Activations, Executor
from pyprune.student import Student

NAMES = ("calibration", "held_out")
NO_EFFECT = (lambda _: False, "refining solves no layers, it trains; only pyprune prune uses it")


def refine(model: nn.Module, dense: nn.Module, calibration=None, *, tokenizer=None, cross_block: bool = False,
           global_propagation: bool = True, settings: Reconstruction | None = None,
           compute_dtype: torch.dtype | None = None, device: str = "auto", seed: int = 0,
           progress: Callable[[int, int], None] | None = None,
           warn: Callable[[str], None] = warnings.warn) -> list[dict]:
    """Train ``model``, block by block and in place, to give the outputs of ``dense`` (paper R, arXiv 2406.15524).

    calibration: a :class:`pyprune.Calibration`, or its source (path, texts, token ids); ``tokenizer`` for text.
    settings: steps, learning rate, batch, selection by held-out error, as in :class:`pyprune.Reconstruction`.
    progress: called with (blocks done, blocks in all). warn: told where the calibration data are thin, and when
    memory ran out and fewer sequences at a time go on.
    Under ``torchrun`` every process calls it with the same models; they share the calibration sequences.
    Returns one row a window: its blocks, relative error before and after on calibration and on held-out sequences.
    Raises ConfigError if the two models have not the same blocks, hidden size and vocabulary.
    """
    settings = settings or Reconstruction()
    student, teacher = ModelView(model), ModelView(dense)
    check_usable(student)
    check_usable(teacher)
    for live in (model, dense):
        check_finite(live.state_dict().items())
    data = sequences_for(student, teacher, calibration, tokenizer, settings, seed)
    for text in data.warnings:
        warn(text)
    world, failed = distributed.start(), True
    try:
        where = pick_device(device)  # after the processes have taken a GPU each
        pupil, master = (Executor(view, device=where, compute_dtype=compute_dtype) for view in (student, teacher))
        pupil.world = master.world = world
        work = Refinement(pupil, master, settings, cross_block, global_propagation, seed, tell=warn)
        with Progress(len(student.blocks), enabled=False) as bar:
            rows = work.run(data, bar, progress or (lambda done, total: None))
        failed = False
    finally:
        world.close(failed)
    return rows


def sequences_for(student: ModelView, teacher: ModelView, calibration, tokenizer, settings: Reconstruction,
                  seed: int) -> CalibrationData:
    """Calibration and held-out sequences for a pair of models; ConfigError where anything does not fit."""
    sizes = [(len(view.blocks), *view.model.get_input_embeddings().weight.shape) for view in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError("the pruned and the dense model must have the same blocks, vocabulary and hidden size, got "
                          f"{sizes[0]} and {sizes[1]}")
    check_apart(student, teacher)
    chosen: Calibration = calibration_data.coerce(calibration)
    if chosen.seed is None:
        chosen = dataclasses.replace(chosen, seed=seed)
    check_effects(chosen, {"self_generated_for": NO_EFFECT}, "calibration")
    check_effects(settings, {"layerwise_target": NO_EFFECT}, "reconstruction")
    data = calibration_data.load(chosen, tokenizer, encoder=student.is_encoder, vocab_size=sizes[0][1],
                                 model_config=student.model.config)
    if positions := positions_of(student):
        positions.check(lengths_of(data, chosen), "calibration sequences", "seq_len", data.warnings.append)
    if chosen.self_generated:
        add_generated(data, chosen, teacher.model, tokenizer)
    if (settings.select == "validation" or settings.early_stop) and not data.held_out:
        raise ConfigError("select='validation' and early_stop need held-out sequences: set held_out above 0, or give "
                          "more calibration text")
    return data


@dataclass
class Refinement:
    """Two models and how one is trained towards the other; a step a block, journaled."""

    pupil: Executor
    master: Executor
    settings: Reconstruction
    cross: bool
    propagate: bool
    seed: int
    tell: Callable[[str], None]
    journal: Journal = dataclasses.field(default_factory=lambda: Journal(None))
    output: str | None = None
    told: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.pupil.warn = self.master.warn = self.warn
        self.world, self.blocks = self.pupil.world, self.pupil.view.blocks
        self.last = len(self.blocks) - 1

    def warn(self, message: str) -> None:
        if message not in self.told:
            self.told.append(message)
            self.tell(message)

    def run(self, data: CalibrationData, bar: Progress, progress: Callable[[int, int], None] = lambda *_: None
            ) -> list[dict]:
        """Train every window; returns their rows. Blocks that the journal has are read and only run."""
        fit = data.sequences + data.generated
        self.streams, self.targets = ([a for a in (executor.embed(fit, shared=True), executor.embed(data.held_out))
                                       if a is not None] for executor in (self.pupil, self.master))
        done, rows = len(self.journal.entries), []
        for index in range(self.last + 1):
            self.pupil.weights.acquire(index)
            if self.propagate:
                bar.update(phase="dense targets")
                for target in self.targets:
                    _through(self.master, [index], target, target)
            if index < done:
                bar.update(phase="resume")
                rows += self._restore(index)
                self._advance(index)
            else:
                bar.update(phase="reconstruct")
                found = [self._window([index - 1, index] if self.cross and index else [index])]
                self._advance(index)
                if self.cross and index == self.last:
                    found.append(self._window([index]))
                self._commit(index, found)
                rows += found
            self._leave(index)
            bar.update(block=index + 1, phase="done", error=rows[-1].get("after_calibration"))
            progress(index + 1, self.last + 1)
            if index < self.last:
                self.journal.safe_point()
        return rows

    # ---- one window --------------------------------------------------------------------------------------------

    def _window(self, window: list[int]) -> dict:
        if not self.propagate:
            for source, target in zip(self.streams, self.targets):
                _through(self.master, window, source, target)
        blocks = [self.blocks[i] for i in window]
        net = Student(self.pupil, window, blocks, [_masks(block) for block in blocks],
                      training_dtype(self.pupil, self.settings.autocast))
        trace, before, after = self._improve(net)
        if trace.micro_batch_size:  # the next window will not fit either
            self.settings = dataclasses.replace(self.settings, micro_batch_size=trace.micro_batch_size)
        if trace.diverged:
            self.warn(f"training of blocks {window} met a loss that is not finite and was undone; lower lr")
        return {"blocks": window, "steps": trace.steps, "seconds": trace.seconds, "diverged": trace.diverged,
                **{f"{when}_{name}": value for when, errors in (("before", before), ("after", after))
                   for name, value in zip(NAMES, errors)}}

    def _improve(self, net: Student) -> tuple[Trace, list[float], list[float]]:
        """Train a window and write it; errors before and after are those of the model's own weights, in their type.
        With ``select="validation"`` a window that ends worse on held-out sequences stays as it was."""
        before, start = self._errors(net), net.snapshot()
        pairs = list(zip(self.streams, self.targets))
        trace = train(net, pairs[:1], self.settings, seed=self.seed, held_out=pairs[1:] or None)
        net.commit()
        net.restore()
        after = self._errors(net)
        if self.settings.select == "validation" and self.world.same(not after[1] <= before[1]):
            net.restore(start)
            net.commit()
            after = before
        return trace, before, after

    def _errors(self, net: Student) -> list[float]:
        """Relative error on calibration sequences, of which each process has its share, and on held-out ones."""
        sums = [error_sums(self.pupil, net.indices, net, x, t) for x, t in zip(self.streams, self.targets)]
        self.world.sum_(sums[0])
        return [ratio(*pair) for pair in torch.stack(sums).tolist()]

    # ---- from block to block -----------------------------------------------------------------------------------

    def _advance(self, index: int) -> None:
        """Bring the pruned streams to the next window's inputs, through the block that is final before it."""
        through = [index - 1] if self.cross else [index] if index < self.last else []
        for stream in self.streams if through != [-1] else []:
            _through(self.pupil, through, stream, stream)

    def _settled(self, index: int) -> list[int]:
        return settled(index, self.last, self.cross)

    def _commit(self, index: int, rows: list[dict]) -> None:
        """Make this step the point to resume from."""
        final = self._settled(index)
        for i in dict.fromkeys([*final, index]):
            self.journal.write(i, tensors_of(self.pupil.view.path, i, self.blocks[i]), draft=i not in final)
        self.journal.commit(index, {"rows": rows, "warnings": self.told,
                                    "micro_batch_size": self.settings.micro_batch_size})

    def _restore(self, index: int) -> list[dict]:
        """Bring back what an interrupted run made of a block, and what it said."""
        entry, done = self.journal.entries[index], len(self.journal.entries)
        draft = self.cross and index == done - 1 < self.last
        self.blocks[index].load_state_dict(read_back(self.journal, self.world, self.pupil.view.path, index, draft))
        self.settings = dataclasses.replace(self.settings, micro_batch_size=entry["micro_batch_size"])
        for text in entry["warnings"]:
            self.warn(text)
        return entry["rows"]

    def _leave(self, index: int) -> None:
        """Let go of the weights that no later window needs."""
        if self.world.any(self.journal.stopping):  # also: process 0 has written what the others may read
            self.journal.stop()
        final = self._settled(index)
        for i in final:
            self.pupil.release(i, shard_path(self.output, i) if self.output else None)
        for i in [index] if self.propagate else final:
            self.master.release(i)


def _through(executor: Executor, window: list[int], source: Activations, target: Activations) -> None:
    """``source`` through consecutive blocks as they are, into ``target``, which may be ``source``."""
    for index in window:
        with executor.compute(index) as module, torch.no_grad():
            executor.run(index, module, source, target)
        source = target


def _masks(block: nn.Module) -> dict:
    """Keep masks of the matrices that hold zeros."""
    found = {ref: ref.view(block) != 0 for ref in weights_of(block, routers=True)}
    return parameter_masks(block, {ref: mask for ref, mask in found.items() if not mask.all()})
