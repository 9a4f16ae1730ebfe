"""Unstructured and N:M pruning of one block: observe, choose, solve, reconstruct; the loop propagates and writes."""

from __future__ import annotations

from torch import Tensor, nn

from pyprune.config import PruneConfig
from pyprune.effects import needs_sequences, trains
from pyprune.execution.error_probes import ErrorProbe, errors_of, make_probes, pass_dense, pass_pruned
from pyprune.execution.executor import Activations
from pyprune.execution.journal import Journal
from pyprune.execution.run import Findings, Run
from pyprune.masks.block import gather, prune_block
from pyprune.masks.statistics import Inputs, Observer, observe
from pyprune.model.blocks import WeightRef
from pyprune.pipeline.block_loop import Written, read_back, settled_blocks, tensors_of
from pyprune.pipeline.passes import Passes
from pyprune.pipeline.progress import Progress
from pyprune.reconstruction.windows import WindowTrainer, streams_beside, wanted

MASK = ".pyprune_mask"
"""Suffix of the name of a keep mask in the draft of a block."""


class MaskWork:
    """The work of one run that chooses masks, in place on the run's model."""

    def __init__(self, run: Run, found: Findings, journal: Journal):
        self.run, self.found, self.journal = run, found, journal
        self.config, self.executor = run.config, run.executor
        self.last = len(run.view.blocks) - 1
        self.passes = self.passes_of(run.config)
        self.fit: Activations | None = None
        self.probes: list[ErrorProbe] = []
        self.trainer: WindowTrainer | None = None

    @staticmethod
    def passes_of(config: PruneConfig) -> Passes:
        """What a run of this configuration passes through its blocks."""
        if not needs_sequences(config):
            return Passes()
        beside, dense_inputs = streams_beside(config), config.inputs == "dense"
        cross = "behind" in beside
        # without GP the statistics pass leaves BR's targets; CR's are two dense blocks behind the final prefix
        dense = 1 if "dense" in beside else 2 * cross
        return Passes(statistics=1, propagation=(not dense_inputs) + cross, dense=dense,
                      training=config.reconstruction.epochs * (1 + cross) if trains(config) else 0,
                      keeps_outputs=dense_inputs or ("local" in beside and not cross), streams=("inputs", *beside))

    def start(self) -> None:
        if self.passes.statistics and self.run.data.sequences:
            self.fit = self.executor.embed(self.run.data.sequences, shared=True)
        self.probes = make_probes(self.executor, self.config, self.run.data)
        if wanted(self.config):
            self.trainer = WindowTrainer(self.run, self.found, self.fit, self.probes)

    def enter(self, index: int, module: nn.Module, done: bool) -> None:
        with self.found.clock("probe"):
            pass_dense(self.executor, index, module, self.probes)
        if not done:
            return
        if self.fit is not None and self.config.inputs == "dense" and index < self.last:
            with self.found.clock("forward"):
                self.executor.run(index, module, self.fit, self.fit)
        if self.trainer:
            self.trainer.dense(index, module, training=False)

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
            return [observe(self.executor, index, module, refs, probe.pruned, lambda columns, device: Inputs())
                    for probe in self.probes]

    def observe(self, index: int, module: nn.Module) -> Observer | None:
        """Statistics of the calibration data, None if none are needed."""
        refs = self.run.selected[index]
        if self.fit is None or not (refs or self.config.inputs == "dense"):
            return None
        beside = self.trainer.beside(index) if self.trainer else {}
        with self.found.clock("forward"):
            return gather(self.run, self.found, index, module, refs, self.fit, **beside)

    def dense_targets(self, index: int, module: nn.Module, statistics: Observer | None) -> dict[WeightRef, Tensor]:
        """What block reconstruction is trained towards; returns copies of the dense weights."""
        if not self.trainer:
            return {}
        with self.found.clock("forward"):
            self.trainer.dense(index, module, gathered=statistics is not None)
        return {ref: ref.view(self.run.view.blocks[index]).clone() for ref in self.run.selected[index]}

    def choose_and_solve(self, index: int, module: nn.Module, statistics: Observer | None,
                         inputs: list[Observer]) -> dict[WeightRef, Tensor]:
        """Masks and layer-wise weights of the block; returns the keep masks."""
        with self.found.clock("solve"):
            return prune_block(self.run, self.found, index, module, statistics, inputs)

    def reconstruct(self, index: int, module: nn.Module, original: dict[WeightRef, Tensor],
                    masks: dict[WeightRef, Tensor]) -> None:
        """Block-wise or cross-block training of the kept weights."""
        if self.trainer:
            with self.found.clock("reconstruct"):
                self.trainer.reconstruct(index, module, original, masks)

    def restore(self, index: int, module: nn.Module, entry: dict) -> None:
        block = self.run.view.blocks[index]
        crosses = self.trainer is not None and self.trainer.cross
        draft = crosses and index == len(self.journal.entries) - 1 < self.last
        tensors = read_back(self.journal, self.run.world, self.run.view.path, index, draft)
        masks = {name.removesuffix(MASK): tensors.pop(name) for name in list(tensors) if name.endswith(MASK)}
        block.load_state_dict(tensors)
        if module is not block:
            module.load_state_dict(block.state_dict())
        if self.trainer:
            self.trainer.masks[index] = masks
            self.trainer.settle(index)
        self.found.weights += entry["weights"]

    def advance(self, index: int, module: nn.Module) -> None:
        with self.found.clock("forward"):
            if self.trainer:
                self.trainer.advance(index, module)
            elif self.fit is not None and self.passes.propagation and index < self.last:
                self.executor.run(index, module, self.fit, self.fit)
        if not self.trainer:
            with self.found.clock("probe"):
                pass_pruned(self.executor, index, module, self.probes)

    def tensors(self, index: int) -> list[Written]:
        """Under cross-block reconstruction the block before is final now; the block at hand, which the next window
        trains again, is written as a draft, with its masks."""
        view, final = self.run.view, self.settled(index)
        written = [Written(i, tensors_of(view, i)) for i in final]
        if index not in final:
            masks = self.trainer.masks[index].items() if self.trainer else ()
            kept = {f"{view.path}.{index}.{path}{MASK}": mask for path, mask in masks}
            written.append(Written(index, {**tensors_of(view, index), **kept}, draft=True))
        return written

    def row(self, index: int) -> dict:
        return {**errors_of(self.probes), **(self.trainer.row(index) if self.trainer else {})}

    def record(self, index: int) -> dict:
        return {"weights": [row for row in self.found.weights if row["block"] == index]}

    def settled(self, index: int) -> list[int]:
        return settled_blocks(index, self.last, self.trainer is not None and self.trainer.cross)

    def finish(self) -> None:
        if self.trainer:
            self.trainer.finish()

    def coverage(self) -> dict:
        """What of the model was selected."""
        return self.run.view.coverage(self.run.selected)

    def models(self) -> dict[float, nn.Module]:
        """The pruned model by its sparsity."""
        return {self.config.sparsities[0]: self.run.view.model}

    def entry(self) -> None:
        """There is no structure to report."""
