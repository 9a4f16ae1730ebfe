"""Where a run computes, and in which types: the one place that turns names into devices and dtypes."""

from __future__ import annotations

import os
import re

import torch

from pyprune.config import ConfigError
from pyprune.devices import indexed

WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ``ONEDNN_MAX_CPU_ISA`` that leave out the products of bfloat16."""


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises :class:`ConfigError` for a device that cannot be used."""
    if name == "auto":
        return indexed("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|(cuda|xpu|hpu)(:\d+)?", name):
        hint = "; did you mean 'cuda'?" if name.lower() in ("gpu", "nvidia") else ""
        raise ConfigError(f"device {name!r} cannot be used: take auto, cpu, cuda or cuda:N{hint}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        way = ""
        if name.startswith("cuda") and torch.version.cuda is None:
            way = "; this PyTorch is built without CUDA: install a build with CUDA, or take device='cpu'"
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}{way}") from error


def cpu_has_bfloat16() -> bool:
    """True if this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX), several times as fast as float32, and the
    library that does it may: ``ONEDNN_MAX_CPU_ISA`` can keep it from these instructions, where it takes three times as
    long as float32."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if most in WITHOUT_BFLOAT16:
        return False
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def pick_dtype(name: str) -> torch.dtype | None:
    """The type of that name; None for ``auto``."""
    return None if name == "auto" else getattr(torch, name)
