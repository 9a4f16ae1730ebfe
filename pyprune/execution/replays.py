"""Work that a GPU is given again and again in the same shapes: recorded as a CUDA graph, then launched as a whole.

A sweep is thousands of kernels of a few microseconds, and its launches from Python take longer than they run; a graph
is one launch for the host. It reads and writes fixed addresses, which are those of its rooms.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

SWITCH = "PYPRUNE_GRAPHS"
"""Set to 0, nothing is recorded."""


def switched_on() -> bool:
    return os.environ.get(SWITCH) != "0"


class Replays:
    """What one run has recorded for a GPU; freed with it."""

    def __init__(self, device: torch.device, warn: Callable[[str], None] = lambda message: None):
        """warn: is called with a sentence when something could not be recorded."""
        self.device, self.warn = device, warn
        self.off = device.type != "cuda" or not switched_on()
        """Whether all work is done as it comes."""
        self._rooms: dict[str, Tensor] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        """By what tells work apart; None where it was done once."""
        self._pool: Any = None
        """Memory that the graphs share: one runs at a time, and nothing of it is read afterwards."""

    def room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor in memory that stays where it is; what was in a room of this name before is lost.

        A room that has to grow moves: what was recorded with its old place is recorded anew.
        """
        size = math.prod(shape)
        if name not in self._rooms or self._rooms[name].numel() < size:
            self._graphs = dict.fromkeys(self._graphs)
            self._rooms.pop(name, None)
            self._rooms[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self._rooms[name][:size].view(shape)

    def __call__(self, key: Hashable, work: Callable[[], object]) -> None:
        """``work()``, which changes nothing but rooms, asks the device for nothing, and is the same for equal keys.

        The first time it is done as it comes, which compiles and loads what it needs; the second time it is recorded.
        Where that fails, the report says so, and all work is done as it comes from there on.
        """
        if self.off or key not in self._graphs:
            work()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._record(work)
        if graph is None:
            work()
            return
        self._graphs[key] = graph
        graph.replay()

    def _record(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        """The work as a graph; nothing of it is done yet. None if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # other threads go on copying meanwhile; a recording that fails leaves its own stream current
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=_stream(self.device), capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), recording:
                work()
        except RuntimeError as error:
            self.off = True
            self._graphs.clear()
            self._rooms.clear()
            reason = str(error).strip().partition("\n")[0]
            self.warn(f"sweeps could not be recorded as CUDA graphs and are launched kernel by kernel: {reason}")
            return None
        return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that a device's work is recorded on; libraries keep memory for each stream they have met."""
    return torch.cuda.Stream(device)
