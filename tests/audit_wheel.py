"""Examines a wheel that was built, and says what it is: ``python tests/audit_wheel.py dist/pyprune-….whl``.

Exit status 1, with a sentence per fault: a stray top level (another project owns ``triton_kernels``), a module that
does not import where there is no driver, machine code missing for an architecture that the name promises, a library
linked that a user may not have. ``--repair`` first gives a CPU wheel its manylinux name (needs auditwheel and
patchelf); libgomp stays outside, because torch brings its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = 20 << 20
"""Bytes; a wheel of six architectures has about one megabyte."""


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or f"{command[0]} ended with status {done.returncode}"
        raise RuntimeError(said.splitlines()[-1])
    return done.stdout


def repair(wheel: Path) -> Path:
    """A copy named for the oldest system that it runs on, in the same folder; the old one is removed."""
    before = set(wheel.parent.glob("*.whl"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf lies beside the interpreter
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", wheel.parent, wheel, PATH=path)
    new = set(wheel.parent.glob("*.whl")) - before
    if not new:
        return wheel  # it had that name already
    wheel.unlink()
    return new.pop()


def promised(wheel: Path) -> set[str]:
    """Architectures that the version names: ``+cu130.sm80.sm90a`` → 80, 90a."""
    return {arch.removesuffix("ptx") for arch in re.findall(r"\.sm(\w+?)(?=\.|-)", wheel.name)}


def machine_code(module: Path) -> set[str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    try:
        return set(re.findall(r"\.sm_(\w+)\.cubin", run(tool, "--list-elf", module)))
    except RuntimeError as error:
        if "does not contain device code" in str(error):
            return set()
        raise


def faults(wheel: Path) -> list[str]:
    """What is wrong with it, in sentences."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if archive.testzip():
            found.append(f"{archive.testzip()} is damaged in the archive")
        with tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder)
            found += faults_of_module(wheel, Path(folder))
    tops = {name.split("/")[0] for name in names}
    stray = {top for top in tops if top != "pyprune" and not re.fullmatch(r"pyprune-.*\.(dist-info|libs)", top)}
    if stray:
        found.append(f"{', '.join(sorted(stray))} would be installed at top level")
    for needed in ("pyprune/triton_kernels/__init__.py", "pyprune/py.typed"):
        if needed not in names:
            found.append(f"{needed} is not in it")
    if wheel.stat().st_size > LARGEST:
        found.append(f"it has {wheel.stat().st_size >> 20} MB, more than {LARGEST >> 20}")
    return found


def faults_of_module(wheel: Path, folder: Path) -> list[str]:
    modules = list(folder.glob("pyprune/_C*.so"))
    if "py3-none-any" in wheel.name:
        return ["a wheel for any machine holds compiled code"] if modules else []
    if len(modules) != 1:
        return [f"it holds {len(modules)} native modules instead of one"]
    found = []
    code = f"import sys; sys.path[0] = {str(folder)!r}\nimport torch, pyprune._C as C; print(C.with_cuda, C.__file__)"
    try:
        said = run(sys.executable, "-c", code, CUDA_VISIBLE_DEVICES="").split()
        if not said[1].startswith(str(folder)):
            found.append("another installed pyprune was imported in its place, so it was not tried")
        elif (said[0] == "True") != bool(promised(wheel)):
            named = f"CUDA for {', '.join(sorted(promised(wheel)))}" if promised(wheel) else "no CUDA"
            found.append(f"its name promises {named}, and the module says with_cuda={said[0]}")
    except RuntimeError as error:
        found.append(f"the native module does not import without a driver: {error}")
    try:
        missing = promised(wheel) - machine_code(modules[0]) if promised(wheel) else set()
        linked = [line.split()[0] for line in run("ldd", modules[0]).splitlines()]
    except RuntimeError as error:
        return [*found, f"the native module cannot be read: {error}"]
    if missing:
        found.append(f"there is no machine code for {', '.join(sorted(missing))}")
    foreign = [name for name in linked if re.match(r"lib(torch|c10|cuda|cudart|cublas|cusolver)", name)]
    if foreign:
        found.append(f"it is linked to {', '.join(foreign)}, which a user's machine may not have")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--repair", action="store_true", help="give a wheel without CUDA its manylinux name first")
    options = parser.parse_args()
    wheel = options.wheel
    if options.repair and not promised(wheel):
        wheel = repair(wheel)
    found = faults(wheel)
    for fault in found:
        print(f"{wheel.name}: {fault}", file=sys.stderr)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    archs = ", ".join(sorted(promised(wheel))) or "none"
    print(f"{wheel}\n  {wheel.stat().st_size / 1e6:.2f} MB, CUDA architectures: {archs}\n  sha256 {digest}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
