"""Zeros that stay zeros while an optimizer trains a model: ``pyprune.keep_sparse``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError

SPARSE = 0.01
"""A weight with at least this share of exact zeros counts as pruned: dense ones have a few by chance."""


def keep_sparse(model: nn.Module, optimizer: torch.optim.Optimizer) -> KeptMasks:
    """Keep the zeros of a model's weights through every step of ``optimizer``.

    Every matrix that the optimizer trains and of which a hundredth or more is exactly zero keeps those zeros; tables
    of embeddings are left alone. Gradients of the zeros are dropped as they arrive, so that accumulated gradients and
    their norms are those of the kept weights, and after each step the zeros are written again, into the weights and
    into what the optimizer remembers of them.
    model: with plain layers, as :func:`pyprune.load` of a plain pruned checkpoint or :func:`pyprune.dense`
    gives it.
    Returns a handle: :meth:`KeptMasks.remove` ends it, and so does leaving it as a context.
    Raises ConfigError for a model with packed layers, and if the optimizer trains no weight that has zeros.
    """
    if any(hasattr(type(module), "packed") for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} has packed layers, which are not trained: unpack them with pyprune.dense(model), "
            "and make the optimizer of its parameters"
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sparse = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim >= 2 and id(p) not in tables and _zeros(p) >= SPARSE * max(1, p.numel())
    }
    found = {name: p for name, p in sparse.items() if id(p) in trained}
    if not found:
        why = (
            "no weight of it has zeros: prune it first"
            if not sparse
            else f"the optimizer trains none of its {len(sparse)} sparse weights, such as {next(iter(sparse))}: make "
            "it of this model's parameters"
        )
        raise ConfigError(f"there is nothing to keep sparse in {type(model).__name__}: {why}")
    return KeptMasks(found, optimizer)


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


class KeptMasks:
    """The zeros that are kept, and the hooks that keep them."""

    def __init__(self, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer):
        self.weights = weights
        self.optimizer = optimizer
        self._dropped = {name: weight.detach() == 0 for name, weight in weights.items()}
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._after_step)]
        for name, weight in weights.items():
            self._handles.append(weight.register_post_accumulate_grad_hook(self._drops_gradient(name)))
        self.apply()

    @property
    def sparsity(self) -> float:
        """Share of the kept weights' values that stay zero."""
        dropped = sum(int(mask.sum()) for mask in self._dropped.values())
        return dropped / sum(weight.numel() for weight in self.weights.values())

    @torch.no_grad()
    def apply(self) -> None:
        """Write the zeros: into weights, gradients, and whatever the optimizer keeps in a weight's shape."""
        for name, weight in self.weights.items():
            dropped = self._dropped_of(name)
            state = self.optimizer.state.get(weight, {}).values()
            for tensor in (weight.data, weight.grad, *state):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    tensor.masked_fill_(dropped, 0)

    def check(self) -> None:
        """Raise ConfigError, with the weight's name, if something else has filled a zero since the last step."""
        for name, weight in self.weights.items():
            filled = int((weight.detach()[self._dropped_of(name)] != 0).sum())
            if filled:
                raise ConfigError(
                    f"{filled:,} zeros of {name} were filled, not by the optimizer that keeps them sparse"
                )

    def remove(self) -> None:
        """Let the optimizer train all weights again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> KeptMasks:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"KeptMasks({len(self.weights)} weights, sparsity {self.sparsity:.4f})"

    def _after_step(self, *unused: Any) -> None:
        self.apply()

    def _drops_gradient(self, name: str) -> Any:
        def drop(weight: Tensor) -> None:
            if weight.grad is not None:
                weight.grad.masked_fill_(self._dropped_of(name), 0)

        return drop

    def _dropped_of(self, name: str) -> Tensor:
        """Where a weight is zero, on the device on which it is now."""
        mask = self._dropped[name]
        if mask.device != self.weights[name].device:
            mask = self._dropped[name] = mask.to(self.weights[name].device)
        return mask
