"""Structured pruning of a whole model: observe → score → choose → repair → slice, block by block.

``inputs="propagated"`` follows the pruned prefix and repairs towards the dense stream: per block one dense pass, one
pass for each of heads and neurons, one to go on. ``inputs="dense"`` needs one pass in all and serves many sparsities.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyprune import slicing
from pyprune.allocation import Member, choose, global_counts, uniform_count
from pyprune.config import ConfigError
from pyprune.group_criteria import NEEDS_GRADIENTS, NEEDS_MOMENTS, Scored, score
from pyprune.groups import PROBE_TOKENS, Coupled, find_groups
from pyprune.liar import Problem, Repair, repair
from pyprune.moments import HELD_OUT_EVERY, Split, held_out_tokens
from pyprune.run import Run, make_probes, stream_error
from pyprune.slicing import Pick, slice_block
from pyprune.stream import Activations, Batch, expert_loop
from pyprune.taps import Taps, mask_gradients


@dataclass(eq=False)
class Target:
    """One sparsity: the model it becomes and how."""

    sparsity: float
    model: nn.Module
    blocks: nn.ModuleList
    counts: list[list[int]]
    """Units kept, per block and group."""
    padded: list[list[int]] | None = None
    edits: dict | None = None
    """Config edits that make it a standard checkpoint; None if it is none."""
    reason: str | None = None
    """Why it is none."""
    layout: dict | None = None
    """What ``pyprune.load`` needs where a config does not say it."""
    rows: list[dict] = field(default_factory=list)
    attributes: list[dict] = field(default_factory=list)


@dataclass(eq=False)
class Plan:
    """What is known before the first pass."""

    groups: list[list[Coupled]]
    gradients: list[list[Tensor]] | None
    flags: dict[str, str]
    """``{kind: config flag}`` of biases that are added."""
    targets: list[Target]
    notes: list[str]


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


# ---- plan ----------------------------------------------------------------------------------------------------------

def make_plan(run: Run) -> Plan:
    """Groups, gradients, sizes and whether they can be said in a stock config; nothing is changed yet."""
    config, view = run.config, run.view
    groups = find_groups(view, config.pattern, config.structured.head_scope)
    groups = [[g for g in block if _selected(g, refs)] for block, refs in zip(groups, run.selected)]
    if not any(groups):
        raise ConfigError(f"targets and ignore leave no whole {config.pattern} to prune: a group goes only if its "
                          "consumer and all its producers are selected")
    for block in groups:
        for g in block:
            if len(g.pools.unique()) == g.units:
                raise ConfigError(_single(g))
    _verify(run, groups)
    run.selected = [[r for r in refs if r.path in _paths(block)] for block, refs in zip(groups, run.selected)]
    gradients = None
    if config.criterion in NEEDS_GRADIENTS:
        if any(g.consumer.expert is not None for block in groups for g in block):
            raise ConfigError(f"criterion {config.criterion!r} does not see fused experts; choose wifv or obs")
        dtype = run.executor.dtype
        with run.clock("gradients"):
            gradients = mask_gradients(view, groups, run.data.sequences, dtype=dtype,
                                       device=next(view.model.parameters()).device, seed=config.seed)
    flags, notes = _flags(run, groups)
    if config.reconstruct == "none" and config.criterion in ("wifv", "obs", "obs_greedy") and any(
            g.kind == "heads" for block in groups for g in block):
        notes.append(f"{config.criterion} chooses heads for a repair that takes up their mean; without reconstruction "
                     "it can be worse than random")
    plan = Plan(groups, gradients, flags, [], notes)
    sparsities = config.sparsity if isinstance(config.sparsity, list) else [config.sparsity]
    counts = _allocate(run, plan, sparsities)
    for sparsity, count in zip(sparsities, counts):
        model = view.model if len(sparsities) == 1 else _twin(view.model, view.path)
        target = Target(sparsity, model, model.get_submodule(view.path), count)
        _decide(run, plan, target)
        plan.targets.append(target)
    return plan


def _paths(block: list[Coupled]) -> set[str]:
    return {g.consumer.path for g in block} | {s.path for g in block for s in g.slots}


def _selected(group: Coupled, refs: list) -> bool:
    chosen = {r.path for r in refs}
    matrices = {s.path for s in group.slots if not s.path.endswith("bias")}
    return group.consumer.path in chosen and matrices <= chosen


def _single(group: Coupled) -> str:
    if group.heads and group.units == group.heads and group.groups == group.heads:
        return "head_scope='queries' needs several query heads a group; this model has one, use head_scope='groups'"
    return (f"{group.name} has a single key/value group, which cannot be dropped; use head_scope='queries' to drop "
            "query heads inside it")


def _verify(run: Run, groups: list[list[Coupled]]) -> None:
    vocabulary = run.view.model.get_input_embeddings().num_embeddings
    device = next(run.view.model.get_input_embeddings().parameters()).device
    ids = (torch.arange(PROBE_TOKENS)[None] * 5 + 2) % vocabulary
    hidden, arguments = run.view.record(ids.to(device))
    seen = set()
    with expert_loop(run.view.model.config):
        for index, (block, found) in enumerate(zip(run.view.blocks, groups)):
            if found and id(found[0].columns) not in seen:
                seen.add(id(found[0].columns))
                slicing.verify(block, found, hidden, arguments[index], f"{run.view.path}.{index}")


def _flags(run: Run, groups: list[list[Coupled]]) -> tuple[dict[str, str], list[str]]:
    """Bias flags to set, and what the plan says about kinds without a slot."""
    config = run.config
    wants = config.reconstruct == "bias" or (config.reconstruct == "liar" and config.structured.interpolate != "weight")
    if not wants:
        return {}, []
    index = next(i for i, block in enumerate(groups) if block)
    dense = slicing.dense_groups(groups[index])
    flags = slicing.bias_flags(run.view.model, {
        kind: slicing.consumer_path(run.view.path, index, g.consumer) for kind, g in dense.items()
        if g.consumer.expert is None})
    notes = []
    for kind, group in dense.items():
        if kind in flags:
            notes.append(f"{flags[kind]}=True gives {group.name} the bias of the reconstruction; the other biases it "
                         "adds are zeros")
        elif not _has_bias(run.view.blocks[index], group):
            notes.append(f"{type(run.view.model).__name__} has no bias slot at {group.name}: the bias-free solution on "
                         "uncentred moments is used")
    return flags, notes


def _has_bias(block: nn.Module, group: Coupled) -> bool:
    if group.consumer.expert is not None:
        return False
    return getattr(block.get_submodule(group.consumer.module_path), "bias", None) is not None


def _allocate(run: Run, plan: Plan, sparsities: list[float]) -> list[list[list[int]]]:
    """Units kept per sparsity, block and group."""
    if run.config.structured.allocation == "uniform":
        return [[[uniform_count(g, s) for g in block] for block in plan.groups] for s in sparsities]
    members = [[Member(i, g, None, g.unit_size(run.view.blocks[i])) for g in block]
               for i, block in enumerate(plan.groups)]
    with run.clock("allocation"), expert_loop(run.view.model.config), torch.no_grad():
        stream = run.executor.embed(run.data.sequences) if run.config.criterion in NEEDS_MOMENTS else None
        for index, block in enumerate(members):
            with run.executor.compute(index) as module:
                splits = _observe(run, index, module, plan.groups[index], stream, target=stream) if stream else None
            for i, member in enumerate(block):
                member.scores = _score(run, plan, index, i, splits[i] if splits else None)
    flat = [m for block in members for m in block]
    out = []
    for s in sparsities:
        counts = iter(global_counts(flat, s))
        out.append([[next(counts) for _ in block] for block in members])
    return out


def _twin(model: nn.Module, path: str) -> nn.Module:
    """A copy of the model that shares every parameter outside the blocks."""
    blocks = model.get_submodule(path)
    inside = {id(p) for p in blocks.parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in inside})


def _decide(run: Run, plan: Plan, target: Target) -> None:
    """Whether a stock config can say the target's sizes; refuse, pad or go on as the configuration asks."""
    mode = run.config.structured.nonstandard
    flags = dict.fromkeys(plan.flags.values(), True)
    try:
        target.edits = _edits(run, plan, target.counts, flags)
        return
    except ConfigError as error:
        target.reason = str(error)
    if mode == "refuse":
        raise ConfigError(f"sparsity {target.sparsity:g} makes a model that stock tools cannot load: {target.reason}. "
                          "Choose another sparsity or pattern, or structured.nonstandard='save' (for pyprune.load) or "
                          "'pad' (zeros, stock tools, no smaller)")
    if mode == "save":
        return
    widest = {k: max(c for b, cs in zip(plan.groups, target.counts) for g, c in zip(b, cs) if g.kind == k)
              for k in {g.kind for b in plan.groups for g in b}}
    dense = {g.kind: g.units for b in plan.groups for g in b}
    tries = [widest, {**widest, "heads": dense.get("heads")}, {**widest, "neurons": dense.get("neurons")}, dense]
    for sizes in tries:
        padded = [[sizes[g.kind] for g in block] for block in plan.groups]
        try:
            target.edits = _edits(run, plan, padded, flags)
        except ConfigError:
            continue
        target.padded = padded
        return
    raise ConfigError(f"even zero-padded sizes do not fit a stock config: {target.reason}")


