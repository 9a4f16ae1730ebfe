"""torchrun on this machine (gloo): 1, 2 and 3 processes agree; one that dies stops the others; any number resumes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import torchrun_case

import pyprune
from pyprune.config import ConfigError, Evaluation
from pyprune.evaluation.block_by_block import Meter
from pyprune.evaluation.perplexity import perplexity_of
from pyprune.evaluation.windows import Text
from pyprune.execution.distributed import FAILED, GONE, LOST, Pulse, World

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
MASKS = (
    "sparsegpt",
    "wanda",
    "moe",
    "dense",
    "sequential",
    "several",
    "sequential_moe",
    "refit",
    "block",
    "shared_keys",
    "cross",
)
STRUCTURED = ("liar", "liar_sequential", "liar_sequential_moe", "taylor")
CASES = (*MASKS, *STRUCTURED, "refine")
THREE = ("sparsegpt", "moe", "sequential_moe", "block", "liar", "liar_sequential_moe", "refine")
"""What three processes run too: a start costs seconds."""


def torchrun(processes: int, *arguments, timeout: int = 120, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment, **options
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the state and report of every case by one, two and three processes."""
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun_case.main(folder, CASES)
    for processes in (2, 3):
        done = torchrun(processes, SUPPORT / "torchrun_case.py", folder, *(CASES if processes == 2 else THREE))
        assert done.returncode == 0, done.stderr[-800:]
    return folder


@pytest.mark.parametrize(
    "name, processes", [(name, n) for n, names in ((2, CASES), (3, THREE)) for name in names if name in MASKS]
)
def test_any_number_of_processes_gives_the_same_masks_and_perplexity(results, name, processes):
    alone, shared = (torch.load(results / f"{name}-{n}.pt") for n in (1, processes))
    kept = [((alone[key] == 0) == (shared[key] == 0)).float().mean().item() for key in alone]
    assert min(kept) > 0.995, "masks up to ties of summation"
    one, other = (json.loads((results / f"{name}-{n}.json").read_text()) for n in (1, processes))
    for a, b in zip(one["evaluation"], other["evaluation"]):
        assert b["dense"] == pytest.approx(a["dense"], rel=1e-5)
        assert b["pruned"] == pytest.approx(a["pruned"], rel=1e-3)
        assert a["windows"] == b["windows"]
    assert [row["name"] for row in one["weights"]] == [row["name"] for row in other["weights"]]
    for a, b in zip(one["weights"], other["weights"]):
        if "error" in a:  # a probe token reached that expert
            assert b["error"] == pytest.approx(a["error"], rel=2e-2)


@pytest.mark.parametrize(
    "name, processes", [(name, n) for n, names in ((2, CASES), (3, THREE)) for name in names if name in STRUCTURED]
)
def test_any_number_of_processes_gives_the_same_smaller_model(results, name, processes):
    alone, shared = (torch.load(results / f"{name}-{n}.pt") for n in (1, processes))
    assert {key: value.shape for key, value in alone.items()} == {key: value.shape for key, value in shared.items()}
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=2e-3, atol=2e-4)
    one, other = (json.loads((results / f"{name}-{n}.json").read_text()) for n in (1, processes))
    assert other["evaluation"][0]["pruned"] == pytest.approx(one["evaluation"][0]["pruned"], rel=1e-3)
    for a, b in zip(one["weights"], other["weights"]):
        assert (a["name"], a["kept"], a["method"], a["tokens"]) == (b["name"], b["kept"], b["method"], b["tokens"])


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_refines_to_the_same_model(results, processes):
    alone, shared = (torch.load(results / f"refine-{n}.pt") for n in (1, processes))
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=2e-3, atol=2e-4)
    one, other = (json.loads((results / f"refine-{n}.json").read_text())["evaluation"] for n in (1, processes))
    assert [row["blocks"] for row in one] == [row["blocks"] for row in other] == [[0], [0, 1], [1, 2], [2]]
    for a, b in zip(one, other):
        assert a["steps"] == b["steps"] > 0 and a["after_calibration"] < a["before_calibration"]
        for name in ("before_calibration", "after_calibration", "before_held_out", "after_held_out"):
            assert b[name] == pytest.approx(a[name], rel=2e-3)


def test_a_process_that_dies_stops_the_others_and_any_number_resumes(tmp_path, results):
    output = tmp_path / "out"
    started = time.monotonic()
    dead = torchrun(2, SUPPORT / "torchrun_case.py", "die", output, 0)
    assert dead.returncode != 0 and time.monotonic() - started < 60
    assert "another one did" in dead.stderr and "finished blocks are safe" in dead.stderr and "--resume" in dead.stderr
    shards = sorted(p.name for p in (output / ".pyprune").glob("block-*.safetensors"))
    assert shards[:1] == ["block-00000.safetensors"]

    result = torchrun_case.case("sparsegpt", output=str(output), resume=True)  # begun by two, ended by one
    reference = torch.load(results / "sparsegpt-2.pt")
    kept = [
        ((value == 0) == (reference[key] == 0)).float().mean().item()
        for key, value in result.model.state_dict().items()
    ]
    assert min(kept) > 0.995
    assert [row["block"] for row in result.report["blocks"]] == [0, 1, 2]


