"""How often a kind of run passes its calibration data through a block, and what it keeps of them between two blocks.

Each kind of run says this of itself, decides by it what to keep, and the plan of a run counts with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """Forward passes of all calibration sequences through a block that is neither the first nor the last."""

    statistics: int = 0
    """Whose inputs masks, scores or weights are computed from."""
    propagation: int = 0
    """That only bring the inputs of the next block."""
    dense: int = 0
    """Through the block before it is pruned, for targets of the reconstruction."""
    allocation: int = 0
    """Ahead of all others, to share one sparsity out among the blocks."""
    training: int = 0
    """With gradients, forward and backward."""
    keeps_outputs: bool = False
    """The statistics pass runs to the block's end, as its outputs are kept; otherwise it ends before the last layer."""
    streams: tuple[str, ...] = ()
    """What is held of the calibration data while a block is at work, hidden states of every token each time."""

    @property
    def forward(self) -> int:
        """Passes without gradients."""
        return self.statistics + self.propagation + self.dense + self.allocation

    def counts(self) -> dict[str, int]:
        """The passes by what they are for."""
        return {name: getattr(self, name) for name in ("statistics", "propagation", "dense", "allocation", "training")}
