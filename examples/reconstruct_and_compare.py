"""Layer-wise, block-wise and cross-block reconstruction: calibration error beside held-out error.

    python examples/reconstruct_and_compare.py

The difference between the two columns is what Shin et al. (arXiv 2406.15524) warn of: what training gains on the
calibration sequences it does not all keep on others.
"""

import torch
from prune_live_model import random_model

import pyprune


def main() -> None:
    tokens = torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(1))
    dense = random_model()
    print(f"{'':12} calibration   held out")
    for name, settings in {
        "layer": dict(reconstruct="layer"),
        "block": dict(reconstruct="block", global_propagation=True),
        "cross_block": dict(reconstruct="cross_block", global_propagation=True),
    }.items():
        result = pyprune.prune(
            dense,
            method="wanda",
            sparsity=0.6,
            calibration=pyprune.Calibration(source=tokens, num_samples=16, held_out=8),
            progress=False,
            **settings,
        )
        last = result.report["blocks"][-1]
        print(f"{name:12} {last['error']:11.4f} {last['error_held_out']:10.4f}")


if __name__ == "__main__":
    main()
