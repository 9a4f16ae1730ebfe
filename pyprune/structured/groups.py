"""Coupled groups of a block: the neurons and attention heads that can be dropped whole, found by derivatives.

A group exists because a *consumer* (down or output projection) reads columns that depend on few rows of its
*producers* (gate, up, query, key, value). That is seen without knowing any architecture: run the block once with the
output of every linear layer replaced by noise, and differentiate each layer's input by that noise. A column that
depends on one row of a producer is a neuron; one that depends on one value row and on whole query and key heads
belongs to a head; one that depends on everything follows a norm. Fused and interleaved projections, grouped queries
and biases need no case of their own. :func:`pyprune.structured.slicing.verify` proves each result on the real block.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.execution.executor import Resident
from pyprune.model.arguments import Arguments
from pyprune.model.attributes import embedding_device, pad_token, vocabulary_size
from pyprune.model.blocks import ModelView, WeightRef, refuse_shared, weights_of
from pyprune.model.recording import call_block
from pyprune.model.watching import expert_loop
from pyprune.structured.block_probe import DependencyTracer, landing, normed

PROBE_TOKENS = 12


@dataclass(frozen=True, eq=False)
class Slot:
    """Rows of one producer parameter that go when a unit goes."""

    path: str
    """Parameter path inside the block."""
    dim: int
    """Dimension of the parameter (of the expert's slice) that the rows lie in."""
    rows: Tensor
    """int64 ``[units, rows of a unit]``."""
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class Coupled:
    """All prunable units of one consumer."""

    kind: str
    """``neurons`` or ``heads``."""
    consumer: WeightRef
    columns: Tensor
    """int64 ``[units, width]``: input columns of the consumer, ascending."""
    slots: tuple[Slot, ...]
    pools: Tensor
    """int64 ``[units]``: equally many units are dropped from every pool, so that the ratio of heads stays legal."""
    heads: int = 0
    """Query heads of the attention; 0 for neurons."""
    groups: int = 0
    """Key/value heads."""
    target: str | None = None
    """Where the consumer's output lands in the residual stream: ``""`` the block's output, else the module whose input
    it is; None if it is not simply added (a norm or a factor in between)."""
    normed: bool = False
    """Whether that sum goes through a norm before anything else sees it (post-norm), so that each token's size is
    divided away."""

    @property
    def units(self) -> int:
        return len(self.columns)

    @property
    def width(self) -> int:
        return self.columns.shape[1]

    @property
    def name(self) -> str:
        return self.consumer.name.removesuffix(".weight")

    def columns_of(self, units: Tensor) -> Tensor:
        """Input columns of the given units, ascending."""
        return self.columns[units].flatten().sort().values

    def unit_size(self, block: nn.Module) -> int:
        """Parameters that one unit removes from the block."""
        size = self.width * self.consumer.view(block).shape[0]
        for slot in self.slots:
            parameter = block.get_parameter(slot.path)
            shape = parameter.shape if slot.expert is None else parameter.shape[1:]
            size += slot.rows.shape[1] * (shape.numel() // shape[slot.dim])
        return size

    @property
    def head_size(self) -> int:
        """Columns of one head."""
        return self.columns.numel() // self.heads

    def heads_left(self, kept: int) -> tuple[int, int]:
        """Query and key/value heads of the sliced attention."""
        if self.width * self.groups == self.columns.numel() and self.units == self.groups:
            return kept * (self.heads // self.groups), kept
        return kept, self.groups


def find_groups(
    view: ModelView, pattern: str, head_scope: str = "groups", weights: Resident | None = None
) -> list[list[Coupled]]:
    """Coupled groups of every block for ``neurons``, ``heads`` or ``structured`` (both).

    head_scope: ``groups`` drops key/value heads with all their query heads, ``queries`` query heads equally many per
    group. weights: where blocks are streamed from (None: they are in memory); blocks of equal structure are examined
    once. Raises ConfigError if a block has no such group.
    """
    refuse_shared(view, pattern)
    model = view.model
    ids = torch.arange(PROBE_TOKENS)[None] * 7 + 1 + (pad_token(model.config) or 0)
    hidden, arguments = view.record((ids % vocabulary_size(model)).to(embedding_device(model)))
    known: dict[tuple, list[Coupled]] = {}
    weights = weights or Resident()
    out = []
    for index, block in enumerate(view.blocks):
        key = (type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters()))
        if key not in known:
            weights.acquire(index)
            with expert_loop(view.model.config):
                known[key] = examine(block, hidden, arguments[index], head_scope)
            weights.release(index)
        wanted = [g for g in known[key] if pattern in ("structured", g.kind)]
        for kind in ("heads", "neurons"):
            if pattern in ("structured", kind) and not any(g.kind == kind for g in wanted):
                raise ConfigError(
                    f"no prunable {kind} found in block {index} ({type(block).__name__}): no projection "
                    f"has an input that splits into {kind} with rows of their own in its producers"
                )
        out.append(wanted)
    return out


def examine(block: nn.Module, hidden: Tensor, arguments: Arguments, head_scope: str) -> list[Coupled]:
    """Coupled groups of one block, heads first."""
    device = hidden.device
    traced = copy.deepcopy(block).to(device).float()
    arguments = arguments.to(device, torch.float32, {})
    hidden = hidden.float()
    refs = weights_of(block)
    generator = torch.Generator(device="cpu").manual_seed(0)
    tracer = DependencyTracer(traced, refs, generator)
    with torch.enable_grad(), tracer:
        noise = torch.randn(hidden.shape, generator=generator).to(device)
        output = call_block(traced, noise, arguments)
    found = []
    for ref in refs:
        if ref in tracer.inputs and (ref.expert is None or ref.expert == tracer.first_expert(ref)):
            found += _classify(ref, tracer, output, head_scope)
    found = [
        replace(g, target=landing(traced, hidden, arguments, g.consumer)) if g.consumer.expert is None else g
        for g in found
    ]
    found = [replace(g, normed=normed(traced, hidden, arguments, g.target, g.consumer.module_path)) for g in found]
    found = [g for group in found for g in _per_expert(group, refs)]
    found = [replace(g, slots=_with_biases(g.slots, block)) for g in found]
    return sorted(found, key=lambda g: g.kind != "heads")


def _classify(ref: WeightRef, tracer: DependencyTracer, output: Tensor, head_scope: str) -> list[Coupled]:
    """The coupled group of one consumer, as a list of none or one."""
    x = tracer.inputs[ref]
    first = tracer.touched(x, torch.tensor([0], device=x.device))
    counts = [int(v.sum()) for v in first.values()]
    total = sum(counts)
    if not counts or all(bool(v.all()) and len(v) > 2 for v in first.values()):
        return []
    if total <= 2:
        return _neurons(ref, tracer, output)
    wide = {count for count in counts if count > 1}
    # one value row, and whole heads of queries, keys and, in DeBERTa, positions; fused ones count together
    head_dim = wide.pop() if len(wide) == 1 and counts.count(1) == 1 else (total - 1) // 2
    if (total - 1) % head_dim or x.shape[-1] % head_dim or x.shape[-1] == head_dim:
        return []  # a single head, or all heads coupled into one
    return _heads(ref, tracer, output, head_dim, head_scope)


def _private(producers: list[WeightRef], ref: WeightRef, tracer: DependencyTracer, output: Tensor) -> bool:
    """Whether the producers are read by this consumer only."""
    others = [x for r, x in tracer.inputs.items() if r.path != ref.path] + [output]
    return not any(p in tracer.touched(x, slice(None)) for x in others for p in producers)


def _neurons(ref: WeightRef, tracer: DependencyTracer, output: Tensor) -> list[Coupled]:
    """Column j depends on row σ(j) of each producer: σ is read off in ⌈log₂ c⌉ derivatives, one bit each."""
    x = tracer.inputs[ref]
    c = x.shape[-1]
    index = torch.arange(c, device=x.device)
    producers = list(tracer.touched(x, slice(None)))
    code = {p: torch.zeros(tracer.leaves[p].shape[-1], dtype=torch.long, device=x.device) for p in producers}
    for bit in range((c - 1).bit_length()):
        on = (index >> bit & 1).bool()
        ones, zeros = tracer.touched(x, on), tracer.touched(x, ~on)
        for p in producers:
            one, zero = ones.get(p, torch.zeros(1, dtype=torch.bool)), zeros.get(p, torch.zeros(1, dtype=torch.bool))
            if bool((one == zero).any()):
                return []  # a row that feeds several columns, or none
            code[p] += one.long() << bit
    if not _private(producers, ref, tracer, output):
        return []
    slots = []
    for p in producers:
        if not bool((torch.bincount(code[p], minlength=c) * c == len(code[p])).all()):
            return []
        rows = code[p].sort(stable=True).indices.reshape(c, -1)
        slots.append(_slot(p, rows))
    return [Coupled("neurons", ref, index[:, None].cpu(), tuple(slots), torch.zeros(c, dtype=torch.long))]


def _heads(ref: WeightRef, tracer: DependencyTracer, output: Tensor, head_dim: int, head_scope: str) -> list[Coupled]:
    """Heads are runs of ``head_dim`` columns; rows read by several heads are their common keys and values."""
    x = tracer.inputs[ref]
    heads = x.shape[-1] // head_dim
    columns = torch.arange(x.shape[-1]).reshape(heads, head_dim)
    producers = list(tracer.touched(x, slice(None)))
    reads = {p: torch.zeros(heads, tracer.leaves[p].shape[-1], dtype=torch.bool) for p in producers}
    for head in range(heads):
        for p, rows in tracer.touched(x, columns[head].to(x.device)).items():
            reads[p][head] = rows.cpu()
    if not _private(producers, ref, tracer, output) or not all(bool(r.any(0).all()) for r in reads.values()):
        return []
    together = torch.stack([r.float() @ r.float().T for r in reads.values()]).sum(0) > 0
    owner = together.long().argmax(1)  # the first head that shares a row names the group
    names = owner.unique()
    if not bool((together == (owner[:, None] == owner[None])).all()) or heads % len(names):
        return []
    members = torch.stack([(owner == n).nonzero()[:, 0] for n in names])  # [groups, heads of a group]
    slots = []
    if head_scope == "groups":
        for p, r in reads.items():
            slots.append(_slot(p, _equal_rows([r[m].any(0) for m in members])))
        pools = torch.zeros(len(names), dtype=torch.long)
        return [Coupled("heads", ref, columns[members].flatten(1), tuple(slots), pools, heads, len(names))]
    for p, r in reads.items():
        own = r & (r.sum(0) == 1)
        if members.shape[1] > 1 and bool(own.any()):
            slots.append(_slot(p, _equal_rows(list(own))))
    pools = (owner[:, None] == names[None]).long().argmax(1)
    return [Coupled("heads", ref, columns, tuple(slots), pools, heads, len(names))]


def _equal_rows(masks: list[Tensor]) -> Tensor:
    counts = {int(m.sum()) for m in masks}
    if len(counts) != 1:
        raise ConfigError(f"heads of unequal size ({sorted(counts)} rows) cannot be pruned together")
    return torch.stack([m.nonzero()[:, 0] for m in masks])


def _slot(ref: WeightRef, rows: Tensor) -> Slot:
    return Slot(ref.path, 1 if ref.transposed else 0, rows.cpu(), ref.expert)


def _with_biases(slots: tuple[Slot, ...], block: nn.Module) -> tuple[Slot, ...]:
    extra = []
    for slot in slots:
        path = slot.path.removesuffix("weight") + "bias" if slot.path.endswith("weight") else slot.path + "_bias"
        with contextlib.suppress(AttributeError):
            if block.get_parameter(path) is not None:
                extra.append(replace(slot, path=path, dim=0))
    return slots + tuple(extra)


def _per_expert(group: Coupled, refs: list[WeightRef]) -> list[Coupled]:
    """The group of one expert, repeated for each expert of the same parameter."""
    if group.consumer.expert is None:
        return [group]
    return [
        replace(group, consumer=ref, slots=tuple(replace(s, expert=ref.expert) for s in group.slots))
        for ref in refs
        if ref.path == group.consumer.path
    ]