def _edits(run: Run, plan: Plan, counts: list[list[int]], flags: dict) -> dict:
    """Config edits for these sizes, checked on a weightless model that is sliced like the real one."""
    model = run.view.model
    units: dict[str, set[int]] = {}
    for i, (block, sizes) in enumerate(zip(plan.groups, counts)):
        for g, n in zip(block, sizes):
            units.setdefault(g.kind, set()).add(n)
        for kind in {g.kind for b in plan.groups for g in b} - {g.kind for g in block}:
            units.setdefault(kind, set()).add(-i - 1)  # a block that keeps its dense size
    for kind, sizes in units.items():
        if len(sizes) > 1:
            shown = ", ".join(str(s) for s in sorted(s for s in sizes if s > 0)[:4])
            raise ConfigError(f"a {type(model.config).__name__} has one size for all blocks, these differ in {kind} "
                              f"({shown}{'' if min(sizes) > 0 else ', others dense'})")
    shell = slicing.empty_like(model, {})
    for block, found, sizes in zip(shell.get_submodule(run.view.path), plan.groups, counts):
        slice_block(block, [Pick(g, choose(g, -torch.arange(g.units).double(), n)) for g, n in zip(found, sizes)])
    dense = slicing.dense_groups(next(b for b in plan.groups if b))
    return slicing.standard_edits(shell, dense, {k: next(iter(v)) for k, v in units.items()}, flags)


