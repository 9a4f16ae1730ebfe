"""Training of pruned blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyprune.config.checks import ConfigError, check_at_least, check_choices


@dataclass(kw_only=True)
class Reconstruction:
    """Settings of block-wise and cross-block reconstruction (arXiv 2406.15524), which train pruned blocks. The defaults
    are the authors', but for fewer epochs."""

    epochs: int = 5
    """Passes over the calibration sequences per block."""
    lr: float = 2e-4
    """Learning rate of AdamW at the start, which falls linearly to zero. 2e-4 is the authors' for 320 steps per block;
    with about 50 steps, 6e-4 is better."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The two decay rates of AdamW's moments."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    batch_size: int = 8
    """Sequences per optimiser step."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward pass. Fewer than per optimiser step accumulate their gradients, which takes
    less memory. By default as many as per step."""
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of the matrix products in training: ``float32``, ``bfloat16``, or ``auto`` (bfloat16 on a GPU, as
    ``compute_dtype`` on a CPU). The weights that the optimiser changes stay float32."""
    early_stop: bool = False
    """Stop training a block when its held-out error has not fallen for an epoch."""
    select: Literal["last", "validation"] = "last"
    """Which state of a block is kept: ``last``, the one after the last step, or ``validation``, the one with the lowest
    held-out error."""
    layerwise_target: Literal["local", "dense"] = "local"
    """What the layer-wise step before block training fits: ``local``, the dense layer's output on the pruned model's
    inputs; or ``dense``, its output on the dense model's own inputs (with global propagation)."""

    def __post_init__(self):
        if len(self.betas) != 2:
            raise ConfigError(f"betas must be two numbers, got {self.betas!r}")
        self.betas = (self.betas[0], self.betas[1])
        check_at_least(self, "epochs", minimum=0)
        check_at_least(self, "batch_size", "micro_batch_size")
        check_choices(self)
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr!r}")
