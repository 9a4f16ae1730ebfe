"""pyprune: one-shot pruning of transformers, fast and honest.

    import pyprune

    result = pyprune.prune("smollm2-135m", method="sparsegpt", pattern="2:4")
    result.save("smollm2-2to4")
    model, tokenizer = pyprune.load("smollm2-2to4")

Names are imported when they are first used: ``import pyprune`` itself loads neither torch nor transformers.

The names of ``__all__`` are the public interface. The code lies in packages, each of which says in its docstring what
it holds and what it may import; imports point downwards only, those inside functions included, and
``[tool.importlinter]`` in pyproject.toml holds the order. docs/architecture.md draws the picture. Four modules and
the script's entry belong to no package:

``keywords``   the one name of every field, in Python and on the command line
``effects``    in which runs a field has an effect; what was set and would do nothing is refused
``sources``    what kind of thing a source of text is, told from its name or type
``devices``    which device a name means
``__main__``   ``python -m pyprune``

``pyprune.triton_kernels`` is the folder ``triton_kernels`` of the repository; ``pyprune._C`` is built from ``csrc``.
"""
# ruff: noqa: F401  (the imports at the end are for type checkers)

from __future__ import annotations

import importlib
import typing

__version__ = "0.1.0"

_PUBLIC = {
    "Calibration": "pyprune.config",
    "ConfigError": "pyprune.config",
    "Evaluation": "pyprune.config",
    "PruneConfig": "pyprune.config",
    "PruneResult": "pyprune.pipeline.result",
    "Reconstruction": "pyprune.config",
    "Scored": "pyprune.structured.criteria",
    "Structured": "pyprune.config",
    "backend": "pyprune.ops",
    "check": "pyprune.watching.check",
    "compare": "pyprune.reporting.comparison",
    "evaluate": "pyprune.evaluation.single",
    "dense": "pyprune.packed.conversion",
    "generate": "pyprune.data.self_generated",
    "history": "pyprune.watching.history",
    "inspect": "pyprune.reporting.inspection",
    "keep_sparse": "pyprune.finetuning.masks",
    "latency": "pyprune.evaluation.latency",
    "load": "pyprune.packed.loading",
    "merge_lora": "pyprune.finetuning.adapters",
    "pack": "pyprune.packed.files",
    "plan": "pyprune.planning.plan",
    "prune": "pyprune.pipeline.prune",
    "refine": "pyprune.pipeline.refine",
    "study": "pyprune.studies.study",
    "sparse": "pyprune.packed.conversion",
    "unpack": "pyprune.packed.files",
}
"""Public name → the module or package it is imported from."""
__all__ = [*_PUBLIC, "__version__"]

if typing.TYPE_CHECKING:
    from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig, Reconstruction, Structured
    from pyprune.data.self_generated import generate
    from pyprune.evaluation.latency import latency
    from pyprune.evaluation.single import evaluate
    from pyprune.finetuning.adapters import merge_lora
    from pyprune.finetuning.masks import keep_sparse
    from pyprune.ops import backend
    from pyprune.packed.conversion import dense, sparse
    from pyprune.packed.files import pack, unpack
    from pyprune.packed.loading import load
    from pyprune.pipeline.prune import prune
    from pyprune.pipeline.refine import refine
    from pyprune.pipeline.result import PruneResult
    from pyprune.planning.plan import plan
    from pyprune.reporting.comparison import compare
    from pyprune.reporting.inspection import inspect
    from pyprune.structured.criteria import Scored
    from pyprune.studies.study import study
    from pyprune.watching.check import check
    from pyprune.watching.history import history


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyprune' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