# ---- blocks --------------------------------------------------------------------------------------------------------

def _observe(run: Run, index: int, module: nn.Module, groups: list[Coupled], stream: Activations, *,
             target: Activations | None = None, dense: list[Activations | None] | None = None) -> list[Split]:
    """Moments of the groups' inputs over a stream; outputs go to ``target``, errors are taken against ``dense``."""
    weights = [g.consumer.view(run.view.blocks[index]) for g in groups]
    precision = "bfloat16" if run.executor.dtype == torch.bfloat16 else "float32"
    errors = [dense is not None and dense[i] is not None for i in range(len(groups))]
    splits = [Split.make(w.shape[1], w.shape[0] if e else 0, run.executor.device, precision)
              for w, e in zip(weights, errors)]
    taps = Taps(module, groups, sums=any(errors), stop=target is None)
    total = stream.sequences
    try:
        for batch in stream.batches(run.executor.batch_size):
            with run.clock("forward"):
                hidden = stream.read(batch)
                out = taps.run(lambda hidden=hidden: run.executor.forward(index, module, hidden))
                if target is not None:
                    target.write(batch, out)
            with run.clock("statistics"):
                held = _held(stream, batch, total).to(run.executor.device)
                for i, split in enumerate(splits):
                    x = taps.inputs.get(i)
                    if x is None:
                        continue  # an expert that no token of this batch reached
                    mark = held if len(x) == len(held) else torch.arange(len(x), device=x.device) % HELD_OUT_EVERY == 4
                    e = None
                    if errors[i]:
                        want = dense[i].read(batch)
                        e = want.reshape(-1, want.shape[-1]).to(x.device).float() - taps.sums[i].float()
                    split.update(x, mark, e)
    finally:
        taps.close()
    for split, group in zip(splits, groups):
        if not split.finite():
            raise ConfigError(f"the inputs of {run.view.path}.{index}.{group.name} are not finite on the calibration "
                              "data; check the checkpoint, or load it in a wider dtype")
    return splits


