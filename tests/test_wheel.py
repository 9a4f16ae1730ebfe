"""Packaging: what a wheel is called, what is in it, that it imports without a driver; what is said when tools are
missing. The build itself runs offline with the build requirements already installed."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
MISSING = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
MISSING += [module for module in ("pybind11", "build") if importlib.util.find_spec(module) is None]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from a source tree only")


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py's functions, without running setup."""
    for name in ("PYPRUNE_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS", "PYPRUNE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A toolkit that only knows its version."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))


@pytest.mark.parametrize(
    "variable, text, archs, cmake, version",
    [
        ("PYPRUNE_CUDA_ARCHS", "90a", ["90a"], "90a-real", "+cu130.sm90a"),
        (
            "PYPRUNE_CUDA_ARCHS",
            "80;90a;100;120",
            ["80", "90a", "100", "120"],
            "80-real;90a-real;100-real;120-real",
            "+cu130.sm80.sm90a.sm100.sm120",
        ),
        (
            "TORCH_CUDA_ARCH_LIST",
            "8.0 9.0a+PTX",
            ["80", "90a+PTX"],
            "80-real;90a-real;90a-virtual",
            "+cu130.sm80.sm90aptx",
        ),
        ("CUDAARCHS", "86-real,120f", ["86", "120f"], "86-real;120f-real", "+cu130.sm86.sm120f"),
        ("PYPRUNE_CUDA_ARCHS", "off", [], "", ""),
    ],
)
def test_architectures_and_version(setup_py, nvcc, monkeypatch, variable, text, archs, cmake, version):
    monkeypatch.setenv(variable, text)
    assert setup_py["cuda_archs"]() == archs
    assert setup_py["cmake_archs"](archs) == cmake
    assert setup_py["version"](archs) == setup_py["base_version"]() + version


def test_our_variable_wins(setup_py, nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "off")
    assert setup_py["cuda_archs"]() == []


@pytest.mark.parametrize("text, message", [("70", "8.0 or newer"), ("hopper", "cannot read the architecture 'hopper'")])
def test_bad_architectures_are_named(setup_py, monkeypatch, text, message):
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match=message):
        setup_py["cuda_archs"]()


