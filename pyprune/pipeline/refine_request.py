"""What one refinement is asked to do, by :func:`pyprune.refine` or the command, and the record that repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pyprune.config import (
    SECTIONS,
    STREAMING,
    Calibration,
    ConfigError,
    Evaluation,
    Reconstruction,
    Unused,
    check_backends,
    check_dtype,
    dtype_name,
    from_dict,
    read_yaml,
    to_dict,
)
from pyprune.evaluation.gain import dense_of
from pyprune.reporting.record import CALIBRATION_PLACES, named_calibration, named_evaluation, yaml_text
from pyprune.reporting.words import distinct, perplexity_text
from pyprune.sources import in_memory, split

RECORD = "refinement.json"
"""How a checkpoint was refined, and what it gained."""
RECIPE = "refine.yaml"
"""What repeats a refinement."""


@dataclass(kw_only=True)
class Refinement:
    """Settings of a refinement. Raises ConfigError for a value that is none of those known."""

    model: str | None = None
    """Folder of the pruned model; None: it is in memory."""
    dense: str | None = None
    """The model that it was pruned from; None: it is in memory."""
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    cross_block: bool = False
    global_propagation: bool = True
    dtype: str = "auto"
    compute_dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    packed: bool = False
    """Write the checkpoint without its zeros, as :func:`pyprune.pack` does."""
    stream: str = "auto"
    """Whether the blocks of either model are read from their files one after the other, as in
    :class:`pyprune.PruneConfig`; ``always`` asks for both."""
    memory_budget_gb: float | None = None
    """Host memory for activations, in GB."""
    backends: dict[str, dict[str, str]] | None = None
    """The back-ends that the refinement took which this one repeats, as in :class:`pyprune.PruneConfig`."""

    def __post_init__(self):
        for name in ("dtype", "compute_dtype"):
            setattr(self, name, check_dtype(getattr(self, name), name))
        if self.stream not in STREAMING:
            raise ConfigError(f"stream must be one of {', '.join(STREAMING)}, got {self.stream!r}")
        check_backends(self.backends)

    def asked(self) -> dict:
        """What decides the result, as plain data."""
        names = ("cross_block", "global_propagation", "seed", "dtype", "compute_dtype", "packed")
        return {
            **{name: getattr(self, name) for name in names},
            "settings": to_dict(self.reconstruction),
            "calibration": to_dict(named_calibration(self.calibration)),
        }

    def identity(self) -> dict:
        """The same, but for where the data lie: they have fingerprints."""
        asked = self.asked()
        kept = {key: value for key, value in asked["calibration"].items() if key not in CALIBRATION_PLACES}
        return {**asked, "calibration": kept, "evaluation": {"dtype": self.evaluation.dtype}}

    def record(self) -> dict:
        """All fields as plain data; what was given in memory stands there as its kind and a fingerprint."""
        sections = {
            "calibration": named_calibration(self.calibration),
            "evaluation": named_evaluation(self.evaluation),
        }
        return to_dict({**vars(self), **sections})

    @property
    def repeatable(self) -> bool:
        """Whether every text and the dense model have names, so that the record repeats the refinement."""
        return self.dense is not None and not any(map(in_memory, _texts(self)))


@dataclass(kw_only=True)
class Request(Refinement):
    """A refinement of one folder into another."""

    output: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.model is not None:
            self.dense = self.dense or dense_of(self.model, "--dense")

    @property
    def pruned(self) -> str:
        """The folder of the pruned model."""
        return str(self.model)

    @property
    def original(self) -> str:
        """The model that it was pruned from."""
        return str(self.dense)


def live(config: str | Path | Mapping | None, values: Mapping[str, Any]) -> Refinement:
    """The settings of a refinement of a model in memory: those in a ``refine.yaml``, or in a mapping of its fields,
    with other values put in their places. Where the pruned model lies, and what only a folder has, is left out."""
    names = {f.name for f in fields(Refinement)}
    base = {name: value for name, value in _read(config).items() if name not in ("model", "output", "evaluation")}
    base = {name: value for name, value in base.items() if name not in ("packed", "stream", "memory_budget_gb")}
    if unknown := next((name for name in base if name not in names), None):
        from_dict(Refinement, {unknown: None}, RECIPE)  # refuses it, with the nearest
    return from_dict(Refinement, _merged(base, values), RECIPE)


def _read(config: str | Path | Mapping | None) -> dict:
    return read_yaml(config) if isinstance(config, (str, Path)) else dict(config or {})


def requested(config: str | Path | Mapping | None, values: Mapping[str, Any]) -> Request:
    """The request in a ``refine.yaml``, or in a mapping of its fields, with other values put in their places.

    A section of ``values`` is a finished one or a mapping of the fields to override. Raises ConfigError for a field
    that is unknown or would do nothing; one that only the record has, and that does nothing beside ``values``, returns
    to its default.
    """
    merged = _merged(_read(config), values)
    if not merged.get("model"):
        raise ConfigError(f"no pruned model: name its folder, or a {RECIPE} with --config")
    if not merged.get("output"):
        raise ConfigError("no output folder: name one with -o")
    return from_dict(Request, merged, RECIPE)


def _merged(base: dict, values: Mapping[str, Any]) -> dict:
    """The fields of a record with others in their places, sections made."""
    given = {name: value for name, value in values.items() if value is not None}
    merged = {**base, **given}
    for name in ("dtype", "compute_dtype"):
        merged[name] = dtype_name(merged.get(name, "auto"))
    for name in ("calibration", "evaluation", "reconstruction"):
        if not isinstance(given.get(name, {}), SECTIONS[name]):
            merged[name] = _section(name, base.get(name) or {}, given.get(name, {}))
    return merged


def _section(name: str, base: dict, given: dict):
    """A section of the base with the given fields; of the base, fields that then do nothing return to their default."""
    merged = {**base, **given}
    while True:
        try:
            return from_dict(SECTIONS[name], merged, name)
        except Unused as error:
            field = error.field.rpartition(".")[2]
            if field in given or field not in merged:
                raise
            del merged[field]


def recipe(request: Refinement, backends: dict) -> str:
    """``refine.yaml``: repeats the refinement, each op by the back-end that it took."""
    plain = yaml_text({**request.record(), "backends": backends})
    note = ""
    if request.model is None:
        note += "# The pruned model was in memory; name the folder of one that run.yaml makes, before --config.\n"
    if request.dense is None:
        note += "# The dense model was in memory; name it with --dense.\n"
    if any(in_memory(text) for text in _texts(request)):
        note += (
            "# The refinement took texts from memory. To repeat it, put a path or a name in place of each <…> below.\n"
        )
    return note + plain


def _texts(request: Refinement) -> list[str]:
    """The names of all texts."""
    calibration, evaluation = named_calibration(request.calibration), named_evaluation(request.evaluation)
    sources = (calibration.source, evaluation.text, evaluation.off_domain)
    return [text for source in sources for text in split(source) if text is not None]


def card_line(found: dict, repeatable: bool) -> str:
    """What the model card adds: that the weights are not those of the pruning alone, and how to get them again."""
    source = "" if found["model"] else "FOLDER "
    repeat = (
        f"(`pyprune refine {source}--config {RECIPE} -o DIR`"
        + ("; FOLDER is what `run.yaml` makes, as the pruned model was in memory)" if source else ")")
        if repeatable
        else "once what was given in memory has a name there"
    )
    how = (
        ("cross-block" if found["cross_block"] else "block")
        + " reconstruction"
        + (" with global propagation" if found["global_propagation"] else "")
    )
    was = "; ".join(
        f"{perplexity_text(row['pruned'])} → {perplexity_text(row['refined'])} on {row['text']}"
        for row in found["evaluation"]
    )
    return (
        f"- refined after pruning by {how} against `{found['dense']}` (arXiv 2406.15524)"
        + (f", perplexity {was}" if was else "")
        + f": `refinement.json`; `{RECIPE}` repeats it {repeat}\n"
        + "".join(f"- warning: {text}\n" for text in distinct(found["warnings"]))
    )
