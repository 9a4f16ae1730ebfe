"""The values that fields choose from, as types and as tuples; names of ops and back-ends; the usual numbers."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["magnitude", "wanda", "sparsegpt"]
StructuredPattern = Literal["neurons", "heads", "structured"]
Criterion = Literal["random", "magnitude", "activation", "wifv", "taylor", "fisher", "obs", "obs_greedy"]
Layerwise = Literal["layer", "refit"]
WeightReconstruction = Literal["none", Layerwise, "block", "cross_block"]
StructuredReconstruction = Literal["none", "bias", "mask_tuning", "liar"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TokenWeights = Literal["auto", "relative", "balanced", "uniform"]
Inputs = Literal["propagated", "dense", "sequential"]
Streaming = Literal["auto", "always", "never"]
METHODS: tuple[Method, ...] = get_args(Method)
STRUCTURED_PATTERNS: tuple[StructuredPattern, ...] = get_args(StructuredPattern)
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
LAYERWISE: tuple[Layerwise, ...] = get_args(Layerwise)
WEIGHT_RECONSTRUCTIONS: tuple[WeightReconstruction, ...] = get_args(WeightReconstruction)
STRUCTURED_RECONSTRUCTIONS: tuple[StructuredReconstruction, ...] = get_args(StructuredReconstruction)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
TOKEN_WEIGHTS: tuple[TokenWeights, ...] = get_args(TokenWeights)
STREAMING: tuple[Streaming, ...] = get_args(Streaming)
BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = (
    "gram_update",
    "cross_gram_update",
    "column_moments",
    "select_mask",
    "nm_mask",
    "compress_24",
    "expand_24",
    "obs_sweep",
    "trailing_update",
    "cholesky",
    "cholesky_solve",
    "liar_update",
    "linear",
    "sparse_linear",
    "rms_norm",
    "rotary",
    "swiglu",
    "attention",
)
"""The functions of :mod:`pyprune.ops`."""
MAX_COLUMN_BLOCK = 1024
"""Columns that :func:`pyprune.ops.obs_sweep` takes, on every back-end."""
SAMPLES, TOKENS, WINDOW = 64, 512, 1024
"""Sequences of calibration text, tokens of each, tokens of an evaluation window, where nothing else is asked."""
SHORT_WINDOWS, SHORT_WINDOW = 8, 512
"""How many windows of how many tokens are measured of a text that nobody named."""
KINDS = ATTENTION, MLP = "attention", "mlp"
"""Parts of every block that a sparsity may be given for."""
REST = ("*", "default")
"""Keys of a mapping of sparsities that stand for what its other keys do not name."""
