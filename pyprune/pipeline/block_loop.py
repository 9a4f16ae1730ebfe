"""How a block's step begins and ends, what it leaves on the disk, and how an interrupted run brings it back."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from pyprune.execution.distributed import World
from pyprune.execution.journal import Journal, shard_path
from pyprune.execution.run import Probe, Run, stream_error
from pyprune.pipeline.progress import Progress
from pyprune.reconstruction.windows import Refiner

MASK = ".pyprune_mask"
"""Ends the name of a keep mask in the draft of a block."""


def enter_block(run: Run, index: int, module: nn.Module, probes: list[Probe]) -> None:
    """Before a block is changed the dense probes pass it."""
    with run.clock("probe"):
        for probe in probes:
            run.executor.run(index, module, probe.dense, probe.dense)


def block_row(index: int, probes: list[Probe], started: float) -> dict:
    """A block's line of the report: errors of the hidden states behind it, and its seconds."""
    errors = {probe.name: stream_error(probe) for probe in probes}
    return {"block": index, "error": errors.get("calibration"), "error_held_out": errors.get("held_out"),
            "seconds": time.perf_counter() - started}


def leave_block(run: Run, bar: Progress, index: int, settled: list[int]) -> None:
    """After a block's step is committed: let go of the blocks that are final, and stop if a signal asked for it."""
    if run.world.any(run.journal.stopping):  # also: process 0 has written what the others may read
        run.journal.stop()
    output = run.config.output
    for i in settled:
        run.executor.release(i, shard_path(output, i) if output else None)
    bar.update(block=index + 1, phase="done", error=run.blocks[index]["error"])
    if index < len(run.view.blocks) - 1:
        run.journal.safe_point()


def write_block(run: Run, index: int, refiner: Refiner | None) -> None:
    """Begin to write what this step finished. Under CR that is the block before; the block at hand, which the next
    window trains again, goes with its masks as a draft."""
    settled = settled_by(run, index, refiner)
    for i in settled:
        run.journal.write(i, tensors_of(run.view.path, i, run.view.blocks[i]))
    if index in settled:
        return None
    prefix = f"{run.view.path}.{index}."
    masks = {f"{prefix}{path}{MASK}": mask for path, mask in refiner.masks[index].items()}
    return run.journal.write(index, {**tensors_of(run.view.path, index, run.view.blocks[index]), **masks}, draft=True)


def settled_by(run: Run, index: int, refiner: Refiner | None) -> list[int]:
    """Blocks that are final once the step of block ``index`` is done."""
    return settled(index, len(run.view.blocks) - 1, refiner is not None and refiner.cross)


def settled(index: int, last: int, cross: bool) -> list[int]:
    """The same for a step on its own: CR (``cross``) trains a block again in the next step, the last one in its own."""
    if not cross:
        return [index]
    return [i for i in (index - 1, index) if i >= 0 and (i < index or index == last)]


def tensors_of(path: str, index: int, block: nn.Module) -> dict[str, Tensor]:
    """Everything a checkpoint stores of a block of the list ``path``, by the names it has in the model."""
    return {f"{path}.{index}.{name}": tensor for name, tensor in block.state_dict().items()}


def commit_block(run: Run, index: int) -> None:
    """Make a finished block the point to resume from."""
    with run.clock("write"):
        run.journal.commit(index, {"weights": [row for row in run.weights if row["block"] == index],
                                   "row": run.blocks[index], "warnings": run.warnings, "seconds": run.clock.seconds})


def restore_block(run: Run, index: int, module: nn.Module, refiner: Refiner | None = None) -> None:
    """Bring back what an interrupted run made of a block: weights, report rows, warnings, seconds."""
    block, entry, done = run.view.blocks[index], run.journal.entries[index], len(run.journal.entries)
    draft = refiner is not None and refiner.cross and index == done - 1 < len(run.view.blocks) - 1
    with run.clock("resume"):
        tensors = read_back(run.journal, run.world, run.view.path, index, draft)
        masks = {name.removesuffix(MASK): tensors.pop(name) for name in list(tensors) if name.endswith(MASK)}
        block.load_state_dict(tensors)
        if module is not block:
            module.load_state_dict(block.state_dict())
        if refiner:
            refiner.masks[index] = masks
            refiner.settle(index)
    run.weights += entry["weights"]
    run.resume_row(entry, index)


def read_back(journal: Journal, world: World, path: str, index: int, draft: bool) -> dict[str, Tensor]:
    """What an interrupted run left of a block of the list ``path``, in every process, by the block's own names."""
    found = world.lead(lambda: journal.read(index, draft=draft))
    found = world.tensors(found, torch.device("cpu"))
    return {name.removeprefix(f"{path}.{index}."): tensor for name, tensor in found.items()}
