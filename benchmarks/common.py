"""What every benchmark shares: the machine and versions a figure belongs to, and the JSON it is written to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment() -> dict:
    """Processor, threads, GPU, versions and commit, as a flat dictionary."""
    import triton

    import pyprune

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": _commit(), "cpu": _processor(),
            "threads": torch.get_num_threads(), "gpu": gpu.name if gpu else None,
            "gpu_multiprocessors": gpu.multi_processor_count if gpu else None, "python": platform.python_version(),
            "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
            "pyprune": pyprune.__version__}


def write(name: str, rows: list[dict], out: str | Path | None = None) -> Path:
    """Write ``rows`` with the environment to ``<name>.json`` in ``out``, ``$OUT`` or benchmarks/results; the path."""
    folder = Path(out or os.environ.get("OUT") or ROOT / "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path
