"""Block-by-block executor: how activations pass through one block at a time.

Sequences of equal length are stored together, ``[sequences, tokens, hidden]``, so a batch is a view of the store,
nothing is ever padded, and most of a block's arguments depend on the batch's shape alone. Those that depend on the
tokens, and what blocks leave for later ones, are stored with the sequences (:mod:`pyprune.model.arguments`).
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.devices import indexed
from pyprune.execution.activation_store import Store, transfers
from pyprune.execution.between import Between
from pyprune.execution.cpu_forward import forward_mode
from pyprune.execution.distributed import World
from pyprune.execution.replays import Replays
from pyprune.execution.residency import Arrivals
from pyprune.execution.trust import by_reference, distrust
from pyprune.model.arguments import Arguments, Beside
from pyprune.model.attributes import any_token, embedding_device
from pyprune.model.blocks import ModelView
from pyprune.model.recording import call_block
from pyprune.model.watching import expert_loop
from pyprune.ops import guards

T = TypeVar("T")
CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Tokens per batch where no batch size was given: on a CPU as many as stay in cache, on a GPU as many as fill it."""


def target_tokens(device: torch.device | str) -> int:
    """Tokens per batch on a device where no batch size was given."""
    return GPU_TOKENS if torch.device(device).type == "cuda" else CPU_TOKENS


class NoRoom(enum.Enum):
    """Result of a forward pass that ran out of device memory."""

    NO_ROOM = enum.auto()


NO_ROOM: Final = NoRoom.NO_ROOM


