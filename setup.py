"""Builds ``pyprune._C`` with CMake and ninja. Everything else about the package is in pyproject.toml.

Environment variables:

``PYPRUNE_NATIVE=0``      pure Python, no compiler needed: the ops run in PyTorch.
``PYPRUNE_CUDA_ARCHS``    ``off``, ``native`` (this machine's GPUs) or a list such as ``90a`` or ``80;90a;100;120``;
                          ``9.0a``, spaces, commas and ``+PTX`` are understood. Unset: ``TORCH_CUDA_ARCH_LIST``, then
                          ``CUDAARCHS``, then ``native`` if both nvcc and a GPU are here, else ``off``. (A toolkit alone
                          does not start a CUDA build: nobody could run its result here.)
``PYPRUNE_SANITIZE=1``    AddressSanitizer and UndefinedBehaviorSanitizer (tests/sanitize.sh).
``MAX_JOBS``, ``NVCC_THREADS``, ``CMAKE_ARGS``, ``CUDA_HOME``, ``CXX``   as usual.

A CUDA build's version carries toolkit and architectures, ``0.1.0+cu130.sm90a``, so that such wheels differ by name.
The build folder, ``build/cmake-*``, is kept: a second ``pip install -e .`` compiles only what changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DATA = ("pyprune.data.prose", "pyprune.reporting.assets")
"""Folders of data: named among the packages, or setuptools warns of each at length."""
NATIVE = os.environ.get("PYPRUNE_NATIVE", "1").lower() not in ("0", "off", "false", "no")
SANITIZE = os.environ.get("PYPRUNE_SANITIZE", "0").lower() in ("1", "on", "true", "yes")


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def visible_capabilities() -> list[str]:
    """Compute capabilities of this machine's GPUs ("90"), empty when there is no driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
    )
    found = re.findall(r"^(\d+)\.(\d)$", query.stdout, re.M) if query.returncode == 0 else []
    return sorted({major + minor for major, minor in found}, key=int)


def cuda_archs() -> list[str]:
    """Architectures to build for, normalised: ["80", "90a", "120+PTX"]; [] means a CPU module."""
    text = next(
        (
            os.environ[name]
            for name in ("PYPRUNE_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS")
            if os.environ.get(name)
        ),
        "auto",
    ).strip()
    if text.lower() in ("off", "none", "0"):
        return []
    if text.lower() in ("auto", "native"):
        found = [arch + "a" if arch == "90" else arch for arch in visible_capabilities()]
        if text.lower() == "native" and not found:
            raise SystemExit(
                "PYPRUNE_CUDA_ARCHS=native, but nvidia-smi shows no GPU here; name architectures instead, "
                "such as PYPRUNE_CUDA_ARCHS=90a, or set it to off"
            )
        return found if find_nvcc() else []
    archs = []
    for item in re.split(r"[;,\s]+", text):
        match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)([af]?)(-real)?(\+PTX)?", item, re.I)
        if not match:
            raise SystemExit(f"cannot read the architecture {item!r} in {text!r}: write 90a, 9.0a or 80;90a;100;120")
        major, minor, family, _, ptx = match.groups()
        if int(major) < 8:
            raise SystemExit(f"architecture {item!r}: the kernels need compute capability 8.0 or newer")
        archs.append(major + minor + family.lower() + ("+PTX" if ptx else ""))
    return archs


def cmake_archs(archs: list[str]) -> str:
    return ";".join(f"{a[:-4]}-real;{a[:-4]}-virtual" if a.endswith("+PTX") else f"{a}-real" for a in archs)


def base_version() -> str:
    return re.search(r'^__version__ = "([^"]+)"', (ROOT / "pyprune/__init__.py").read_text(), re.M)[1]


def toolkit(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return f"cu{major}{minor}"


def version(archs: list[str]) -> str:
    if not archs:
        return base_version()
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit(
            f"CUDA architectures {';'.join(archs)} were asked for, but there is no nvcc: install the CUDA "
            "toolkit and set CUDA_HOME, or set PYPRUNE_CUDA_ARCHS=off for a CPU module"
        )
    return ".".join([f"{base_version()}+{toolkit(nvcc)}", *(f"sm{a.replace('+PTX', 'ptx')}" for a in archs)])


class CMakeBuild(build_ext):
    """Configures and builds the one extension with CMake and copies it to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise SystemExit(
                "pyprune's native module needs a C++17 compiler: install one (Debian, Ubuntu: apt install "
                "g++; Fedora: dnf install gcc-c++; conda: conda install gxx) and try again, or set "
                "PYPRUNE_NATIVE=0 for a slower pure-Python install"
            )
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("building without isolation needs cmake and ninja: pip install cmake ninja pybind11")
        import pybind11

        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{tag}{'-sanitize' if SANITIZE else ''}"
        build.mkdir(parents=True, exist_ok=True)
        archs = cuda_archs()
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": "Release",
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYPRUNE_CUDA_ARCHS": cmake_archs(archs),
            "PYPRUNE_SANITIZE": "ON" if SANITIZE else "OFF",
        }
        if archs:
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
            options["PYPRUNE_NVCC_THREADS"] = os.environ.get("NVCC_THREADS", "2")
        arguments = [f"-D{key}={value}" for key, value in options.items()]
        arguments += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments], check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        built = next(build.glob("_C*" + sysconfig.get_config_var("SHLIB_SUFFIX")))
        temporary = target.with_name(target.name + ".new")
        shutil.copy2(built, temporary)
        os.replace(temporary, target)  # a process that has the old module loaded keeps its file


setup(
    version=version(cuda_archs() if NATIVE else []),
    packages=[*find_packages(include=["pyprune", "pyprune.*"]), "pyprune.triton_kernels", *DATA],
    package_dir={"pyprune": "pyprune", "pyprune.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("pyprune._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
