"""``pyprune refine`` streams, resumes, shares its work as pruning runs do: the same bytes, whatever way they went."""

from __future__ import annotations

import json
import os
import signal
import threading

import numpy as np
import pytest
import tiny
import yaml
from calling import call
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
        pruned / kind, output, calibration=calibration, evaluation=TEXT, reconstruction=FAST, progress=False, **fields
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


@pytest.fixture(scope="module")
def asked(pruned, tmp_path_factory):
    """A refinement with settings that are not the defaults, through the command line: its folder and the ids' file."""
    root = tmp_path_factory.mktemp("asked")
    np.save(root / "ids.npy", tiny.ids(20, 24).numpy())
    options = f"--num-samples 12 --held-out 6 --seed 3 --epochs 2 --lr 2e-3 --cross-block --max-windows 2 -o {root}/out"
    files_of = ["--calibration", root / "ids.npy", "--text", root / "ids.npy", "--off-domain", "none"]
    with pytest.raises(SystemExit) as ended:
        commands.main([str(a) for a in ["refine", pruned / "masked", *options.split(), *files_of]])
    assert not ended.value.code
    return root


def test_its_record_repeats_a_refinement_to_the_bit(asked, pruned, tmp_path, capsys):
    recipe = asked / "out" / "refine.yaml"
    code, out, err = call(capsys, "refine", "--config", recipe, "-o", tmp_path / "again")
    assert code == 0, err
    assert f"pyprune refine --config {tmp_path}/again/refine.yaml" in out
    assert_same(asked / "out", tmp_path / "again")
    records = [yaml.safe_load((f / "refine.yaml").read_text()) for f in (asked / "out", tmp_path / "again")]
    assert {**records[0], "output": None} == {**records[1], "output": None}
    assert records[0]["model"] == str(pruned / "masked") and records[0]["dense"] == str(pruned / "dense")
    results = [json.loads((f / "refinement.json").read_text()) for f in (asked / "out", tmp_path / "again")]
    assert plain(results[0]) == plain(results[1]) and results[0]["backends"] == records[0]["backends"]
    card = (tmp_path / "again" / "README.md").read_text()
    assert "`pyprune refine --config refine.yaml -o DIR`" in card
    assert "pyprune refine --config refine.yaml" in (tmp_path / "again" / "report.html").read_text()


def test_options_override_the_record(asked, tmp_path, capsys):
    options = ["--no-cross-block", "--no-evaluation", "--epochs", 1]
    code, _, err = call(capsys, "refine", "--config", asked / "out" / "refine.yaml", "-o", tmp_path / "other", *options)
    assert code == 0, err
    found = yaml.safe_load((tmp_path / "other" / "refine.yaml").read_text())
    assert (found["cross_block"], found["reconstruction"]["epochs"], found["seed"]) == (False, 1, 3)
    assert not found["evaluation"]["enabled"], "and what only an evaluation reads does not stand in the way"
    assert json.loads((tmp_path / "other" / "refinement.json").read_text())["windows"][0]["blocks"] == [0]


def test_a_record_follows_the_back_ends_of_its_run(asked, tmp_path):
    recipe = yaml.safe_load((asked / "out" / "refine.yaml").read_text())
    assert recipe["backends"]["cpu"]["gram_update/float32"] != "reference"
    recipe["backends"]["cpu"]["gram_update/float32"] = "reference"
    found = refine_checkpoint(output=tmp_path / "o", config=recipe, progress=False, device="cpu")
    assert found["backends"] == recipe["backends"]


def test_texts_in_memory_are_described_and_refused_until_they_have_a_name(pruned, whole, tmp_path):
    folder = whole("masked", "BR")[0]
    text = (folder / "refine.yaml").read_text()
    assert text.startswith("# The refinement took texts from memory") and "<Tensor in memory, sha256" in text
    assert (
        "`refine.yaml` repeats it once what was given in memory has a name there" in (folder / "README.md").read_text()
    )
    with pytest.raises(ConfigError, match="was in memory when this configuration was written"):
        refine_checkpoint(output=tmp_path / "o", config=folder / "refine.yaml", progress=False)
    refined(pruned, tmp_path / "again", config=folder / "refine.yaml")
    assert_same(folder, tmp_path / "again")


def test_the_folder_alone_resumes(asked, tmp_path, capsys, stop_after):  # noqa: F811
    stop_after(1)
    assert call(capsys, "refine", "--config", asked / "out" / "refine.yaml", "-o", tmp_path / "o")[0] == 130
    stop_after(-1)
    code, _, err = call(capsys, "refine", "--resume", "-o", tmp_path / "o")
    assert code == 0, err
    assert_same(asked / "out", tmp_path / "o")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-o", "o"], "no pruned model: name its folder, or a refine.yaml"),
        (["small"], "no output folder"),
        (["--config", "missing.yaml", "-o", "o"], "no such configuration file: missing.yaml"),
        (["--config", "run.yaml", "-o", "o"], "unknown field 'method' in refine.yaml"),
    ],
)
def test_what_a_refinement_lacks_is_said(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: small\nmethod: wanda\n")
    code, _, err = call(capsys, "refine", *arguments)
    assert code == 2 and said in err
