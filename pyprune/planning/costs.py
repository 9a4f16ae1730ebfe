"""What a run computes and holds, counted from shapes alone: FLOPs, forward passes, bytes of memory and disk by part.

No weights are looked at, so a model of any size can be counted; blocks that are alike are counted once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyprune.config import PruneConfig
from pyprune.effects import needs_factor, trains
from pyprune.evaluation.domains import of_run
from pyprune.evaluation.perplexity import POSITIONS
from pyprune.evaluation.windows import count_windows
from pyprune.execution.activation_store import DEPTH
from pyprune.execution.device import cpu_has_bfloat16
from pyprune.execution.executor import target_tokens
from pyprune.execution.replays import switched_on
from pyprune.masks.refit import NARROW, SYSTEM_ELEMENTS, USUAL_STEPS
from pyprune.masks.solvers import PANEL_BLOCKS
from pyprune.model import assembly
from pyprune.model.attributes import active_share, attention_size, embedding_width, output_layer, vocabulary_size
from pyprune.model.blocks import ModelView, WeightRef, weights_of
from pyprune.model.packed_shards import packed_bytes, pays
from pyprune.pipeline.opening import models_whole
from pyprune.pipeline.passes import Passes
from pyprune.pipeline.phases import kind_of
from pyprune.pipeline.sparsities import Rules

PROCESS = 500 * 2**20
"""Bytes of a process that has imported torch (built for CPUs) and transformers and pruned something tiny."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Inputs of a block's weights that get statistics of their own."""

    width: int
    rows: tuple[int, ...]
    """Of each of the weights that read it."""
    count: int = 1
    """How many of them there are: one, or one an expert."""
    share: float = 1.0
    """Share of the tokens that each sees."""


def kinds(view: ModelView, selected: list[list[WeightRef]]) -> list[tuple[nn.Module, list[WeightRef], list[int]]]:
    """A block of each kind, its selected weights, and the numbers of all blocks like it."""
    found: dict[tuple, tuple[nn.Module, list[WeightRef], list[int]]] = {}
    for index, (block, refs) in enumerate(zip(view.blocks, selected)):
        shapes = tuple((name, p.shape) for name, p in block.named_parameters())
        found.setdefault((shapes, tuple(refs)), (block, refs, []))[2].append(index)
    return list(found.values())


def inputs_of(view: ModelView, block: nn.Module, refs: list[WeightRef]) -> list[Input]:
    """The distinct inputs of a block's weights: neighbours of one module and width share theirs, but for its last
    weight, which consumes what the others produce; every expert has its own."""
    groups: dict[tuple, Input] = {}
    for place, ref in enumerate(refs):
        rows, width = ref.view(block).shape
        if ref.expert is not None:
            share = active_share(view.model.config)
            groups[(ref.path,)] = Input(width, (rows,), len(ref.parameter(block)), share)
            continue
        parent = ref.module_path.rpartition(".")[0]
        last = place + 1 == len(refs) or refs[place + 1].module_path.rpartition(".")[0] != parent
        others = groups[parent, width, last].rows if (parent, width, last) in groups else ()
        groups[parent, width, last] = Input(width, (*others, rows))
    return list(groups.values())


def tokens_of(config: PruneConfig) -> int:
    """Calibration tokens, the self-generated ones included."""
    return (config.calibration.samples + config.calibration.self_generated) * config.calibration.tokens


def probe_sequences(config: PruneConfig) -> int:
    """Sequences that errors are measured on, of the calibration data and held out."""
    calibration, most = config.calibration, config.probe_samples
    return sum(min(most, count) for count in (calibration.samples, calibration.held_out, calibration.self_generated))


