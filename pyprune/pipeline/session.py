"""What one run holds while it lasts: where it is journaled, who computes, and what it has found so far."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from pyprune import ops
from pyprune.config import PruneConfig
from pyprune.execution.activation_store import Store
from pyprune.execution.device import pick_device
from pyprune.execution.distributed import World
from pyprune.execution.journal import Journal
from pyprune.execution.progress import Doing
from pyprune.execution.run import Findings
from pyprune.pipeline.shared import Shared
from pyprune.pipeline.tracking import Track, nobody
from pyprune.reporting.words import distinct

T = TypeVar("T")


@dataclass(eq=False)
class Session:
    """One run while it lasts. Its phases (:mod:`pyprune.pipeline.phases`) are functions of it."""

    config: PruneConfig
    journal: Journal
    world: World
    held: contextlib.ExitStack
    """What is entered here lasts until the result is written."""
    progress: bool = True
    """Whether this process shows how far it is."""
    track: Track = nobody
    shared: Shared = field(default_factory=Shared)
    """What this run has in common with others."""
    following: int = 0
    """Runs of the same kind that follow this one, for the time that is left."""
    found: Findings = field(default_factory=Findings)
    told: int = 0
    """Warnings that were printed already."""
    device: torch.device = field(init=False)
    """Where blocks are computed."""

    def __post_init__(self) -> None:
        self.device = pick_device(self.config.device)

    def doing(self, text: str, enabled: bool = True, said: bool = True) -> Doing:
        """Show what is done now, as :class:`Doing` does."""
        return Doing(text, self.progress and enabled, said=said)

    def tell(self) -> None:
        """Print the warnings that are new, before work begins that they may make worthless; the report has all."""
        new = self.found.warnings[self.told :]
        self.told = len(self.found.warnings)
        for text in distinct(new) if self.progress else ():
            print(f"pruning · warning: {text}", file=sys.stderr, flush=True)


def settle_backends(
    journal: Journal,
    world: World,
    device: torch.device,
    asked: str = "auto",
    repeated: dict | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> dict:
    """The back-end that each op takes in this run, the same in all processes: :func:`pyprune.ops.settle`."""

    def settled() -> dict:
        return ops.settle(device.type, journal.header.get("backends"), asked, repeated, warn)

    return world.same(world.lead(settled) or {})


def begin(journal: Journal, world: World, identity: dict, blocks: int, **header) -> None:
    """Record in the journal what this run is, or compare it with the interrupted one; all processes know its steps."""
    world.lead(lambda: journal.begin(identity, blocks, **header))
    journal.entries, journal.notes = world.same((journal.entries, journal.notes))
    journal.total = blocks


def kept(
    journal: Journal,
    world: World,
    name: str,
    work: Callable[[Doing], T],
    doing: Doing,
) -> T:
    """What an interrupted run worked out under this name, else ``work()``, kept for the next."""
    value = world.same(journal.kept(name))
    if value is None:
        with doing as said:
            value = work(said)
        world.lead(lambda: journal.keep(name, value))
    return value


def make_store(budget_gb: float | None, folder: Path | None, device: torch.device) -> Store:
    """Activations in host memory within the budget, above it in files in ``folder``."""
    return Store(None if budget_gb is None else int(budget_gb * 1e9), folder, pin=device.type == "cuda")