def test_native_without_a_gpu_says_so(setup_py, monkeypatch):
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "native")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="nvidia-smi shows no GPU"):
        setup_py["cuda_archs"]()


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "needs a C\\+\\+17 compiler: install one .*PYPRUNE_NATIVE=0"),
        ("compiler only", "pip install cmake ninja pybind11"),
    ],
)
def test_missing_tools_are_named(setup_py, monkeypatch, tmp_path, path, message):
    (tmp_path / "c++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if path else "")
    monkeypatch.delenv("CXX", raising=False)
    extension = setuptools.Extension("pyprune._C", [])
    command = setup_py["CMakeBuild"](setuptools.Distribution({"ext_modules": [extension]}))
    with pytest.raises(SystemExit, match=message):
        command.build_extension(extension)


def source_tree(target):
    """The files a sdist is made from, without build products."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("csrc", "triton_kernels", "pyprune", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for path in ROOT.glob("[!.]*"):
        if path.is_file() and path.suffix in (".py", ".toml", ".txt", ".in", ".md", ""):
            shutil.copy(path, target)
    return target


def run(*command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def built(kind, tree, out, **environment):
    """The ``sdist`` or ``wheel`` of a source tree, built offline."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", str(out), cwd=tree, **environment)
    return next(out.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind]))


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.skipif(bool(MISSING), reason=f"needs the dev extra: {', '.join(MISSING)} not installed")
def test_pure_python_wheel(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = source_tree(tmp_path / "tree")
    wheel = built("wheel", tree, tmp_path, PYPRUNE_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(wheel) if name.endswith(".so")]
    assert "pyprune/py.typed" in names(wheel), "type checkers read the annotations of an installed package"


def installed(wheel, folder):
    """The interpreter of a fresh environment with the wheel in it; torch and the like are those of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=ROOT)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "-q", "--no-deps", "--no-index", str(wheel), cwd=folder)
    [site] = (folder / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return python


def prunes(python, folder):
    """The installed command prunes a model on the CPU."""
    code = (
        "import transformers as t\n"
        "sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)\n"
        "sizes |= dict(num_hidden_layers=1, vocab_size=99)\n"
        "t.LlamaForCausalLM(t.LlamaConfig(**sizes)).save_pretrained('dense')"
    )
    run(python, "-c", code, cwd=folder)
    arguments = ("prune", "dense", "-o", "pruned", "--method", "magnitude", "--no-evaluation", "--device", "cpu")
    run(python.parent / "pyprune", *arguments, cwd=folder, CUDA_VISIBLE_DEVICES="")
    report = json.loads((folder / "pruned" / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)


def audited(wheel, *options):
    """What the examination of wheels prints; the wheel has passed it."""
    return run(sys.executable, str(ROOT / "tests" / "audit_wheel.py"), *options, str(wheel), cwd=ROOT)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs the dev extra: {', '.join(MISSING)} not installed")
@pytest.mark.skipif(NVCC is None, reason="needs nvcc (the CUDA toolkit) to build the kernels")
def test_a_wheel_for_two_architectures(tmp_path):
    """It passes its examination (names, machine code of both, imports without a driver), and in a fresh environment it
    says for which GPUs it is and prunes on the CPU."""
    (tmp_path / "tree").mkdir()
    tree = source_tree(tmp_path / "tree")
    toolkit = str(Path(NVCC).resolve().parent.parent)
    wheel = built("wheel", tree, tmp_path, MAX_JOBS="2", CUDA_HOME=toolkit, PYPRUNE_CUDA_ARCHS="90a;120+PTX")
    assert re.search(r"\+cu\d+\.sm90a\.sm120ptx-cp", wheel.name)
    assert "CUDA architectures: 120, 90a" in audited(wheel)
    python = installed(wheel, tmp_path / "environment")
    code = "import pyprune._C as C; print(C.__file__, C.with_cuda, C.cuda_architectures)"
    place, *said = run(python, "-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").split()
    assert place.startswith(str(tmp_path / "environment")) and said == ["True", "90a-real,120-real,120-virtual"]
    prunes(python, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs the dev extra: {', '.join(MISSING)} not installed")
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_wheel_from_sdist(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = source_tree(tmp_path / "tree")
    sdist = built("sdist", tree, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = next((tmp_path / "sdist").iterdir())
    wheel = built("wheel", unpacked, tmp_path, MAX_JOBS="2", PYPRUNE_CUDA_ARCHS="off")
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.split("-")[2:4] == [f"cp{version}", f"cp{version}"]
    assert platform.machine() in wheel.name
    content = names(wheel)
    assert {name.split("/")[0] for name in content} == {"pyprune", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert "pyprune/triton_kernels/__init__.py" in content
    assert any(name.startswith("pyprune/_C.") for name in content)

    assert "CUDA architectures: none" in audited(wheel)
    python = installed(wheel, tmp_path / "environment")
    code = (
        "import torch, pyprune._C as C\n"
        "from pyprune import ops\n"
        "assert not C.with_cuda and ops.status()['gram_update']['cpu'] == 'usable'\n"
        "print(C.__file__)\n"
        "print(ops.nm_mask(torch.tensor([[1., 2, 3, 4]]), 2, 4).tolist())"
    )
    place, answer = run(python, "-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").splitlines()
    assert place.startswith(str(tmp_path / "environment")) and answer == "[[False, False, True, True]]"
    prunes(python, tmp_path)
    linked = run("ldd", place, cwd=tmp_path)
    assert not [line for line in linked.splitlines() if "torch" in line or "libcuda" in line]
