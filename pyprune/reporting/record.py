"""What a run leaves behind: its report as plain data, and the identity by which ``--resume`` knows it again."""

from __future__ import annotations

import contextlib
import copy
import datetime
import hashlib
import inspect
import math
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import Calibration, Evaluation, PruneConfig, to_dict
from pyprune.data.calibration import CalibrationData, fingerprint
from pyprune.data.given import contents
from pyprune.execution.activation_store import peak_memory
from pyprune.execution.error_probes import LEVELS
from pyprune.execution.run import Findings, Run
from pyprune.sources import in_memory, is_name, split

PLACES = ("model", "output", "stream", "memory_budget_gb", "evaluation", "backends", "weights")
"""Fields that say where things are or what is measured, not what comes out; data and model have fingerprints, and what
the ops took stands in the journal."""
CALIBRATION_PLACES = ("source", "split", "subset", "text_column", "self_generated_path")


def settings_of(config: PruneConfig) -> dict:
    """The fields that decide the result."""
    settings = {key: value for key, value in config_for_report(config).items() if key not in PLACES}
    if config.sparsity_by_name:
        settings["sparsity"] = list(map(list, config.sparsity_by_name.items()))  # the order of its keys counts
    settings["calibration"] = {
        key: value for key, value in settings["calibration"].items() if key not in CALIBRATION_PLACES
    }
    return {**settings, "evaluation": {"dtype": config.evaluation.dtype}}


def data_identity(data: CalibrationData, texts: list[list[Tensor]]) -> dict:
    """Fingerprints of the very token ids of calibration, held-out and evaluation sequences."""
    return {
        "calibration": data.fingerprint,
        "held_out": fingerprint(data.held_out),
        **({"generated": fingerprint(data.generated)} if data.generated else {}),
        "evaluation": [fingerprint(windows) for windows in texts],
    }


def compared(dense: list[dict], pruned: list[dict]) -> list[dict]:
    """One row per text: perplexity of the dense and of the pruned model, their ratio and its standard error.

    The standard error comes from the differences of the windows' losses: it says how much the ratio would vary with
    other windows of such text. None for one window, and where a loss is not finite.
    """
    return [
        {
            **{name: value for name, value in d.items() if name not in ("perplexity", "losses", "scored")},
            "dense": d["perplexity"],
            "pruned": p["perplexity"],
            **paired_ratio(d["losses"], p["losses"], d.get("scored")),
        }
        for d, p in zip(dense, pruned)
    ]


def paired_ratio(dense: list[float], pruned: list[float], scored: list[int] | None = None) -> dict:
    """Ratio of two perplexities and its standard error, from the mean losses of the same windows.

    scored: tokens that each window scored, where windows overlap; None: they weigh the same.
    """
    if not all(loss is not None and math.isfinite(loss) for loss in (*dense, *pruned)):
        return {"ratio": None, "ratio_standard_error": None}
    differences = [p - d for d, p in zip(dense, pruned)]
    count = len(differences)
    weights = scored or [1] * count
    mean = math.fsum(weight * d for weight, d in zip(weights, differences)) / sum(weights)
    if mean > 700:
        return {"ratio": None, "ratio_standard_error": None}
    ratio = math.exp(mean)
    if count == 1:
        return {"ratio": ratio, "ratio_standard_error": None}
    spread = math.fsum((weight * (d - mean)) ** 2 for weight, d in zip(weights, differences))
    error = ratio * math.sqrt(spread * count / (count - 1)) / sum(weights)
    return {"ratio": ratio, "ratio_standard_error": error}


def build_report(
    run: Run,
    found: Findings,
    model: nn.Module,
    evaluation: list[dict],
    generalisation: dict | None,
    coverage: dict,
    structured: dict | None,
    peak_device: int | None,
    backends: dict,
) -> dict:
    """The run as one plain dict: what ``report.json`` holds.

    model: as it is now. evaluation: perplexity of the dense and the pruned model, one row per text. generalisation: how
    far that carries to other kinds of text, None where that was not measured. coverage: share of
    the dense model that was selected. structured: what structured pruning adds. peak_device: bytes allocated on the GPU
    at most between the two evaluations, None without one. backends: what each op took.
    """
    pruned_weights = sum(w["sparsity"] * w["shape"][0] * w["shape"][1] for w in found.weights)
    targeted = sum(w["shape"][0] * w["shape"][1] for w in found.weights)
    if coverage["fraction"] < 1:
        found.warn(
            f"{1 - coverage['fraction']:.1%} of the blocks' matrix weights were left dense: "
            + ", ".join(coverage["skipped"][:4])
            + (" …" if len(coverage["skipped"]) > 4 else "")
        )
    return {
        "version": 1,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": config_for_report(run.config),
        "model": {
            "name": run.config.model or type(model).__name__,
            "architecture": type(model).__name__,
            "blocks": len(run.view.blocks),
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_dense": run.parameters,
            "dtype": str(next(model.parameters()).dtype)[6:],
        },
        "sparsity_asked": run.config.sparsity,
        "sparsity": pruned_weights / targeted if targeted else 0.0,
        **({"sparsity_by_key": by_key(found.weights)} if run.config.sparsity_by_name else {}),
        "coverage": coverage,
        "evaluation": evaluation,
        "generalisation": generalisation,
        "weights": found.weights,
        "blocks": found.blocks,
        "error_quantile_levels": list(LEVELS),
        **({"structured": structured} if structured else {}),
        "seconds": found.clock.seconds,
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": peak_device,
        "calibration": {
            "description": run.data.description,
            "fingerprint": run.data.fingerprint,
            "samples": len(run.data.sequences),
            "tokens": sum(map(len, run.data.sequences)),
        },
        "warnings": found.warnings,
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(run.executor.device),
        },
        "backends": backends,
    }


