"""Removal of heads and neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyprune.config.checks import check_choices
from pyprune.config.values import TokenWeights


@dataclass(kw_only=True)
class Structured:
    """Settings of structured pruning (LIAR, arXiv 2407.13331)."""

    allocation: Literal["uniform", "global"] = "uniform"
    """How widths are shared out: ``uniform`` keeps the same width in every block, which is a standard checkpoint;
    ``global`` compares scores across blocks as FLAP does, so that every block has a width of its own."""
    damping: float | None = None
    """How strongly LIAR's fit is held back, for few tokens: what is added to the diagonal of its least-squares systems,
    as a multiple of their mean diagonal. By default it is chosen on held-out calibration tokens."""
    interpolate: Literal["both", "weight", "bias"] = "both"
    """Which part of LIAR is used: ``both``, only the ``weight`` update, or only the ``bias``."""
    interpolate_weights: bool = False
    """Write the dropped weights as a linear map of the kept ones (the matrix P of arXiv 2407.13331)."""
    token_weights: TokenWeights = "auto"
    """How much each token counts in LIAR's fit. ``uniform``: all the same, as in the papers. ``relative``: a
    token's error counts by the size of its own output, so that the few tokens on which a neuron is huge do not decide
    the fit. ``balanced``: half relative to the token's residual stream, half uniform. ``auto``: relative where a layer
    norm follows the residual sum at once (BERT), balanced elsewhere, and uniform for experts."""
    head_scope: Literal["groups", "queries"] = "groups"
    """What counts as a head: ``groups`` drops whole groups of heads that share keys and values; ``queries`` drops query
    heads inside the groups, equally many per group."""
    nonstandard: Literal["refuse", "save", "pad"] = "refuse"
    """What to do with sizes that a standard Hugging Face configuration cannot express: ``refuse`` them, ``save`` them
    for ``pyprune.load``, or ``pad`` them with zeros so that standard tools can load the model."""

    def __post_init__(self):
        check_choices(self)
