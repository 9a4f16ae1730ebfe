"""pyprune: one-shot pruning of transformers, fast and honest.

    import pyprune

    result = pyprune.prune("smollm2-135m", method="sparsegpt", pattern="2:4")
    result.save("smollm2-2to4")
    model, tokenizer = pyprune.load("smollm2-2to4")

Names are imported when they are first used: ``import pyprune`` itself loads neither torch nor transformers.
"""
# ruff: noqa: F401  (the imports at the end are for type checkers)

from __future__ import annotations

import importlib
import sys
import types
import typing

__version__ = "0.1.0"

_PUBLIC = {
    "prune": "pyprune.pipeline.prune", "plan": "pyprune.planning.plan", "PruneResult": "pyprune.pipeline.prune",
    "PruneConfig": "pyprune.config", "Calibration": "pyprune.config", "Evaluation": "pyprune.config",
    "Reconstruction": "pyprune.config", "Structured": "pyprune.config", "ConfigError": "pyprune.config",
    "load": "pyprune.model.checkpoint", "inspect": "pyprune.reporting.inspection", "compare": "pyprune.reporting.comparison",
    "evaluate": "pyprune.evaluation.perplexity", "latency": "pyprune.evaluation.perplexity", "generate": "pyprune.data.self_generated",
    "backend": "pyprune.ops", "refine": "pyprune.pipeline.refine",
}
__all__ = [*_PUBLIC, "__version__"]

if typing.TYPE_CHECKING:
    from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig, Reconstruction, Structured
    from pyprune.data.self_generated import generate
    from pyprune.evaluation.perplexity import evaluate, latency
    from pyprune.model.checkpoint import load
    from pyprune.ops import backend
    from pyprune.pipeline.prune import PruneResult, prune
    from pyprune.pipeline.refine import refine
    from pyprune.planning.plan import plan
    from pyprune.reporting.comparison import compare
    from pyprune.reporting.inspection import inspect


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyprune' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _Package(types.ModuleType):
    """Importing the file ``pyprune/prune.py`` must not turn ``pyprune.prune``, the function, into a module."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _PUBLIC and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
