"""The cells of a study: one run per way of pruning, sparsity and seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyprune.config import SECTIONS, STRUCTURED_PATTERNS, ConfigError, PruneConfig, Unused, from_dict, parse_nm
from pyprune.effects import is_set, needs_sequences
from pyprune.reporting.words import reconstruction_text

CHOSEN = ("model", "output", "method", "criterion", "pattern", "sparsity", "reconstruct", "global_propagation", "seed")
"""Fields that a study sets for each run; its other fields are the same for all runs."""


@dataclass(frozen=True)
class Axes:
    """What a study varies. Every combination that is a run is a cell."""

    methods: Sequence[str] = ("sparsegpt",)
    criteria: Sequence[str] = ("wifv",)
    patterns: Sequence[str] = ("unstructured",)
    sparsities: Sequence[float] = (0.5,)
    """N:M patterns have a sparsity of their own and are run once."""
    reconstruct: Sequence[str | None] = (None,)
    """Values of the field ``reconstruct``, with ``+gp`` for global propagation; None is each pattern's default."""
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self):
        for name in ("methods", "criteria", "patterns", "sparsities", "reconstruct", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name} is empty: a study needs at least one value of each")
            if name == "sparsities" and not all(isinstance(value, (int, float)) for value in values):
                raise ConfigError(f"sparsities of a study are numbers, got {list(values)!r}")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} names a value twice: {', '.join(map(str, values))}")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. name: of its folder and its claim; equal for equal settings of the axes."""

    name: str
    config: PruneConfig


@dataclass
class Grid:
    """The runs of a study, and what is none."""

    cells: list[Cell] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Combinations that are no run, each with the reason."""


def make_grid(axes: Axes, common: Mapping[str, Any]) -> Grid:
    """All runs of a study. common: the fields that all of them share, by section, as ``PruneConfig`` takes them.

    A field that does nothing in some runs is left out there; one that does nothing in any is refused, as is a study
    without a single run. Structured patterns with ``inputs="dense"`` have all sparsities in one run, whose statistics
    they share.
    """
    for name in CHOSEN:
        if common.get(name) is not None and name != "model":
            raise ConfigError(f"{name} is what a study varies; name its values as one of {', '.join(_axis_names())}")
    common = {key: _fields(value) if key in SECTIONS else value for key, value in common.items()}
    grid = Grid()
    idle: dict[str, Unused] = {}
    used: set[str] = set()
    for values in _combinations(axes, common.get("inputs") == "dense"):
        try:
            config, dropped = _config(values, common)
        except ConfigError as error:
            grid.left_out.append(f"{_label(values)}: {error}")
            continue
        idle.update(dropped)
        used |= {path for path in _paths(common) if path not in dropped}
        if values["seed"] != axes.seeds[0] and not _seeded(config):
            continue
        if _name(config) not in {cell.name for cell in grid.cells}:
            grid.cells.append(Cell(_name(config), config))
    unused = [error for path, error in idle.items() if path not in used]
    if grid.cells and unused:
        raise unused[0]
    if not grid.cells:
        raise ConfigError("no combination of the study's values is a run: " + "; ".join(grid.left_out[:3]))
    grid.left_out = list(dict.fromkeys(grid.left_out))
    return grid


def _fields(section: Any) -> Any:
    """A section of settings as a mapping of the fields that were set."""
    if not dataclasses.is_dataclass(section):
        return section
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if is_set(section, f.name)}


def _axis_names() -> list[str]:
    return list(Axes.__dataclass_fields__)


def _combinations(axes: Axes, shares: bool) -> Iterator[dict[str, Any]]:
    """The chosen fields of every run, ordered so that what is worth comparing comes first."""
    for seed, pattern in itertools.product(axes.seeds, axes.patterns):
        structured = pattern in STRUCTURED_PATTERNS
        sparsities: Sequence[Any] = axes.sparsities
        if parse_nm(pattern):
            sparsities = (None,)
        elif structured and shares and len(axes.sparsities) > 1:
            sparsities = (sorted(axes.sparsities),)
        for how, reconstruct, sparsity in itertools.product(
            axes.criteria if structured else axes.methods, axes.reconstruct, sparsities
        ):
            kind, _, more = (reconstruct or "").partition("+")
            if more not in ("", "gp"):
                raise ConfigError(f"reconstruct {reconstruct!r}: only +gp can follow a value, for global propagation")
            yield {
                "criterion" if structured else "method": how,
                "pattern": pattern,
                "sparsity": sparsity,
                "reconstruct": kind or None,
                "global_propagation": bool(more),
                "seed": seed,
            }


def _config(values: dict, common: Mapping[str, Any]) -> tuple[PruneConfig, dict[str, Unused]]:
    """A run's configuration without the common fields that do nothing in it, and these."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in common.items()}
    merged |= {key: value for key, value in values.items() if value is not None}
    dropped: dict[str, Unused] = {}
    while True:
        try:
            return from_dict(PruneConfig, merged), dropped
        except Unused as error:
            section, _, name = error.field.rpartition(".")
            owner = merged.get(section, {}) if section else merged
            if error.field in values or not isinstance(owner, dict) or name not in owner:
                raise
            del owner[name]
            dropped[error.field] = error


def _paths(common: Mapping[str, Any]) -> list[str]:
    """``calibration.num_samples`` for every common field."""
    return [
        path
        for key, value in common.items()
        for path in ([f"{key}.{name}" for name in value] if key in SECTIONS and isinstance(value, dict) else [key])
    ]


def _seeded(config: PruneConfig) -> bool:
    """Whether the seed changes what comes out."""
    return needs_sequences(config) or (config.is_structured and config.criterion == "random")


def _label(values: dict) -> str:
    how = values.get("method") or values.get("criterion")
    sparsity = "" if values["sparsity"] is None else f" {values['sparsity']}"
    repair = reconstruction_text({**values, "reconstruct": values["reconstruct"] or "default"})
    return f"{how} {values['pattern']}{sparsity} + {repair}"


def _name(config: PruneConfig) -> str:
    """``sparsegpt-unstructured-0.5-layer-seed0``: a folder on any file system."""
    how = config.criterion_name if config.is_structured else config.method
    repair = f"{config.reconstruct}{'+gp' if config.global_propagation else ''}"
    sparsity = "_".join(f"{value:g}" for value in config.sparsities)
    return f"{how}-{config.pattern.replace(':', 'to')}-{sparsity}-{repair}-seed{config.seed}"
