"""Layer-wise, block-wise and cross-block reconstruction: calibration error beside held-out error.

    python examples/reconstruct_and_compare.py

A small model with random weights reads essays that come with pyprune, one byte per token: sixteen sequences for
calibration, eight of the same essays held out. Each step lowers both errors of the last block, but training lowers the
one on the calibration sequences more, so their ratio grows. That is the overfitting which Shin et al. (arXiv
2406.15524) warn of.
"""

import torch
from prune_live_model import random_model

import pyprune
from pyprune.data.builtin import ESSAYS, paragraphs

CALIBRATION, HELD_OUT, LENGTH = 16, 8, 64


def text() -> torch.Tensor:
    """The beginning of the essays ``[sequences, tokens]``."""
    count = CALIBRATION + HELD_OUT
    found = "\n\n".join(paragraphs(ESSAYS)).encode()[: count * LENGTH]
    return torch.tensor(list(found)).view(count, LENGTH)


def main() -> None:
    tokens = text()
    dense = random_model()
    ratios = {}
    print(f"{'':12} calibration   held out   ratio")
    for name, settings in {
        "none": dict(reconstruct=None),
        "layer": dict(reconstruct="layer"),
        "block": dict(reconstruct="block", global_propagation=True),
        "cross_block": dict(reconstruct="cross_block", global_propagation=True),
    }.items():
        result = pyprune.prune(
            dense,
            method="wanda",
            sparsity=0.6,
            calibration=pyprune.Calibration(source=tokens, num_samples=CALIBRATION, held_out=HELD_OUT),
            probe_samples=HELD_OUT,
            progress=False,
            **settings,
        )
        last = result.report["blocks"][-1]
        ratios[name] = last["error_held_out"] / last["error"]
        print(f"{name:12} {last['error']:11.4f} {last['error_held_out']:10.4f} {ratios[name]:7.2f}")
    assert ratios["cross_block"] > ratios["none"]


if __name__ == "__main__":
    main()
