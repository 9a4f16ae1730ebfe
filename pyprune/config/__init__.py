"""Configuration: keyword-only dataclasses that validate themselves and round-trip to YAML.

The command line, the Python API and ``run.yaml`` use the same field names. Everything that can be wrong without
looking at a model or at data is refused here, with the value and the way out.

``run``             all settings of one run: ``PruneConfig``, and which sections it has
``calibration``     the section of the calibration data
``evaluation``      the section of what is measured
``reconstruction``  the section of the training of pruned blocks
``structured``      the section of the removal of heads and neurons
``files``           YAML of a run, and a run with some of its fields changed
``mappings``        dataclasses from plain mappings, and back
``patterns``        N:M patterns, sparsities and back-ends, as one text or mapping says them
``checks``          ``ConfigError``, and the checks that all sections share
``values``          the values that fields choose from, and the usual numbers

From outside: the names of ``__all__``, imported from here.
May import: ``effects``, ``sources``.
"""

from pyprune.config.calibration import Calibration
from pyprune.config.checks import (
    ConfigError,
    Unused,
    check_dtype,
    check_effects,
    choices,
    dtype_name,
    function_name,
    is_function,
    members,
)
from pyprune.config.evaluation import Evaluation
from pyprune.config.files import check_named, from_yaml, override, read_yaml, to_yaml
from pyprune.config.mappings import from_dict, to_dict
from pyprune.config.patterns import check_backends, member_name, parse_backend, parse_nm, sparsity_text
from pyprune.config.reconstruction import Reconstruction
from pyprune.config.run import SECTIONS, PruneConfig
from pyprune.config.structured import Structured
from pyprune.config.values import (
    ATTENTION,
    BACKENDS,
    CRITERIA,
    KINDS,
    LAYERWISE,
    MAX_COLUMN_BLOCK,
    METHODS,
    MLP,
    OPS,
    REST,
    SHORT_WINDOWS,
    STREAMING,
    STRUCTURED_PATTERNS,
    TOKEN_WEIGHTS,
    Criterion,
    Dtype,
    Inputs,
    Method,
    Streaming,
    StructuredReconstruction,
    TokenWeights,
    WeightReconstruction,
)

__all__ = [
    "ATTENTION",
    "BACKENDS",
    "CRITERIA",
    "Calibration",
    "ConfigError",
    "Criterion",
    "Dtype",
    "Evaluation",
    "Inputs",
    "KINDS",
    "LAYERWISE",
    "MAX_COLUMN_BLOCK",
    "METHODS",
    "MLP",
    "Method",
    "OPS",
    "PruneConfig",
    "REST",
    "Reconstruction",
    "SECTIONS",
    "SHORT_WINDOWS",
    "STREAMING",
    "STRUCTURED_PATTERNS",
    "Streaming",
    "Structured",
    "StructuredReconstruction",
    "TOKEN_WEIGHTS",
    "TokenWeights",
    "Unused",
    "WeightReconstruction",
    "check_backends",
    "check_dtype",
    "check_effects",
    "check_named",
    "choices",
    "dtype_name",
    "from_dict",
    "from_yaml",
    "function_name",
    "is_function",
    "member_name",
    "members",
    "override",
    "parse_backend",
    "parse_nm",
    "read_yaml",
    "sparsity_text",
    "to_dict",
    "to_yaml",
]
