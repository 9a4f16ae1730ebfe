"""The one loop over the blocks of a model: enter, restore or work, advance, commit, leave.

A kind of run (masks, structured pruning, refinement) gives the loop its :class:`BlockWork`; everything about order,
interruption and the journal is here, once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pyprune.execution.distributed import World
from pyprune.execution.executor import Executor
from pyprune.execution.heap import kept_warm
from pyprune.execution.journal import Journal, shard_path
from pyprune.execution.progress import Progress
from pyprune.execution.run import Findings, seed_all
from pyprune.model.blocks import ModelView
from pyprune.pipeline.tracking import Track, nobody, scalars


class BlockWork(Protocol):
    """What one kind of run does with a block. ``module`` is the block as it computes: itself, or its copy on the
    device, which each method keeps equal to the block."""

    def start(self) -> None:
        """Before the first block: the streams of activations this run needs."""

    def enter(self, index: int, module: nn.Module, done: bool) -> None:
        """The block is still dense: what passes through it as it is. ``done``: an interrupted run finished it."""

    def work(self, index: int, module: nn.Module, bar: Progress) -> None:
        """Make the block what it is to become."""

    def restore(self, index: int, module: nn.Module, entry: dict) -> None:
        """Make it what the interrupted run made of it, from that run's journal entry."""

    def advance(self, index: int, module: nn.Module) -> None:
        """The streams pass the block as it now is."""

    def tensors(self, index: int) -> list[Written]:
        """What the journal has to keep of the model after this block."""

    def row(self, index: int) -> dict:
        """The block's row of the report; ``error`` is what the progress bar shows."""

    def record(self, index: int) -> dict:
        """What :meth:`restore` needs beside the tensors, as plain data."""

    def settled(self, index: int) -> list[int]:
        """Blocks that no later step changes."""

    def finish(self) -> None:
        """After the last block."""


@dataclass(frozen=True, eq=False)
class Written:
    """The tensors of one block on their way to the journal."""

    index: int
    tensors: dict[str, Tensor]
    draft: bool = False
    """A later step changes the block again."""


@dataclass(frozen=True, eq=False)
class Loop:
    """What the loop itself needs of a run."""

    executor: Executor
    journal: Journal
    found: Findings
    world: World
    seed: int
    output: str | None
    track: Track = nobody
    """Who is told the scalars of each finished block."""


@kept_warm()
def run_blocks(loop: Loop, work: BlockWork, bar: Progress) -> None:
    """Every block in its turn. Finished blocks are journaled; those of an interrupted run are read back and only run,
    to bring the activations to where it stopped. Raises :class:`~pyprune.execution.journal.Interrupted` between two
    blocks if a signal asked for it."""
    executor, journal, found = loop.executor, loop.journal, loop.found
    last, done = len(executor.view.blocks) - 1, len(journal.entries)
    found.warnings += journal.notes
    with found.clock("forward"):
        work.start()
    for index in range(last + 1):
        started = time.perf_counter()
        seed_all(loop.seed + index)
        with executor.compute(index, ahead=index + 1) as module, torch.no_grad():
            work.enter(index, module, index < done)
            if index < done:
                bar.update(phase="resume")
                with found.clock("resume"):
                    work.restore(index, module, journal.entries[index])
                found.take_up(journal.entries[index], last=index == done - 1)
            else:
                work.work(index, module, bar)
                for written in work.tensors(index):
                    journal.write(written.index, written.tensors, draft=written.draft)
            bar.update(phase="propagate")
            work.advance(index, module)
        if index >= done:
            found.blocks.append({"block": index, **work.row(index), "seconds": time.perf_counter() - started})
            with found.clock("write"):
                journal.commit(
                    index,
                    {
                        "row": found.blocks[index],
                        "warnings": found.warnings,
                        "seconds": found.clock.seconds,
                        **work.record(index),
                    },
                )
            loop.track(index, scalars(found.blocks[index]))
        if loop.world.any(journal.stopping):  # also: process 0 has written what the others may read
            journal.stop()
        for i in work.settled(index):
            executor.release(i, shard_path(loop.output, i) if loop.output else None)
        bar.update(block=index + 1, phase="done", error=found.blocks[index]["error"])
        if index < last:
            journal.safe_point()
    work.finish()


def settled_blocks(index: int, last: int, cross: bool) -> list[int]:
    """Blocks that are final once the step of block ``index`` is done. Cross-block reconstruction (``cross``) trains a
    block again in the next step, the last one in its own."""
    if not cross:
        return [index]
    return [i for i in (index - 1, index) if i >= 0 and (i < index or index == last)]


def tensors_of(view: ModelView, index: int) -> dict[str, Tensor]:
    """Everything a checkpoint stores of a block, by the names it has in the model."""
    return {f"{view.path}.{index}.{name}": tensor for name, tensor in view.blocks[index].state_dict().items()}


def read_back(journal: Journal, world: World, path: str, index: int, draft: bool = False) -> dict[str, Tensor]:
    """What an interrupted run left of a block of the list ``path``, in every process, by the block's own names."""
    found = world.lead(lambda: journal.read(index, draft=draft))
    found = world.tensors(found, torch.device("cpu"))
    return {name.removeprefix(f"{path}.{index}."): tensor for name, tensor in found.items()}
