"""What a run is, and what it finds. What it leaves on the disk is :mod:`pyprune.execution.journal`."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pyprune.config import PruneConfig
from pyprune.data.calibration import CalibrationData
from pyprune.execution.distributed import World
from pyprune.execution.executor import Executor
from pyprune.model.blocks import ModelView, WeightRef


@dataclass(frozen=True, eq=False)
class Run:
    """What a run is: nothing in it changes while it runs, but the weights of the model."""

    config: PruneConfig
    view: ModelView
    """The model that is pruned."""
    executor: Executor
    """Passes activations through its blocks."""
    selected: list[list[WeightRef]]
    """Per block, the weights that ``targets`` and ``ignore`` leave to prune."""
    data: CalibrationData
    world: World = field(default_factory=World)
    """The processes that share the calibration sequences."""
    rules: list[dict[WeightRef, str]] | None = None
    """Per block, the key of ``sparsity`` that counts for each weight, where that is a mapping."""
    parameters: int = field(init=False)
    """Of the model as it was before the run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", sum(p.numel() for p in self.view.model.parameters()))

    @property
    def sparsity(self) -> float:
        """The sparsity that is asked for; of several by name the mean over their weights."""
        if self.rules is None:
            return self.config.one_sparsity
        sizes = {
            (i, ref): ref.view(block).numel()
            for i, (block, refs) in enumerate(zip(self.view.blocks, self.selected))
            for ref in refs
        }
        return sum(self.sparsity_of(*key) * size for key, size in sizes.items()) / max(sum(sizes.values()), 1)

    def sparsity_of(self, index: int, ref: WeightRef) -> float:
        """The sparsity that is asked for in a weight of block ``index``."""
        if self.rules is None:
            return self.config.one_sparsity
        return self.config.sparsity_by_name[self.rules[index][ref]]


class Clock:
    """Measures time by phase; entering an inner phase pauses the outer one.

    On a GPU the host only queues what a phase does, so there events measure it: the time from one to the next as the
    device meets them, its idle time included.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._device: torch.device | None = None
        self._since: Any = time.perf_counter()
        self._measured: list[tuple[str, Any, Any]] = []
        """Phase, and the events where it began and ended, which the device need not have met yet."""

    def follow(self, device: torch.device) -> None:
        """From here on measure what the GPU does in a phase; any other device is measured by the host's time."""
        self._charge()
        self._device = device if device.type == "cuda" else None
        self._since = self._now()

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; waits for a GPU to be done with what was queued in them."""
        if self._measured:
            self._measured[-1][2].synchronize()
        for phase, start, stop in self._measured:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + start.elapsed_time(stop) / 1e3
        self._measured = []
        return self._seconds

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _charge(self) -> None:
        now = self._now()
        if self._stack and self._device is None:
            self._seconds[self._stack[-1]] = self._seconds.get(self._stack[-1], 0.0) + now - self._since
        elif self._stack:
            self._measured.append((self._stack[-1], self._since, now))
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


@dataclass(eq=False)
class Findings:
    """What a run has found so far: the rows of its report, its warnings, its seconds."""

    clock: Clock = field(default_factory=Clock)
    weights: list[dict] = field(default_factory=list)
    """One row per pruned weight."""
    blocks: list[dict] = field(default_factory=list)
    """One row per finished block."""
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Keep a warning, but only once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def share_warnings(self, world: World) -> None:
        """Every process keeps the warnings of all."""
        for messages in world.everyone(self.warnings) if world.size > 1 else []:
            for message in messages:
                self.warn(message)

    def take_up(self, entry: dict, last: bool) -> None:
        """Take up what an interrupted run reported of a block: its row, its warnings, and with the last one the
        seconds of that run."""
        self.blocks.append(entry["row"])
        for message in entry["warnings"]:
            self.warn(message)
        for phase, seconds in entry["seconds"].items() if last else ():
            self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds


def seed_all(seed: int) -> None:
    """Seed Python's and torch's generators: what a block draws depends on the run's seed and its place alone."""
    random.seed(seed)
    torch.manual_seed(seed)
