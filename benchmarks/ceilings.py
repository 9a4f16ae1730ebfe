"""What this machine does at most: bytes per second of a large copy, FLOP/s of products by type."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.timing import Clock
from pyprune.ops import native

COPY = {"cpu": 128 << 20, "cuda": 1 << 30}
SQUARE = {"cpu": 1024, "cuda": 8192}


def computed_in_hardware(dtype: torch.dtype, device: str) -> bool:
    """Whether products of the type are the processor's own; emulated ones only waste the time of a run."""
    if device != "cpu" or dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        level = native._C.cpu_level() if native._C else ""
        return "bf16" in level or "amx" in level or torch.cpu._is_avx512_bf16_supported()
    return False


def measure(device: str, dtypes: list[torch.dtype]) -> dict[str, float]:
    """``copy`` in bytes/s, read and written; FLOP/s by the name of each type.

    On a CPU with the native module the FLOP/s are those of its register tile fed from the first-level cache, which no
    product exceeds; elsewhere those of a large product by the library.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    source = torch.zeros(COPY[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / _best(lambda: target.copy_(source), device)}
    for dtype in dtypes:
        if not computed_in_hardware(dtype, device):
            continue
        name = str(dtype)[6:]
        if kind == "cpu" and native._C is not None and dtype in (torch.float32, torch.bfloat16):
            found[name] = _tile_rate(dtype)
            continue
        n = SQUARE[kind]
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device)
    return found


def _tile_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the native module's register tile."""
    done: list[float] = []
    narrow, threads = dtype == torch.bfloat16, torch.get_num_threads()
    spent = _best(lambda: done.append(native._C.cpu_tile_flops(narrow, 3000, threads)), "cpu")
    return done[0] / spent


def _best(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Least seconds, by the clock that the rows are timed by."""
    clock = Clock(device)
    call()
    return min(clock(call) for _ in range(repeats))