def test_the_command_line_runs_under_torchrun(tmp_path):
    import numpy

    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "dense")
    numpy.save(tmp_path / "ids.npy", tiny.ids(8, 16).numpy())
    numpy.save(tmp_path / "text.npy", tiny.ids(4, 16, seed=1).numpy())
    arguments = [
        "prune",
        tmp_path / "dense",
        "-o",
        tmp_path / "out",
        "--method",
        "wanda",
        "--stream",
        "always",
        "--calibration",
        tmp_path / "ids.npy",
        "--num-samples",
        "8",
        "--seq-len",
        "16",
        "--window",
        "16",
        "--text",
        tmp_path / "text.npy",
    ]
    done = torchrun(2, "-m", "pyprune", *arguments)
    assert done.returncode == 0, done.stderr[-800:]
    assert len(re.findall("sparsity 0.5", done.stdout)) == 1, "one process reports"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01) and report["calibration"]["samples"] == 8
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    arguments = [
        "refine",
        tmp_path / "out",
        "-o",
        tmp_path / "refined",
        "--epochs",
        "2",
        "--lr",
        "2e-3",
        "--reconstruction-batch-size",
        "4",
        "--cross-block",
        *arguments[6:],
    ]
    done = torchrun(2, "-m", "pyprune", *arguments)
    assert done.returncode == 0, done.stderr[-800:]
    assert len(re.findall("refined  ", done.stdout)) == 1, "one process reports"
    row = json.loads((tmp_path / "refined" / "refinement.json").read_text())["windows"][-1]
    assert row["after_calibration"] < row["before_calibration"]
    before, after = (pyprune.load(tmp_path / name).model for name in ("out", "refined"))
    for p, q in zip(before.model.layers.parameters(), after.model.layers.parameters()):
        assert p.ndim < 2 or torch.equal(p == 0, q == 0)


def worlds(size: int) -> list[World]:
    found = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        found.append(world)
    return found


@pytest.mark.parametrize("count", [3, 7, 64, 1000])
def test_shares_cover_everything_once_and_are_even(count):
    for size in (1, 2, 3):
        spans = [world.span(count) for world in worlds(size)]
        assert [k for start, stop in spans for k in range(start, stop)] == list(range(count))
        sizes = [stop - start for start, stop in spans]
        assert max(sizes) - min(sizes) <= 1


def test_work_is_dealt_the_same_everywhere_and_evenly():
    costs = [11.0, 4, 4, 4, 3, 2, 2, 1]
    for size in (1, 2, 3, 5):
        dealt = [world.deal(costs) for world in worlds(size)]
        assert all(owners == dealt[0] for owners in dealt)
        load = [sum(c for c, o in zip(costs, dealt[0]) if o == rank) for rank in range(size)]
        assert max(load) <= max(max(costs), 4 / 3 * sum(costs) / size)


def test_losses_of_shares_make_the_perplexity_of_the_whole():
    windows = [tiny.ids(1, 8, seed)[0] for seed in range(4)]
    losses = [1.0, 2.0, 3.0, 4.5]
    world = World()
    world.size = 3
    shares = [[{"losses": losses[rank::3], "seconds": rank, "dtype": "bfloat16"}] for rank in range(3)]
    world.everyone = lambda value: shares
    meter = Meter([Text("t", windows)], Evaluation(), torch.device("cpu"), None, world)
    (row,) = meter.joined(None)
    assert row["losses"] == losses and row["perplexity"] == perplexity_of(losses)
    assert (row["windows"], row["seconds"], row["dtype"]) == (4, 2, "bfloat16")


def test_fewer_sequences_than_processes_are_refused():
    from pyprune.execution.executor import Executor
    from pyprune.model.blocks import ModelView

    executor = Executor(ModelView(tiny.model("llama")))
    executor.world.size = 3
    with pytest.raises(ConfigError, match="3 processes cannot share 2 calibration sequences"):
        executor.embed(list(tiny.ids(2, 8)), shared=True)


class Notes(dict):
    """A store as ``TCPStore`` is one."""

    def set(self, key, value):
        self[key] = value

    def get(self, key):
        return self[key].encode()

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.mark.parametrize("word, patience", [("5", 30.0), (FAILED, 10.0), (None, 30.0)])
def test_a_silent_process_is_noticed_after_its_time(word, patience):
    store, found = Notes(), []
    if word is not None:
        store["pyprune/alive/1"] = word
    pulse = Pulse(store, 0, 2, silence=30.0)
    for second in range(60):
        store["pyprune/alive/0"] = str(second)
        found.append(pulse.silent(float(second)))
    assert found.index(1) == pytest.approx(patience, abs=1.1) and 0 not in found


def test_a_process_that_is_done_is_not_missed():
    store = Notes({"pyprune/alive/0": "1", "pyprune/alive/1": GONE, "pyprune/alive/2": GONE})
    pulse = Pulse(store, 0, 3, silence=3.0)
    for second in range(20):
        store["pyprune/alive/0"] = str(second)
        assert pulse.silent(float(second)) is None


def test_silence_ends_the_process_with_a_message_only_while_it_runs(capfd):
    codes = []
    idle = Pulse(Notes(), 0, 2, codes.append, beat=0.01, silence=0.03)
    import threading

    thread = threading.Thread(target=idle.beat, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert not codes
    idle.running = True
    thread.join(5)
    assert codes == [LOST]
    assert "no sign of life from process 1" in capfd.readouterr().err
