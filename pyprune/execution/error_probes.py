"""A few sequences carried through the dense and the pruned model side by side, to measure what pruning costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import PruneConfig
from pyprune.data.calibration import CalibrationData
from pyprune.execution.executor import Activations, Executor

CALIBRATION, HELD_OUT, SELF_GENERATED = "calibration", "held_out", "self_generated"
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantiles of the errors of tokens, and of sequences, that a block's row holds."""


@dataclass(eq=False)
class ErrorProbe:
    """The same sequences in both models: ``pruned`` follows the pruned prefix, ``dense`` the dense one."""

    name: str
    """``calibration``, ``held_out`` or ``self_generated``."""
    pruned: Activations
    dense: Activations


def make_probes(executor: Executor, config: PruneConfig, data: CalibrationData) -> list[ErrorProbe]:
    """Calibration, held-out and self-generated probes, as far as there are sequences for them; what a choice is made by
    is measured on every held-out sequence. Cross-block training, which changes a block after its own step, follows no
    self-generated ones."""
    n = config.probe_samples
    chooses = config.reconstruction.select == "validation" or config.reconstruction.early_stop
    held_out = data.held_out[: None if chooses else n]
    sampled = data.sampled[:n] if held_out and config.reconstruct != "cross_block" else []
    probes = []
    for name, sequences in ((CALIBRATION, data.sequences[:n]), (HELD_OUT, held_out), (SELF_GENERATED, sampled)):
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


def errors_of(executor: Executor, probes: list[ErrorProbe]) -> dict:
    """A block's errors as its row of the report holds them: of each probe as a whole, and their quantiles over tokens
    and over sequences. One reading of the device."""
    sums = [stream_errors(executor, probe.pruned, probe.dense) for probe in probes]
    values = torch.stack(sums).tolist() if sums else []
    found = {probe.name: as_row(row) for probe, row in zip(probes, values)}
    errors = {name: error for name, (error, _) in found.items()}
    return {
        "error": errors.get(CALIBRATION),
        "error_held_out": errors.get(HELD_OUT),
        **({"error_self_generated": errors[SELF_GENERATED]} if SELF_GENERATED in errors else {}),
        "error_quantiles": {name: quantiles for name, (_, quantiles) in found.items()},
    }


def as_row(values: list[float]) -> tuple[float, dict[str, list[float]]]:
    """Error and quantiles of what :func:`stream_errors` found."""
    lost, total, *quantiles = values
    return lost / total if total else 0.0, {
        "tokens": quantiles[: len(LEVELS)],
        "sequences": quantiles[len(LEVELS) :],
    }


def stream_errors(executor: Executor, pruned: Activations, dense: Activations) -> Tensor:
    """Of two streams over the same sequences, where they now stand: ``‖dense − pruned‖²``, ``‖dense‖²``, and the
    quantiles ``LEVELS`` of their ratio over tokens and over sequences (arXiv 2407.13331 shows such distributions).

    Returns float64 ``[2 + 2 · levels]`` on the device.
    """
    lost: list[Tensor] = []
    total: list[Tensor] = []
    for batch in dense.batches(executor.batch_size):
        target, got = (s.read(batch).to(executor.device, non_blocking=True).float() for s in (dense, pruned))
        lost.append((target - got).square().sum(-1).double())  # [sequences, tokens]
        total.append(target.square().sum(-1).double())
    tokens = torch.cat([(part / whole.clamp(min=1e-30)).flatten() for part, whole in zip(lost, total)])
    sequences = torch.cat([part.sum(1) / whole.sum(1).clamp(min=1e-30) for part, whole in zip(lost, total)])
    sums = [torch.stack([part.sum() for part in parts]).sum() for parts in (lost, total)]
    return torch.cat(
        [
            torch.stack(sums),
            *(torch.stack([values.quantile(level) for level in LEVELS]) for values in (tokens, sequences)),
        ]
    )
