"""Unstructured and N:M pruning of one block: observe, choose, solve, reconstruct; the loop propagates and writes."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

from pyprune.config import PruneConfig
from pyprune.effects import needs_sequences, trains
from pyprune.execution.error_probes import SELF_GENERATED, ErrorProbe, errors_of, make_probes, pass_dense, pass_pruned
from pyprune.execution.executor import NO_ROOM, Activations
from pyprune.execution.journal import Journal
from pyprune.execution.lanes import Declined, carried_through
from pyprune.execution.progress import Progress
from pyprune.execution.run import Findings, Run
from pyprune.masks.block import gather, prune_block
from pyprune.masks.group_order import GroupOrder, record, structure
from pyprune.masks.sequential import SequentialPass
from pyprune.masks.statistics import Inputs, Observer, observe
from pyprune.model.blocks import WeightRef
from pyprune.pipeline.block_loop import Written, read_back, settled_blocks, tensors_of
from pyprune.pipeline.passes import Passes
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
        self.orders: dict[Hashable, GroupOrder] = {}
        """With sequential inputs, what is known of blocks by their structure."""
        self.passed = -1
        """The last block that the streams passed while it was pruned."""

    @staticmethod
    def passes_of(config: PruneConfig) -> Passes:
        """What a run of this configuration passes through its blocks."""
        if not needs_sequences(config):
            return Passes()
        beside = streams_beside(config)
        cross, sequential, follows = "behind" in beside, config.inputs == "sequential", config.inputs == "propagated"
        # without GP the statistics pass leaves BR's targets, unless it prunes as it goes; CR's are two dense blocks
        # behind the final prefix
        dense = 1 if "dense" in beside else 2 * cross or int(sequential and trains(config))
        if sequential:
            follows = trains(config) or config.reconstruction.select == "validation"
        return Passes(
            statistics=1,
            propagation=follows + cross,
            dense=dense,
            training=config.reconstruction.epochs * (1 + cross) if trains(config) else 0,
            keeps_outputs=config.inputs != "propagated" or ("local" in beside and not cross),
            streams=("inputs", *beside),
        )

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
        if self.config.inputs == "sequential":
            self.work_sequentially(index, module, bar)
            return
        inputs = self.observe_probes(index, module)
        bar.update(phase="statistics")
        statistics = self.observe(index, module)
        bar.update(phase="dense targets")
        original = self.dense_targets(index, module, statistics is not None)
        bar.update(phase="solve")
        masks = self.choose_and_solve(index, module, statistics, inputs)
        bar.update(phase="reconstruct")
        self.reconstruct(index, module, original, masks)

    def work_sequentially(self, index: int, module: nn.Module, bar: Progress) -> None:
        bar.update(phase="dense targets")
        dense = self.dense_ahead(index)
        original = self.dense_targets(index, module, dense is not None)
        bar.update(phase="group by group")
        masks = self.prune_in_passing(index, module, dense)
        if masks is None:
            inputs, statistics = self.observe_probes(index, module), self.observe(index, module, dense)
            masks = self.choose_and_solve(index, module, statistics, inputs)
        bar.update(phase="reconstruct")
        self.reconstruct(index, module, original, masks)

    def dense_ahead(self, index: int) -> Activations | None:
        """The dense stream, where the layer-wise step fits its outputs: it passes the block with the pruned one."""
        if self.trainer is None or self.fit is None or not self.run.selected[index]:
            return None
        return self.trainer.beside(index).get("dense")

    def prune_in_passing(
        self, index: int, module: nn.Module, dense: Activations | None
    ) -> dict[WeightRef, Tensor] | None:
        """One pass in which each group of layers is pruned when all tokens have arrived at it; returns the keep masks.
        None for a block that cannot be pruned so, which is still dense then; the report says why."""
        if self.fit is None or not self.run.selected[index]:
            return None
        key = self.structure(index)
        with self.found.clock("forward"):
            if key not in self.orders:
                self.orders[key] = self.order_of(index, module, self.fit)
            if self.orders[key].trouble is None:
                try:
                    masks = self.pass_as_it_fits(index, module, self.orders[key], self.fit, dense)
                    self.passed = index
                    return masks
                except Declined as declined:
                    self.orders[key] = GroupOrder(trouble=str(declined))
        self.found.warn(f"block {index} was pruned as by inputs='propagated': {self.orders[key].trouble}")
        return None

    def pass_as_it_fits(
        self, index: int, module: nn.Module, order: GroupOrder, fit: Activations, dense: Activations | None
    ) -> dict[WeightRef, Tensor]:
        """:class:`SequentialPass` over all streams of the run. Raises Declined if it cannot be made."""
        target = fit if self.final and index < self.last else None

        def lanes() -> SequentialPass:
            going = SequentialPass(self.run, self.found, index, module, order)
            if dense is None:
                going.add(fit, target, fit=True)
            else:
                going.add_towards(dense, fit, None if self.final and index == self.last else dense, target)
            for probe in self.probes:
                going.add(probe.pruned, None if self.trainer else probe.pruned)
            return going

        return carried_through(self.executor, self.found, index, lanes)

    def order_of(self, index: int, module: nn.Module, fit: Activations) -> GroupOrder:
        """Order of the groups of blocks like this one, the same in all processes."""
        refs = self.run.selected[index]
        order = self.executor.attempt(lambda: record(self.executor, index, module, refs, fit))
        if order is NO_ROOM:
            order = GroupOrder(trouble=f"one sequence of {max(fit.rows)} tokens does not fit on {self.executor.device}")
        return self.run.world.same(order)

    @property
    def final(self) -> bool:
        """Whether the layer-wise step is the last that changes a block."""
        return self.trainer is None or not (self.trainer.trains or self.trainer.settings.select == "validation")

    def structure(self, index: int) -> Hashable:
        return structure(self.run.view.blocks[index], self.run.selected[index])

    def observe_probes(self, index: int, module: nn.Module) -> list[Observer]:
        """Inputs of the block's weights on the probe sequences, to measure every weight's error on."""
        refs = self.run.selected[index]
        if not refs:
            return []
        with self.found.clock("probe"):
            return [
                observe(self.executor, index, module, refs, probe.pruned, lambda columns, device: Inputs())
                for probe in self.probes
                if probe.name != SELF_GENERATED
            ]

    def observe(self, index: int, module: nn.Module, dense: Activations | None = None) -> Observer | None:
        """Statistics of the calibration data, None if none are needed. dense: of a block that could not be pruned in
        passing, the dense stream that was to go ahead."""
        refs = self.run.selected[index]
        if self.fit is None or not (refs or self.config.inputs == "dense"):
            return None
        beside = {} if dense is None else {"dense": dense}
        if self.trainer and self.config.inputs != "sequential":
            beside = self.trainer.beside(index)
        with self.found.clock("forward"):
            return gather(self.run, self.found, index, module, refs, self.fit, **beside)

    def dense_targets(self, index: int, module: nn.Module, gathered: bool) -> dict[WeightRef, Tensor]:
        """What block reconstruction is trained towards; returns copies of the dense weights. gathered: the statistics
        pass has made, or will make, what :meth:`WindowTrainer.beside` says."""
        if not self.trainer:
            return {}
        with self.found.clock("forward"):
            self.trainer.dense(index, module, gathered=gathered)
        return {ref: ref.view(self.run.view.blocks[index]).clone() for ref in self.run.selected[index]}

    def choose_and_solve(
        self, index: int, module: nn.Module, statistics: Observer | None, inputs: list[Observer]
    ) -> dict[WeightRef, Tensor]:
        """Masks and layer-wise weights of the block; returns the keep masks."""
        with self.found.clock("solve"):
            return prune_block(self.run, self.found, index, module, statistics, inputs)

    def reconstruct(
        self, index: int, module: nn.Module, original: dict[WeightRef, Tensor], masks: dict[WeightRef, Tensor]
    ) -> None:
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
        if self.config.inputs == "sequential" and self.run.selected[index] and entry["not_sequential"] is not None:
            self.orders[self.structure(index)] = GroupOrder(trouble=entry["not_sequential"])

    def advance(self, index: int, module: nn.Module) -> None:
        with self.found.clock("forward"):
            if self.trainer:
                self.trainer.advance(index, module, passed=self.final and index == self.passed)
            elif self.fit is not None and self.follows(index) and index < self.last:
                self.executor.run(index, module, self.fit, self.fit)
        behind = [] if index == self.passed else self.probes
        if self.trainer:  # which passes those it measures on itself
            behind = [probe for probe in self.probes if probe.name == SELF_GENERATED]
        with self.found.clock("probe"):
            pass_pruned(self.executor, index, module, behind)

    def follows(self, index: int) -> bool:
        """Whether the calibration stream has still to pass the pruned block."""
        return self.config.inputs != "dense" and index != self.passed

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
        way = {}
        if self.config.inputs == "sequential" and self.run.selected[index]:
            way = {"inputs": "sequential" if index == self.passed else "propagated"}
        return {**errors_of(self.executor, self.probes), **(self.trainer.row(index) if self.trainer else {}), **way}

    def record(self, index: int) -> dict:
        kept: dict = {"weights": [row for row in self.found.weights if row["block"] == index]}
        if self.config.inputs == "sequential":
            order = self.orders.get(self.structure(index))
            kept["not_sequential"] = order.trouble if order else None
        return kept

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
        return {self.run.sparsity: self.run.view.model}

    def entry(self) -> None:
        """There is no structure to report."""
