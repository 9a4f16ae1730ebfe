"""Neurons chosen by a function of your own, beside the criterion of FLAP.

python examples/own_criterion.py
"""

import torch
from prune_live_model import random_model

import pyprune


def spread_and_size(layer: pyprune.Scored) -> torch.Tensor:
    """How far a neuron's contribution to the next layer varies, times its largest weight there."""
    varies = layer.per_unit(layer.known().variance * layer.weight.double().square().sum(0)).sqrt()
    return varies * layer.weight.abs().amax(0)[layer.group.columns].amax(1).double()


def main() -> None:
    calibration = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(1))
    dense = random_model()
    for criterion in ("wifv", spread_and_size):
        result = pyprune.prune(
            dense, pattern="neurons", sparsity=0.5, criterion=criterion, calibration=calibration, progress=False
        )
        recorded = result.report["config"]["criterion"]
        print(f"{recorded}: error of the last block {result.report['blocks'][-1]['error']:.4f}")


if __name__ == "__main__":
    main()