@dataclasses.dataclass
class Work:
    """FLOPs of an average block, and of the head, by what they scale with."""

    forward: float
    """A token through the matrices that are active for it."""
    attention: float
    """A token's attention to one other."""
    statistics: float
    """A token into the statistics: Gram matrices, or column norms."""
    solve: float
    """Factorisations, sweeps and refits, or the choice of masks alone."""
    head: float
    """A token through the output layer."""

    def passing(self, length: int) -> float:
        """A token of a sequence through a block; it attends to half of the others on average."""
        return self.forward + self.attention * length / 2


def work_of(view: ModelView, selected: list[list[WeightRef]], config: PruneConfig) -> Work:
    """Averages over the blocks of a model, which may be without weights."""
    forward = statistics = solve = 0.0
    factors, share = needs_factor(config) or config.is_structured, active_share(view.model.config)
    for block, refs, alike in kinds(view, selected):
        experts = {ref.path for ref in weights_of(block) if ref.expert is not None}
        forward += len(alike) * sum(
            2 * p.numel() * (share if name in experts else 1) for name, p in block.named_parameters() if p.ndim >= 2
        )
        for x in inputs_of(view, block, refs):
            statistics += len(alike) * x.count * x.share * (x.width**2 if factors else x.width)
            solve += len(alike) * x.count * 2 * x.width**3 if factors else 0
        solve += len(alike) * sum(
            2 * rows * columns * (columns if factors else 1) for rows, columns in shapes_of(block, refs)
        )
        if config.reconstruct == "refit":
            solve += len(alike) * sum(refit_flops(rows, columns) for rows, columns in shapes_of(block, refs))
    model, blocks = view.model, view.distinct
    head = output_layer(model)
    return Work(
        forward / blocks,
        4.0 * attention_size(model.config),
        statistics / blocks,
        solve / blocks,
        0.0 if head is None else 2.0 * head.weight.numel(),
    )


def refit_flops(rows: int, columns: int) -> float:
    """FLOPs of one matrix's exact refit."""
    return rows * columns**3 / 3 if columns <= NARROW else 2 * rows * columns**2 * USUAL_STEPS


def solve_bytes(x: Input, config: PruneConfig, recorded: bool = False) -> int:
    """Bytes that solving the weights of one input takes beside their Gram and the masks: while it is factored three
    matrices of its width; then the factor, all of the weights that are swept together, with targets of the dense stream
    twice, and what one of them needs by itself. recorded: they lie in rooms that :func:`room_bytes` counts."""
    columns, largest = x.width, max(x.rows) * x.width
    if config.is_structured:
        return max(12 * columns**2, 4 * columns**2 + 12 * largest)
    if not needs_factor(config):
        return 12 * largest
    towards_dense = config.global_propagation and (
        not trains(config) or config.reconstruction.layerwise_target == "dense"
    )
    stack = 4 * (1 + towards_dense - recorded) * sum(x.rows) * columns
    own = refit_bytes(max(x.rows), columns) if config.reconstruct == "refit" else 8 * largest
    return max(12 * columns**2, 4 * columns**2 + stack + own)


def records(view: ModelView, config: PruneConfig) -> bool:
    """Whether a GPU's kernels are recorded in a second block, if it is them that sweep."""
    return switched_on() and needs_factor(config) and not config.is_structured and len(view.order) > 1


def room_bytes(found: list[Input], config: PruneConfig) -> int:
    """Bytes that recorded sweeps keep from block to block: rooms of weights, mask and factor, each as large as the
    largest, and memory of their own for the masks of the column blocks, once more together, and a panel's errors."""
    largest = max((sum(x.rows) * x.width for x in found), default=0)
    panel = max((sum(x.rows) * min(PANEL_BLOCKS * config.column_block, x.width) for x in found), default=0)
    return (4 + 1 + 2) * largest + 8 * panel + 4 * max((x.width**2 for x in found), default=0)


def refit_bytes(rows: int, columns: int) -> int:
    """Bytes of one matrix's exact refit beside what was swept: H, its dense and new weights, and the search's four
    matrices; or the systems that are factored together, three times."""
    systems = 12 * min(rows * columns**2, max(SYSTEM_ELEMENTS, columns**2))
    return 4 * columns**2 + 8 * rows * columns + (systems if columns <= NARROW else 16 * rows * columns)


