"""What a run leaves behind: its report as plain data, and the identity by which ``--resume`` knows it again."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import platform
import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyprune.config import PruneConfig, to_dict
from pyprune.data.calibration import CalibrationData, fingerprint

PLACES = ("model", "output", "stream", "memory_budget_gb", "evaluation")
"""Fields that say where things are or what is measured, not what comes out; data and model have fingerprints."""
CALIBRATION_PLACES = ("source", "split", "subset", "text_column", "self_generated_path")


def settings_of(config: PruneConfig) -> dict:
    """The fields that decide the result."""
    settings = {key: value for key, value in config_for_report(config).items() if key not in PLACES}
    settings["calibration"] = {key: value for key, value in settings["calibration"].items()
                               if key not in CALIBRATION_PLACES}
    return {**settings, "evaluation": {"dtype": config.evaluation.dtype}}


def data_identity(data: CalibrationData, texts: list[tuple[str, list[Tensor]]]) -> dict:
    """Fingerprints of the very token ids of calibration, held-out and evaluation sequences."""
    return {"calibration": data.fingerprint, "held_out": fingerprint(data.held_out),
            **({"generated": fingerprint(data.generated)} if data.generated else {}),
            "evaluation": [fingerprint(windows) for _, windows in texts]}


def model_identity(model: nn.Module, digest: str) -> dict:
    return {"architecture": type(model).__name__, "weights": digest,
            "dtype": str(next(model.parameters()).dtype)[6:]}


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, type, shape and a sum of every tensor's bits: any single change shows, at memory speed."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        whole = len(flat) // 8 * 8
        bits = int(flat[:whole].view(torch.int64).sum()) if whole else 0
        head = flat[:256].numpy().tobytes() + flat[whole:].numpy().tobytes()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), bits]).encode() + head)
    return digest.hexdigest()


def compared(dense: list[dict], pruned: list[dict]) -> list[dict]:
    """One row a text: perplexity of the dense and of the pruned model."""
    return [{**d, "dense": d["perplexity"], "pruned": p["perplexity"]} for d, p in zip(dense, pruned)]


def build_report(run, model: nn.Module, dense: list[dict], pruned: list[dict]) -> dict:
    """The run as one plain dict: what ``report.json`` holds."""
    coverage = run.coverage or run.view.coverage(run.selected)
    pruned_weights = sum(w["sparsity"] * w["shape"][0] * w["shape"][1] for w in run.weights)
    targeted = sum(w["shape"][0] * w["shape"][1] for w in run.weights)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if coverage["fraction"] < 1:
        run.warn(f"{1 - coverage['fraction']:.1%} of the blocks' matrix weights were left dense: "
                 + ", ".join(coverage["skipped"][:4]) + (" …" if len(coverage["skipped"]) > 4 else ""))
    return {
        "version": 1,
        "config": config_for_report(run.config),
        "model": {"name": run.config.model or type(model).__name__, "architecture": type(model).__name__,
                  "blocks": len(run.view.blocks), "parameters": sum(p.numel() for p in model.parameters()),
                  "dtype": str(next(model.parameters()).dtype)[6:]},
        "sparsity": pruned_weights / targeted if targeted else 0.0,
        "coverage": coverage,
        "evaluation": compared(dense, pruned),
        "weights": run.weights,
        "blocks": run.blocks,
        **({"structured": run.structured} if run.structured else {}),
        "seconds": run.clock.seconds,
        "peak_memory_bytes": peak,
        "peak_device_memory_bytes": run.peak_device,
        "calibration": {"description": run.data.description, "fingerprint": run.data.fingerprint,
                        "samples": len(run.data.sequences), "tokens": sum(map(len, run.data.sequences))},
        "warnings": run.warnings,
        "versions": versions(),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(),
                    "device": str(run.executor.device)},
    }


def config_for_report(config: PruneConfig) -> dict:
    """Configuration with in-memory sources named by kind, since a report must be plain data."""
    plain = copy.copy(config)
    plain.calibration, plain.evaluation = copy.copy(config.calibration), copy.copy(config.evaluation)
    for section, key in ((plain.calibration, "source"), (plain.evaluation, "text")):
        value = getattr(section, key)
        if not (value is None or isinstance(value, str) or
                isinstance(value, (list, tuple)) and key == "text" and all(isinstance(v, str) for v in value)):
            setattr(section, key, f"<{type(value).__name__} in memory>")
    return to_dict(plain)


def versions() -> dict:
    """Versions of what a result depends on."""
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for package in ("pyprune", "torch", "transformers", "triton", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
