"""``pyprune.prune``: from what callers give to a configuration. The run itself is :mod:`pyprune.pipeline.phases`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pyprune.config import ConfigError, Evaluation, PruneConfig, is_function, override
from pyprune.data import calibration
from pyprune.execution.journal import journaled
from pyprune.execution.weight_streaming import Opened
from pyprune.keywords import nested
from pyprune.model import checkpoint
from pyprune.packed.loading import opened
from pyprune.pipeline.phases import run_once
from pyprune.pipeline.result import PruneResult
from pyprune.pipeline.session import Session
from pyprune.pipeline.several import run_several
from pyprune.pipeline.shared import Shared
from pyprune.pipeline.tracking import Track, tracker

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyprune.keywords import Fields


def make_config(config: PruneConfig | dict | str | Path | None, fields: Mapping[str, Any]) -> PruneConfig:
    """Configuration from an object, a mapping or the path of a ``run.yaml``, plus settings by their keywords.

    ``calibration=`` and ``evaluation=`` also take their source directly (a path, texts, token ids), and ``evaluation=``
    takes False.
    """
    base = override(None, given_sections(config)) if isinstance(config, Mapping) else config
    if base is not None and not isinstance(base, (PruneConfig, str, Path)):
        raise ConfigError(
            f"config must be a PruneConfig, a mapping or the path of a run.yaml, got {type(base).__name__}"
        )
    found = override(base, given_sections(fields))
    if isinstance(found.criterion, str) and is_function(found.criterion):
        raise ConfigError(
            f"the criterion {found.criterion} was a function in memory when this configuration was written; pass it "
            "again, as the criterion of pyprune.prune in Python"
        )
    found.calibration = calibration.settled(found.calibration)
    return found


def given_sections(fields: Mapping[str, Any], paths: Iterable[str] | None = None) -> dict[str, Any]:
    """Settings by keyword, in the sections they belong to. paths: of the fields that are taken; None: all of a run."""
    whole = {
        "calibration": calibration.named,
        "evaluation": _evaluation_of,
        "reconstruction": lambda value: value,
        "structured": lambda value: value,
    }
    return nested(fields, paths, whole=whole)


def _evaluation_of(given: Any) -> Evaluation | dict:
    """What callers pass for an evaluation, as an :class:`Evaluation` or a mapping of its fields."""
    if isinstance(given, (Evaluation, dict)):
        return given
    return {"enabled": given} if isinstance(given, bool) else {"text": given}


def prune(
    model: str | Path | nn.Module | PruneResult | checkpoint.Loaded | None = None,
    config: PruneConfig | dict | str | Path | None = None,
    *,
    tokenizer: Any = None,
    in_place: bool = False,
    progress: bool = True,
    track: Track | str | None = None,
    resume: bool = False,
    **fields: Unpack[Fields],
) -> PruneResult:
    """Prune a model in one shot and say what it cost.

    model: Hub id, local folder, ``.gguf`` file, packaged name, or a live ``nn.Module`` (give its ``tokenizer`` unless
    calibration and evaluation are token ids). A live model is copied and stays untouched unless ``in_place``. What
    :func:`pyprune.load` or an earlier run returned is taken as the live model in it.
    resume: continue the interrupted run in the output folder after its last finished block, to the same result bit for
    bit; a folder with nothing in it starts from the beginning.
    track: called with (block, scalars by name) after each block, and at the end with the perplexities; or
    ``"tensorboard:FOLDER"``.
    config: a :class:`PruneConfig`, a mapping of its fields, or the path of a ``run.yaml``. ``**fields``: any setting
    of a run by the name of its option (``num_samples=``, ``epochs=``, ``text=``), those of ``config`` overridden.
    ``calibration`` and ``evaluation`` take their settings or just the text, in any form: a path, a Hub data set, a
    string, texts, token ids, a tokenizer's output, a ``datasets.Dataset``, a ``DataLoader``; ``evaluation=False``
    measures nothing. ``criterion`` also takes a function from a :class:`~pyprune.structured.criteria.Scored` to scores
    ``[units]``, higher is kept.
    Returns a :class:`PruneResult`. Raises ConfigError for bad input before any work is done, OutputError if the output
    cannot be written, and :class:`pyprune.execution.journal.Interrupted` when a signal stopped it between two blocks.
    """
    if not isinstance(model, (str, Path, nn.Module, type(None))):
        model, tokenizer = opened(model, tokenizer)
    model = str(model) if isinstance(model, Path) else model
    config = make_config(config, {**fields, "model": model} if isinstance(model, str) else fields)
    if resume and config.output is None:
        raise ConfigError("resume=True would do nothing: a run without an output folder leaves nothing to go on with")
    with (
        journaled(config.output, resume) as (world, journal),
        contextlib.ExitStack() as held,
        tracker(track, world.leads) as told,
    ):
        session = Session(config, journal, world, held, progress and world.leads, told)
        work = run_several if config.singles() else run_once
        return work(session, model, tokenizer, in_place)


def prune_copy(opened: Opened, config: PruneConfig, shared: Shared, progress: bool = True) -> PruneResult:
    """:func:`prune` of a copy of a model that several runs start from, the result in memory; what they have in common
    is worked out once. The model must be whole."""
    with journaled(None, False) as (world, journal), contextlib.ExitStack() as held:
        session = Session(config, journal, world, held, progress and world.leads, shared=shared)
        return run_once(session, opened, opened.tokenizer, in_place=False)