def shapes_of(block: nn.Module, refs: list[WeightRef]) -> list[tuple[int, int]]:
    """``(out, in)`` of each weight."""
    known: dict[str, tuple[int, int]] = {}
    for ref in refs:
        if ref.path not in known:
            rows, columns = ref.view(block).shape
            known[ref.path] = rows, columns
    return [known[ref.path] for ref in refs]


def passes_of(config: PruneConfig) -> Passes:
    """Forward passes of the calibration data through every block, as the kind of run itself has them; of several
    sparsities that are pruned one after the other, for each."""
    return kind_of(config).passes_of(config)


def runs_of(config: PruneConfig) -> int:
    """How often the blocks are gone through: once per sparsity for masks, once in all for heads and neurons."""
    return len(config.singles()) or 1


def flops_of(view: ModelView, work: Work, config: PruneConfig, windows: int) -> dict[str, float]:
    """FLOPs of the matrix products by phase; a phase that does not happen is left out. windows: of the evaluation."""
    blocks, passes, tokens = len(view.order), passes_of(config), tokens_of(config)
    forward = blocks * work.forward
    probes = 2 * probe_sequences(config) * config.calibration.tokens * forward
    found = {"forward": passes.forward * tokens * forward + probes}
    if config.is_structured or needs_factor(config):
        found |= {"gram": blocks * tokens * work.statistics, "solve": view.distinct * work.solve}
    found["reconstruct"] = 3 * passes.training * tokens * forward
    found = {phase: runs_of(config) * count for phase, count in found.items()}
    scored = windows * config.evaluation.tokens
    found["evaluation"] = (1 + len(config.sparsities)) * scored * (forward + work.head)
    return {phase: count for phase, count in found.items() if count}


def models_parameters(view: ModelView, config: PruneConfig) -> int:
    """Parameters of all models that a run holds at once, none streamed; of several sparsities of heads and neurons each
    has blocks of its own."""
    everything, several = sum(p.numel() for p in view.model.parameters()), len(config.sparsities)
    if config.is_curve and several > 1:
        return everything + several * sum(p.numel() for p in view.blocks.parameters())
    return everything * models_whole(config)


def evaluation_windows(view: ModelView, config: PruneConfig, tokenizer: Callable[[], Any] = lambda: None) -> int:
    """Windows that perplexity is measured on, before and after: as many as are asked for at most. Where that is not
    bounded, the text is read and its tokens are reckoned. tokenizer: gives the model's."""
    if view.is_encoder or not config.evaluation.enabled:
        return 0
    settings = config.evaluation
    return sum(
        count_windows(settings, tokenizer(), asked, settings.tokens) if asked.most is None else asked.most
        for asked in of_run(settings, config.calibration)
    )


