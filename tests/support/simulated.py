"""The CUDA kernels compiled for the CPU (cuda_sim/cusim.h): executables that run case folders, and a Python module.

Shared by test_cuda_sim.py (the kernels, in every thread order and under AddressSanitizer) and test_cuda_adapters.py
(bindings and pyprune/ops/native.py on CPU tensors).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    "obs_sweep",
    "select_mask",
    "nm_mask",
    "compress_24",
    "cholesky",
    "cholesky_solve",
    "sparse_linear",
    "sparse_linear_mma",
    "device",
)
FLAGS = ["-std=c++17", "-O1", "-Wall", "-fPIC", "-DPYPRUNE_SIM"]
SANITIZE = ["-fsanitize=address", "-g1"]


def run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_object(source: Path, target: Path, flags: list, csrc: Path = ROOT / "csrc") -> Path:
    run(["g++", *FLAGS, *flags, f"-I{csrc}", f"-I{ROOT / 'tests/cuda_sim'}", "-x", "c++", "-c", source, "-o", target])
    return target


_compiled: dict[bool, dict[str, Path]] = {}


def objects(folder: Path, sanitize: bool = False) -> dict[str, Path]:
    """Kernel files and the driver, compiled two at a time and once a test session, by the first to ask."""
    if sanitize not in _compiled:
        sources = [ROOT / "csrc/cuda" / f"{name}.cu" for name in KERNELS] + [ROOT / "tests/cuda_sim/driver.cpp"]
        targets = {source.stem: folder / f"{source.stem}_{int(sanitize)}.o" for source in sources}
        flags = SANITIZE if sanitize else []
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda source: compile_object(source, targets[source.stem], flags), sources))
        _compiled[sanitize] = targets
    return _compiled[sanitize]


def link_driver(target: Path, parts: dict[str, Path], *, sanitize: bool = False) -> Path:
    run(["g++", *(SANITIZE if sanitize else []), *parts.values(), "-o", target])
    return target


def load_module(folder: Path, parts: dict[str, Path]):
    """The module ``simulated``: bind_cuda of csrc/cuda/bindings.cpp over the simulated kernels."""
    import pybind11

    flags = ["-O0", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [ROOT / "csrc/cuda/bindings.cpp", ROOT / "tests/cuda_sim/module.cpp"]
    with ThreadPoolExecutor(2) as pool:
        mine = list(pool.map(lambda source: compile_object(source, folder / f"{source.stem}.o", flags), sources))
    target = folder / f"simulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    run(["g++", "-shared", *mine, *(path for name, path in parts.items() if name != "driver"), "-o", target])
    spec = importlib.util.spec_from_file_location("simulated", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory(x: torch.Tensor) -> torch.Tensor:
    """A view's memory from its first element to its last."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return x.as_strided((span,), (1,))


def write_case(folder: Path, case: dict) -> None:
    """Integers into ``sizes``, tensors into raw files as they lie in memory, None into nothing."""
    folder.mkdir(parents=True)
    (folder / "sizes").write_text("".join(f"{k} {int(v)}\n" for k, v in case.items() if isinstance(v, int)))
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            (folder / name).write_bytes(memory(value).view(torch.uint8).numpy().tobytes())


def execute(driver: Path, op: str, folder: Path, cases: list[dict], order: int = 0) -> list[Path]:
    """Run ``op`` on every case; ``RuntimeError`` with what the driver, or the sanitizer, printed."""
    folders = [folder / str(i) for i in range(len(cases))]
    for path, case in zip(folders, cases):
        write_case(path, case)
    done = subprocess.run(
        [str(driver), op, *map(str, folders)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUSIM_ORDER": str(order)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return folders


def read(path: Path, like: torch.Tensor) -> torch.Tensor:
    """The array as a tensor of ``like``'s type, shape and strides."""
    flat = torch.frombuffer(bytearray(path.read_bytes()), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


def strided(rows: int, columns: int, stride: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    """A random matrix inside a wider one; the columns between are 7, to be found untouched."""
    whole = torch.full((rows, stride), 7.0, dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return whole[:, :columns]


def between(x: torch.Tensor) -> torch.Tensor:
    """What lies between the rows of a strided view."""
    whole = torch.cat([memory(x), torch.full((x.stride(0) - x.shape[1],), 7.0, dtype=x.dtype)])
    return whole.reshape(x.shape[0], x.stride(0))[:, x.shape[1] :]


def factor_of_inverse(n: int, seed: int) -> torch.Tensor:
    """Upper Cholesky factor of H⁻¹ for a well-conditioned Gram matrix, float32."""
    x = torch.randn(4 * n + 8, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h = x.T @ x / len(x) + 0.01 * torch.eye(n, dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous().float()
