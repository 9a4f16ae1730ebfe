"""In which runs a setting has an effect: one table. What was set and would do nothing is refused, never ignored.

A rule holds a field's condition and, for the sentence, what would use it. Fields without a rule always have an effect.
A field counts as set if it differs from its default, so that a file that holds every field still loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from pyprune.sources import kinds

WEIGHTS_ALONE = ("random", "magnitude")
"""Structured criteria that look at no input."""
GRADIENTS = ("taylor", "fisher")
Rule = tuple[Callable[[Any], Any], str]


def needs_factor(config) -> bool:
    """Whether masks or weights are solved with the inverse of a Gram matrix."""
    return config.method == "sparsegpt" or config.reconstruct != "none"


def needs_sequences(config) -> bool:
    """Whether the result depends on calibration sequences; otherwise they measure errors at most."""
    if config.is_structured:
        return config.reconstruct != "none" or config.criterion not in WEIGHTS_ALONE
    return config.method != "magnitude" or config.reconstruct != "none"


def measures_errors(config) -> bool:
    """Whether block errors are measured."""
    return config.probe_samples > 0 and not _curve(config)


def reads_sequences(config) -> bool:
    return needs_sequences(config) or measures_errors(config)


def texts_read(config) -> list:
    """The sources that a run reads, as ``calibration.source`` and ``evaluation.text`` name them."""
    return [config.calibration.source] * reads_sequences(config) + [config.evaluation.text] * config.evaluation.enabled


def trains(config) -> bool:
    return config.reconstruct in ("block", "cross_block")


def _curve(config) -> bool:
    return config.is_structured and len(config.sparsities) > 1


def observes(config) -> bool:
    """Whether statistics of activations are taken."""
    if config.is_structured:
        return config.reconstruct != "none" or config.criterion not in (*WEIGHTS_ALONE, *GRADIENTS)
    return needs_sequences(config)


def watches(config) -> bool:
    """Whether anything is measured on held-out sequences."""
    return measures_errors(config) or config.reconstruction.select == "validation" or config.reconstruction.early_stop


_FACTOR = (
    "only the OBS sweep of masks uses it: method='sparsegpt', or reconstruct='layer', 'refit', 'block' or 'cross_block'"
)
_DAMPED: Rule = (
    lambda c: not c.is_structured and needs_factor(c),
    _FACTOR + " (the λ of structured patterns is structured.damping)",
)
_TEXT = (
    "only a run that looks at text uses it: method='wanda' or 'sparsegpt', a reconstruct that is not 'none', or "
    "probe_samples above 0"
)
_READS: Rule = (reads_sequences, _TEXT)
_TRAINING: Rule = (trains, "only training uses it: reconstruct='block' or 'cross_block' for masks, or pyprune refine")
_STRUCTURED = "only structured patterns use it: pattern='neurons', 'heads' or 'structured'"
_RECONSTRUCTED: Rule = (
    lambda c: not c.is_structured and c.reconstruct != "none",
    "only the reconstruction of masks uses it: reconstruct='layer', 'refit', 'block' or 'cross_block'",
)
_STATISTICS = (
    "only a run that takes statistics of activations uses it: method='wanda' or 'sparsegpt', a criterion "
    "such as 'wifv', or a reconstruct that is not 'none'"
)

RUN: dict[str, Rule] = {
    "method": (
        lambda c: not c.is_structured,
        "only masks use it: pattern='unstructured' or N:M; structured patterns choose by criterion",
    ),
    "criterion": (lambda c: c.is_structured, _STRUCTURED + "; masks choose by method"),
    "weights": (lambda c: c.model is None, "only a model given in memory has it, and this one has a name"),
    "global_propagation": _RECONSTRUCTED,
    "inputs": (lambda c: observes(c) or c.inputs == c.usual_inputs, _STATISTICS),
    "damping": _DAMPED,
    "column_block": (_DAMPED[0], _FACTOR),
    "batch_size": _READS,
    "compute_dtype": _READS,
    "probe_samples": (
        lambda c: not _curve(c),
        "errors of heads and neurons are measured where there is one sparsity, not a list",
    ),
    **dict.fromkeys(
        (
            "calibration.source",
            "calibration.num_samples",
            "calibration.seq_len",
            "calibration.split",
            "calibration.subset",
            "calibration.text_column",
        ),
        _READS,
    ),
    "calibration.held_out": (
        lambda c: reads_sequences(c) and (watches(c) or not c.calibration.held_out),
        "only block errors use it, and select='validation' or early_stop: set probe_samples above 0",
    ),
    **dict.fromkeys(
        (
            "calibration.self_generated",
            "calibration.self_generated_path",
            "calibration.self_generated_for",
            "calibration.language",
        ),
        (
            needs_sequences,
            "only statistics and reconstruction use it: "
            "method='wanda' or 'sparsegpt', a criterion that looks at activations, "
            "or a reconstruct that is not 'none'",
        ),
    ),
    **{
        f"reconstruction.{name}": _TRAINING
        for name in (
            "epochs",
            "lr",
            "betas",
            "weight_decay",
            "batch_size",
            "micro_batch_size",
            "autocast",
            "early_stop",
        )
    },
    "reconstruction.select": _RECONSTRUCTED,
    "packed": (
        lambda c: not c.is_structured,
        "only masks leave zeros to pack: pattern='unstructured' or N:M; structured patterns make the matrices smaller",
    ),
    "structured.allocation": (lambda c: c.is_structured, _STRUCTURED),
    "structured.nonstandard": (lambda c: c.is_structured, _STRUCTURED),
    "structured.head_scope": (
        lambda c: c.pattern in ("heads", "structured"),
        "only heads use it: pattern='heads' or 'structured'; pattern='neurons' has none",
    ),
    "structured.token_weights": (
        lambda c: c.is_structured and observes(c),
        _STRUCTURED + ", with a reconstruct that is not 'none' or a criterion that looks at activations",
    ),
    "structured.damping": (
        lambda c: (
            c.is_structured
            and (c.reconstruct == "mask_tuning" or c.reconstruct == "liar" and c.structured.interpolate != "bias")
        ),
        _STRUCTURED + ", with reconstruct='liar' (and interpolate not 'bias') or 'mask_tuning'",
    ),
    "structured.interpolate": (
        lambda c: c.is_structured and c.reconstruct == "liar",
        _STRUCTURED + ", with reconstruct='liar'",
    ),
    "structured.interpolate_weights": (
        lambda c: c.is_structured and c.reconstruct == "liar" and c.structured.interpolate != "bias",
        _STRUCTURED + ", with reconstruct='liar' and interpolate not 'bias'",
    ),
}
"""Fields whose effect depends on the rest of the run."""

_SET = (lambda e: "data set" in kinds(e), "only a Hub data set or a saved one uses it, not the source that is named")
_GENERATED: Rule = (lambda c: c.self_generated > 0, "only generated sequences use it: set self_generated above 0")
_CORPUS = "only corpus text uses it, and num_samples is 0"

CALIBRATION: dict[str, Rule] = {
    "source": (lambda c: c.num_samples != 0, _CORPUS),
    "held_out": (lambda c: c.num_samples != 0 or not c.held_out, _CORPUS),
    "split": (lambda c: _SET[0](c.source), _SET[1]),
    "subset": (lambda c: _SET[0](c.source), _SET[1]),
    "text_column": (
        lambda c: {"data set", "table"} & kinds(c.source),
        "only .jsonl, .json, .csv, .tsv and .parquet files and data sets have columns",
    ),
    "self_generated_path": _GENERATED,
    "self_generated_for": _GENERATED,
    "language": _GENERATED,
}
"""Fields of ``Calibration`` whose effect depends on its other fields."""


def _kinds(evaluation) -> set[str]:
    """Of all texts that are named, or of the one that is measured without."""
    other = evaluation.off_domain
    return kinds(evaluation.text) | (set() if other is None or other == "none" else kinds(other))


_OFF = "nothing is measured, as evaluation.enabled is False"
_MEASURED: Rule = (lambda e: e.enabled, _OFF)

EVALUATION: dict[str, Rule] = {
    **dict.fromkeys(("text", "off_domain", "window", "max_windows", "dtype", "batch_size"), _MEASURED),
    **dict.fromkeys(
        ("bos", "stride"),
        (
            lambda e: e.enabled and _kinds(e) != {"ids"},
            "only text that is tokenised here uses it (with evaluation.enabled)",
        ),
    ),
    "split": (lambda e: e.enabled and "data set" in _kinds(e), _SET[1] + " (with evaluation.enabled)"),
    "subset": (lambda e: e.enabled and "data set" in _kinds(e), _SET[1] + " (with evaluation.enabled)"),
    "text_column": (
        lambda e: e.enabled and {"data set", "table"} & _kinds(e),
        CALIBRATION["text_column"][1] + " (with evaluation.enabled)",
    ),
}
"""The same of ``Evaluation``."""


def idle(settings, rules: dict[str, Rule], section: str = "", named: Collection[str] = ()) -> tuple[str, str] | None:
    """The first field that was set and would do nothing: its path, and a sentence. None if there is none.

    settings: a dataclass; rules: by field, or ``section.field`` of a dataclass inside it. named: fields that somebody
    wrote down, which count as set whatever their value, unless that switches something off.
    """
    for path, (used, by) in rules.items():
        inner, _, name = path.rpartition(".")
        owner = getattr(settings, inner) if inner else settings
        value = getattr(owner, name)
        if (is_set(owner, name) or (path in named and value is not False)) and not used(settings):
            full = f"{section}.{path}" if section else path
            return full, f"{full}={shown(value)} would do nothing: {by}"
    return None


def is_set(owner, name: str) -> bool:
    """Whether a field of a dataclass differs from its default."""
    value, standard = getattr(owner, name), default(type(owner), name)
    plain = value is None or isinstance(value, (bool, int, float, str, tuple))
    return value is not standard and (not plain or value != standard)


def default(cls, name: str):
    found = next(f for f in dataclasses.fields(cls) if f.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def shown(value) -> str:
    plain = (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, str)) for v in value))
    )
    return repr(value) if plain and len(repr(value)) < 200 else f"<{type(value).__name__} in memory>"