def memory_of(
    view: ModelView,
    selected: list[list[WeightRef]],
    config: PruneConfig,
    compute: torch.dtype,
    streamed: bool,
    gpu: bool,
    budget: float = math.inf,
    room: float = math.inf,
    stays: bool = False,
    windows: int = 0,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part, at the moment of its peak, of the host and of a GPU; without one, all is in host memory.

    budget: host memory for activations; what is above it lies in files. room: GPU memory for passes that stand still.
    stays: the weights are on the GPU all the time. windows: of the evaluation.
    """
    hidden = embedding_width(view.model)
    own, calibration = next(view.blocks.parameters()).dtype, config.calibration
    largest = max(sum(p.numel() for p in block.parameters()) for block, _, _ in kinds(view, selected))
    everything = sum(p.numel() for p in view.model.parameters())
    rest = everything - sum(p.numel() for p in view.blocks.parameters())
    window = 2 if config.reconstruct == "cross_block" else 1
    host = {
        "process": PROCESS,
        "weights": (rest + (1 + window) * largest if streamed else models_parameters(view, config)) * own.itemsize,
    }
    sequences = config.batch_size or max(1, target_tokens("cuda" if gpu else "cpu") // calibration.tokens)
    batch = sequences * calibration.tokens
    block = {"block": window * largest * compute.itemsize if compute != own else 0}
    if stays:
        block["weights"] = everything * own.itemsize
    elif gpu:  # and the next block is on its way
        block["block"] = (window + 1) * largest * compute.itemsize
    grams, inputs, solve, rooms, widest = 0, 0, 0, 0, widest_input(view, selected)
    recorded = gpu and records(view, config)
    stored, paused = activations_of(view, selected, config, compute, budget, room if gpu else None)
    host["activations"] = int(min(budget, stored))
    for one, refs, _ in kinds(view, selected):
        found = inputs_of(view, one, refs)
        inputs = max(inputs, sum(int(x.width * x.count * x.share) for x in found))
        factors = needs_factor(config) or config.is_structured
        grams = max(grams, sum(4 * x.width**2 * x.count for x in found) if factors else 0)
        masks = sum(rows * columns for rows, columns in shapes_of(one, refs))
        solve = max([solve, *(masks + solve_bytes(x, config, recorded) for x in found)])
        rooms = max(rooms, room_bytes(found, config) if recorded else 0)
    kept = {
        "statistics": grams,
        "probes": probe_sequences(config) * calibration.tokens * inputs * compute.itemsize,
        "paused_passes": int(paused),
        "recorded_sweeps": rooms,
    }
    ring = 2 * DEPTH * hidden if gpu else 0
    moments = [
        {**block, **kept, "batches": batch * (4 * widest + hidden + ring) * compute.itemsize},
        {**block, **kept, "solve": solve, "batches": batch * ring * compute.itemsize},
    ]
    if trains(config):
        micro = (config.reconstruction.micro_batch_size or config.reconstruction.batch_size) * calibration.tokens
        moments.append(
            {
                **block,
                "recorded_sweeps": rooms,
                "training": window * (20 * largest + 4 * micro * (6 * widest + 12 * hidden)),
            }
        )
    evaluated = {**host, "activations": 0, "evaluation": evaluation_bytes(view, config, streamed, widest, windows)}
    hosts = [host, evaluated] if gpu else [evaluated, *({**host, **moment} for moment in moments)]
    return _peak(hosts), _peak(moments) if gpu else {}


def _peak(moments: list[dict[str, int]]) -> dict[str, int]:
    """The moment that needs most, its parts that are not empty."""
    return {part: size for part, size in max(moments, key=lambda m: sum(m.values())).items() if size}


def activation_bytes(config: PruneConfig, hidden: int, compute: torch.dtype) -> int:
    """The calibration data between two blocks, once a stream, and the sequences that errors are measured on, twice."""
    tokens = len(passes_of(config).streams) * tokens_of(config)
    return (tokens + 2 * probe_sequences(config) * config.calibration.tokens) * hidden * compute.itemsize


def widest_input(view: ModelView, selected: list[list[WeightRef]]) -> int:
    """Width of the widest input of a selected weight, or of the hidden states."""
    found = (x.width for block, refs, _ in kinds(view, selected) for x in inputs_of(view, block, refs))
    return max(embedding_width(view.model), *found, 0)


def activations_of(
    view: ModelView,
    selected: list[list[WeightRef]],
    config: PruneConfig,
    compute: torch.dtype,
    budget: float,
    room: float | None,
) -> tuple[float, float]:
    """Bytes that go to the activation store, which keeps ``budget`` of them in memory and the rest in files, and bytes
    of passes that stand still where blocks are computed.

    room: GPU memory for these; None on a CPU, where they share the store's budget. Those there is no room for spill to
    the store.
    """
    hidden = embedding_width(view.model)
    stored = activation_bytes(config, hidden, compute)
    paused = paused_bytes(config, hidden, widest_input(view, selected), compute)
    stays = min(paused, max(0.0, budget - stored) if room is None else room)
    return stored + paused - stays, stays


def paused_bytes(config: PruneConfig, hidden: int, widest: int, compute: torch.dtype) -> int:
    """What passes that stand still before a group of layers keep alive: the residual, and queries, keys, values and
    attention's output, or the widest input; a run measures it."""
    if config.inputs != "sequential":
        return 0
    tokens = tokens_of(config) + probe_sequences(config) * config.calibration.tokens
    return tokens * (hidden + max(4 * hidden, widest)) * compute.itemsize


def evaluation_bytes(view: ModelView, config: PruneConfig, streamed: bool, widest: int, windows: int) -> int:
    """What measuring perplexity needs beside the weights: a copy in another type, activations, logits."""
    if view.is_encoder or not config.evaluation.enabled:
        return 0
    asked, own = config.evaluation.dtype, next(view.blocks.parameters()).dtype
    dtype = (
        getattr(torch, asked)
        if asked != "auto"
        else torch.bfloat16
        if own == torch.float32 and cpu_has_bfloat16()
        else own
    )
    vocabulary, hidden = vocabulary_size(view.model), embedding_width(view.model)
    tokens = config.evaluation.batch_size * config.evaluation.tokens
    everything = sum(p.numel() for p in view.model.parameters())
    blocks = sum(p.numel() for p in view.blocks.parameters())
    cast = 0 if dtype == own else (everything if not streamed else everything - blocks + 2 * blocks // len(view.blocks))
    kept = windows * config.evaluation.tokens * hidden if streamed else 0
    return (
        cast + kept + tokens * max(vocabulary, 4 * widest + hidden)
    ) * dtype.itemsize + 8 * config.evaluation.batch_size * min(POSITIONS, config.evaluation.tokens) * vocabulary


def writes_once(view: ModelView, config: PruneConfig, streamed: bool) -> bool:
    """Whether finished blocks are linked into the checkpoint; otherwise they wait beside it and are written again."""
    return streamed or (not config.is_curve and assembly.stores_as_held(view.model, view.path))


def disk_of(
    view: ModelView,
    selected: list[list[WeightRef]],
    config: PruneConfig,
    streamed: bool,
    activations: int = 0,
    rules: Rules | None = None,
) -> dict[str, int]:
    """Bytes of the checkpoint, or of those of all sparsities, and while running: one that is packed is written beside
    the plain one.

    activations: bytes that do not fit into their memory. rules: per block, the key of each weight's sparsity.
    """
    size = next(view.blocks.parameters()).dtype.itemsize
    checkpoint = sum(p.numel() for p in view.model.parameters()) * size
    once = writes_once(view, config, streamed)
    blocks = 0 if once else sum(p.numel() for p in view.blocks.parameters()) * size
    if config.is_curve:
        checkpoint, blocks = len(config.sparsities) * checkpoint, len(config.sparsities) * blocks
    finished = running = 0
    for single in config.singles() or [config]:
        plain = checkpoint + blocks + activations
        kept = checkpoint - packing_saves(view, selected, single, rules) if config.packed else checkpoint
        running = max(running, finished + plain + kept * config.packed)
        finished += kept
    return {"checkpoint": finished, "while_running": running}


def packing_saves(
    view: ModelView, selected: list[list[WeightRef]], config: PruneConfig, rules: Rules | None = None
) -> int:
    """Bytes that packing the selected weights takes off the checkpoint."""
    saved = 0
    for i, (block, refs) in enumerate(zip(view.blocks, selected)):
        for ref in refs:
            weight = ref.view(block)
            sparsity = config.sparsity_by_name[rules[i][ref]] if rules else config.one_sparsity
            shape, kept = tuple(weight.shape), round((1 - sparsity) * weight.numel())
            if pays(shape, kept, weight.dtype):
                saved += weight.numel() * weight.element_size() - packed_bytes(shape, kept, weight.dtype)
    return saved
