"""``pyprune refine`` streams, resumes, shares its work as pruning runs do: the same bytes, whatever way they went."""

from __future__ import annotations

import json
import os
import signal
import threading

import numpy as np
import pytest
import tiny
from fast import FAST
from same_bytes import assert_same, files, source

import pyprune
from pyprune.cli import commands
from pyprune.config import Calibration, ConfigError, Evaluation
from pyprune.execution.journal import Interrupted, Journal
from pyprune.execution.weight_streaming import Streamed
from pyprune.pipeline.prune import prune
from pyprune.pipeline.refine_checkpoint import refine_checkpoint
from pyprune.pipeline.refine_work import RefineWork

KINDS = {"masked": dict(method="wanda", pattern="2:4"), "smaller": dict(pattern="neurons", sparsity=0.5)}
WAYS = {
    "BR": dict(),
    "BR without GP": dict(global_propagation=False),
    "CR": dict(cross_block=True),
    "CR without GP": dict(cross_block=True, global_propagation=False),
}
TEXT = Evaluation(text=tiny.ids(3, 24), dtype="float32")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Folders of a masked and a smaller model, whose pruning.json names the dense one."""
    folder = tmp_path_factory.mktemp("pruned")
    dense = source(folder / "dense")
    for kind, fields in KINDS.items():
        prune(
            dense,
            output=str(folder / kind),
            calibration=tiny.ids(12, 24),
            evaluation=Evaluation(enabled=False),
            progress=False,
            **fields,
        )
    return folder


def refined(pruned, output, kind="masked", **fields):
    calibration = Calibration(source=tiny.ids(20, 24), num_samples=12, seq_len=24, held_out=8)
    return refine_checkpoint(
        pruned / kind, output, calibration=calibration, evaluation=TEXT, settings=FAST, progress=False, **fields
    )


def plain(found: dict) -> dict:
    """What must not depend on how a run went."""
    return {
        "windows": [{k: v for k, v in row.items() if k != "seconds"} for row in found["windows"]],
        "perplexity": [[row[name] for name in ("dense", "pruned", "refined")] for row in found["evaluation"]],
    }


@pytest.fixture(scope="module")
def whole(pruned, tmp_path_factory):
    """Uninterrupted runs in memory, by kind and way."""
    made = {}

    def get(kind, way):
        if (kind, way) not in made:
            folder = tmp_path_factory.mktemp("whole") / "out"
            made[kind, way] = folder, refined(pruned, folder, kind, stream="never", **WAYS[way])
        return made[kind, way]

    return get


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stopped", [1, 2])
def test_an_interrupted_refinement_resumes_to_the_same_bytes(way, stopped, pruned, whole, tmp_path, stop_after):  # noqa: F811
    output = tmp_path / "out"
    stop_after(stopped)
    with pytest.raises(Interrupted, match=f"{stopped} of 3 blocks done.*--resume"):
        refined(pruned, output, **WAYS[way])
    assert not (output / "config.json").exists(), "nothing that looks like a model yet"
    stop_after(-1)
    trained = []
    window = RefineWork._window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefineWork, "_window", lambda self, blocks: (trained.append(blocks), window(self, blocks))[1])
        found = refined(pruned, output, resume=True, **WAYS[way])
    folder, reference = whole("masked", way)
    assert_same(folder, output)
    assert plain(found) == plain(reference) == plain(json.loads((output / "refinement.json").read_text()))
    assert trained == [row["blocks"] for row in reference["windows"]][stopped:], "only what was missing"
    assert not (output / ".pyprune").exists()


@pytest.mark.parametrize(
    "kind, way", [("masked", "BR"), ("masked", "CR without GP"), ("smaller", "CR"), ("smaller", "BR without GP")]
)
def test_streamed_and_in_memory_give_the_same_weights(kind, way, pruned, whole, tmp_path, monkeypatch):
    """Never more than the window's blocks of the pruned model at a time, nor than one more of the dense one."""
    most = {"smaller": 0, "dense": 0}
    acquire = Streamed.acquire

    def counted(self, index):
        acquire(self, index)
        name = "dense" if self.files.folder.name == "dense" else "smaller"
        most[name] = max(most[name], len(self._present))

    monkeypatch.setattr(Streamed, "acquire", counted)
    found = refined(pruned, tmp_path / "out", kind, stream="always", **WAYS[way])
    folder, reference = whole(kind, way)
    one, other = files(folder), files(tmp_path / "out")
    assert set(one) == set(other) and all((one[name] == other[name]).all() for name in one)
    assert plain(found)["windows"] == plain(reference)["windows"]
    for row, known in zip(found["evaluation"], reference["evaluation"]):
        assert row["refined"] == pytest.approx(known["refined"], rel=1e-5)
    blocks = 2 if "CR" in way else 1
    assert most == {"smaller": blocks, "dense": blocks if "without" in way else 1}
    model = pyprune.load(tmp_path / "out").model
    assert pyprune.evaluate(model, TEXT.text, dtype="float32")["perplexity"] == pytest.approx(
        found["evaluation"][0]["refined"], rel=1e-5
    )


