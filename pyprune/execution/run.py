"""What one run passes along and hands back: the run itself, its clock, its error probes, its result."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pyprune.config import PruneConfig
from pyprune.data.calibration import CalibrationData
from pyprune.execution.distributed import World
from pyprune.execution.executor import Activations, Executor
from pyprune.execution.journal import Journal
from pyprune.execution.weight_streaming import Streamed
from pyprune.model import checkpoint
from pyprune.model.blocks import ModelView, WeightRef
from pyprune.model.origin import Origin


@dataclass
class PruneResult:
    """A pruned model, what was asked, and what it cost."""

    model: nn.Module
    tokenizer: object
    config: PruneConfig
    report: dict
    models: dict[float, nn.Module] = field(default_factory=dict)
    """Structured pruning: by sparsity; ``model`` is the last one asked for."""
    origin: Origin | None = None
    """What the dense checkpoint holds beside the model."""

    def save(self, directory: str) -> None:
        """Write a Hugging Face checkpoint with ``pruning.json``, ``report.json``, ``run.yaml`` and a model card; of
        several sparsities, each in a folder of its own, ``sparsity-0.3``."""
        if len(self.models) < 2:
            checkpoint.save(self.model, self.tokenizer, directory, self.report, self.config, self.origin)
        for single in self.singles():
            checkpoint.save(single.model, single.tokenizer, f"{directory}/sparsity-{single.config.sparsity:g}",
                            single.report, single.config, self.origin)

    def fill(self, folder: Path) -> None:
        """Write the same files into a folder that exists."""
        if len(self.models) < 2:
            checkpoint.fill(self.model, self.tokenizer, folder, self.report, self.config, Path(self.config.output).name,
                            self.origin)
        for single in self.singles():
            name = f"sparsity-{single.config.sparsity:g}"
            (folder / name).mkdir()
            checkpoint.fill(single.model, single.tokenizer, folder / name, single.report, single.config, name,
                            self.origin)

    def singles(self) -> list[PruneResult]:
        """One result a sparsity, where several were asked for."""
        if len(self.models) < 2:
            return []
        from pyprune.pipeline.structured import report_of

        return [PruneResult(model, self.tokenizer, dataclasses.replace(self.config, sparsity=sparsity),
                            report_of(self.report, sparsity)) for sparsity, model in self.models.items()]


class StreamedResult(PruneResult):
    """The result of a run that never held the whole model: it lies in the output folder and is loaded if asked for."""

    weights: Streamed
    _model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """The pruned model, loaded whole on first use."""
        if self._model is None:
            self._model = checkpoint.load(self.config.output).model
        return self._model

    @model.setter
    def model(self, value: nn.Module | None) -> None:
        self._model = value

    def fill(self, folder: Path) -> None:
        """Write the checkpoint from the shards of the finished blocks."""
        self.weights.save(folder)
        checkpoint.save_extras(self.tokenizer, folder, self.origin)
        checkpoint.save_records(folder, self.report, self.config, Path(self.config.output).name)


class Clock:
    """Exclusive wall time by phase: entering an inner phase pauses the outer one."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._charge()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()


@dataclass
class Probe:
    """A few sequences carried through both models to measure errors: ``student`` pruned, ``dense`` not."""

    name: str
    student: Activations
    dense: Activations


@dataclass
class Run:
    """Everything one run passes along."""

    config: PruneConfig
    view: ModelView
    executor: Executor
    selected: list[list[WeightRef]]
    data: CalibrationData
    clock: Clock = field(default_factory=Clock)
    journal: Journal = field(default_factory=lambda: Journal(None))
    world: World = field(default_factory=World)
    weights: list[dict] = field(default_factory=list)
    blocks: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    coverage: dict | None = None
    """What of the dense model was selected, where the model has other sizes afterwards."""
    peak_device: int | None = None
    """Bytes allocated on the GPU at most between the two evaluations; None without one."""
    structured: dict | None = None
    """What structured pruning adds to the report."""

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def resume_row(self, entry: dict, index: int) -> None:
        """Take up what an interrupted run reported of a block: its row, warnings, and with the last one its seconds."""
        self.blocks.append(entry["row"])
        for text in entry["warnings"]:
            self.warn(text)
        if index == len(self.journal.entries) - 1:
            for phase, seconds in entry["seconds"].items():
                self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds


def make_probes(run: Run) -> list[Probe]:
    """Calibration and held-out probes, as far as there are sequences for them; what a choice is made by is measured on
    every held-out sequence."""
    n = run.config.probe_samples
    chooses = run.config.reconstruction.select == "validation" or run.config.reconstruction.early_stop
    held_out = run.data.held_out[:None if chooses else n]
    probes = []
    for name, sequences in (("calibration", run.data.sequences[:n]), ("held_out", held_out)):
        if sequences:
            student = run.executor.embed(sequences)
            probes.append(Probe(name, student, student.like()))
    return probes


def stream_error(probe: Probe) -> float:
    """``‖f̄(x̄) − f(x)‖² / ‖f̄(x̄)‖²`` of a probe's block outputs, pruned stream against dense stream."""
    lost = total = 0.0
    for batch in probe.dense.batches():
        dense = probe.dense.read(batch).float()
        lost += (dense - probe.student.read(batch).float()).square().sum().item()
        total += dense.square().sum().item()
    return lost / total if total else 0.0


def seed_all(seed: int) -> None:
    """Seed Python's and torch's generators: what a block draws depends on the run's seed and its place alone."""
    random.seed(seed)
    torch.manual_seed(seed)
