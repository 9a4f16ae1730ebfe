"""The CUDA kernels compile for every architecture we ship, and ptxas's report stays within what was designed.

Needs nvcc but no GPU. Limits: no spills and no stack anywhere, registers that let several blocks run on a
multiprocessor, and no more shared memory than every architecture gives without asking.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from simulated import KERNELS

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
EXPECTED = {
    "obs_sweep": 4,
    "select_mask": 15,
    "nm_mask": 15,
    "compress_24": 2,
    "cholesky": 6,
    "cholesky_solve": 2,
    "sparse_linear": 12,
    "sparse_linear_mma": 4,
    "device": 0,
}
DEFAULT_SHARED = 48 << 10  # what a block may use on any architecture; launches ask for no more (csrc/cuda/*.cu)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")


pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc (the CUDA toolkit) to compile the kernels"),
    pytest.mark.slow,
]


def compile_kernels(name: str, folder: Path) -> str:
    """One file for all architectures; ptxas's report."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [
        find_nvcc(),
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        "--threads=2",
        "-Xptxas=-v",
        *targets,
        "-c",
        str(ROOT / "csrc/cuda" / f"{name}.cu"),
        "-o",
        str(folder / f"{name}.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of the compiled files, and per file ptxas's report."""
    folder = tmp_path_factory.mktemp("cuda_compile")
    with ThreadPoolExecutor(2) as pool:
        return folder, dict(zip(KERNELS, pool.map(lambda name: compile_kernels(name, folder), KERNELS)))


@pytest.fixture(scope="module")
def reports(compiled):
    """File → list of (architecture, kernel, registers, stack, spilled bytes, static shared bytes)."""
    return {name: parse(text) for name, text in compiled[1].items()}


def machine_code(compiled, name: str) -> dict[tuple[str, str], list[str]]:
    """(architecture, kernel) → its instructions, without the guards before them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", compiled[0] / f"{name}.o"], capture_output=True, text=True, check=True).stdout
    found = {}
    for arch, body in re.findall(r"^arch = sm_(\w+)(.*?)(?=^arch = |\Z)", text, re.S | re.M):
        for kernel, code in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", body, re.S):
            found[arch, kernel] = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?(.*?);", code, re.M)
    return found


def parse(report: str) -> list[tuple]:
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    found = []
    for name, arch, stack, stores, loads, registers, rest in entry.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled, static = int(stores) + int(loads), int(shared[1]) if shared else 0
        found.append((arch, name, int(registers), int(stack), spilled, static))
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_every_architecture_compiles_without_spills(reports, name):
    report = reports[name]
    assert {arch: sum(row[0] == arch for row in report) for arch in ARCHITECTURES} == dict.fromkeys(
        ARCHITECTURES, EXPECTED[name]
    )
    for arch, kernel, registers, stack, spilled, shared in report:
        assert spilled == 0 and stack == 0, f"{kernel} on sm_{arch}: {spilled} bytes spilled, stack {stack}"
        assert shared == 0, f"{kernel} on sm_{arch}: shared memory is dynamic here, ptxas found {shared} bytes"
        assert registers <= 128, f"{kernel} on sm_{arch} uses {registers} registers"


def test_the_sweep_leaves_room_for_four_blocks_a_multiprocessor(reports):
    """128 threads per block and 36 KB: at most 65,536 / (4 · 128) = 128 registers."""
    assert all(registers <= 128 for _, _, registers, *_ in reports["obs_sweep"])


def test_the_sweeps_loads_wait_for_nothing(compiled):
    """The factor comes by asynchronous copies, 16 bytes each, and a row of w by eight loads that all are under way
    before anything is computed with one of them."""
    kernels = machine_code(compiled, "obs_sweep")
    assert {arch for arch, _ in kernels} == set(ARCHITECTURES)
    for (arch, kernel), code in kernels.items():
        copies = [line for line in code if line.startswith("LDGSTS")]
        assert [line for line in copies if ".128" in line], f"{kernel} on sm_{arch}"
        assert not [line for line in code if line.startswith(("LDL", "STL"))], f"{kernel} on sm_{arch}: local memory"
        if "any" in kernel:
            continue
        loads = [i for i, line in enumerate(code) if line.startswith("LDG.E.128")]
        assert len(loads) == 8
        between = code[loads[0] : loads[-1]]
        assert not [line for line in between if line.startswith(("F", "MUFU", "SHFL", "BAR", "DEPBAR", "STS"))]
        # the compiler knows that a warp stays together: its shuffles have no second version for when it does not
        assert not [line for line in code if line.startswith("BRA.DIV")], f"{kernel} on sm_{arch}"


def test_row_selection_reads_its_row_once(compiled):
    """Nothing is read from global memory after the first key was counted: the row stays in registers."""
    kernels = {key: code for key, code in machine_code(compiled, "select_mask").items() if "select_held" in key[1]}
    assert len(kernels) == 3 * len(ARCHITECTURES)
    for (arch, kernel), code in kernels.items():
        counted = next(i for i, line in enumerate(code) if line.startswith("ATOMS"))
        loads = [i for i, line in enumerate(code) if line.startswith("LDG")]
        assert loads and max(loads) < counted, f"{kernel} on sm_{arch}"
        assert not [line for line in code if line.startswith(("LDL", "STL"))], f"{kernel} on sm_{arch}: local memory"


def test_products_with_packed_weights_use_tensor_cores_and_wide_loads(compiled):
    """Four products per word and eight tokens; bits in loads of 8 bytes, x of 16, values by copies of 16."""
    kernels = machine_code(compiled, "sparse_linear_mma")
    assert len(kernels) == 4 * len(ARCHITECTURES)
    for (arch, kernel), code in kernels.items():
        where, tiles = f"{kernel} on sm_{arch}", 2 if "Li2E" in kernel else 1
        assert sum(line.startswith("HMMA.16816.F32") for line in code) == 4 * tiles, where
        assert sum(line.startswith("LDG.E.128") for line in code) == 2 * tiles, where
        assert sum(line.startswith("LDG.E.64") for line in code) >= 4, where
        assert [line for line in code if line.startswith("LDGSTS") and ".128" in line], where
        assert not [line for line in code if line.startswith(("LDL", "STL", "BRA.DIV"))], where


@pytest.mark.parametrize(
    "name, size",
    [
        ("obs_sweep", "SHARED_ANY"),
        ("sparse_linear_mma", "SHARED"),
        ("select_mask", "sizeof(Scratch)"),
        ("cholesky", "2 * TILE * (TILE + 1) * sizeof(float)"),
        ("cholesky", "packed(SMALL, 0) * sizeof(float)"),
        ("cholesky_solve", "(TILE * (TILE + 1) + TILE * 33) * sizeof(float)"),
    ],
)
def test_launches_fit_the_shared_memory_of_every_architecture(tmp_path, name, size):
    """The sizes that the launches ask for, evaluated by the compiler from the sources themselves."""
    program = tmp_path / "size.cpp"
    program.write_text(
        f'#include "cuda/{name}.cu"\nnamespace pyprune::cuda {{\n'
        f'static_assert({size} <= {DEFAULT_SHARED}, "shared memory");\n}}\n'
    )
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-DPYPRUNE_SIM",
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'tests/cuda_sim'}",
            "-fsyntax-only",
            str(program),
        ],
        check=True,
    )