def test_a_streamed_refinement_resumes(pruned, whole, tmp_path, stop_after):  # noqa: F811
    stop_after(2)
    with pytest.raises(Interrupted):
        refined(pruned, tmp_path / "out", stream="always", **WAYS["CR"])
    stop_after(-1)
    found = refined(pruned, tmp_path / "out", resume=True, **WAYS["CR"])  # streamed again without being told
    folder, reference = whole("masked", "CR")
    one, other = files(folder), files(tmp_path / "out")
    assert set(one) == set(other) and all((one[name] == other[name]).all() for name in one)
    assert plain(found)["windows"] == plain(reference)["windows"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4


def test_another_refinement_does_not_go_on_with_it(pruned, tmp_path, stop_after):  # noqa: F811
    stop_after(1)
    with pytest.raises(Interrupted):
        refined(pruned, tmp_path / "out")
    with pytest.raises(ConfigError, match="interrupted run with 1 of 3.*--resume"):
        refined(pruned, tmp_path / "out")
    with pytest.raises(ConfigError, match="cross_block was False, now True"):
        refined(pruned, tmp_path / "out", resume=True, cross_block=True)
    with pytest.raises(ConfigError, match="model.weights was"):
        refined(pruned, tmp_path / "out", resume=True, kind="smaller")


def test_a_run_that_died_after_its_last_block_only_moves_out(pruned, whole, tmp_path, monkeypatch):
    publish = Journal.publish
    monkeypatch.setattr(Journal, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        refined(pruned, tmp_path / "out")
    monkeypatch.setattr(Journal, "publish", publish)
    monkeypatch.setattr(RefineWork, "work", lambda *_: pytest.fail("all blocks are done"))
    found = refined(pruned, tmp_path / "out", resume=True)
    folder, reference = whole("masked", "BR")
    assert_same(folder, tmp_path / "out")
    assert plain(found) == plain(reference)


def test_a_failed_refinement_leaves_no_folder(pruned, tmp_path):
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        refine_checkpoint(pruned / "masked", tmp_path / "out", calibration=Calibration(source=["text"]))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_stops_between_blocks_and_the_command_goes_on(pruned, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "ids.npy", tiny.ids(20, 24).numpy())
    arguments = [
        "refine",
        pruned / "masked",
        "-o",
        tmp_path / "out",
        "--calibration",
        tmp_path / "ids.npy",
        "--num-samples",
        12,
        "--seq-len",
        24,
        "--no-evaluation",
        "--epochs",
        2,
        "--lr",
        2e-3,
        "--memory-budget-gb",
        1e-6,
    ]
    window = RefineWork._window

    def interrupted(self, blocks):
        os.kill(os.getpid(), signal.SIGINT)
        return window(self, blocks)

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            commands.main([str(a) for a in arguments])
        return ended.value.code or 0

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(RefineWork, "_window", interrupted)
    assert command(*arguments) == 130
    assert "stopped with 1 of 3 blocks done" in capsys.readouterr().err
    monkeypatch.setattr(RefineWork, "_window", window)
    assert command(*arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert command(*arguments, "--resume") == 0
    assert "error of the last block" in capsys.readouterr().out
    pyprune.load(tmp_path / "out")
