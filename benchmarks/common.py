"""What every benchmark shares: where the data is, how time is taken, what goes into a result file.

Run from the repository root: ``python -m benchmarks study main_job``. ``PYPRUNE_DATA`` names the folder with the
data sets; results go to ``$OUT`` if set, else to ``benchmarks/results/``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyprune.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def command_line(main: Callable[[], None]) -> None:
    """Run a program; what it refuses (ConfigError) is a sentence on standard error and exit status 2."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def data(*parts: str) -> Path:
    """A file of the benchmark data. Raises ConfigError if it is not there."""
    root = os.environ.get("PYPRUNE_DATA")
    if not root:
        raise ConfigError(
            "set PYPRUNE_DATA to the folder with the benchmark data (wikitext-2, calibration, evaluation, …)"
        )
    path = Path(root).joinpath(*parts)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; PYPRUNE_DATA must hold {'/'.join(parts)}")
    return path


def environment() -> dict:
    """Machine, versions and commit of a measurement."""
    import torch
    import transformers

    from pyprune.ops import native

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        found = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        said = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", info.read_text(), re.MULTILINE))
        if "model name" in said:  # which alone is "AMD EPYC" for three generations
            cpu = f"{said['model name']} (family {said.get('cpu family')}, model {said.get('model')})"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instruction_set": native._C.cpu_level() if native._C else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 2),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "../pyprune", "../csrc")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def result_path(name: str, out: str | Path | None = None, suffix: str = ".json") -> Path:
    folder = Path(out or os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}{suffix}"


def write(name: str, rows: list[dict], out: str | Path | None = None, **more) -> Path:
    """Write rows with the environment they were measured in to ``NAME.json``; returns the path."""
    path = result_path(name, out)
    found = {"benchmark": name, "environment": environment(), **more, "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def read(name: str, out: str | Path | None = None) -> list[dict]:
    """Rows of an earlier, perhaps partial, run."""
    path = result_path(name, out)
    return json.loads(path.read_text())["rows"] if path.is_file() else []


@dataclass
class Spent:
    """Wall and CPU seconds (user + system, all threads) of a ``with`` block."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Spent:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def load_model(name: str):
    """Float32 model and tokenizer, as every row of a benchmark starts from."""
    import pyprune

    model, tokenizer = pyprune.load(name, "float32")
    return model.eval(), tokenizer
