"""Which device a name means: ``cuda`` is the current GPU, and tensors there say ``cuda:0``."""

from __future__ import annotations

import torch


def indexed(device: torch.device | str) -> torch.device:
    """``device`` as tensors on it name theirs, so that two names of one device compare equal."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