@dataclass(frozen=True)
class Batch:
    """Rows ``start:stop`` of the sequences that are ``length`` tokens long."""

    length: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Activations:
    """One stream of hidden states for a fixed list of sequences.

    ``data[length]`` is ``[sequences, length, hidden]``; ``rows[length]`` are the sequences' places in the original
    order.
    """

    def __init__(
        self,
        sequences: Sequence[Tensor],
        hidden: int,
        dtype: torch.dtype,
        store: Store | None = None,
        batch_tokens: int = CPU_TOKENS,
    ):
        """batch_tokens: tokens per batch where no batch size is given, :func:`target_tokens` of the device that reads
        them."""
        self.store = store or Store()
        self.batch_tokens = batch_tokens
        self.ids: dict[int, Tensor] = {}
        self.rows: dict[int, list[int]] = {}
        for row, ids in enumerate(sequences):
            self.rows.setdefault(len(ids), []).append(row)
        self.rows = dict(sorted(self.rows.items()))
        for length, rows in self.rows.items():
            self.ids[length] = torch.stack([sequences[row].long() for row in rows])
        self.hidden, self.dtype = hidden, dtype
        self.span = {length: (len(rows), 0) for length, rows in self.rows.items()}
        """Per length, the number of sequences of all processes together, and the place of this process's first one
        among them."""
        self.data = {length: self.store.empty((len(rows), length, hidden), dtype) for length, rows in self.rows.items()}
        self.beside: dict[int, dict[int, Tensor]] = {}
        """Arguments that depend on the tokens: number → length → ``[sequences, …]``."""
        self.left: dict[tuple, dict[int, Tensor]] = {}
        """What the blocks so far left for later ones: key and place → length → ``[sequences, …]``."""
        self._leavers: dict[tuple, dict[int, Tensor]] = {}
        """Key and place → length → which sequences have it already: in a pass from a stream to itself the later batches
        do not have it yet, bool ``[sequences]``."""

    def batches(self, size: int | None = None) -> list[Batch]:
        """Consecutive batches of ``size`` sequences (None: about ``batch_tokens`` tokens)."""
        out = []
        for length, rows in self.rows.items():
            step = size or max(1, self.batch_tokens // length)
            out += [Batch(length, s, min(s + step, len(rows))) for s in range(0, len(rows), step)]
        return out

    def read(self, batch: Batch) -> Tensor:
        return self.data[batch.length][batch.start : batch.stop]

    def write(self, batch: Batch, hidden: Tensor) -> None:
        self.data[batch.length][batch.start : batch.stop].copy_(hidden)

    def like(self) -> Activations:
        """A second stream over the same sequences, its values a copy of this one's."""
        other = copy.copy(self)
        other.data = self._copies(self.data)
        other.left = {key: self._copies(tensors) for key, tensors in self.left.items()}
        other._leavers = copy.deepcopy(self._leavers)
        return other

    def _copies(self, tensors: dict[int, Tensor]) -> dict[int, Tensor]:
        return {length: self.store.empty(tuple(data.shape), data.dtype).copy_(data) for length, data in tensors.items()}

    def room(self, tensors: dict[int, Tensor], length: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor for all sequences of a length among ``tensors``, made if it is missing; shape: of one row."""
        if length not in tensors:
            tensors[length] = self.store.empty((len(self.rows[length]), *shape), dtype)
        return tensors[length]

    def left_for(self, batch: Batch) -> dict[tuple, Tensor]:
        """What blocks left for later ones in these sequences."""
        rows = slice(batch.start, batch.stop)
        return {
            key: self.left[key][batch.length][rows]
            for key, done in self._leavers.items()
            if batch.length in done and done[batch.length][rows].all()
        }

    def room_left(self, batch: Batch, key: tuple, tensor: Tensor) -> Tensor:
        """Where what a block leaves in these sequences goes."""
        rows = slice(batch.start, batch.stop)
        done = self._leavers.setdefault(key, {})
        done.setdefault(batch.length, torch.zeros(len(self.rows[batch.length]), dtype=torch.bool))[rows] = True
        return self.room(self.left.setdefault(key, {}), batch.length, tensor.shape[1:], tensor.dtype)[rows]

    @property
    def sequences(self) -> int:
        return sum(map(len, self.rows.values()))

    @property
    def tokens(self) -> int:
        return sum(length * len(rows) for length, rows in self.rows.items())


class Resident:
    """All weights stay in memory: nothing is read and nothing is released."""

    streamed = False

    def of_copy(self, view: ModelView) -> Resident:
        """How the weights of a copy of the model are held."""
        return Resident()

    def acquire(self, index: int) -> None:
        """Make the parameters of a block real."""

    def coming(self, index: int, block: nn.Module) -> Callable[[], dict[str, Tensor]] | None:
        """What waits for the tensors of a block that is to be acquired next, by their names; None if nothing can."""
        return lambda: named_tensors(block)

    def release(self, index: int, saved: Path | None = None) -> None:
        """Free a block's parameters. ``saved``: the file that holds it as it is now; without one it was not changed."""


class Executor:
    """Runs single blocks of a model over stored activations, in ``compute_dtype`` on ``device``."""

    def __init__(
        self,
        view: ModelView,
        *,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        weights: Resident | None = None,
        store: Store | None = None,
        world: World | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ):
        """weights: how the blocks are read and released (None: they are in memory). store: where activations are kept.
        world: the processes that share the calibration sequences. warn: is called with a sentence when a batch did not
        fit on the device and was halved.
        """
        self.view, self.device, self.batch_size = view, indexed(device), batch_size
        own = next(p.dtype for p in view.blocks[0].parameters() if p.is_floating_point())
        self.dtype = compute_dtype or own
        self.weights = weights or Resident()
        self.store = store or Store(pin=self.device.type == "cuda")
        self.transfers = transfers(self.device, self.dtype)
        self.arrivals: Arrivals | None = None
        self.world, self.warn = world or World(), warn
        self.replays = Replays(self.device, warn)
        self.mode: Callable = contextlib.nullcontext
        """Makes the context that forward passes run in."""
        if self.device.type == "cpu":
            self.mode = lambda: forward_mode(self.dtype, self.verdicts)
        self.between: Between | None = Between(lambda: self.verdicts)
        """Recognises what runs through ops in a block; None leaves all to the block's own code."""
        self.verdicts: guards.Verdicts | None = None
        """Takes the guards of the ops that forward passes run; None: nobody looks at them."""
        self._proved: set[int] = set()
        """Blocks whose first batch was looked at (:meth:`proved`)."""
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    def embed(self, sequences: Sequence[Tensor], shared: bool = False) -> Activations:
        """Inputs of the first block for token sequences (1-D id tensors of any lengths), at least one.

        shared: with several processes each takes its part. Raises ConfigError if a process would have no sequence.
        """
        if shared and self.world.size > 1:
            return self._embed_part(list(sequences))
        tokens = target_tokens(self.device)
        shell = Activations(sequences, 0, self.dtype, batch_tokens=tokens)
        passes = (
            (batch, *self._record(shell.ids[batch.length][batch.start : batch.stop]))
            for batch in shell.batches(self.batch_size)
        )
        first = next(passes)
        activations = Activations(sequences, first[1].shape[-1], self.dtype, self.store, tokens)
        for batch, hidden, arguments, own in itertools.chain([first], passes):
            self._store(activations.read(batch), hidden)
            for number, tensor in own.items():
                dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
                rows = activations.room(
                    activations.beside.setdefault(number, {}), batch.length, tensor.shape[1:], dtype
                )
                self._store(rows[batch.start : batch.stop], tensor)
            self._arguments.setdefault((batch.length, batch.size), arguments)
        self.drain()
        return activations

    def _store(self, host: Tensor, value: Tensor) -> None:
        """Put what the model's own embedding made, wherever it did so, into the store."""
        if value.device == self.device:
            self.transfers.write(host, value)
        else:
            host.copy_(value)

    def _embed_part(self, sequences: list[Tensor]) -> Activations:
        if len(sequences) < self.world.size:
            raise ConfigError(
                f"{self.world.size} processes cannot share {len(sequences)} calibration sequences; start "
                "fewer, or calibrate on more"
            )
        first, stop = self.world.span(len(sequences))
        own = self.embed(sequences[first:stop])
        own.span = {
            length: (sum(len(s) == length for s in sequences), sum(len(s) == length for s in sequences[:first]))
            for length in sorted({len(s) for s in sequences})
        }
        return own

    def _record(self, ids: Tensor) -> tuple[Tensor, list[Arguments], dict[int, Tensor]]:
        """First-block input, the blocks' arguments on the device, and the sequences' own tensors where they are."""
        hidden, recorded = self.view.record(ids.to(embedding_device(self.view.model)))
        arguments, own = self.view.tokenwise.split(recorded)
        memo: dict[int, object] = {}
        return hidden, [a.to(self.device, self.dtype, memo) for a in arguments], own

    def arguments(self, index: int, length: int, size: int) -> Arguments:
        """What the model hands block ``index`` beside ``[size, length, hidden]`` states (recorded once per shape); what
        belongs to the sequences themselves is filled in by :meth:`beside`."""
        if (length, size) not in self._arguments:
            ids = torch.full((size, length), any_token(self.view.model), dtype=torch.long)
            self._arguments[length, size] = self._record(ids)[1]
        return self._arguments[length, size][index]

    def beside(self, window: Iterable[int], source: Activations, batch: Batch) -> Beside:
        """What belongs to the sequences of a batch and the blocks of a window need, on the device."""
        rows, beside = slice(batch.start, batch.stop), Beside()
        if source.beside:
            for number in self.view.tokenwise.numbers(window):
                beside.tensors[number] = source.beside[number][batch.length][rows]
        beside.left = source.left_for(batch)
        beside = beside.map(lambda t: t.to(self.device, non_blocking=True))
        beside.origin = source.left
        return beside

    @contextlib.contextmanager
    def compute(self, index: int, ahead: int | None = None) -> Iterator[nn.Module]:
        """Block ``index`` ready to run: itself where type and device already fit, else a copy for the duration.

        ahead: the block that is computed next, and that nothing changes before: it is on its way to a GPU meanwhile.
        """
        arrived = self.arrivals.take(index) if self.arrivals else {}
        self.weights.acquire(index)
        block = self.view.blocks[index]
        fits = all(
            p.device == self.device and (p.dtype == self.dtype or not p.is_floating_point()) for p in block.parameters()
        )
        module = block if fits else moved(block, self.device, self.dtype, arrived)
        del arrived
        if ahead is not None and ahead < len(self.view.blocks):
            self._send(ahead)
        try:
            faster = self.between.through_ops(module) if self.between else contextlib.nullcontext()
            with expert_loop(self.view.model.config), faster:
                yield module
        finally:
            if module is not block:  # whoever still holds the copy must not hold its memory
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data = tensor.data.new_empty(0)

    def _send(self, index: int) -> None:
        block = self.view.blocks[index]
        read = self.weights.coming(index, block)
        if self.device.type != "cuda" or read is None or any(p.is_cuda for p in block.parameters()):
            return
        self.arrivals = self.arrivals or Arrivals(self.device)
        self.arrivals.send(index, read, self.dtype)

    def put(self, home: Tensor, value: Tensor) -> None:
        """Write a result to a weight of the model's own block; in host memory it is there after :meth:`drain`."""
        if home.device == self.device:
            home.copy_(value)
        else:
            self.transfers.write(home, value, several=True)

    @torch.no_grad()
    def forward(self, index: int, module: nn.Module, hidden: Tensor, beside: Beside | None = None) -> Tensor:
        """Output of ``module``, standing in for block ``index``, on ``[batch, tokens, hidden]``; what the block leaves
        for later ones is then in ``beside``."""
        hidden = hidden.to(self.device, self.dtype, non_blocking=True)
        arguments = (beside or Beside()).fill(self.arguments(index, hidden.shape[1], hidden.shape[0]))
        with self.mode():
            return call_block(module, hidden, arguments)

    def stream(self, source: Activations) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch of a stream on the device, the next ones on their way while one is used."""
        return self.transfers.read((batch, source.read(batch)) for batch in source.batches(self.batch_size))

    def write(self, target: Activations, batch: Batch, hidden: Tensor, beside: Beside | None = None) -> None:
        """Send a batch's result, and what blocks left beside it, to a stream; it is there after :meth:`drain`."""
        self.transfers.write(target.read(batch), hidden)
        if beside is None:
            return
        for key, tensor in beside.left.items():
            if target.left is beside.origin and key not in beside.written:
                continue
            if len(tensor) != batch.size:
                raise ConfigError(
                    f"a block leaves a tensor of shape {list(tensor.shape)} under {key[0]!r} for later "
                    f"blocks, which has no row for each of {batch.size} sequences; it cannot be stored "
                    "with them"
                )
            self.transfers.write(target.room_left(batch, key, tensor), tensor)

    def drain(self) -> None:
        self.transfers.drain()

    def run(
        self,
        index: int,
        module: nn.Module,
        source: Activations,
        target: Activations | None = None,
        each: Callable[[Batch, Tensor | None], None] | None = None,
        through: Callable[[Callable[[], Tensor]], Tensor | None] | None = None,
    ) -> None:
        """Pass ``source`` through a block; outputs go to ``target`` (may be ``source``) and to ``each``.

        through: is called with each forward pass as a function, runs it and returns its output; it may end the pass
        early and return None. The first batch that passes the block in any run goes there by :meth:`proved`.
        """

        def one(part: Batch, x: Tensor) -> tuple[Tensor | None, Beside]:
            beside = self.beside([index], source, part)
            forward = functools.partial(self.forward, index, module, x, beside)
            return forward() if through is None else through(forward), beside

        def looked_at(part: Batch, x: Tensor) -> tuple[Tensor | None, Beside]:
            return self.proved(index, functools.partial(one, part, x))

        for part, (out, beside) in self.in_parts(source, index, looked_at):
            if target is not None and out is not None:
                self.write(target, part, out, beside)
            if each is not None:
                each(part, out)
        self.drain()

    def in_parts(
        self, source: Activations, index: int, work: Callable[[Batch, Tensor], T]
    ) -> Iterator[tuple[Batch, T]]:
        """``work(batch, hidden)`` of every batch of a stream; a batch too large beside block ``index`` is halved."""
        for batch, hidden in self.stream(source):
            parts = [(batch, hidden)]
            while parts:
                part, x = parts.pop(0)
                found = self.attempt(functools.partial(work, part, x))
                if found is NO_ROOM:
                    parts[:0] = self.halve(part, x, index)
                else:
                    yield part, found

    def proved(self, index: int, forward: Callable[[], T]) -> T:
        """``forward()``, of which nothing is kept yet. The first one through a block is looked at by the guards of the
        ops that it runs: where one fails it is made again with the reference, which replaces the op if it was at fault.
        Waits for the device then."""
        if index in self._proved:
            return forward()
        out, wrong = self._watched(forward)
        if wrong:
            with by_reference(wrong):
                out, still = self._watched(forward)
            for op in sorted(wrong - still):
                distrust(self.warn, self.device, index, op)
        self._proved.add(index)
        return out

    def _watched(self, forward: Callable[[], T]) -> tuple[T, set[str]]:
        """``forward()``, and the ops of it that failed their guards."""
        self.verdicts = seen = guards.Verdicts()
        try:
            return forward(), guards.at_fault([seen.wrong])
        finally:
            self.verdicts = None

    def room(self) -> float:
        """Bytes that activations outside the store may take where blocks are computed."""
        if self.device.type != "cuda":
            return max(0, self.store.budget - self.store.in_memory)
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return SHARE * (free + cached)

    def attempt(self, forward: Callable[[], T]) -> T | NoRoom:
        """``forward()``, or ``NO_ROOM`` if the device's memory did not suffice."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return forward()
        self.free()
        return NO_ROOM

    def free(self) -> None:
        """Give back what the device's allocator keeps for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def halve(self, batch: Batch, hidden: Tensor, index: int) -> list[tuple[Batch, Tensor]]:
        """The two halves of a batch that did not fit, and smaller batches from here on.

        Raises ConfigError for a single sequence, saying what would fit.
        """
        if batch.size == 1:
            raise ConfigError(
                f"one sequence of {batch.length} tokens does not fit on {self.device} beside block "
                f"{index} ({block_bytes(self.view.blocks[index]) / 1e9:.2f} GB); use a shorter seq_len "
                f"(about {batch.length // 2}), a 16-bit compute_dtype, or device='cpu'"
            )
        middle = batch.size // 2
        if self.batch_size is None or self.batch_size > middle:
            self.batch_size = middle
            self.warn(
                f"block {index} ran out of memory on {self.device} with {batch.size} sequences of {batch.length} "
                f"tokens: batches of {middle} from there on; set batch_size={middle} to begin with that"
            )
        first = Batch(batch.length, batch.start, batch.start + middle)
        second = Batch(batch.length, first.stop, batch.stop)
        return [(first, hidden[:middle]), (second, hidden[middle:])]

    def release(self, index: int, saved: Path | None = None) -> None:
        """Free a block's weights where they are streamed; ``saved`` is the shard that holds what it became."""
        self.weights.release(index, saved)


SHARE = 0.8
"""Of a GPU's free memory, what activations that stay there may take; the rest is for a batch at work and solves."""


def named_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a block by name, each once."""
    return dict((*block.named_parameters(), *block.named_buffers()))


def moved(
    block: nn.Module, device: torch.device, dtype: torch.dtype, arrived: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of a block on a device, in a type; its parameters are copied once, straight to where they belong.

    arrived: by name, copies that are there already and become the new block's own.
    """
    memo = {}
    for name, tensor in named_tensors(block).items():
        copied = (arrived or {}).get(name)
        if copied is None:
            copied = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(block, memo)


def block_bytes(block: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in block.parameters())
