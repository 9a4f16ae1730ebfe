"""Bad data that only the kernels see: NaN scores, a failed factor, too many non-zeros.

A kernel that meets one stores 1 into a word it was given. On a GPU the words are pinned host memory and nothing waits
for them: as with CUDA's own errors, the next call raises, or :func:`check`. Interpreted kernels raise at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.devices import indexed

REASONS = {
    "select_mask": "w has NaN scores, so there is no order to select by; rows that have them (scope 'matrix': all "
    "rows) are unchanged",
    "nm_mask": "w has NaN scores, so there is no order to select by; groups that have them are unchanged",
    "compress_24": "not a 2:4 matrix: some group of 4 columns has more than 2 non-zeros",
    "expand_24": "metadata does not name two different columns in order: not made by compress_24",
    "obs_sweep": "the sweep needs finite w and r and a positive diagonal of r (non-finite weights or activations, or a "
    "failed factorisation, come before it); rows that met a fault are unchanged",
}
_words: dict[torch.device, Tensor] = {}


def word(op: str, device: torch.device) -> Tensor:
    """The int32 word in which kernels of ``op`` report; raises what earlier calls have reported."""
    if device not in _words:
        _words[device] = torch.zeros(len(REASONS), dtype=torch.int32, pin_memory=device.type == "cuda")
    raise_met(device)
    index = list(REASONS).index(op)
    return _words[device][index : index + 1]


def raise_met(device: torch.device) -> None:
    """Raise ``ValueError`` for the faults whose words have arrived."""
    words = _words.get(device)
    if words is None or not any(found := words.tolist()):
        return
    words.zero_()
    raise ValueError("; ".join(f"{op}: {REASONS[op]}" for op, hit in zip(REASONS, found) if hit))


def after(device: torch.device) -> None:
    """At the end of an op: interpreted kernels have finished, those on a GPU are not waited for."""
    if device.type != "cuda":
        raise_met(device)


def check(device: torch.device | str = "cuda") -> None:
    """Wait for ``device`` and raise ``ValueError`` for bad data that its Triton kernels have met."""
    device = indexed(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    raise_met(device)
