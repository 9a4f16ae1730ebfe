"""Models that are never whole: rows of token ids pass one block at a time, one reading of the weights for all of them.

``Blockwise`` gives their logits; ``measure_streamed`` the same windows, types and losses as
:func:`pyprune.evaluation.perplexity.measure`; ``Meter`` measures whatever model a run has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pyprune.config import Evaluation
from pyprune.evaluation.perplexity import check_causal, forward_dtype, measure, placed, row_of, window_losses
from pyprune.evaluation.windows import Text
from pyprune.execution.activation_store import Store
from pyprune.execution.distributed import World
from pyprune.execution.executor import Executor, Resident
from pyprune.execution.weight_streaming import Streamed
from pyprune.model.attributes import embedding_device
from pyprune.model.blocks import ModelView


class Meter:
    """Measures every model of a run on the same windows: on the device where it fits, block by block where its weights
    are streamed, each process its share of the windows."""

    def __init__(
        self,
        texts: list[Text],
        evaluation: Evaluation,
        device: torch.device,
        store: Store,
        world: World,
    ):
        self.texts, self.evaluation, self.device, self.store, self.world = texts, evaluation, device, store, world
        self.notes: list[str] = []
        """What the user should know of where it was measured."""

    def __call__(
        self,
        model: nn.Module,
        weights: Resident | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict]:
        """One row per text, as :func:`~pyprune.evaluation.perplexity.measure` returns them.

        weights: how the blocks' weights are held. progress: called with what is done and all there is, in windows, or
        in blocks where these are streamed.
        """
        world, texts = self.world, self.texts
        if not texts:
            return []
        split = all(len(text.windows) >= world.size for text in texts)
        own = [text.share(world.rank, world.size) if split else text for text in texts]
        if isinstance(weights, Streamed):
            blocks = Blockwise(weights.view, weights, self.device, self.store)
            rows = measure_streamed(blocks, own, self.evaluation, progress)
        else:
            with placed(model, self.device, self.evaluation) as fits:
                rows = measure(model, own, self.evaluation, progress)
            note = (
                f"perplexity was measured on the CPU: the whole model does not fit on {self.device}; "
                "stream='always' measures block by block there"
            )
            if not fits and note not in self.notes:
                self.notes.append(note)
        return self.joined(rows) if split and world.size > 1 else rows

    def joined(self, rows: list[dict]) -> list[dict]:
        """Rows of all windows, from those of every process's share."""
        found = []
        for text, parts in zip(self.texts, zip(*self.world.everyone(rows))):
            losses = [0.0] * len(text.windows)
            for rank, part in enumerate(parts):
                losses[rank :: self.world.size] = part["losses"]
            seconds = max(part["seconds"] for part in parts)
            found.append({**row_of(text, losses, torch.float32, seconds), "dtype": parts[0]["dtype"]})
        return found


@dataclasses.dataclass
class Blockwise:
    """A model that is never whole, as forward passes over rows of token ids: all rows pass one block after another, so
    each weight is read once."""

    view: ModelView
    weights: Resident
    """How the blocks' weights are held."""
    device: torch.device = torch.device("cpu")
    store: Store = dataclasses.field(default_factory=Store)
    """Where the rows' hidden states are kept between two blocks."""

    @torch.no_grad()
    def logits(
        self,
        rows: list[Tensor],
        *,
        dtype: torch.dtype,
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Of each batch of rows of one length: their numbers in ``rows``, their ids, and the logits ``[rows, tokens,
        vocabulary]``, on the device of the embedding.

        rows: 1-D token ids of any lengths. dtype: of the forward passes. progress: called with (blocks done, blocks).
        """
        view, weights = self.view, self.weights
        executor = Executor(
            view, device=self.device, compute_dtype=dtype, batch_size=batch_size, weights=weights, store=self.store
        )
        # torch's own products and the model's own code, as in the evaluation of a model in memory
        executor.mode, executor.between = contextlib.nullcontext, None
        last = len(view.blocks) - 1
        told = progress or (lambda done, whole: None)
        with rest_in(view, dtype):
            activations = executor.embed(rows)
            for index in range(last):
                with executor.compute(index, ahead=index + 1) as module:
                    executor.run(index, module, activations, activations)
                weights.release(index)
                told(index + 1, last + 1)
            with executor.compute(last) as module:
                for batch, hidden in executor.stream(activations):
                    beside = executor.beside([last], activations, batch)
                    arguments = beside.fill(executor.arguments(last, batch.length, batch.size))
                    out = module(hidden, *arguments.args, **arguments.kwargs)
                    ids = activations.ids[batch.length][batch.start : batch.stop]
                    home = embedding_device(view.model)
                    out = (out[0].to(home), *out[1:]) if isinstance(out, tuple) else out.to(home)
                    ids = ids.to(home)
                    yield (
                        activations.rows[batch.length][batch.start : batch.stop],
                        ids,
                        view.complete(ids, out).logits,
                    )
            weights.release(last)
            told(last + 1, last + 1)


def measure_streamed(
    model: Blockwise,
    named: list[Text],
    evaluation: Evaluation,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """One row per text, as :func:`pyprune.evaluation.perplexity.measure` returns them."""
    if not named:
        return []
    check_causal(model.view.model)
    start, dtype = time.perf_counter(), forward_dtype(model.view.model, evaluation.dtype)
    rows = [window for text in named for window in text.windows]
    scored = [count for text in named for count in text.scored or [len(window) - 1 for window in text.windows]]
    told: list[Tensor] = []
    places: list[int] = []
    for numbers, ids, logits in model.logits(rows, dtype=dtype, batch_size=evaluation.batch_size, progress=progress):
        told.append(window_losses(logits, ids, [scored[number] for number in numbers]))
        places += numbers
    losses = [loss for _, loss in sorted(zip(places, torch.cat(told).tolist()))]
    seconds = time.perf_counter() - start
    result = []
    for text in named:
        own, losses = losses[: len(text.windows)], losses[len(text.windows) :]
        result.append(row_of(text, own, dtype, seconds * len(own) / len(rows)))
    return result


@contextlib.contextmanager
def rest_in(view: ModelView, dtype: torch.dtype) -> Iterator[None]:
    """Embeddings, final norm and head in another type for the duration; blocks and buffers are left alone."""
    rest: list[nn.Parameter] = [
        p for p in view.model.parameters() if not p.is_meta and p.is_floating_point() and p.dtype != dtype
    ]
    before = [p.data for p in rest]
    for parameter in rest:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in zip(rest, before):
            parameter.data = data
