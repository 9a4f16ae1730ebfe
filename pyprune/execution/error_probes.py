"""A few sequences carried through the dense and the pruned model side by side, to measure what pruning costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pyprune.config import PruneConfig
from pyprune.data.calibration import CalibrationData
from pyprune.execution.executor import Activations, Executor


@dataclass(eq=False)
class ErrorProbe:
    """The same sequences in both models: ``pruned`` follows the pruned prefix, ``dense`` the dense one."""

    name: str
    """``calibration`` or ``held_out``."""
    pruned: Activations
    dense: Activations


def make_probes(executor: Executor, config: PruneConfig, data: CalibrationData) -> list[ErrorProbe]:
    """Calibration and held-out probes, as far as there are sequences for them; what a choice is made by is measured on
    every held-out sequence."""
    n = config.probe_samples
    chooses = config.reconstruction.select == "validation" or config.reconstruction.early_stop
    held_out = data.held_out[: None if chooses else n]
    probes = []
    for name, sequences in (("calibration", data.sequences[:n]), ("held_out", held_out)):
        if sequences:
            pruned = executor.embed(sequences)
            probes.append(ErrorProbe(name, pruned, pruned.like()))
    return probes


def pass_dense(executor: Executor, index: int, module: nn.Module, probes: list[ErrorProbe]) -> None:
    """The dense streams pass a block that is not pruned yet."""
    for probe in probes:
        executor.run(index, module, probe.dense, probe.dense)


def pass_pruned(executor: Executor, index: int, module: nn.Module, probes: list[ErrorProbe]) -> None:
    """The pruned streams pass the finished block."""
    for probe in probes:
        executor.run(index, module, probe.pruned, probe.pruned)


def errors_of(executor: Executor, probes: list[ErrorProbe]) -> dict[str, float | None]:
    """A block's errors as its row of the report holds them, ``‖f̄(x̄) − f(x)‖² / ‖f̄(x̄)‖²`` of the pruned stream f
    against the dense stream f̄, where they now stand; read from the device in one go."""
    errors = dict(zip((probe.name for probe in probes), stream_errors(executor, [(p.pruned, p.dense) for p in probes])))
    return {"error": errors.get("calibration"), "error_held_out": errors.get("held_out")}


def stream_errors(executor: Executor, pairs: Sequence[tuple[Activations, Activations]]) -> list[float]:
    """``‖dense − pruned‖² / ‖dense‖²`` of pairs (pruned, dense) of streams over the same sequences."""
    if not pairs:
        return []
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64, device=executor.device)
    for found, (pruned, dense) in zip(sums, pairs):
        for batch in dense.batches(executor.batch_size):
            target, got = (s.read(batch).to(executor.device, non_blocking=True).float() for s in (dense, pruned))
            found += torch.stack([(target - got).square().sum(), target.square().sum()])
    return [lost / total if total else 0.0 for lost, total in sums.tolist()]
