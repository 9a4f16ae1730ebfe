"""How samples are taken: contenders take turns, so that a busy moment hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping

import torch

CACHE = 256 << 20
"""Bytes that are written between two calls on a GPU, more than its caches hold."""


class Clock:
    """Times calls on a device.

    On a CPU with one thread the seconds of that thread, which other programs hardly change; with several threads wall
    time; on a GPU the time between two events, with the caches emptied before.
    """

    def __init__(self, device: str):
        self.device = device
        self._empty = torch.empty(CACHE, dtype=torch.uint8, device=device) if device != "cpu" else None
        one = device == "cpu" and torch.get_num_threads() == 1
        self.name = "events" if device != "cpu" else "cpu" if one else "wall"
        self._now = time.thread_time if one else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self._empty is None:
            start = self._now()
            call()
            return self._now() - start
        self._empty.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3


def take_turns(
    calls: Mapping[Hashable, Callable[[], float]], *, samples: int, seconds: float, least: int = 3
) -> dict[Hashable, list[float]]:
    """Seconds that each call says it took: ``samples`` of them, fewer (``least``) once ``seconds`` are spent.

    Each runs once before it counts. A call that alone takes longer than a tenth of ``seconds`` is not warmed up again:
    its first run counts.
    """
    begun = time.perf_counter()
    found: dict[Hashable, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        start = time.perf_counter()
        first = call()
        if time.perf_counter() - start > seconds / 10:
            found[name].append(first)
    while True:
        for name, call in calls.items():
            if len(found[name]) < samples:
                found[name].append(call())
        taken = min(map(len, found.values()))
        if taken >= samples or (taken >= least and time.perf_counter() - begun > seconds):
            return found
