"""Perplexity of a model that is never whole in memory: all windows pass through one block at a time.

The same windows, types and losses as :func:`pyprune.evaluate.measure`, one reading of the weights for all texts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyprune.config import Evaluation
from pyprune.evaluate import check_causal, forward_dtype, perplexity_of, window_losses
from pyprune.model import ModelView
from pyprune.store import Store
from pyprune.stream import Executor
from pyprune.weights import Streamed


@torch.no_grad()
def measure_streamed(view: ModelView, weights: Streamed, named: list[tuple[str, list[Tensor]]], evaluation: Evaluation,
                     store: Store, device: torch.device) -> list[dict]:
    """One row a text, as :func:`pyprune.evaluate.measure` returns them."""
    if not named:
        return []
    check_causal(view.model)
    start, dtype = time.perf_counter(), forward_dtype(view.model, evaluation.dtype)
    executor = Executor(view, device=device, compute_dtype=dtype, batch_size=evaluation.batch_size, weights=weights,
                        store=store)
    executor.mode = contextlib.nullcontext  # torch's own products, as in the evaluation of a model in memory
    rows = [window for _, windows in named for window in windows]
    losses = [0.0] * len(rows)
    with rest_in(view, dtype):
        activations = executor.embed(rows)
        last = len(view.blocks) - 1
        for index in range(last):
            with executor.compute(index) as module:
                executor.run(index, module, activations, activations)
            weights.release(index)
        with executor.compute(last) as module:
            for batch, hidden in executor.stream(activations):
                arguments = executor.arguments(last, batch.length, batch.size)
                out = module(hidden, *arguments.args, **arguments.kwargs)
                ids = activations.ids[batch.length][batch.start:batch.stop]
                home = view.model.get_input_embeddings().weight.device
                out = (out[0].to(home), *out[1:]) if isinstance(out, tuple) else out.to(home)
                found = window_losses(view.complete(ids.to(home), out).logits, ids.to(home)).tolist()
                for row, loss in zip(activations.rows[batch.length][batch.start:batch.stop], found):
                    losses[row] = loss
        weights.release(last)
    seconds = time.perf_counter() - start
    result = []
    for name, windows in named:
        own, losses = losses[:len(windows)], losses[len(windows):]
        result.append({"text": name, "perplexity": perplexity_of(own), "windows": len(windows),
                       "window": len(windows[0]), "dtype": str(dtype)[6:],
                       "seconds": seconds * len(windows) / len(rows)})
    return result


@contextlib.contextmanager
def rest_in(view: ModelView, dtype: torch.dtype) -> Iterator[None]:
    """Embeddings, final norm and head in another type for the duration; blocks and buffers are left alone."""
    rest: list[nn.Parameter] = [p for p in view.model.parameters() if not p.is_meta and p.is_floating_point()
                                and p.dtype != dtype]
    before = [p.data for p in rest]
    for parameter in rest:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in zip(rest, before):
            parameter.data = data
