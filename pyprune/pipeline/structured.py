"""Structured pruning of a whole model: observe → score → choose → repair → slice, block by block.

``inputs="propagated"`` follows the pruned prefix and repairs towards the dense stream: per block one dense pass, one
pass for each of heads and neurons, one to go on. ``inputs="dense"`` needs one pass in all and serves many sparsities.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from pyprune.execution.executor import expert_loop
from pyprune.execution.run import Run, make_probes, seed_all
from pyprune.pipeline.block_loop import block_row, enter_block, leave_block, tensors_of
from pyprune.structured import config_edits, slicing
from pyprune.structured.block import Plan, Target, dense_block, needs_split, propagated_block, refresh
from pyprune.structured.preparation import make_plan


def prune_structured(run: Run, bar) -> dict[float, nn.Module]:
    """Prune the run's model; returns ``{sparsity: model}``, in the order asked. One sparsity is pruned in place.

    Raises ConfigError before any pass if the result could not be loaded as asked (``structured.nonstandard``).
    """
    config = run.config
    inputs = config.inputs
    many = isinstance(config.sparsity, list)
    if many and inputs == "propagated":
        inputs = "dense"
        run.warn("several sparsities share one pass over the dense stream; prune one at a time for inputs='propagated'")
    with run.clock("groups"):
        plan = make_plan(run)
    run.coverage = run.view.coverage(run.selected)
    for note in plan.notes:
        run.warn(note)
    with expert_loop(run.view.model.config), torch.no_grad():
        _run_blocks(run, bar, plan, inputs)
    for target in plan.targets:
        finish(run, plan, target)
    run.weights += plan.targets[-1].rows
    entries = [{"sparsity": t.sparsity, "standard": t.edits is not None, "reason": t.reason, "edits": t.edits,
                "parameters": sum(p.numel() for p in t.model.parameters()), "layers": t.rows, "layout": t.layout}
               for t in plan.targets]
    run.structured = {"notes": plan.notes, "inputs": inputs, **entries[-1], **({"curve": entries} if many else {})}
    return {t.sparsity: t.model for t in plan.targets}


def report_of(report: dict, sparsity: float) -> dict:
    """The report of one of several sparsities, as if it had been pruned alone."""
    whole = report["structured"]
    entry = next(e for e in whole["curve"] if e["sparsity"] == sparsity)
    total = sum(r["shape"][0] * r["shape"][1] for r in entry["layers"])
    dropped = sum(r["sparsity"] * r["shape"][0] * r["shape"][1] for r in entry["layers"])
    return {**report, "config": {**report["config"], "sparsity": sparsity}, "weights": entry["layers"],
            "model": {**report["model"], "parameters": entry["parameters"]}, "sparsity": dropped / total,
            "evaluation": entry.get("evaluation", []),
            "structured": {"notes": whole["notes"], "inputs": whole["inputs"], **entry}}


def _run_blocks(run: Run, bar, plan: Plan, inputs: str) -> None:
    """Every block in its turn; finished ones are journaled, and those of an interrupted run only run again."""
    executor, journal, clock = run.executor, run.journal, run.clock
    observing = needs_split(run)
    with clock("forward"):
        student = executor.embed(run.data.sequences, shared=True) if observing else None
        dense = student.like() if observing and inputs == "propagated" and run.config.reconstruct != "none" else None
    probes = make_probes(run) if len(plan.targets) == 1 else []
    last, done = len(run.view.blocks) - 1, len(journal.entries)
    run.warnings += journal.notes
    for index, block in enumerate(run.view.blocks):
        started = time.perf_counter()
        seed_all(run.config.seed + index)
        bar.update(block=index, phase="resume" if index < done else "statistics")
        with executor.compute(index) as module:
            enter_block(run, index, module, probes)
            if index < done:
                with clock("forward"):
                    for stream in (student if inputs == "dense" else None, dense):
                        if stream is not None:
                            executor.run(index, module, stream, stream)
                _restore(run, plan, index)
            elif inputs == "dense":
                dense_block(run, plan, index, module, student)
            else:
                propagated_block(run, plan, index, module, student, dense)
            if len(plan.targets) == 1:
                refresh(block, module)
            if index >= done:
                _add_biases(plan, index)
                journal.write(index, _tensors(run, plan, index))
            bar.update(phase="propagate")
            if inputs == "propagated" and student is not None and index < last:
                with clock("forward"):
                    executor.run(index, module, student, student)
            with clock("probe"):
                for probe in probes:
                    executor.run(index, module, probe.student, probe.student)
        if index >= done:
            run.blocks.append(block_row(index, probes, started))
            _commit(run, plan, index)
        leave_block(run, bar, index, [index])


def _add_biases(plan: Plan, index: int) -> None:
    """Explicit zeros for the biases that the config's flags add beside the reconstruction's."""
    for target in plan.targets:
        for name in plan.biases[index]:
            module = target.blocks[index].get_submodule(name.rpartition(".")[0])
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), requires_grad=False)


# ---- what a block leaves on the disk --------------------------------------------------------------------------------

def _prefix(target: Target, plan: Plan) -> str:
    """Sets the tensors of several models apart in one shard."""
    return f"{target.sparsity:g}/" if len(plan.targets) > 1 else ""


def _tensors(run: Run, plan: Plan, index: int) -> dict[str, Tensor]:
    return {_prefix(target, plan) + name: tensor for target in plan.targets
            for name, tensor in tensors_of(run.view.path, index, target.blocks[index]).items()}


def _commit(run: Run, plan: Plan, index: int) -> None:
    """Make a finished block the point to resume from."""
    with run.clock("write"):
        run.journal.commit(index, {
            "targets": [{"rows": [row for row in t.rows if row["block"] == index], "attributes": t.attributes[index]}
                        for t in plan.targets],
            "row": run.blocks[index], "warnings": run.warnings, "seconds": run.clock.seconds})


def _restore(run: Run, plan: Plan, index: int) -> None:
    """Give a block the sizes and values that an interrupted run gave it, its report rows, warnings and seconds."""
    entry = run.journal.entries[index]
    with run.clock("resume"):
        found = run.world.lead(lambda: run.journal.read(index))
        found = run.world.tensors(found, torch.device("cpu"))
        for target, kept in zip(plan.targets, entry["targets"]):
            start = f"{_prefix(target, plan)}{run.view.path}.{index}."
            tensors = {name.removeprefix(start): t for name, t in found.items() if name.startswith(start)}
            slicing.set_block(target.blocks[index], tensors, kept["attributes"])
            target.rows += kept["rows"]
            target.attributes.append(kept["attributes"])
    run.resume_row(entry, index)


# ---- finish --------------------------------------------------------------------------------------------------------

def finish(run: Run, plan: Plan, target: Target) -> None:
    """Config and leftovers of one pruned model: a plain checkpoint, or a layout that ``pyprune.load`` reads."""
    flags = dict.fromkeys(plan.flags.values(), True)
    config_edits.apply_edits(target.model, target.edits) if target.edits is not None else _set_flags(target.model, flags)
    if target.edits is None:
        sizes = [{g.name: n for g, n in zip(block, counts)} for block, counts in zip(plan.groups, target.counts)]
        target.layout = config_edits.layout(target.model, run.view.path, target.attributes, sizes)
    elif target.padded is not None:
        target.reason = f"zero-padded to a stock config, no smaller in memory: {target.reason}"
    target.model.eval()


def _set_flags(model: nn.Module, flags: dict) -> None:
    for key, value in flags.items():
        setattr(model.config, key, value)
    config_edits.add_biases(model, flags)
