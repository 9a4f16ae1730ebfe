"""How the models of a run are opened: loaded whole or streamed block by block, and what stands against the latter."""

from __future__ import annotations

from pathlib import Path

from pyprune.config import Calibration, PruneConfig
from pyprune.execution.weight_streaming import Opened, open_checkpoint
from pyprune.structured.criteria import needs_gradients


def open_model(config: PruneConfig, streamed: bool | None = None, pin: bool = False) -> Opened:
    """Open the model of a run as :func:`open_checkpoint` does."""
    return open_checkpoint(
        config.model_name, config.dtype, config.stream, why_not_streamed(config), streamed, pin, models_whole(config)
    )


def models_whole(config: PruneConfig) -> int:
    """Models that a run holds at once if they are whole: for masks of several sparsities the dense one and the copy at
    work, or without an output folder every result. Heads and neurons share what is outside the blocks."""
    several = len(config.singles())
    return 2 if several and config.output else several or 1


def why_not_streamed(config: PruneConfig) -> str | None:
    """Why a run needs its model whole, None if it does not."""
    if config.output is None:
        return "finished blocks are written as the run goes on, so it needs an output folder"
    if config.is_curve:
        return "several sparsities of heads and neurons make several models at once"
    if config.is_structured and needs_gradients(config.criterion):
        return f"criterion {config.criterion_name!r} differentiates the whole model"
    return samples_itself(config.calibration)


def samples_itself(calibration: Calibration) -> str | None:
    """Why the dense model must be whole for self-generated calibration, None if it is not asked for or written."""
    path = calibration.self_generated_path
    if calibration.self_generated and not (path and Path(path).is_file()):
        return "self-generated calibration samples from the whole model; write it to a file with pyprune generate first"
    return None