def by_key(rows: list[dict]) -> list[dict]:
    """Where sparsities were given by name, for each key what was ``asked`` and what was ``achieved`` in the mean over
    its ``weights``."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["asked_by"], []).append(row)
    return [
        {
            "key": key,
            "asked": own[0]["asked"],
            "achieved": sum(math.prod(row["shape"]) * row["sparsity"] for row in own)
            / sum(math.prod(row["shape"]) for row in own),
            "weights": len(own),
        }
        for key, own in found.items()
    ]


def config_for_report(config: PruneConfig) -> dict:
    """Configuration as plain data: what was given in memory stands there as its kind and a fingerprint, never whole."""
    plain = copy.copy(config)
    plain.calibration = named_calibration(config.calibration)
    plain.evaluation = named_evaluation(config.evaluation)
    if not callable(config.criterion):
        return to_dict(plain)
    plain.criterion = "wifv"  # in its place: a function cannot be written
    return {**to_dict(plain), "criterion": _function_text(config.criterion, config.criterion_name)}


def named_calibration(settings: Calibration) -> Calibration:
    """A copy with :func:`written` for its source."""
    plain = copy.copy(settings)
    plain.source = written(settings.source)
    return plain


def named_evaluation(settings: Evaluation) -> Evaluation:
    """A copy with :func:`written` for its texts."""
    plain = copy.copy(settings)
    plain.text, plain.off_domain = written(settings.text), written(settings.off_domain)
    return plain


def written(source: Any) -> Any:
    """A source, or a list of sources, as it is written down: its name, or what it is with a fingerprint."""
    entries = split(source)
    if len(entries) > 1:
        return [written(entry) for entry in entries]
    if source is None or is_name(source):
        return None if source is None else str(source)
    if isinstance(source, (list, tuple)) and len(source) == 1 and is_name(source[0]):
        return [str(source[0])]
    digest = hashlib.sha256()
    for part in contents(source):
        digest.update(part)
    return f"<{type(source).__name__} in memory, sha256 {digest.hexdigest()[:16]}>"


def _function_text(criterion: Callable, name: str) -> str:
    """A criterion that is a function: its name, with a fingerprint of its source where Python finds that.

    What a closure holds is not in the fingerprint; a partial function and an object that can be called have none.
    """
    try:
        source = inspect.getsource(criterion)
        digest = f", sha256 {hashlib.sha256(source.encode()).hexdigest()[:16]}"
    except (OSError, TypeError):  # typed at a prompt; no function
        digest = ""
    return f"<{name.strip('<>')} in memory{digest}>"


def versions() -> dict:
    """Versions of what a result depends on."""
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for package in ("pyprune", "torch", "transformers", "triton", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def pruning_record(report: dict) -> dict:
    """What ``pruning.json`` keeps of a report: how each weight was pruned and from what."""
    config = report.get("config", {})
    names = ("method", "pattern", "sparsity", "reconstruct", "criterion", "seed")
    structured = report.get("structured")
    kept = (
        {}
        if not structured
        else {"structured": {name: value for name, value in structured.items() if name not in ("layers", "curve")}}
    )
    return {
        "format": 1,
        **{name: config.get(name) for name in names},
        "settings": config,
        **kept,
        **{name: report.get(name) for name in ("model", "weights", "coverage", "calibration", "versions")},
    }


def run_yaml(report: dict, config: PruneConfig) -> str:
    """``run.yaml``: repeats the run, each op by the back-end that it took. What was given in memory is described there,
    and refused until it has a name."""
    plain = {
        **config_for_report(config),
        "backends": report["backends"],
        "weights": report["model"].get("weights"),
    }
    absent = unnamed(report)
    if not absent:
        return yaml_text(plain)
    keywords = [f"{ABSENT[what]}=…" for what in absent if what in ABSENT]
    again = ", ".join(["model", "config='run.yaml'", *keywords])
    note = (
        f"# The run took its {' and its '.join(absent)} from memory. To repeat it, put a path or a name in place\n"
        f"# of null or <…> below, or pass the same again: pyprune.prune({again}).\n"
        f"# Calibration token ids: sha256 {report['calibration']['fingerprint']}\n"
    )
    return note + yaml_text(plain)


ABSENT = {"calibration data": "calibration", "evaluation text": "text", "criterion": "criterion"}
"""What a run may have taken from memory beside the model, and the keyword that gives it again."""


def unnamed(report: dict) -> list[str]:
    """What of a run was given in memory, so that its ``run.yaml`` alone does not repeat it."""
    config = report["config"]
    texts = config["evaluation"]["text"]
    found = {
        "model": config["model"] is None,
        "calibration data": _stands_in(config["calibration"]["source"]),
        "evaluation text": any(map(_stands_in, texts if isinstance(texts, list) else [texts])),
        "criterion": _stands_in(config["criterion"]),
    }
    return [what for what, absent in found.items() if absent]


def _stands_in(value: Any) -> bool:
    return isinstance(value, str) and in_memory(value)


def yaml_text(plain: dict) -> str:
    import yaml

    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
