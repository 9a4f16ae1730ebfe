"""Memory that a forward pass frees stays with the process for the next one.

glibc gives large blocks back to the system as soon as they are free, and the system zeroes their pages when the next
batch asks for them again: 5 to 14 % of the CPU time of a float32 pass, 16 to 28 % of a bfloat16 one. It also gives
each thread a heap of its own, so that passes that stand still in threads (:mod:`pyprune.execution.relay`) would each
fault in memory of its own beside what another has just freed; and of a heap that threads of the past have left behind,
which new ones are given whatever the number allowed, 64 MiB at a time are unmapped as soon as they are empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD, ARENA_MAX = -3, -1, -2, -8
"""Parameters of glibc's ``mallopt``."""
LARGEST = 32 * 2**20
"""The largest threshold that glibc takes; what is larger is mapped by itself, and unmapped when it is freed."""
PAD, USUAL_PAD = 2 * LARGEST + 2**20, 2**17
"""What glibc asks the system for beyond need. Above the 64 MiB that a thread's heap is made of, none is unmapped when
it is empty."""
KEPT = 768 * 2**20
"""Free bytes that stay: what the batches that stand still in a block have kept alive, as far as it goes."""


@contextlib.contextmanager
def kept_warm() -> Iterator[None]:
    """Keep up to ``KEPT`` freed bytes for the duration, for all threads that begin in it. Does nothing without glibc,
    or where the environment sets its allocator (``MALLOC_…``, ``GLIBC_TUNABLES``).

    glibc takes the number of heaps once: threads that begin afterwards share the one, too, and wait for each other
    where they ask for more than a kilobyte at the same moment.
    """
    libc = None if _chosen() else _glibc()
    if libc is None or not (libc.mallopt(MMAP_THRESHOLD, LARGEST) and libc.mallopt(TRIM_THRESHOLD, KEPT)):
        yield
        return
    libc.mallopt(ARENA_MAX, 1)
    libc.mallopt(TOP_PAD, PAD)
    try:
        yield
    finally:
        libc.mallopt(TOP_PAD, USUAL_PAD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)  # where glibc's own rule ends once a block of 32 MiB was freed
        libc.malloc_trim(0)


def _chosen() -> bool:
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") else None
    except OSError:
        return None
