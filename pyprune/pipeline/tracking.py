"""Figures of a run as it goes, for TensorBoard or any other tracker: one callback gets the scalars of each block."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyprune.config import ConfigError

Track = Callable[[int, dict[str, float]], None]
"""Called with the block's number and scalars by name; at the end with the number of blocks and the perplexities."""
TENSORBOARD = "tensorboard:"


@contextlib.contextmanager
def tracker(target: Track | str | None, leads: bool = True) -> Iterator[Track]:
    """The callback of a run. target: a callback, ``tensorboard:FOLDER``, or None for nobody. leads: only the first of
    several processes tracks. Raises ConfigError for another target, and where TensorBoard is not installed."""
    if isinstance(target, str):
        folder = target.removeprefix(TENSORBOARD)
        if folder == target or not folder:
            raise ConfigError(f"track must be tensorboard:FOLDER or, in Python, a function, got {target!r}")
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(f"track={target!r} needs TensorBoard: pip install tensorboard")
        if leads:
            with _tensorboard(folder) as write:
                yield write
            return
    yield target if callable(target) and leads else nobody


def under(name: str, track: Track) -> Track:
    """A callback that puts a name before every scalar's: ``sparsity-0.3/block/error``."""
    return lambda step, values: track(step, {f"{name}/{key}": value for key, value in values.items()})


def nobody(step: int, values: dict[str, float]) -> None:
    """Nobody wants to know."""


@contextlib.contextmanager
def _tensorboard(folder: str) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a block's row of the report: ``block/error``, ``block/steps/layer/held_out``."""
    found: dict[str, float] = {}

    def take(name: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, (int, float)):
            found[name] = float(value)
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                take(f"{name}/{key}", inner)

    for key, value in row.items():
        if key == "steps":
            for step in value:
                take(f"block/steps/{step['step']}", {k: v for k, v in step.items() if k != "step"})
        elif key != "block":
            take(f"block/{key}", value)
    return found


def outcome(evaluation: list[dict]) -> dict[str, float]:
    """Perplexities by model and text: ``perplexity/pruned/wiki.test.txt``."""
    return {
        f"perplexity/{whose}/{row['text']}": float(row[whose])
        for row in evaluation
        for whose in ("dense", "pruned", "refined")
        if row.get(whose) is not None
    }
