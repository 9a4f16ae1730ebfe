"""Block-by-block executor: where activations live and how they pass through one block at a time.

Sequences of equal length are stored together, ``[sequences, tokens, hidden]``, so a batch is a view of the store,
nothing is ever padded, and a block's arguments depend on the batch's shape alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.autograd import ForwardMode
from pyprune.model import Arguments, ModelView, call_block

TARGET_TOKENS = 2048 if not torch.cuda.is_available() else 16384
"""Tokens a batch: on a CPU what stays in cache, on a GPU what fills it."""


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

    def __init__(self, sequences: Sequence[Tensor], hidden: int, dtype: torch.dtype):
        self.ids: dict[int, Tensor] = {}
        self.rows: dict[int, list[int]] = {}
        for row, ids in enumerate(sequences):
            self.rows.setdefault(len(ids), []).append(row)
        self.rows = dict(sorted(self.rows.items()))
        for length, rows in self.rows.items():
            self.ids[length] = torch.stack([sequences[row].long() for row in rows])
        self.hidden, self.dtype = hidden, dtype
        self.data = {length: torch.empty(len(rows), length, hidden, dtype=dtype) for length, rows in self.rows.items()}

    def batches(self, size: int | None = None) -> list[Batch]:
        """Consecutive batches of ``size`` sequences (None: about ``TARGET_TOKENS`` tokens)."""
        out = []
        for length, rows in self.rows.items():
            step = size or max(1, TARGET_TOKENS // length)
            out += [Batch(length, s, min(s + step, len(rows))) for s in range(0, len(rows), step)]
        return out

    def read(self, batch: Batch) -> Tensor:
        return self.data[batch.length][batch.start:batch.stop]

    def write(self, batch: Batch, hidden: Tensor) -> None:
        self.data[batch.length][batch.start:batch.stop].copy_(hidden)

    def like(self) -> Activations:
        """A second stream over the same sequences, its values a copy of this one's."""
        other = copy.copy(self)
        other.data = {length: data.clone() for length, data in self.data.items()}
        return other

    @property
    def sequences(self) -> int:
        return sum(map(len, self.rows.values()))

    @property
    def tokens(self) -> int:
        return sum(length * len(rows) for length, rows in self.rows.items())


class Executor:
    """Runs single blocks of a model over stored activations, in ``compute_dtype`` on ``device``."""

    def __init__(self, view: ModelView, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype | None = None,
                 batch_size: int | None = None):
        self.view, self.device, self.batch_size = view, torch.device(device), batch_size
        own = next(p.dtype for p in view.blocks[0].parameters() if p.is_floating_point())
        self.dtype = compute_dtype or own
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    def embed(self, sequences: Sequence[Tensor]) -> Activations | None:
        """Inputs of the first block for token sequences (1-D id tensors of any lengths); None for none."""
        if not sequences:
            return None
        activations = None
        shell = Activations(sequences, 0, self.dtype)
        for batch in shell.batches(self.batch_size):
            ids = shell.ids[batch.length][batch.start:batch.stop]
            hidden, arguments = self._record(ids)
            if activations is None:
                activations = Activations(sequences, hidden.shape[-1], self.dtype)
            activations.write(batch, hidden)
            self._arguments.setdefault((batch.length, batch.size), arguments)
        return activations

    def _record(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        home = next(self.view.model.get_input_embeddings().parameters()).device
        hidden, arguments = self.view.record(ids.to(home))
        memo: dict[int, object] = {}
        return hidden, [a.to(self.device, self.dtype, memo) for a in arguments]

    def arguments(self, index: int, length: int, size: int) -> Arguments:
        """What the model hands block ``index`` beside ``[size, length, hidden]`` states (recorded once a shape)."""
        if (length, size) not in self._arguments:
            vocabulary = self.view.model.get_input_embeddings().num_embeddings
            # any ids do, except the padding id, from which some encoders derive positions
            token = 1 + (getattr(self.view.model.config, "pad_token_id", None) or 0)
            ids = torch.full((size, length), min(token, vocabulary - 1), dtype=torch.long)
            self._arguments[length, size] = self._record(ids)[1]
        return self._arguments[length, size][index]

    @contextlib.contextmanager
    def compute(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` ready to run: itself where type and device already fit, else a copy for the duration."""
        block = self.view.blocks[index]
        fits = all(p.device == self.device and (p.dtype == self.dtype or not p.is_floating_point())
                   for p in block.parameters())
        module = block if fits else copy.deepcopy(block).to(self.device, self.dtype)
        with expert_loop(self.view.model.config):
            yield module

    @torch.no_grad()
    def forward(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Output of ``module``, standing in for block ``index``, on ``[batch, tokens, hidden]``."""
        hidden = hidden.to(self.device, self.dtype, non_blocking=True)
        arguments = self.arguments(index, hidden.shape[1], hidden.shape[0])
        with ForwardMode() if self.device.type == "cpu" else contextlib.nullcontext():
            return call_block(module, hidden, arguments)

    def run(self, index: int, module: nn.Module, source: Activations, target: Activations | None = None,
            each: Callable[[Batch, Tensor], None] | None = None) -> None:
        """Pass ``source`` through a block; outputs go to ``target`` (may be ``source``) and to ``each``."""
        for batch in source.batches(self.batch_size):
            out = self.forward(index, module, source.read(batch))
            if target is not None:
                target.write(batch, out)
            if each is not None:
                each(batch, out)


@contextlib.contextmanager
def expert_loop(config) -> Iterator[None]:
    """Run fused experts one by one for the duration, so that each expert's inputs can be seen."""
    name = "_experts_implementation"
    before = getattr(config, name, None)
    if before is None or before == "eager":
        yield
        return
    setattr(config, name, "eager")
    try:
        yield
    finally:
        setattr(config, name, before)
