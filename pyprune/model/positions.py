"""How many positions a model has, and what is said of sequences that are longer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.config import ConfigError
from pyprune.model.attributes import any_token, embedding_device, positions_named
from pyprune.model.blocks import ModelView, check_apart


@dataclass(frozen=True)
class Positions:
    """What a model says of the length of its sequences."""

    model: str
    count: int
    table: bool
    """They are rows of a table, so that a longer sequence cannot be computed (GPT-2, OPT, BERT)."""

    def check(self, lengths: Iterable[int], what: str, field: str, warn: Callable[[str], None]) -> None:
        """Raise ConfigError for longer sequences where a table ends, warn elsewhere; ``field`` sets their length."""
        longest = max(lengths, default=0)
        if longest <= self.count:
            return
        if self.table:
            raise ConfigError(
                f"{what} have up to {longest} tokens, but {self.model} has {self.count} positions; set "
                f"{field} to at most {self.count}, or give shorter rows"
            )
        warn(
            f"{what} have up to {longest} tokens, more than the {self.count} positions {self.model} was made for: "
            "what is measured there says little of shorter text"
        )


def positions_of(view: ModelView) -> Positions | None:
    """Positions of a model, None if it has no limit or does not say.

    A table is found by what the model looks up: an index that grows with the number of tokens. Its weights outside the
    blocks must be real.
    """
    name, config = type(view.model).__name__, view.model.config
    tables = _tables(view)
    if tables:
        return Positions(name, min(tables), True)
    count = positions_named(config)
    if count is None:
        return None
    # sines of every position (GPT-J), causal masks (GPT-Neo); integers are only counted off (DeBERTa)
    fixed = any(
        buffer.ndim >= 2 and count in buffer.shape and buffer.dtype not in (torch.int64, torch.int32)
        for buffer in view.model.buffers()
    )
    return Positions(name, count, fixed)


def of_any(model: nn.Module) -> Positions | None:
    """The same of a model that may be none that can be pruned."""
    try:
        return positions_of(ModelView(model))
    except ConfigError:
        return None


def _tables(view: ModelView) -> list[int]:
    """Sequence lengths at which the tables outside the blocks end."""
    device = embedding_device(view.model)
    check_apart(view)  # what is learnt of the model first is learnt from other tokens
    seen = []
    for length in (2, 3):
        with _Lookups() as lookups:
            view.record(torch.full((1, length), any_token(view.model), device=device))
        seen.append(lookups.found)
    outside = {
        parameter.data_ptr()
        for name, parameter in view.model.named_parameters()
        if not name.startswith(f"{view.path}.")
    }
    return [
        rows - (seen[0][key][0] - 1)
        for key, (last, rows) in seen[1].items()
        if key in outside and key in seen[0] and last == seen[0][key][0] + 1
    ]


class _Lookups(TorchFunctionMode):
    """Keeps, by the address of its table, the largest index of every look-up and the table's rows."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, tuple[int, int]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            ids: Tensor = args[0] if args else kwargs["input"]
            table: Tensor = args[1] if len(args) > 1 else kwargs["weight"]
            if ids.numel():
                self.found[table.data_ptr()] = (int(ids.max()), table.shape[0])
        return func(*args, **kwargs)
