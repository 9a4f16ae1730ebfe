"""In which order the groups of a block's layers are reached, and what a paused pass keeps alive: one recorded pass.

A group is the layers that read the same tensor. Experts that the recorded pass does not reach get the places that
those it reaches tell.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn

from pyprune.execution.executor import Activations, Batch, Executor
from pyprune.execution.lanes import changed_attribute
from pyprune.execution.spilling import Alive
from pyprune.masks.statistics import Observer
from pyprune.model.blocks import WeightRef
from pyprune.model.routing import expert_lists


@dataclass(frozen=True)
class Group:
    """Layers of a block that read the same input."""

    place: tuple[int, int, int]
    """Orders groups as a pass reaches them."""
    refs: tuple[WeightRef, ...]

    @property
    def leader(self) -> str:
        return self.refs[0].name


@dataclass(frozen=True)
class GroupOrder:
    """What is known of all blocks of one structure."""

    groups: tuple[Group, ...] = ()
    """As a pass reaches them."""
    token_bytes: float = 0.0
    """Bytes that a pass which stands before a group keeps alive for each token, at most."""
    trouble: str | None = None
    """Why such blocks cannot be pruned group by group."""


def structure(block: nn.Module, refs: list[WeightRef]) -> Hashable:
    """Equal for blocks whose groups have the same order."""
    return type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()), tuple(refs)


def record(executor: Executor, index: int, module: nn.Module, refs: list[WeightRef], source: Activations) -> GroupOrder:
    """Run a block over one sequence of a stream, the longest."""
    batch = Batch(max(source.rows), 0, 1)
    beside = executor.beside([index], source, batch)
    executor.arguments(index, batch.length, 1)
    with Alive() as alive:
        observer = Observer(module, refs, lambda columns, device: alive)

        def once() -> None:
            observer.run(lambda: executor.forward(index, module, source.read(batch), beside))

        try:
            changed = changed_attribute(module, once)
        finally:
            observer.close()
    trouble = _again(observer) or changed
    if trouble is not None:
        return GroupOrder(trouble=trouble)
    return GroupOrder(_groups(module, refs, observer), alive.peak / batch.length)


def _again(observer: Observer) -> str | None:
    """Why groups that are met once in a pass do not say all that a weight reads; None if they do."""
    for step, name, times in observer.calls:
        if step or times:
            return f"{name} is multiplied by several times in a pass"
    return f"several layers share {min(observer.alone)}" if observer.alone else None


def _groups(module: nn.Module, refs: list[WeightRef], observer: Observer) -> tuple[Group, ...]:
    first: dict[str, int] = {}
    for position, (_, name, _) in enumerate(observer.calls):
        first.setdefault(name, position)
    routed = _experts(module, refs)
    named = {key: name for name, key in routed.items()}
    kinds: dict[str, dict[str, int]] = {}
    """By the place of the experts in the block: what each of them has, in the order of its use."""
    for name in first:
        if name in routed:
            place, _, kind = routed[name]
            kinds.setdefault(place, {}).setdefault(kind, len(kinds[place]))
    leads = {
        (routed[name][0], routed[name][2]): routed[observer.leader[name]][2]
        for name in first
        if name in routed and observer.leader[name] in routed
    }
    starts = {place: min(first[name] for name in first if routed.get(name, ("",))[0] == place) for place in kinds}
    together = {
        place
        for place in kinds
        if _kind_by_kind([routed[name] for name in first if name in routed], place, kinds[place])
    }
    members: dict[str, list[WeightRef]] = {}
    for ref in refs:
        leader = observer.leader.get(ref.name)
        if leader is None and ref.name in routed:
            place, number, kind = routed[ref.name]
            leader = named.get((place, number, leads.get((place, kind), "")))
        if leader is not None:
            members.setdefault(leader, []).append(ref)

    def place_of(leader: str) -> tuple[int, int, int]:
        if leader not in routed:
            return first[leader], 0, 0
        place, number, kind = routed[leader]
        inner = (kinds[place][kind], number) if place in together else (number, kinds[place][kind])
        return starts[place], *inner

    return tuple(
        sorted((Group(place_of(leader), tuple(own)) for leader, own in members.items()), key=lambda group: group.place)
    )


def _experts(module: nn.Module, refs: list[WeightRef]) -> dict[str, tuple[str, int, str]]:
    """By name of a weight of an expert: where the experts are, which of them it is, and what of it."""
    found = {ref.name: (ref.module_path, ref.expert, ref.path) for ref in refs if ref.expert is not None}
    for path in expert_lists(module):
        numbers = {name: number for number, name in enumerate(module.get_submodule(path)._modules)}
        for ref in refs:
            if ref.path.startswith(f"{path}."):
                name, _, kind = ref.path[len(path) + 1 :].partition(".")
                found[ref.name] = path, numbers[name], kind
    return found


def _kind_by_kind(calls: list[tuple[str, int, str]], place: str, ranks: dict[str, int]) -> bool:
    """Whether all experts do their first product before any does its second."""
    own = [(ranks[kind], number) for where, number, kind in calls if where == place]
    several = len({number for _, number in own}) > 1
    return several and [rank for rank, _ in own] == sorted(rank for rank, _ in own)
