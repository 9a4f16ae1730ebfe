"""Consumers' products taken out of the passes through a block, and put back when they are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyprune.execution.executor import Executor
from pyprune.execution.lanes import Declined
from pyprune.model.blocks import WeightRef
from pyprune.model.watching import Watch
from pyprune.structured.groups import Coupled


@dataclass(eq=False)
class Product:
    """A consumer's product in one pass."""

    x: Tensor
    """``[tokens, in]``."""
    output: Tensor
    """As the module gives it, then as the repaired one does."""

    @property
    def rows(self) -> Tensor:
        """The output ``[tokens, out]``."""
        return self.output.reshape(-1, self.output.shape[-1])


Waiting = dict[int, Product]
"""By group, the products of one pass that are taken aside."""
Reached = Callable[[tuple[int, ...], Tensor | None], None]


class Aside:
    """While open, takes the products of consumers out of the passes through a block until they are asked for.

    ``waiting()`` tells where to keep those of the pass at hand; None leaves it alone. ``reached(groups, total)`` is
    called where the products of these groups are needed: ``total``, in the residual stream, lacks exactly them, and is
    to be added to in place. Without a total, the one product's ``output`` is what goes on.
    """

    def __init__(
        self, block: nn.Module, groups: list[Coupled], waiting: Callable[[], Waiting | None], reached: Reached
    ):
        self.waiting, self.reached = waiting, reached
        self._places = {group.consumer: i for i, group in enumerate(groups)}
        self._lands: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            if group.consumer.expert is None and group.target is not None:
                self._lands.setdefault(group.target, []).append(i)
        self._landing = {i for places in self._lands.values() for i in places}
        self._watch = Watch(block, self._places, replace=self._take)
        self._handles = [
            block.get_submodule(path).register_forward_pre_hook(self._land(path)) for path in self._lands if path
        ]

    def _take(self, ref: WeightRef, x: Tensor, output: Tensor) -> Tensor:
        waiting, i = self.waiting(), self._places[ref]
        if waiting is None or not x.numel():
            return output
        if i in waiting:
            raise Declined(f"{ref.name} is multiplied by several times in a pass")
        waiting[i] = Product(x.reshape(-1, x.shape[-1]), output)
        if i in self._landing:
            return torch.zeros_like(output)
        self.reached((i,), None)
        return waiting.pop(i).output

    def _arrive(self, path: str, total: Tensor) -> None:
        waiting = self.waiting()
        here = () if waiting is None else tuple(i for i in self._lands[path] if i in waiting)
        if here:
            self.reached(here, total)

    def _land(self, path: str):
        def hook(module, args):
            self._arrive(path, args[0])

        return hook

    def leave(self, out: Tensor) -> Tensor:
        """Called with what the block returns."""
        if "" in self._lands:
            self._arrive("", out)
        if left := self.waiting():
            raise Declined(f"what group {min(left)} gives lands nowhere")
        return out

    def close(self) -> None:
        self._watch.close()
        for handle in self._handles:
            handle.remove()


def multiply(
    executor: Executor, product: Product, columns: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What a consumer of this weight ``[out, columns]`` gives, in the shape of its output; columns: those of its input
    that are left."""
    x = product.x if columns is None else product.x.index_select(1, columns.to(product.x.device))
    with executor.mode():
        rows = functional.linear(x, weight, bias)
    return rows.view(product.output.shape)


def put(waiting: Waiting, i: int, total: Tensor | None, output: Tensor) -> None:
    """Let a pass go on with this output of group i."""
    if total is None:
        waiting[i].output = output
    else:
        total.add_(output.view_as(total))
        del waiting[i]
