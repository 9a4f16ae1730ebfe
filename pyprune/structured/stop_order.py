"""Where the passes through a block of one structure stand still for its groups, found by a pass of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.execution.executor import Activations, Batch, Executor
from pyprune.execution.lanes import Declined, changed_attribute
from pyprune.execution.spilling import Alive
from pyprune.model.routing import expert_lists
from pyprune.structured.consumers import Aside, Waiting, multiply, put
from pyprune.structured.groups import Coupled


@dataclass(frozen=True)
class Stop:
    """Where the passes stand still for some groups, that are settled there one after the other."""

    place: tuple[int, int]
    """Orders stops as a pass comes to them: experts by their number."""
    groups: tuple[int, ...]


@dataclass(frozen=True)
class StopOrder:
    """What is known of all blocks of one structure."""

    stops: tuple[Stop, ...] = ()
    token_bytes: float = 0.0
    """Bytes that a pass which stands still keeps alive for each token, at most."""
    trouble: str | None = None
    """Why such blocks cannot be pruned in one pass."""


@torch.no_grad()
def record(executor: Executor, index: int, module: nn.Module, groups: list[Coupled], source: Activations) -> StopOrder:
    """Run a block over one sequence of a stream, the longest: plainly, with the consumers' products taken aside and put
    back, and without them. Only where putting back makes up for taking away can the block be pruned so."""
    lists = tuple(f"{path}." for path in expert_lists(module))
    for group in groups:
        if group.consumer.path.startswith(lists):
            return StopOrder(trouble=f"{group.name} is not reached by every sequence")
    batch = Batch(max(source.rows), 0, 1)
    executor.arguments(index, batch.length, 1)
    waiting: Waiting = {}
    order: list[tuple[int, ...]] = []
    back, alive = True, Alive()

    def reached(here: tuple[int, ...], total: Tensor | None) -> None:
        alive.update()
        order.append(here)
        for i in here:
            ref = groups[i].consumer
            weight, bias = ref.view(module), None
            if ref.expert is None:
                bias = getattr(module.get_submodule(ref.module_path), "bias", None)
            output = multiply(executor, waiting[i], None, weight, bias)
            put(waiting, i, total, output if back else torch.zeros_like(output))

    def forward() -> Tensor:
        beside = executor.beside([index], source, batch)
        return executor.forward(index, module, source.read(batch), beside)

    plain = forward()
    aside = Aside(module, groups, lambda: waiting, reached)
    outs: list[Tensor] = []

    def aside_pass() -> None:
        with alive:
            outs.append(aside.leave(forward()))

    try:
        changed = changed_attribute(module, aside_pass)
        met = list(order)
        back = False
        waiting.clear()
        outs.append(aside.leave(forward()))
    except Declined as declined:
        return StopOrder(trouble=str(declined))
    finally:
        aside.close()
    if changed is not None:
        return StopOrder(trouble=changed)
    wrong, effect = (float((out.float() - plain.float()).norm()) for out in outs)
    if not wrong <= 0.01 * effect:
        return StopOrder(trouble="what its heads or neurons give goes other ways than to the residual sum")
    return _stops(groups, met, alive.peak / batch.length)


def _stops(groups: list[Coupled], met: list[tuple[int, ...]], token_bytes: float) -> StopOrder:
    stops: list[Stop] = []
    experts: dict[str, int] = {}
    for position, here in enumerate(met):
        ref = groups[here[0]].consumer
        if ref.expert is None:
            stops.append(Stop((position, 0), here))
        else:
            experts.setdefault(ref.path, position)
    for i, group in enumerate(groups):
        ref = group.consumer
        if ref.expert is not None and ref.path in experts:
            stops.append(Stop((experts[ref.path], ref.expert), (i,)))
        elif ref.expert is None and not any(i in here for here in met):
            return StopOrder(trouble=f"{group.name} is not reached by every sequence")
    return StopOrder(tuple(sorted(stops, key=lambda stop: stop.place)), token_bytes)