def _held(stream: Activations, batch: Batch, total: int) -> Tensor:
    if total >= 2 * HELD_OUT_EVERY:
        rows = torch.tensor(stream.rows[batch.length][batch.start:batch.stop])
        return (rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1).repeat_interleave(batch.length)
    return held_out_tokens(batch.size, batch.length, batch.start, total)


def _dense_pass(run: Run, index: int, module: nn.Module, groups: list[Coupled], stream: Activations,
                sums: list[Activations | None]) -> None:
    """Advance the dense stream by one block and keep what each consumer's output should add up to."""
    taps = Taps(module, groups)
    try:
        for batch in stream.batches(run.executor.batch_size):
            hidden = stream.read(batch)
            out = taps.run(lambda hidden=hidden: run.executor.forward(index, module, hidden))
            for i, store in enumerate(sums):
                if store is not None and store is not stream:
                    store.write(batch, taps.sums[i].reshape(out.shape))
            stream.write(batch, out)
    finally:
        taps.close()


def _score(run: Run, plan: Plan, index: int, i: int, split: Split | None) -> Tensor:
    group, block = plan.groups[index][i], run.view.blocks[index]
    criterion = run.config.criterion
    if criterion in NEEDS_MOMENTS and split.count == 0:
        criterion = "magnitude"
        run.warn(f"{run.view.path}.{index}.{group.name} saw no calibration token: chosen by magnitude")
    layer = Scored(group, group.consumer.view(block).to(run.executor.device).float(), split,
                   centred=_slot(run, plan, index, group), block=block, seed=hash((run.config.seed, index, i)) % 2**31,
                   gradients=None if plan.gradients is None else plan.gradients[index][i])
    with run.clock("score"):
        return score(criterion, layer)


def _slot(run: Run, plan: Plan, index: int, group: Coupled) -> bool:
    return group.kind in plan.flags and group.consumer.expert is None or _has_bias(run.view.blocks[index], group)


def _repair(run: Run, plan: Plan, target: Target, index: int, i: int, split: Split | None, scores: Tensor) -> Pick:
    """Choose and repair one consumer for one sparsity; appends its row to the target's report."""
    config, block = run.config, run.view.blocks[index]
    group, count = plan.groups[index][i], target.counts[index][i]
    weight = group.consumer.view(block).to(run.executor.device).float().contiguous()
    bias = None
    if _slot(run, plan, index, group):
        own = getattr(block.get_submodule(group.consumer.module_path), "bias", None)
        bias = torch.zeros(len(weight), device=weight.device) if own is None else own.data.to(weight.device).float()
    kept = choose(group, scores, count)
    s = config.structured
    with run.clock("solve"):
        if split is None:
            columns = group.columns_of(kept).to(weight.device)
            done = Repair(weight[:, columns], bias, "none")
        else:
            done = repair(Problem(weight, bias, group, split), kept, config.reconstruct, damping=s.damping,
                          interpolate=s.interpolate, interpolate_weights=s.interpolate_weights)
    name = run.view.name(index, group.consumer)
    for warning in done.warnings:
        run.warn(f"{name} {warning}")
    target.rows.append({
        "name": name, "block": index, "shape": list(weight.shape), "kind": group.kind, "units": group.units,
        "kept": count, "method": done.method, "damping": done.damping, "error_held_out": done.error, "error": None,
        "errors": done.errors, "norm_ratio": done.norm_ratio, "warnings": done.warnings,
        "tokens": 0 if split is None else split.count,
        "sparsity": 1 - count / group.units})
    # a bias that was a slot only stays absent where nothing was put in it
    return Pick(group, kept, done.weight, done.bias, None if target.padded is None else target.padded[index][i])


def _needs_split(run: Run) -> bool:
    return run.config.reconstruct != "none" or run.config.criterion in NEEDS_MOMENTS


