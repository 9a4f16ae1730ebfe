"""Every Triton kernel compiles for every architecture: no spills, shared memory that fits, the expected opcode.

Every configuration for sm_90, each kernel's default for the others; ``tests/triton_versions.sh`` runs the full cross
product. In two processes of their own: compiling needs Triton without its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "aot.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    shards = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--short", "--shard", f"{i}/2"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    rows = []
    for process in shards:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:]
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def test_every_architecture_was_compiled_for(compiled):
    kernels = {row["kernel"] for row in compiled}
    assert {row["arch"] for row in compiled} == {80, 90, 100, 120}
    assert {row["kernel"] for row in compiled if row["arch"] == 90} == kernels - {"gram persistent pointers"}
    assert len(kernels) >= 25


def test_no_kernel_spills(compiled):
    assert [row for row in compiled if row["stack"]] == []


def test_shared_memory_fits_the_chip(compiled):
    assert [row for row in compiled if row["shared"] > row["limit"]] == []


def test_products_run_on_tensor_cores(compiled):
    checked = [row for row in compiled if "matrix" in row]
    assert {row["arch"] for row in checked} == {80, 90, 100, 120}
    assert [row for row in checked if not row["matrix"]] == []


def test_wide_tiles_are_loaded_by_the_copy_engine(compiled):
    """TMA on compute capability 9 and 10, asynchronous copies on the others."""
    checked = [row for row in compiled if "loads" in row]
    assert {row["arch"] for row in checked} == {80, 90, 100, 120}
    assert [row for row in checked if not row["loads"]] == []
