"""The one call that a GPU gets, rehearsed without one, so that it cannot rot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the script itself runs")
def test_the_rehearsal_runs_every_step_and_leaves_its_results(tmp_path):
    """Over five seconds (half a minute of work): every step is a process of its own, as on the GPU."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--rehearse"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    read = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert [row["what"] for row in read["ceilings"]][0] == "copy" and len(read["ceilings"]) == 4
    [smoke] = read["smoke"]
    assert set(smoke["errors"]) >= {"reference"} and not smoke["failed"] and smoke["op"] == "nm_mask"
    assert [row["backend"] for row in read["block"]] == ["auto", "reference"]
    assert all(row["predicted_run_s"] > 0 and "failed" not in row for row in read["block"])
    assert read["some_tests"][0]["worst_status"] == 0 and read["some_tests"][0]["tests"] > 10
    assert (tmp_path / "block_trace.json.gz").stat().st_size > 1000 and (tmp_path / "block_profile.txt").is_file()
    timed = {row["backend"]: row["correct"] for row in read["ops"] if row["samples"]}
    assert timed.keys() >= {"cpu", "eager"} and set(timed.values()) == {"green"}
    assert log.count(": status 0") == 5


def test_its_steps_fit_ten_minutes_a_part():
    limits: dict[str, int] = {}
    for part, body in re.findall(r"^(\w+)\(\) \{\n(.*?)^\}", SCRIPT.read_text(), re.MULTILINE | re.DOTALL):
        limits[part] = sum(int(seconds) for seconds in re.findall(r"step \w+ (\d+) ", body))
    assert limits["build"] + limits["part_one"] <= 600 and limits["build"] + limits["part_two"] <= 600, limits


def test_an_unknown_part_is_refused():
    done = subprocess.run(["bash", str(SCRIPT), "3"], capture_output=True, text=True, env={**os.environ, "OUT": "/tmp"})
    assert done.returncode == 2 and "takes 1, 2, --rehearse or nothing, got 3" in done.stderr
