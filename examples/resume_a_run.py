"""A run that is killed in the middle, and resumed: the checkpoint has the bytes of a run that nobody stopped.

python examples/resume_a_run.py
"""

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from prune_live_model import random_model

import pyprune


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, whole, killed, tokens = (Path(folder, name) for name in ("dense", "whole", "killed", "tokens.npy"))
        random_model().save_pretrained(source)
        np.save(tokens, np.random.default_rng(0).integers(0, 256, (64, 128), dtype=np.int32))

        options = ["--method", "wanda", "--calibration", str(tokens), "--no-evaluation"]
        command = [sys.executable, "-m", "pyprune", "prune", str(source), "-o", str(killed), *options]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and not list(killed.glob(".pyprune/block-*.json")):
            time.sleep(0.001)
        running.kill()
        running.wait()
        print("killed; blocks that are safe on disk:", len(list(killed.glob(".pyprune/block-*.json"))))

        settings = dict(method="wanda", calibration=str(tokens), evaluation={"enabled": False}, progress=False)
        pyprune.prune(str(source), output=str(killed), resume=True, **settings)
        pyprune.prune(str(source), output=str(whole), **settings)
        print("same bytes:", digest(whole) == digest(killed))


if __name__ == "__main__":
    main()
