"""``pyprune.evaluate``: perplexity of one model by itself, in memory or with weights that are read block by block."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.config import ConfigError, Evaluation, Streaming, from_dict
from pyprune.data.calibration import need_tokenizer
from pyprune.evaluation import domains
from pyprune.evaluation.block_by_block import Blockwise, measure_streamed
from pyprune.evaluation.perplexity import check_causal, measure
from pyprune.evaluation.windows import windows_of
from pyprune.execution.activation_store import Store
from pyprune.execution.device import pick_device
from pyprune.execution.unopened import Unopened
from pyprune.execution.weight_streaming import Opened, open_streamed
from pyprune.model import checkpoint
from pyprune.model.attributes import vocabulary_size
from pyprune.model.blocks import not_finite, predicts_next_token
from pyprune.model.checkpoint import Loaded
from pyprune.model.positions import of_any, positions_of
from pyprune.model.skeleton import skeleton
from pyprune.packed.loading import opened


def ready(model: Any, tokenizer: Any = None, stream: Streaming = "auto") -> Loaded | Opened:
    """A model to measure: in memory, or without its blocks where :func:`to_stream` says that they are read one by one.

    model: what :func:`pyprune.packed.loading.opened` takes, or what this function returned.
    """
    if isinstance(model, Opened):
        return model
    found = to_stream(model, stream)
    streamed = None if found is None else open_streamed(found, "always")
    if streamed is None:
        return opened(model, tokenizer)
    return streamed if tokenizer is None else dataclasses.replace(streamed, tokenizer=tokenizer)


def to_stream(model: Any, stream: Streaming = "auto") -> Unopened | None:
    """The checkpoint of a model whose weights are to be read block by block, None of any other.

    Raises ConfigError where ``always`` cannot be: a model in memory, one that does not predict the next token, files
    that cannot be streamed.
    """
    if not isinstance(model, (str, Path)):
        if stream == "always" and not isinstance(model, Opened):
            raise ConfigError("stream='always' needs the name of a folder: this model is in memory")
        return None
    found = Unopened(str(model))
    if not found.streams(stream)[0] or found.files is None:
        return None
    if predicts_next_token(found.view.model):
        return found
    if stream == "always":
        raise ConfigError(
            f"{model} cannot be streamed: {type(found.view.model).__name__} does not predict the next token, and only "
            "models that do are measured block by block; set stream='never'"
        )
    return None


def check_named(name: str | Path) -> None:
    """Raise ConfigError for a named model that has no perplexity, by its configuration, before its weights are read."""
    found = Unopened(str(name))
    if not found.source.gguf_file and not checkpoint.structured_sizes(found.source):
        check_causal(skeleton(found.config, origin=found.origin))


def placed_on(found: Loaded | Opened, device: str | None) -> nn.Module | Blockwise:
    """What computes the logits of a model that is :func:`ready`. device: as of :func:`evaluate`."""
    if isinstance(found, Opened):
        place = pick_device(device or "cpu")
        return Blockwise(found.view, found.weights, place, Store(pin=place.type == "cuda"))
    if device is not None:
        found.model.to(pick_device(device))
    return found.model


class NotFinite(ConfigError):
    """A perplexity is not finite; ``found`` is what :func:`evaluate` would have returned, with its ``warnings``."""

    def __init__(self, found: dict):
        super().__init__("; ".join(found["warnings"]))
        self.found = found


def evaluate(
    model: Any,
    evaluation: Any = None,
    *,
    tokenizer=None,
    device: str | None = None,
    stream: Streaming = "auto",
    progress=None,
    **fields,
) -> dict:
    """Perplexity of a model on one or several texts.

    model: a live causal model with its ``tokenizer``, what :func:`pyprune.load` takes or returns, or a run's result.
    evaluation: an :class:`Evaluation`, or its ``text``: a path, a Hub data set, a list of texts, token ids, or a list
    of such sources; without one, the documentation and the novel that come with pyprune.
    fields: further fields of :class:`Evaluation`.
    device: where to run; ``auto`` takes a GPU if there is one. None leaves a live model where it is.
    stream: ``always`` reads the weights of a folder block by block, ``never`` loads them whole, ``auto`` streams what
    would take more than half of the free memory. progress: called with what is done and all there is, in windows, or in
    blocks of a streamed model.
    Returns a row of the first text, and one of every text under ``"texts"`` when there are several:
    ``{"perplexity", "text", "split", "subset", "domain", "losses", "windows", "window", "stride", "tokens", "dtype",
    "seconds"}``, where ``tokens`` is how many were scored, ``split`` and ``subset`` are a data set's, and ``stride`` is
    None where windows do not overlap; else ``"scored"``, tokens by window, is there, too.
    Raises :class:`ConfigError` on bad input, and
    :class:`NotFinite`, which has the rows of all texts, where a perplexity is not finite.
    """
    evaluation = _settings(evaluation, fields)
    if isinstance(model, (str, Path)):
        device = device or "auto"
        check_named(model)
    subject = ready(model, tokenizer, stream)
    live = subject.model
    check_causal(live)
    forwards = placed_on(subject, device)
    positions = positions_of(subject.view) if isinstance(subject, Opened) else of_any(live)
    pieces = windows_of(
        domains.alone(evaluation),
        evaluation,
        subject.tokenizer,
        vocab_size=vocabulary_size(live),
        positions=positions,
    )
    if not pieces:
        need_tokenizer(subject.tokenizer, "evaluation text")
    if isinstance(forwards, Blockwise):
        rows = measure_streamed(forwards, pieces, evaluation, progress)
    else:
        rows = measure(forwards, pieces, evaluation, progress)
    found = {**rows[0], "texts": rows} if len(rows) > 1 else rows[0]
    bad = [row for row in rows if not math.isfinite(row["perplexity"])]
    if bad:
        cause = None if isinstance(subject, Opened) else not_finite(live.state_dict().items())
        told = [
            f"the perplexity on {row['text']} is {row['perplexity']}: the model's weights or activations hold NaN or "
            f"inf in {row['dtype']}" + (f", {cause}" if cause else "")
            for row in bad
        ]
        raise NotFinite({**found, "warnings": told})
    return found


def _settings(evaluation: Any, fields: dict) -> Evaluation:
    given = (
        {f.name: getattr(evaluation, f.name) for f in dataclasses.fields(Evaluation)}
        if isinstance(evaluation, Evaluation)
        else {"text": evaluation}
    )
    return from_dict(Evaluation, {**given, **fields}, "evaluation")
