"""Block-wise reconstruction of one block of a model that is pruned already, towards the dense model's outputs.

Zeros of the pruned model's matrices stay exactly where they are; a structured model has none and every weight of its
smaller blocks trains. Blocks may differ in width inside, not in hidden size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pyprune.data.calibration import CalibrationData
from pyprune.execution.error_probes import ErrorProbe, errors_of, pass_pruned
from pyprune.execution.executor import Activations, Executor
from pyprune.execution.journal import Journal
from pyprune.execution.progress import Progress
from pyprune.execution.run import Findings
from pyprune.masks.statistics import ratio
from pyprune.model.blocks import weights_of
from pyprune.pipeline.block_loop import Written, read_back, settled_blocks, tensors_of
from pyprune.pipeline.refine_request import Refinement
from pyprune.reconstruction.trained_window import TrainedWindow
from pyprune.reconstruction.training import Trace, train, window_error_sums
from pyprune.reconstruction.windows import parameter_masks, training_dtype

NAMES = ("calibration", "held_out")
PROBES = 2
"""Sequences of each on which the errors of the blocks are measured, as many as a run of ``pyprune.prune`` takes."""


class RefineWork:
    """The work of one run that trains a pruned model against the dense one."""

    def __init__(
        self,
        pruned: Executor,
        dense: Executor,
        data: CalibrationData,
        request: Refinement,
        found: Findings,
        journal: Journal,
    ):
        """request: says how to train, and whether the targets are the dense model's own stream."""
        self.pruned, self.dense, self.data, self.settings = pruned, dense, data, request.reconstruction
        self.cross, self.propagate, self.seed = request.cross_block, request.global_propagation, request.seed
        self.found, self.journal = found, journal
        self.world, self.view, self.blocks = pruned.world, pruned.view, pruned.view.blocks
        self.last = len(self.blocks) - 1
        self.streams: list[Activations] = []
        """Calibration and held-out sequences behind the pruned prefix."""
        self.targets: list[Activations] = []
        """The same in the dense model."""
        self.windows: list[list[dict]] = []
        """Per block, the rows of the windows that its step trained."""
        self.errors: list[dict] = []
        """Per block, how far the model is from the dense one behind it, ``before`` and ``after``: what the report of
        ``pyprune.prune`` calls a block's errors, on the same sequences for both."""
        self.before: list[ErrorProbe] = []
        """A few sequences in the model as it came and in the dense one."""
        self.after: list[ErrorProbe] = []
        """The same in the refined model; of cross-block training behind the last block that is final."""

    def start(self) -> None:
        fit = self.data.sequences + self.data.generated
        self.streams, self.targets = (
            [executor.embed(rows, shared=shared) for rows, shared in ((fit, True), (self.data.held_out, False)) if rows]
            for executor in (self.pruned, self.dense)
        )
        for name, rows in zip(NAMES, (self.data.sequences[:PROBES], self.data.held_out[:PROBES])):
            if rows:
                came = ErrorProbe(name, self.pruned.embed(rows), self.dense.embed(rows))
                self.before.append(came)
                self.after.append(ErrorProbe(name, came.pruned.like(), came.dense))

    def enter(self, index: int, module: nn.Module, done: bool) -> None:
        with self.found.clock("probe"):
            for came, refined in zip(self.before, self.after):
                if self.cross:  # the block before is final later than the dense stream leaves it
                    refined.dense = came.dense.like()
                _through(self.dense, [index], came.dense, came.dense)
            pass_pruned(self.pruned, index, module, self.before)
            self.errors.append({"block": index, "before": self._measured(self.before)})
        if self.propagate:
            with self.found.clock("forward"):
                for target in self.targets:
                    _through(self.dense, [index], target, target)
            self.dense.release(index)

    def work(self, index: int, module: nn.Module, bar: Progress) -> None:
        bar.update(phase="reconstruct")
        with self.found.clock("reconstruct"):
            rows = [self._window([index - 1, index] if self.cross and index else [index])]
            self._settle(index)
            if self.cross and index == self.last:
                rows.append(self._window([index]))
        for i in [] if self.propagate else self.settled(index):
            self.dense.release(i)
        self.windows.append(rows)
        self._follow(index, module)

    def restore(self, index: int, module: nn.Module, entry: dict) -> None:
        draft = self.cross and index == len(self.journal.entries) - 1 < self.last
        self.blocks[index].load_state_dict(read_back(self.journal, self.world, self.view.path, index, draft))
        self.settings = dataclasses.replace(self.settings, micro_batch_size=entry["micro_batch_size"])
        self.windows.append(entry["windows"])
        self._settle(index)
        self._follow(index, module)

    def advance(self, index: int, module: nn.Module) -> None:
        if not self.cross and index < self.last:
            with self.found.clock("forward"):
                for stream in self.streams:
                    self.pruned.run(index, module, stream, stream)
        if not self.cross or index == self.last:
            for came, refined in zip(self.before, self.after):
                refined.dense = came.dense
            self._pass_refined(index, module)

    def tensors(self, index: int) -> list[Written]:
        final = self.settled(index)
        return [Written(i, tensors_of(self.view, i), draft=i not in final) for i in dict.fromkeys([*final, index])]

    def row(self, index: int) -> dict:
        return {"error": self.windows[index][-1].get("after_calibration")}

    def record(self, index: int) -> dict:
        return {"windows": self.windows[index], "micro_batch_size": self.settings.micro_batch_size}

    def settled(self, index: int) -> list[int]:
        return settled_blocks(index, self.last, self.cross)

    def finish(self) -> None:
        pass

    def _window(self, window: list[int]) -> dict:
        if not self.propagate:
            for source, target in zip(self.streams, self.targets):
                _through(self.dense, window, source, target)
        blocks = [self.blocks[i] for i in window]
        net = TrainedWindow(
            self.pruned,
            window,
            blocks,
            [_masks(block) for block in blocks],
            training_dtype(self.pruned, self.settings.autocast),
        )
        trace, before, after = self._improve(net)
        if trace.micro_batch_size:  # the next window will not fit either
            self.settings = dataclasses.replace(self.settings, micro_batch_size=trace.micro_batch_size)
        if trace.diverged:
            self.found.warn(f"training of blocks {window} met a loss that is not finite and was undone; lower lr")
        return {
            "blocks": window,
            "steps": trace.steps,
            "seconds": trace.seconds,
            "diverged": trace.diverged,
            **{
                f"{when}_{name}": value
                for when, errors in (("before", before), ("after", after))
                for name, value in zip(NAMES, errors)
            },
        }

    def _improve(self, net: TrainedWindow) -> tuple[Trace, list[float], list[float]]:
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

    def _errors(self, net: TrainedWindow) -> list[float]:
        """Relative error on calibration sequences, of which each process has its share, and on held-out ones."""
        sums = [window_error_sums(self.pruned, net.indices, net, x, t) for x, t in zip(self.streams, self.targets)]
        self.world.sum_(sums[0])
        return [ratio(*pair) for pair in torch.stack(sums).tolist()]

    def _settle(self, index: int) -> None:
        """Cross-block: block ``index − 1`` is final now, so the streams move to the inputs of block ``index``."""
        if self.cross and index:
            for stream in self.streams:
                _through(self.pruned, [index - 1], stream, stream)
            with self.pruned.compute(index - 1) as module:
                self._pass_refined(index - 1, module)

    def _pass_refined(self, index: int, module: nn.Module) -> None:
        """The refined model's probes pass a block that is final, and are measured."""
        with self.found.clock("probe"), torch.no_grad():
            pass_pruned(self.pruned, index, module, self.after)
            self.errors[index]["after"] = self._measured(self.after)

    def _measured(self, probes: list[ErrorProbe]) -> dict:
        """``error`` and ``error_held_out``."""
        return {key: value for key, value in errors_of(self.pruned, probes).items() if key != "error_quantiles"}

    def _follow(self, index: int, module: nn.Module) -> None:
        """The compute copy takes the block's new weights."""
        if module is not self.blocks[index]:
            module.load_state_dict(self.blocks[index].state_dict())


@torch.no_grad()
def _through(executor: Executor, window: list[int], source: Activations, target: Activations) -> None:
    """``source`` through consecutive blocks as they are, into ``target``, which may be ``source``."""
    for index in window:
        with executor.compute(index) as module:
            executor.run(index, module, source, target)
        source = target


def _masks(block: nn.Module) -> dict[str, Tensor]:
    """Keep masks of the matrices that hold zeros."""
    found = {ref: ref.view(block) != 0 for ref in weights_of(block, routers=True)}
    return parameter_masks(block, {ref: mask for ref, mask in found.items() if not mask.all()})
