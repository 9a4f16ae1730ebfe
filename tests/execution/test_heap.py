"""Freed memory stays with the process inside the context alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyprune.execution import heap

CODE = """
import resource, threading, torch
from pyprune.execution.heap import kept_warm

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        one, other = torch.ones(5 * 2**20), torch.ones(5 * 2**20)  # 20 MiB each
        del one, other
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_threads():
    # eight alive, one at a time, as passes that stand still
    turn, arrived = threading.Lock(), threading.Barrier(8)
    def work():
        arrived.wait()
        with turn:
            torch.ones(5 * 2**19)  # 10 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
with kept_warm():
    faults()
    inside = faults()
    threads = in_threads()
print(before, inside, faults(), threads)
"""


def measured(**environment: str) -> list[int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    plain.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env={**plain, **environment}
    )
    return list(map(int, done.stdout.split()))


@pytest.mark.skipif(heap._glibc() is None, reason="the system's allocator is not glibc's")
def test_pages_are_faulted_in_once_inside_the_context():
    before, inside, _, threads = measured()
    assert inside < 100 and (before < 100 or inside < before)
    assert threads < 1000  # a heap for each would take 2,560 for each
    one, same, _, _ = measured(MALLOC_MMAP_THRESHOLD_="262144")  # who sets the allocator keeps what was set
    assert min(one, same) > 1000
