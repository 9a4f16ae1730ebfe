"""One name for each field of a run: ``num_samples`` in Python is ``--num-samples`` on the command line.

A name that several sections share belongs to the run itself (``seed``, ``dtype``) and carries the section's name
elsewhere (``evaluation_dtype``). In ``run.yaml`` and in the dataclasses the same fields stand in their sections.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict

from pyprune.config import (
    SECTIONS,
    ConfigError,
    Criterion,
    Dtype,
    Inputs,
    Method,
    PruneConfig,
    Reconstruction,
    Streaming,
    Structured,
    StructuredReconstruction,
    TokenWeights,
    WeightReconstruction,
)


class Fields(TypedDict, total=False):
    """Every keyword of :func:`pyprune.prune`, for editors and type checkers; a test keeps it equal to the fields."""

    output: str | None
    method: Method
    pattern: str
    sparsity: float | list[float] | tuple[float, ...] | dict[str, float] | None
    criterion: Criterion | Callable[..., Any]
    reconstruct: WeightReconstruction | StructuredReconstruction | None
    global_propagation: bool
    inputs: Inputs
    targets: list[str]
    ignore: list[str]
    damping: float
    column_block: int
    batch_size: int | None
    dtype: Dtype
    compute_dtype: Dtype
    device: str
    backend: str
    seed: int
    probe_samples: int
    memory_budget_gb: float | None
    stream: Streaming
    packed: bool
    num_samples: int | None
    seq_len: int | None
    calibration_seed: int | None
    calibration_split: str
    calibration_subset: str | None
    calibration_text_column: str | None
    self_generated: int
    self_generated_path: str | None
    self_generated_for: Literal["reconstruction", "all"]
    language: str | None
    held_out: int
    text: Any
    off_domain: Any
    window: int | None
    stride: int | None
    max_windows: int | None
    evaluation_dtype: Dtype
    evaluation_batch_size: int
    bos: bool
    evaluation_split: str
    evaluation_subset: str | None
    evaluation_text_column: str | None
    epochs: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    reconstruction_batch_size: int
    micro_batch_size: int | None
    autocast: Literal["auto", "float32", "bfloat16"]
    early_stop: bool
    select: Literal["last", "validation"]
    layerwise_target: Literal["local", "dense"]
    allocation: Literal["uniform", "global"]
    structured_damping: float | None
    interpolate: Literal["both", "weight", "bias"]
    interpolate_weights: bool
    token_weights: TokenWeights
    head_scope: Literal["groups", "queries"]
    nonstandard: Literal["refuse", "save", "pad"]
    calibration: Any
    evaluation: Any
    reconstruction: Reconstruction | dict
    structured: Structured | dict


RECORDED = ("backends", "weights")
"""Fields that a run writes down in ``run.yaml``; nobody names them on a command line."""
RENAMED = {"calibration.source": "calibration", "evaluation.text": "text", "evaluation.enabled": "evaluation"}


REFINED = (
    "output",
    "dtype",
    "compute_dtype",
    "device",
    "seed",
    "stream",
    "memory_budget_gb",
    "global_propagation",
    "packed",
)
NOT_REFINED = ("calibration.self_generated_for", "reconstruction.layerwise_target")
"""Fields of a run, and settings in its sections that mean nothing there, of a refinement."""


def configuration_fields() -> dict[str, tuple[type, dataclasses.Field]]:
    """``calibration.seq_len`` → its dataclass and field, for every field of a run that somebody chooses."""
    found: dict[str, tuple[type, dataclasses.Field]] = {
        f.name: (PruneConfig, f) for f in dataclasses.fields(PruneConfig) if f.name not in (*SECTIONS, *RECORDED)
    }
    for section, cls in SECTIONS.items():
        found |= {f"{section}.{f.name}": (cls, f) for f in dataclasses.fields(cls)}
    return found


def keywords(paths: Iterable[str] | None = None) -> dict[str, str]:
    """Keyword → path of the field, for the fields that a function or a command takes; None: all of a run."""
    paths = list(configuration_fields() if paths is None else paths)
    counts = Counter(path.rpartition(".")[2] for path in paths)

    def name(path: str) -> str:
        section, _, last = path.rpartition(".")
        return RENAMED.get(path) or (f"{section}_{last}" if section and counts[last] > 1 else last)

    return {name(path): path for path in paths}


def refine_fields() -> list[str]:
    """Paths of the fields that ``refine`` takes."""
    sections = ("calibration.", "reconstruction.", "evaluation.")
    return [*REFINED, *(p for p in configuration_fields() if p.startswith(sections) and p not in NOT_REFINED)]


def nested(
    given: Mapping[str, Any], paths: Iterable[str] | None = None, *, whole: Mapping[str, Callable[[Any], Any]] = {}
) -> dict[str, Any]:
    """``{"num_samples": 8}`` → ``{"calibration": {"num_samples": 8}}``.

    whole: per section, what turns a value given under the section's own name (settings, or a bare source) into a
    mapping of fields, or leaves a finished section as it is. Raises :class:`ConfigError` for a name that is no field's,
    with the nearest that is one.
    """
    known = {**keywords(paths), **{name: name for name in RECORDED}}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in whole:
            continue
        if name not in known:
            raise ConfigError(unknown(name, [*keywords(paths), *whole]))
        section, _, field = known[name].rpartition(".")
        (found.setdefault(section, {}) if section else found)[field] = value
    for section, read in whole.items():
        if given.get(section) is None:
            continue
        value, beside = read(given[section]), found.get(section)
        if beside and not isinstance(value, dict):
            value = dict(vars(value))
        found[section] = {**value, **beside} if beside else value
    return found


def unknown(name: str, known: Iterable[str]) -> str:
    """The sentence for a keyword that does not exist."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")
