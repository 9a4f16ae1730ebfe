"""What a model hands its blocks beside the hidden states, and which of it belongs to the sequences of a batch.

Most arguments (masks, rotary tables, positions) depend on a batch's shape alone. Some models hand on more:

- tensors computed from the tokens, one row for each sequence (per-layer embeddings, the embedded tokens): they are
  found by recording the arguments of different tokens, and stored with the sequences;
- a mapping in which blocks leave tensors for later blocks (shared keys and values): what is left depends on the pruned
  weights, so it travels with the hidden states of its stream.

Anything else that differs from batch to batch is refused.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.model.attributes import pad_token, special_tokens, text_config

PROBE_TOKENS = 8
TOLERANCE = 1e-2
"""Rows of a batch are the same but for rounding when only another row has changed, in 16-bit types too."""

Path = tuple
"""Place of a value in a block's arguments: ``("args", 0)``, ``("kwargs", "position_embeddings", 1)``."""


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor with a row for each sequence, number ``number`` of the model's."""

    number: int


class LeftForLater(collections.UserDict):
    """Stands for the mapping in which blocks leave tensors for later ones. By itself it forgets what is written."""

    def __setitem__(self, key, value):
        """There is no batch that it belongs to."""

    def __getitem__(self, key):
        raise ConfigError(
            f"a block reads {key!r} from what earlier blocks left for it, and cannot be examined alone; "
            "structured pruning needs blocks that do not share keys and values: choose an unstructured "
            "or N:M pattern"
        )

    def __contains__(self, key):
        return self[key]


@dataclass
class Arguments:
    """Everything but the hidden states that the model hands to one block."""

    args: tuple
    kwargs: dict

    def to(self, device, dtype, memo: dict) -> Arguments:
        """Floating tensors cast to ``dtype``, all tensors moved, tuples and dicts walked; a tensor that several
        blocks share stays shared through ``memo``."""

        def cast(path: Path, value):
            if not isinstance(value, Tensor):
                return value
            if id(value) not in memo:
                moved = value.to(device, dtype if value.is_floating_point() else value.dtype)
                memo[id(value)] = (moved, value)  # the original stays alive, so its id stays its own
            return memo[id(value)][0]

        return self.map(cast)

    def map(self, change: Callable[[Path, object], object]) -> Arguments:
        """The same arguments with ``change(place, value)`` for every value in them."""
        return self._mapped(change, ())

    def _mapped(self, change: Callable[[Path, object], object], path: Path) -> Arguments:
        return Arguments(
            _map(change, self.args, (*path, "args")),
            {k: _map(change, v, (*path, "kwargs", k)) for k, v in self.kwargs.items()},
        )

    def values(self) -> dict[Path, object]:
        found: dict[Path, object] = {}
        self.map(found.__setitem__)
        return found


def _map(change, value, path: Path):
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_map(change, v, (*path, i)) for i, v in enumerate(value))
    if isinstance(value, Arguments):  # of one of several applications
        return value._mapped(change, path)
    if type(value) is dict and value:
        return {k: _map(change, v, (*path, k)) for k, v in value.items()}
    return change(path, value)


def tidy(model: str, arguments: Arguments) -> Arguments:
    """Recorded arguments with stand-ins for mappings that blocks fill. Raises ConfigError for a live cache."""

    def change(path: Path, value):
        if any(cls.__name__.endswith("Cache") for cls in type(value).__mro__):
            raise ConfigError(
                f"{model} hands its blocks a {type(value).__name__} ({place(path)}) even with "
                "use_cache=False; it would grow with every calibration pass, so this model cannot be "
                "pruned block by block"
            )
        return LeftForLater() if isinstance(value, MutableMapping) and not value else value

    return arguments.map(change)


def place(path: Path) -> str:
    """How errors name an argument."""
    if path[:2] == ("args", 0) and path[3:4] in (("args",), ("kwargs",)):  # of a block that is applied several times
        return f"{place(path[3:])} of application {path[2] + 1}"
    kind, *rest = path
    head, *inner = rest
    name = f"positional argument {head + 1}" if kind == "args" else str(head)
    return name + "".join(f"[{step!r}]" for step in inner)


@dataclass(frozen=True)
class Tokenwise:
    """Per block, the places of the arguments that depend on the tokens, and the number of the tensor there."""

    slots: tuple[dict[Path, int], ...] = ()

    def split(self, recorded: list[Arguments]) -> tuple[list[Arguments], dict[int, Tensor]]:
        """Arguments with a :class:`Slot` for each such tensor, and the tensors ``[sequences, …]`` by number."""
        tensors: dict[int, Tensor] = {}

        def cut(slots: dict[Path, int]):
            def change(path: Path, value):
                if path not in slots:
                    return value
                tensors[slots[path]] = value
                return Slot(slots[path])

            return change

        return [a.map(cut(slots)) for slots, a in zip(self.slots, recorded)], tensors

    def numbers(self, indices: Iterable[int]) -> list[int]:
        """Tensors that these blocks need."""
        return sorted({number for i in indices if i < len(self.slots) for number in self.slots[i].values()})


