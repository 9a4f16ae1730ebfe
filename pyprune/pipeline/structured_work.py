"""Structured pruning of one block: observe, score, choose, repair, slice; the loop propagates and writes.

``inputs="propagated"`` follows the pruned prefix and repairs towards the dense stream: per block one dense pass, one
pass for each of heads and neurons, one to go on. ``inputs="sequential"`` does the last three in one
(:mod:`pyprune.structured.sequential`). ``inputs="dense"`` needs one pass in all and serves many sparsities.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from pyprune.config import PruneConfig
from pyprune.effects import observes
from pyprune.execution.error_probes import ErrorProbe, errors_of, make_probes, pass_dense, pass_pruned
from pyprune.execution.executor import NO_ROOM, Activations
from pyprune.execution.journal import Journal
from pyprune.execution.lanes import Declined, carried_through
from pyprune.execution.progress import Progress
from pyprune.execution.run import Findings, Run
from pyprune.pipeline.block_loop import Written
from pyprune.pipeline.passes import Passes
from pyprune.structured import config_edits, slicing
from pyprune.structured.allocation import removed
from pyprune.structured.block import StructuredRun, Target, dense_block, dense_sums, propagated_block, refresh
from pyprune.structured.criteria import needs_moments
from pyprune.structured.preparation import prepare
from pyprune.structured.sequential import SequentialBlock, replay
from pyprune.structured.slicing import Pick
from pyprune.structured.stop_order import StopOrder, record
from pyprune.structured.units import Units


class StructuredWork:
    """The work of one run that removes heads and neurons; one sparsity is pruned in place."""

    def __init__(self, run: Run, found: Findings, journal: Journal, units: Units):
        """Raises ConfigError before any pass if the result could not be loaded as ``structured.nonstandard`` asks.

        units: what is chosen from, as :func:`pyprune.structured.units.find_units` found it.
        """
        self.run, self.found, self.journal, self.executor = run, found, journal, run.executor
        self.last = len(run.view.blocks) - 1
        self.inputs, self.passes = self.inputs_of(run.config), self.passes_of(run.config)
        if self.inputs != run.config.inputs:
            found.warn(
                "several sparsities share one pass over the dense stream; prune one at a time for inputs='propagated'"
            )
        with found.clock("groups"):
            self.structured: StructuredRun = prepare(run, found, units)
        self.prepared, self.targets = self.structured.prepared, self.structured.targets
        for note in self.prepared.notes:
            found.warn(note)
        self.fit: Activations | None = None
        self.dense: Activations | None = None
        self.probes: list[ErrorProbe] = []
        self.orders: dict[Hashable, StopOrder] = {}
        """With sequential inputs, what is known of blocks by their structure."""
        self.key: Hashable = None
        """Structure of the block at hand while it was dense."""
        self.kept: list[list[int]] | None = None
        """By group, the units that the block at hand kept if it was pruned in passing: the streams have passed it."""

    @staticmethod
    def inputs_of(config: PruneConfig) -> str:
        """Whose inputs a block is pruned on: several sparsities share those of the dense model."""
        return "dense" if config.is_curve else config.inputs or config.usual_inputs

    @classmethod
    def passes_of(cls, config: PruneConfig) -> Passes:
        """What a run of this configuration passes through its blocks."""
        if not observes(config):
            return Passes()
        shares = config.structured.allocation == "global" and needs_moments(config.criterion)
        if cls.inputs_of(config) == "dense":
            return Passes(statistics=1, allocation=int(shares), keeps_outputs=True, streams=("inputs",))
        streams = ["inputs"]
        if config.reconstruct != "none":
            streams += ["dense"] if config.pattern == "neurons" else ["dense", "sums of the attention"]
        sequential = config.inputs == "sequential"
        return Passes(
            statistics=2 if config.pattern == "structured" and not sequential else 1,
            propagation=int(not sequential),
            allocation=int(shares),
            dense=int("dense" in streams),
            keeps_outputs=sequential,
            streams=tuple(streams),
        )

    def start(self) -> None:
        if self.passes.statistics and self.run.data.sequences:
            self.fit = self.executor.embed(self.run.data.sequences, shared=True)
            self.dense = self.fit.like() if self.passes.dense else None
        if len(self.targets) == 1:
            self.probes = make_probes(self.executor, self.run.config, self.run.data)

    def enter(self, index: int, module: nn.Module, done: bool) -> None:
        with self.found.clock("probe"):
            pass_dense(self.executor, index, module, self.probes)
        if done:
            with self.found.clock("forward"):
                for stream in (self.fit if self.inputs == "dense" else None, self.dense):
                    if stream is not None:
                        self.executor.run(index, module, stream, stream)

    def work(self, index: int, module: nn.Module, bar: Progress) -> None:
        bar.update(phase="statistics")
        self.kept, self.key = None, self.structure(index)
        if self.inputs == "dense":
            dense_block(self.structured, index, module, self.fit)
        else:
            bar.update(phase="dense targets")
            sums = dense_sums(self.structured, index, module, self.dense)
            bar.update(phase="statistics")
            if self.inputs != "sequential" or not self.prune_in_passing(index, module, sums):
                propagated_block(self.structured, index, module, self.fit, sums)
        self._refresh(index, module)
        self._add_biases(index)

    def prune_in_passing(self, index: int, module: nn.Module, sums: list[Activations | None]) -> bool:
        """One pass in which heads and neurons go when all tokens have arrived at their consumers. False for a block
        that cannot be pruned so, which is still dense then; the report says why."""
        if self.fit is None or not self.prepared.groups[index]:
            return False
        key, fit, [target] = self.key, self.fit, self.targets
        if key not in self.orders:
            with self.found.clock("forward"):
                self.orders[key] = self.order_of(index, module, fit)
        if self.orders[key].trouble is None:

            def lanes() -> SequentialBlock:
                going = SequentialBlock(self.structured, index, module, self.orders[key], sums)
                going.add(fit, fit if index < self.last else None, fit=True)
                for probe in self.probes:
                    going.add(probe.pruned, probe.pruned)
                return going

            try:
                picks: list[Pick] = carried_through(self.executor, self.found, index, lanes)
            except Declined as declined:
                self.orders[key] = StopOrder(trouble=str(declined))
            else:
                self.kept = [pick.kept.tolist() for pick in picks]
                with self.found.clock("slice"):
                    target.attributes.append(slicing.slice_block(target.blocks[index], picks))
                return True
        self.found.warn(f"block {index} was pruned as by inputs='propagated': {self.orders[key].trouble}")
        return False

    def order_of(self, index: int, module: nn.Module, fit: Activations) -> StopOrder:
        """Where the passes through blocks like this one stop, the same in all processes."""
        groups = self.prepared.groups[index]
        order = self.executor.attempt(lambda: record(self.executor, index, module, groups, fit))
        if order is NO_ROOM:
            order = StopOrder(trouble=f"one sequence of {max(fit.rows)} tokens does not fit on {self.executor.device}")
        return self.run.world.same(order)

    def structure(self, index: int) -> Hashable:
        """Equal for blocks, still dense, whose passes stop at the same places."""
        block, groups = self.run.view.blocks[index], self.prepared.groups[index]
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        return type(block), shapes, tuple(group.consumer for group in groups)

    def restore(self, index: int, module: nn.Module, entry: dict) -> None:
        """Give a block the sizes and values that an interrupted run gave it."""
        world = self.run.world
        stored = world.tensors(world.lead(lambda: self.journal.read(index)), torch.device("cpu"))
        self.kept, self.key = entry["kept"], self.structure(index)
        for target, done in zip(self.targets, entry["targets"]):
            start = f"{self._prefix(target)}{self.run.view.path}.{index}."
            tensors = {name.removeprefix(start): t for name, t in stored.items() if name.startswith(start)}
            if self.kept is not None:
                self.replay(index, module, target, tensors, self.kept)
            slicing.set_block(target.blocks[index], tensors, done["attributes"])
            target.rows += done["rows"]
            target.attributes.append(done["attributes"])
        if entry["not_sequential"] is not None:
            self.orders[self.key] = StopOrder(trouble=entry["not_sequential"])
        self._refresh(index, module)

    def replay(
        self, index: int, module: nn.Module, target: Target, tensors: dict[str, torch.Tensor], kept: list[list[int]]
    ) -> None:
        """The streams pass the block, still dense, as they did while it was pruned."""
        groups = self.prepared.groups[index]
        rooms = [None] * len(groups) if target.padded is None else target.padded[index]
        picks = [slicing.stored_pick(tensors, g, torch.tensor(k), room) for g, k, room in zip(groups, kept, rooms)]
        with self.found.clock("forward"):
            replay(self.structured, index, module, picks, [self.fit] if self.fit and index < self.last else [])
        with self.found.clock("probe"):
            replay(self.structured, index, module, picks, [probe.pruned for probe in self.probes])

    def advance(self, index: int, module: nn.Module) -> None:
        if self.kept is not None:
            return  # they passed it while it was pruned
        if self.fit is not None and self.inputs != "dense" and index < self.last:
            with self.found.clock("forward"):
                self.executor.run(index, module, self.fit, self.fit)
        with self.found.clock("probe"):
            pass_pruned(self.executor, index, module, self.probes)

    def tensors(self, index: int) -> list[Written]:
        view = self.run.view
        return [
            Written(
                index,
                {
                    f"{self._prefix(target)}{view.path}.{index}.{name}": tensor
                    for target in self.targets
                    for name, tensor in target.blocks[index].state_dict().items()
                },
            )
        ]

    def row(self, index: int) -> dict:
        way = {}
        if self.inputs == "sequential" and self.prepared.groups[index]:
            way = {"inputs": "propagated" if self.kept is None else "sequential"}
        return {**errors_of(self.executor, self.probes), **way}

    def record(self, index: int) -> dict:
        order = self.orders.get(self.key)
        return {
            "targets": [
                {"rows": [row for row in t.rows if row["block"] == index], "attributes": t.attributes[index]}
                for t in self.targets
            ],
            "kept": self.kept,
            "not_sequential": order.trouble if order else None,
        }

    def settled(self, index: int) -> list[int]:
        return [index]

    def finish(self) -> None:
        for target in self.targets:
            _finish(self.structured, target)
        self.found.weights += self.targets[-1].rows

    def coverage(self) -> dict:
        """What of the dense model was selected."""
        return self.prepared.coverage

    def entry(self) -> dict:
        """What the report says of the structure; of several sparsities, one entry each in ``curve``."""
        entries = [
            {
                "sparsity": t.sparsity,
                "standard": t.edits is not None,
                "reason": t.reason,
                "edits": t.edits,
                "parameters": sum(p.numel() for p in t.model.parameters()),
                "removed": removed(self.prepared.groups, t.counts),
                "layers": t.rows,
                "layout": t.layout,
            }
            for t in self.targets
        ]
        curve = {"curve": entries} if self.run.config.is_curve else {}
        return {"notes": self.prepared.notes, "inputs": self.inputs, **entries[-1], **curve}

    def models(self) -> dict[float, nn.Module]:
        """The pruned models by sparsity, in the order asked."""
        return {t.sparsity: t.model for t in self.targets}

    def _refresh(self, index: int, module: nn.Module) -> None:
        """The compute copy follows the one model there is."""
        if len(self.targets) == 1:
            refresh(self.run.view.blocks[index], module)

    def _add_biases(self, index: int) -> None:
        """Explicit zeros for the biases that the config's flags add beside the reconstruction's."""
        for target in self.targets:
            for name in self.prepared.biases[index]:
                module = target.blocks[index].get_submodule(name.rpartition(".")[0])
                if module.bias is None:
                    module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), requires_grad=False)

    def _prefix(self, target: Target) -> str:
        """Sets the tensors of several models apart in one shard."""
        return f"{target.sparsity:g}/" if len(self.targets) > 1 else ""


def _finish(work: StructuredRun, target: Target) -> None:
    """Config and leftovers of one pruned model: a plain checkpoint, or a layout that ``pyprune.load`` reads."""
    flags = dict.fromkeys(work.prepared.flags.values(), True)
    if target.edits is not None:
        config_edits.apply_edits(target.model, target.edits)
        if target.padded is not None:
            target.reason = f"zero-padded to a stock config, no smaller in memory: {target.reason}"
    else:
        for key, value in flags.items():
            setattr(target.model.config, key, value)
        config_edits.add_biases(target.model, flags)
        sizes = [
            {g.name: n for g, n in zip(block, counts)} for block, counts in zip(work.prepared.groups, target.counts)
        ]
        target.layout = config_edits.layout(target.model, work.run.view.path, target.attributes, sizes)
    target.model.eval()
