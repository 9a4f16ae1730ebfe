"""What pyprune runs on here: versions, processor, GPUs, and which back-ends are usable; ``pyprune env``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TextIO

PACKAGES = ("torch", "transformers", "triton", "datasets", "numpy", "safetensors", "lm-eval")


def environment(qualify: bool = False) -> dict:
    """Versions, CPU, GPUs and native module of this machine, the state of every op's back-ends, and which one ``auto``
    takes and why. ``qualify`` measures that now; otherwise what was measured before is shown."""
    import torch

    import pyprune
    from pyprune import ops
    from pyprune.ops import native

    module = native._C
    gpus = [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory}
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    verdicts = {device: ops.verdicts(device, measure=qualify, again=qualify) for device in devices}
    return {
        "pyprune": pyprune.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "level": module.cpu_level() if module else None,
        },
        "gpus": gpus,
        "native": {
            "built": module is not None,
            "cuda": bool(module and module.with_cuda),
            "cuda_architectures": getattr(module, "cuda_architectures", None) or None,
        },
        "backends": {device: ops.status(device) for device in devices},
        "chosen": {
            device: {op: verdict["takes"] for op, verdict in found.items()} for device, found in verdicts.items()
        },
        "verdicts": verdicts,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_environment(found: dict, out: TextIO | None = None) -> None:
    """``environment()`` as text: a table of ops and back-ends for each device, and why one cannot be used."""
    from rich.table import Table

    from pyprune.reporting.console import open_console

    console = open_console(out)
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    console.print(f"pyprune {found['pyprune']}, Python {found['python']}, {found['platform']}\n{packages}")
    console.print(
        f"CPU: {found['cpu']['cores']} cores, {found['cpu']['threads']} threads, kernels for "
        f"{found['cpu']['level'] or 'plain PyTorch only'}"
    )
    for gpu in found["gpus"]:
        console.print(
            f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        )
    native = found["native"]
    console.print(
        "native module: "
        + (
            "not built"
            if not native["built"]
            else "CPU kernels"
            + (f" and CUDA kernels for {native['cuda_architectures']}" if native["cuda"] else "; no CUDA kernels")
        )
    )
    for device, status in found["backends"].items():
        names, reasons = list(next(iter(status.values()))), set()
        table = Table("op", *names, "auto takes", title=f"tensors on {device}", title_justify="left")
        for op, states in status.items():
            table.add_row(
                op, *("yes" if states[name] == "usable" else "–" for name in names), _taken(found["chosen"][device], op)
            )
            reasons |= {
                f"{name}: {states[name]}" for name in names if states[name] != "usable" and "has no" not in states[name]
            }
        console.print(table)
        for reason in sorted(reasons):
            console.print(f"  {reason}")
        console.print(_why(found["verdicts"][device], device))


def _taken(chosen: dict[str, str], op: str) -> str:
    """What auto takes for an op: one name, or one for each class of its sizes."""
    names = {key.partition("/")[2]: name for key, name in chosen.items() if key.partition("/")[0] == op}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} ({part})" for part, name in names.items())


def _why(verdicts: dict[str, dict], device: str):
    """A table of what ``auto`` takes and why; one row where all have the same reason."""
    from rich.table import Table

    table = Table("op", "auto takes", "why", "milliseconds", "error", title=f"choice on {device}", title_justify="left")
    reasons = {verdict["why"] for verdict in verdicts.values()}
    if len(reasons) == 1:
        table.add_row("every op", "see above", reasons.pop(), "", "")
        return table
    for op, verdict in verdicts.items():
        failed = "".join(f"; not {name}: {reason}" for name, reason in verdict.get("failed", {}).items())
        shown = "; ".join(
            f"{name} " + ", ".join(f"{1e3 * s:.3g}" for s in seconds)
            for name, seconds in verdict.get("seconds", {}).items()
        )
        error = verdict.get("errors", {}).get(verdict["takes"])
        table.add_row(op, verdict["takes"], verdict["why"] + failed, shown, "" if error is None else f"{error:.0e}")
    threads = {verdict["threads"] for verdict in verdicts.values() if "threads" in verdict}
    table.caption = "; ".join(
        "timed on one thread, in its CPU seconds" if n == 1 else f"timed on {n} threads" for n in sorted(threads)
    )
    return table
