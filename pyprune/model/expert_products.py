"""Products with fused experts: to which expert one belongs, and the tokens that this expert gets."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.model.blocks import WeightRef

_MATMULS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class Experts:
    """The experts among ``refs``, recognised by the address of their slice in ``block``'s parameters."""

    def __init__(self, block: nn.Module, refs: Iterable[WeightRef]):
        self._stacks: list[tuple[nn.Parameter, bool, dict[int, WeightRef]]] = []
        by_path: dict[str, dict[int, WeightRef]] = {}
        for ref in refs:
            if ref.expert is not None:
                by_path.setdefault(ref.path, {})[ref.expert] = ref
        for members in by_path.values():
            first = next(iter(members.values()))
            self._stacks.append((first.parameter(block), first.transposed, members))

    def __bool__(self) -> bool:
        return bool(self._stacks)

    def products(self, func, args: tuple, kwargs: dict | None) -> list[tuple[WeightRef, Tensor]]:
        """Experts and their inputs ``[tokens, in]`` in one call of a torch function: one for a product with a slice,
        all of them for a batched product with the whole parameter. There, rows of zeros are the tokens of others."""
        if func is nn.functional.linear:
            named = kwargs or {}
            x = args[0] if args else named["input"]
            matrix = args[1] if len(args) > 1 else named["weight"]
        elif func in _MATMULS and len(args) == 2 and isinstance(args[1], Tensor) and args[1].ndim > 1:
            x, matrix = args[0], args[1].mT
        else:
            return []
        for parameter, transposed, members in self._stacks:
            stack = parameter.data.mT if transposed else parameter.data
            found = _slices(matrix, stack)
            if _slices(matrix, stack.mT) and not found:
                path = next(iter(members.values())).path
                way = "[experts, out, in]" if transposed else "[experts, in, out]"
                raise ConfigError(
                    f"{path} is multiplied as {way}, which its shape does not tell; ignore it to prune the rest"
                )
            if len(found) == 1:
                return [(members[e], x.reshape(-1, x.shape[-1])) for e in found if e in members]
            if found:
                x = x.expand(len(stack), -1, -1)
                return [(ref, x[e][(x[e] != 0).any(-1)]) for e, ref in members.items()]
        return []


def _slices(matrix: Tensor, stack: Tensor) -> range:
    """Experts whose slice of ``stack`` this is: one, all, or none."""
    if matrix.shape == stack.shape and matrix.stride() == stack.stride() and matrix.data_ptr() == stack.data_ptr():
        return range(len(stack))
    if matrix.shape == stack.shape[1:] and matrix.stride() == stack.stride()[1:]:
        expert, rest = divmod(matrix.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size())
        if rest == 0 and 0 <= expert < len(stack):
            return range(expert, expert + 1)
    return range(0)