def _run_blocks(run: Run, bar, plan: Plan, inputs: str) -> None:
    observe = _needs_split(run)
    with run.clock("forward"):
        student = run.executor.embed(run.data.sequences) if observe else None
        dense = student.like() if observe and inputs == "propagated" and run.config.reconstruct != "none" else None
    probes = make_probes(run) if len(plan.targets) == 1 else []
    last = len(run.view.blocks) - 1
    for index, block in enumerate(run.view.blocks):
        started = time.perf_counter()
        bar.update(block=index, phase="structured")
        with run.executor.compute(index) as module:
            with run.clock("probe"):
                for probe in probes:
                    run.executor.run(index, module, probe.dense, probe.dense)
            if inputs == "dense":
                _dense_block(run, plan, index, module, student)
            else:
                _propagated_block(run, plan, index, module, student, dense)
                with run.clock("forward"):
                    if student is not None and index < last:
                        run.executor.run(index, module, student, student)
            if len(plan.targets) == 1:
                _refresh(block, module)
                with run.clock("probe"):
                    for probe in probes:
                        run.executor.run(index, module, probe.student, probe.student)
        errors = {probe.name: stream_error(probe) for probe in probes}
        run.blocks.append({"block": index, "error": errors.get("calibration"), "error_held_out": errors.get("held_out"),
                           "seconds": time.perf_counter() - started})
        bar.update(block=index + 1, phase="done", error=errors.get("calibration"))


def _refresh(block: nn.Module, module: nn.Module) -> None:
    """Give a compute copy the sliced block's sizes and values."""
    if module is block:
        return
    fresh = copy.deepcopy(block)
    like = next(p for p in module.parameters() if p.is_floating_point())
    fresh.to(like.device, like.dtype)
    module.__dict__.update(fresh.__dict__)


def _dense_block(run: Run, plan: Plan, index: int, module: nn.Module, stream: Activations | None) -> None:
    groups = plan.groups[index]
    splits: list = [None] * len(groups)
    if stream is not None:
        splits = _observe(run, index, module, groups, stream, target=stream)
    scores = [_score(run, plan, index, i, splits[i]) for i in range(len(groups))]
    picks = [[_repair(run, plan, t, index, i, splits[i], scores[i]) for i in range(len(groups))] for t in plan.targets]
    for target, chosen in zip(plan.targets, picks):
        with run.clock("slice"):
            target.attributes.append(slice_block(target.blocks[index], chosen))


def _propagated_block(run: Run, plan: Plan, index: int, module: nn.Module, student: Activations | None,
                      dense: Activations | None) -> None:
    """Heads, then neurons, each on the input that the pruned prefix and the pruned attention leave them."""
    groups, target = plan.groups[index], plan.targets[0]
    sums: list[Activations | None] = [None] * len(groups)
    if dense is not None:
        own = [g.consumer.expert is None for g in groups]
        sums = [None if not o else dense if g.target == "" else dense.like() for g, o in zip(groups, own)]
        with run.clock("forward"):
            _dense_pass(run, index, module, groups, dense, sums)
    attributes: dict[str, dict] = {}
    for kind in ("heads", "neurons"):
        stage = [i for i, g in enumerate(groups) if g.kind == kind]
        if not stage:
            continue
        splits: list = [None] * len(stage)
        if student is not None:
            splits = _observe(run, index, module, [groups[i] for i in stage], student, dense=[sums[i] for i in stage])
        picks = [_repair(run, plan, target, index, i, split, _score(run, plan, index, i, split))
                 for i, split in zip(stage, splits)]
        with run.clock("slice"):
            for path, values in slice_block(target.blocks[index], picks).items():
                attributes.setdefault(path, {}).update(values)
            _refresh(target.blocks[index], module)
    target.attributes.append(attributes)


# ---- finish --------------------------------------------------------------------------------------------------------

def finish(run: Run, plan: Plan, target: Target) -> None:
    """Config and leftovers of one pruned model: a plain checkpoint, or a layout that ``pyprune.load`` reads."""
    flags = dict.fromkeys(plan.flags.values(), True)
    slicing.apply_edits(target.model, target.edits) if target.edits is not None else _set_flags(target.model, flags)
    if target.edits is None:
        sizes = [{g.name: n for g, n in zip(block, counts)} for block, counts in zip(plan.groups, target.counts)]
        target.layout = slicing.layout(target.model, run.view.path, target.attributes, sizes)
    elif target.padded is not None:
        target.reason = f"zero-padded to a stock config, no smaller in memory: {target.reason}"
    target.model.eval()


def _set_flags(model: nn.Module, flags: dict) -> None:
    for key, value in flags.items():
        setattr(model.config, key, value)
    slicing.add_biases(model, flags)
