"""The only file that calls ``pyprune._C``; only ``ops`` calls this one. ``<op>_cpu`` and ``<op>_cuda``."""

from __future__ import annotations

import torch  # noqa: F401  first, so that both modules share torch's OpenMP runtime

try:
    from pyprune import _C
except ImportError as error:
    _C = None
    _missing = f"the native module pyprune._C is not here ({error}): reinstall with a C++ compiler present"
else:
    _missing = None


def unusable(name: str) -> str | None:
    """None if the back-end ``name`` (``cpu`` or ``cuda``) can run at all, else the reason in a sentence."""
    if _C is None:
        return _missing
    if name == "cuda" and not _C.with_cuda:
        return "this build has no CUDA kernels (PYPRUNE_CUDA_ARCHS was off or unset when it was built)"
    return None


# ---- CUDA ----------------------------------------------------------------------------------------------------------
