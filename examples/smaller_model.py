"""Half of the FFN neurons removed, with and without LIAR's repair: size, and error of each block.

python examples/smaller_model.py
"""

import torch
from prune_live_model import random_model

import pyprune


def main() -> None:
    calibration = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(1))
    dense = random_model()
    before = sum(p.numel() for p in dense.parameters())
    errors = {}
    for repair in ("none", "bias", "liar"):
        result = pyprune.prune(
            dense, pattern="neurons", sparsity=0.5, reconstruct=repair, calibration=calibration, progress=False
        )
        after = sum(p.numel() for p in result.model.parameters())
        errors[repair] = result.report["blocks"][-1]["error"]
        print(f"{repair:5} {after / before:.0%} of the parameters, error of the last block {errors[repair]:.4f}")
    assert errors["liar"] < errors["none"]


if __name__ == "__main__":
    main()
