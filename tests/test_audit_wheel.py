"""The examination of wheels finds what is wrong with one and says so; wheels are made up here, file by file."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest

from pyprune.ops import native

PYTHON_ONLY = "pyprune-0.1.0-py3-none-any.whl"
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
FILES = {
    "pyprune/__init__.py": b"",
    "pyprune/py.typed": b"",
    "pyprune/triton_kernels/__init__.py": b"",
    "pyprune-0.1.0.dist-info/METADATA": b"Name: pyprune",
}


@pytest.fixture
def examined(tmp_path, monkeypatch, capsys):
    """Exit status and printed text of the examination of a wheel of that name with these files."""
    spec = importlib.util.spec_from_file_location("audit_wheel", Path(__file__).with_name("audit_wheel.py"))
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)

    def call(name: str, files: dict[str, bytes]) -> tuple[int, str]:
        wheel = tmp_path / name
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        monkeypatch.setattr(sys, "argv", ["audit_wheel.py", str(wheel)])
        status = audit.main()
        said = capsys.readouterr()
        return status, said.out if status == 0 else said.err

    return call


def test_a_good_wheel_passes_and_is_described(examined):
    status, said = examined(PYTHON_ONLY, FILES)
    assert status == 0 and "CUDA architectures: none" in said and "sha256" in said


@pytest.mark.parametrize(
    "name, files, sentence",
    [
        (PYTHON_ONLY, {**FILES, "triton_kernels/__init__.py": b""}, "triton_kernels would be installed at top level"),
        (PYTHON_ONLY, {**FILES, "pyprune/_C.so": b""}, "a wheel for any machine holds compiled code"),
        (f"pyprune-0.1.0-{TAG}-{TAG}-linux_x86_64.whl", FILES, "it holds 0 native modules instead of one"),
        (
            PYTHON_ONLY,
            {path: content for path, content in FILES.items() if "triton_kernels" not in path},
            "pyprune/triton_kernels/__init__.py is not in it",
        ),
        (
            f"pyprune-0.1.0-{TAG}-{TAG}-linux_x86_64.whl",
            {**FILES, "pyprune/_C.so": b"no machine code"},
            "the native module cannot be read",
        ),
    ],
    ids=["stray top level", "compiled code", "no native module", "no kernels", "damaged module"],
)
def test_a_fault_is_a_sentence(examined, name, files, sentence):
    status, said = examined(name, files)
    assert status == 1 and f"{name}: {sentence}" in said


@pytest.mark.skipif(native._C is None, reason="needs the native module")
def test_a_name_that_promises_other_machine_code_than_there_is(examined):
    module = Path(native._C.__file__)
    name = f"pyprune-0.1.0+cu130.sm1234-{TAG}-{TAG}-linux_x86_64.whl"
    status, said = examined(name, {**FILES, f"pyprune/{module.name}": module.read_bytes()})
    assert status == 1 and "there is no machine code for 1234" in said
    assert native._C.with_cuda or "its name promises CUDA for 1234, and the module says with_cuda=False" in said
