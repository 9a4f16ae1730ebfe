"""Launch configurations: short hand-picked lists, a fixed default, and an optional choice by timing kept on disk.

The first usable entry of a list is the default and the only one ever used unless ``PYPRUNE_AUTOTUNE=1``. Timings are
stored in ``kernels.json`` under ``PYPRUNE_CACHE`` (by default ``pyprune`` in ``XDG_CACHE_HOME`` or ``~/.cache``), keyed
by chip, Triton version, op and shape, so a shape is tuned once per machine.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

SMALL_SHARED = 99 * 1024  # sm_86, sm_89, sm_120; the others have 163 KiB (sm_80) or 227 KiB (sm_90, sm_100)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: block sizes (the kernel's constexpr names), warps and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    big: bool = False
    """Needs more shared memory than ``SMALL_SHARED``: left out on the chips that have no more."""

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def launch(self) -> dict:
        """Keyword arguments of the launch; fused multiply-add is said explicitly because Triton's default changes."""
        return dict(self.blocks, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)


def config(warps: int, stages: int = 1, big: bool = False, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), warps, stages, big)


@functools.cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the chip; 2 for the interpreter, so that splits are exercised there too."""
    return _properties(torch.device(device).index or 0).multi_processor_count if device.type == "cuda" else 2


def usable(configs: Sequence[Config], shared: int) -> list[Config]:
    return [c for c in configs if not c.big or shared > SMALL_SHARED]


def enabled() -> bool:
    return os.environ.get("PYPRUNE_AUTOTUNE") == "1"


def cache_file() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PYPRUNE_CACHE") or Path(caches) / "pyprune") / "kernels.json"


def _read() -> dict[str, str]:
    try:
        return json.loads(cache_file().read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _remember(key: str, value: str) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(_read() | {key: value}, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def milliseconds(run: Callable[[], None], repeats: int = 10) -> float:
    """Best of ``repeats`` on the current CUDA stream, after two untimed calls (the first one compiles)."""
    run()
    run()
    best = float("inf")
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def pick(
    op: str,
    shape: Hashable,
    configs: Sequence[Config],
    device: torch.device,
    trial: Callable[[Config], None] | None = None,
    timer=milliseconds,
) -> Config:
    """The configuration to launch ``op`` with; ``trial(config)`` must run it on scratch outputs."""
    if device.type != "cuda":
        return configs[-1]  # the interpreter: lists end with the configuration of the fewest programs or steps
    chip = _properties(device.index or 0)
    choices = usable(configs, chip.shared_memory_per_block_optin)
    if not enabled() or trial is None or len(choices) == 1:
        return choices[0]
    return _timed(f"{chip.name} | triton {triton.__version__} | {op} | {shape}", tuple(choices), trial, timer)


_chosen: dict[tuple[str, str], Config] = {}


def _timed(key: str, choices: tuple[Config, ...], trial: Callable[[Config], None], timer) -> Config:
    memo = (str(cache_file()), key)
    if memo not in _chosen:
        stored = {str(c): c for c in choices}.get(_read().get(key, ""))
        if stored is None:
            stored = min(choices, key=lambda c: timer(lambda: trial(c)))
            _remember(key, str(stored))
        _chosen[memo] = stored
    return _chosen[memo]