Record = Callable[..., tuple[Tensor, list[Arguments]]]
"""``record(ids, disturbed=False)``: the first block's input and every block's arguments."""


def find_tokenwise(model: str, record: Record, batches: tuple[Tensor, Tensor]) -> Tokenwise:
    """Compare the arguments recorded for two batches of ids ``[2, tokens]`` that differ in the first row alone.

    Raises ConfigError where an argument that depends on the tokens has not one row per sequence, or where one depends
    on what earlier blocks gave.
    """
    ids, other = batches
    recorded = record(ids)[1]
    changed, disturbed = record(other)[1], record(ids, disturbed=True)[1]
    numbers: dict[int, int] = {}
    slots: list[dict[Path, int]] = []
    for index, parts in enumerate(zip(recorded, changed, disturbed)):
        value, new, behind = (part.values() for part in parts)
        if not value.keys() == new.keys() == behind.keys():
            raise ConfigError(
                f"block {index} of {model} gets other arguments for other tokens; it cannot be run apart from the model"
            )
        slots.append({})
        for path, tensor in value.items():
            if not same(tensor, behind[path]):
                raise ConfigError(
                    f"{place(path)} of block {index} of {model} is computed from the output of earlier "
                    "blocks and changes as they are pruned; this model cannot be pruned block by block"
                )
            if same(tensor, new[path]):
                continue
            if not _rowwise(tensor, new[path], len(ids)):
                raise ConfigError(
                    f"{place(path)} of block {index} of {model} depends on the tokens of the whole batch "
                    "and has no row for each sequence; it cannot be stored with the sequences"
                )
            slots[-1][path] = numbers.setdefault(id(tensor), len(numbers))
    return Tokenwise(tuple(slots))


def same(a, b) -> bool:
    """Whether two values of arguments are equal; of objects, only their types are compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (bool, int, float, str, torch.dtype, type(None))) or isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return type(a) is type(b)


def _rowwise(a, b, rows: int) -> bool:
    """Whether the second row is that of its sequence alone: it stayed when the first sequence changed."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and a.shape == b.shape and len(a) == rows):
        return False
    size = a[1].abs().max().item() if a[1].numel() else 0
    return torch.allclose(a[1].double(), b[1].double(), rtol=TOLERANCE, atol=TOLERANCE * size)


def probe_batches(config, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Two batches ``[2, PROBE_TOKENS]`` of ids that differ in their first row. Ids that configurations name (image
    placeholders and the like) are left out, but the padding id is among the changed ones: real text may hold it."""
    named, padding = special_tokens(config), pad_token(config)
    if padding is None:
        padding = pad_token(text_config(config))
    plain = [i for i in range(min(vocabulary, 4096)) if i not in named] or [0]
    draw = torch.randint(len(plain), (3, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(plain)[draw]
    if isinstance(padding, int) and 0 <= padding < vocabulary:
        rows[2, PROBE_TOKENS // 2] = padding
    return rows[:2], torch.stack([rows[2], rows[1]])


@dataclass
class Beside:
    """What belongs to the sequences of one batch beside their hidden states, on the device."""

    tensors: dict[int, Tensor] = field(default_factory=dict)
    """Arguments that depend on the tokens, by number, ``[sequences, …]``."""
    left: dict[tuple, Tensor] = field(default_factory=dict)
    """By key and place in the tuple under that key: what blocks left for later ones; blocks write here."""
    written: set[tuple] = field(default_factory=set)
    """What of it was written since."""
    origin: object = None
    """Where the rest of it was read from."""

    def fill(self, arguments: Arguments) -> Arguments:
        """Arguments with this batch's own tensors in their places."""
        left = Left(self)

        def change(path: Path, value):
            if isinstance(value, Slot):
                return self.tensors[value.number]
            return left if isinstance(value, LeftForLater) else value

        return arguments.map(change)

    def map(self, change: Callable[[Tensor], Tensor]) -> Beside:
        return Beside({k: change(v) for k, v in self.tensors.items()}, {k: change(v) for k, v in self.left.items()})


class Left(MutableMapping):
    """The mapping as blocks see it: key → tuple of tensors, kept as one tensor per key and place."""

    def __init__(self, beside: Beside):
        self.store, self.written = beside.left, beside.written

    def __getitem__(self, key):
        found = [self.store[k] for k in sorted(k for k in self.store if k[0] == key)]
        if not found:
            raise KeyError(key)
        return tuple(found)

    def __setitem__(self, key, value) -> None:
        if not (isinstance(value, (tuple, list)) and value and all(isinstance(v, Tensor) for v in value)):
            raise ConfigError(
                f"a block leaves a {type(value).__name__} under {key!r} for later blocks; only tuples of "
                "tensors can be stored with the sequences"
            )
        for i, tensor in enumerate(value):
            self.store[key, i] = tensor
            self.written.add((key, i))

    def __delitem__(self, key) -> None:
        for k in [k for k in self.store if k[0] == key]:
            del self.store[k]

    def __iter__(self) -> Iterator:
        return iter(dict.fromkeys(k for k, _ in self.store))

    def __len__(self) -> int:
        return len(set(self))
