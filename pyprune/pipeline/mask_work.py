"""Unstructured and N:M pruning of one block: observe, choose, solve, reconstruct; the loop propagates and writes."""

from __future__ import annotations

from torch import Tensor, nn

from pyprune.effects import needs_sequences
from pyprune.execution.error_probes import ErrorProbe, errors_of, make_probes, pass_dense, pass_student
from pyprune.execution.executor import Activations
from pyprune.execution.journal import Journal
from pyprune.execution.run import Findings, Run
from pyprune.masks.block import gather, prune_block
from pyprune.masks.statistics import Inputs, Observer, observe
from pyprune.model.blocks import WeightRef
from pyprune.pipeline.block_loop import Written, read_back, settled_blocks, tensors_of
from pyprune.pipeline.progress import Progress
from pyprune.reconstruction.windows import Refiner, wanted

MASK = ".pyprune_mask"
"""Ends the name of a keep mask in the draft of a block."""


class MaskWork:
    """The work of one run that chooses masks, in place on the run's model."""

    def __init__(self, run: Run, found: Findings, journal: Journal):
        self.run, self.found, self.journal = run, found, journal
        self.config, self.executor = run.config, run.executor
        self.last = len(run.view.blocks) - 1
        self.fit: Activations | None = None
        self.probes: list[ErrorProbe] = []
        self.refiner: Refiner | None = None

    def start(self) -> None:
        if needs_sequences(self.config):
            self.fit = self.executor.embed(self.run.data.sequences, shared=True)
        self.probes = make_probes(self.executor, self.config, self.run.data)
        if wanted(self.config):
            self.refiner = Refiner(self.run, self.found, self.fit, self.probes)

    def enter(self, index: int, module: nn.Module, done: bool) -> None:
        with self.found.clock("probe"):
            pass_dense(self.executor, index, module, self.probes)
        if not done:
            return
        if self.fit is not None and self.config.inputs == "dense" and index < self.last:
            with self.found.clock("forward"):
                self.executor.run(index, module, self.fit, self.fit)
        if self.refiner:
            self.refiner.dense(index, module, training=False)

    def work(self, index: int, module: nn.Module, bar: Progress) -> None:
        inputs = self.observe_probes(index, module)
        bar.update(phase="statistics")
        statistics = self.observe(index, module)
        bar.update(phase="dense targets")
        original = self.dense_targets(index, module, statistics)
        bar.update(phase="solve")
        masks = self.choose_and_solve(index, module, statistics, inputs)
        bar.update(phase="reconstruct")
        self.reconstruct(index, module, original, masks)

    def observe_probes(self, index: int, module: nn.Module) -> list[Observer]:
        """Inputs of the block's weights on the probe sequences, to measure every weight's error on."""
        refs = self.run.selected[index]
        if not refs:
            return []
        with self.found.clock("probe"):
            return [observe(self.executor, index, module, refs, probe.student, lambda columns, device: Inputs())
                    for probe in self.probes]

    def observe(self, index: int, module: nn.Module) -> Observer | None:
        """Statistics of the calibration data, None if none are needed."""
        refs = self.run.selected[index]
        if self.fit is None or not (refs or self.config.inputs == "dense"):
            return None
        beside = self.refiner.beside(index) if self.refiner else {}
        with self.found.clock("forward"):
            return gather(self.run, self.found, index, module, refs, self.fit, **beside)

    def dense_targets(self, index: int, module: nn.Module, statistics: Observer | None) -> dict[WeightRef, Tensor]:
        """What block reconstruction is trained towards; returns copies of the dense weights."""
        if not self.refiner:
            return {}
        with self.found.clock("forward"):
            self.refiner.dense(index, module, gathered=statistics is not None)
        return {ref: ref.view(self.run.view.blocks[index]).clone() for ref in self.run.selected[index]}

    def choose_and_solve(self, index: int, module: nn.Module, statistics: Observer | None,
                         inputs: list[Observer]) -> dict[WeightRef, Tensor]:
        """Masks and layer-wise weights of the block; returns the keep masks."""
        with self.found.clock("solve"):
            return prune_block(self.run, self.found, index, module, statistics, inputs)

    def reconstruct(self, index: int, module: nn.Module, original: dict[WeightRef, Tensor],
                    masks: dict[WeightRef, Tensor]) -> None:
        """Block-wise or cross-block training of the kept weights."""
        if self.refiner:
            with self.found.clock("reconstruct"):
                self.refiner.refine(index, module, original, masks)

    def restore(self, index: int, module: nn.Module, entry: dict) -> None:
        block = self.run.view.blocks[index]
        crosses = self.refiner is not None and self.refiner.cross
        draft = crosses and index == len(self.journal.entries) - 1 < self.last
        tensors = read_back(self.journal, self.run.world, self.run.view.path, index, draft)
        masks = {name.removesuffix(MASK): tensors.pop(name) for name in list(tensors) if name.endswith(MASK)}
        block.load_state_dict(tensors)
        if module is not block:
            module.load_state_dict(block.state_dict())
        if self.refiner:
            self.refiner.masks[index] = masks
            self.refiner.settle(index)
        self.found.weights += entry["weights"]

    def advance(self, index: int, module: nn.Module) -> None:
        with self.found.clock("forward"):
            if self.refiner:
                self.refiner.advance(index, module)
            elif self.fit is not None and self.config.inputs == "propagated" and index < self.last:
                self.executor.run(index, module, self.fit, self.fit)
        if not self.refiner:
            with self.found.clock("probe"):
                pass_student(self.executor, index, module, self.probes)

    def tensors(self, index: int) -> list[Written]:
        """Under cross-block reconstruction the block before is final now; the block at hand, which the next window
        trains again, goes with its masks as a draft."""
        view, final = self.run.view, self.settled(index)
        written = [Written(i, tensors_of(view, i)) for i in final]
        if index not in final:
            masks = self.refiner.masks[index].items() if self.refiner else ()
            kept = {f"{view.path}.{index}.{path}{MASK}": mask for path, mask in masks}
            written.append(Written(index, {**tensors_of(view, index), **kept}, draft=True))
        return written

    def row(self, index: int) -> dict:
        return {**errors_of(self.probes), **(self.refiner.row(index) if self.refiner else {})}

    def record(self, index: int) -> dict:
        return {"weights": [row for row in self.found.weights if row["block"] == index]}

    def settled(self, index: int) -> list[int]:
        return settled_blocks(index, self.last, self.refiner is not None and self.refiner.cross)

    def finish(self) -> None:
        if self.refiner:
            self.refiner.finish()

    def coverage(self) -> dict:
        """What of the model was selected."""
        return self.run.view.coverage(self.run.selected)

    def models(self) -> dict[float, nn.Module]:
        """The pruned model by its sparsity."""
        return {self.config.sparsity: self.run.view.model}

    def entry(self) -> None:
        """There is no structure to report."""
