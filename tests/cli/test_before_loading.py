"""What is wrong is said before the weights are read; whatever a command is at, Ctrl-C ends it in one sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
from calling import call

from pyprune.model import checkpoint


@pytest.fixture
def sealed(monkeypatch):
    """No weights can be loaded."""

    def loaded(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(checkpoint, "load_with_origin", loaded)
    monkeypatch.setattr("pyprune.execution.weight_streaming.Streamed.__init__", loaded)


WRONG = {
    "no calibration file": (["--calibration", "missing.jsonl"], "no such file or folder: missing.jsonl"),
    "no evaluation file": (["--text", "/nowhere/wiki.txt"], "no such file or folder: /nowhere/wiki.txt"),
    "no weight has that name": (["--targets", "mpl"], "'mpl'"),
    "every weight is left dense": (["--ignore", "*"], "ignore ['*'] leave no weight to prune"),
    "pattern that does not divide": (["--pattern", "3:7"], "pattern 3:7 does not divide the 32 inputs"),
    "sequences longer than the text": (["--seq-len", "999999"], "a smaller --seq-len"),
    "sequences longer than the file": (["--calibration", "{ids}", "--seq-len", "30"], "seq-len 30|--seq-len is 30"),
    "too few sequences": (
        ["--calibration", "{ids}", "--num-samples", "13"],
        "has 12 rows; give more, or set --num-samples 12",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_before_the_weights_are_read(capsys, tmp_path, folder, sealed, case):
    options, said = WRONG[case]
    np.save(tmp_path / "ids.npy", tiny.ids(12, 24).numpy())
    options = [option.format(ids=tmp_path / "ids.npy") for option in options]
    code, out, err = call(capsys, "prune", folder, "-o", tmp_path / "o", *options)
    assert code == 2 and out == "", err
    assert any(text in err for text in said.split("|")), err
    assert not (tmp_path / "o").exists()


def test_sequences_beyond_a_table_of_positions_are_refused_before_the_weights_are_read(capsys, tmp_path, sealed):
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    np.save(tmp_path / "ids.npy", tiny.ids(12, 200).numpy())
    code, _, err = call(
        capsys,
        "prune",
        tmp_path / "gpt2",
        "-o",
        tmp_path / "o",
        "--calibration",
        tmp_path / "ids.npy",
        "--no-evaluation",
    )
    assert (
        code == 2
        and "have up to 200 tokens, but GPT2LMHeadModel has 128 positions; set --seq-len to at most 128" in err
    )


def test_eval_of_an_encoder_points_to_tasks(capsys, tmp_path, sealed):
    tiny.model("bert").save_pretrained(tmp_path / "bert")
    np.save(tmp_path / "ids.npy", tiny.ids(12, 24).numpy())
    code, out, err = call(capsys, "eval", tmp_path / "bert", "--text", tmp_path / "ids.npy")
    assert code == 2 and out == ""
    assert "BertModel does not predict the next token" in err and "`pyprune eval MODEL --tasks NAMES`" in err
    assert "loading" not in err and "no-evaluation" not in err


def test_eval_and_refine_look_for_their_files_first(capsys, tmp_path, folder, sealed):
    code, _, err = call(capsys, "eval", folder, "--text", "missing.txt")
    assert code == 2 and err.endswith("error: no such file or folder: missing.txt\n")
    code, _, err = call(capsys, "eval", folder, "--tasks", "last-word,missing.jsonl")
    assert code == 2 and "error: no such file: missing.jsonl" in err
    code, _, err = call(capsys, "refine", folder, "-o", tmp_path / "o", "--dense", "/nowhere/model")
    assert code == 2 and "unknown model '/nowhere/model'" in err
    code, _, err = call(
        capsys, "refine", folder, "-o", tmp_path / "o", "--dense", folder, "--calibration", "missing.csv"
    )
    assert code == 2 and "no such file or folder: missing.csv" in err


@pytest.mark.parametrize("option", ["--calibration", "--text"])
def test_files_that_are_not_there_are_missed_before_torch_is_imported(capsys, tmp_path, folder, monkeypatch, option):
    monkeypatch.setattr("pyprune.cli.commands.libraries", lambda label: pytest.fail("torch was to be imported"))
    (tmp_path / "empty.txt").touch()
    for name, why in [("missing.jsonl", "no such file or folder: missing.jsonl"), ("empty.txt", "empty.txt is empty")]:
        path = name if name.startswith("missing") else tmp_path / name
        code, _, err = call(capsys, "prune", folder, "-o", tmp_path / "o", option, path)
        assert code == 2 and why in err


@pytest.mark.parametrize(
    "place",
    [
        "pyprune.model.checkpoint.load_with_origin",
        "pyprune.evaluation.perplexity.losses_of",
        "pyprune.model.assembly.save",
    ],
)
def test_an_interruption_of_a_run_anywhere_is_one_sentence(capsys, tmp_path, folder, monkeypatch, place):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    code, out, err = call(
        capsys,
        "prune",
        folder,
        "-o",
        tmp_path / "o",
        "--method",
        "magnitude",
        "--num-samples",
        2,
        "--seq-len",
        16,
        "--window",
        16,
    )
    assert (code, out) == (130, "") and "Traceback" not in err
    last = err.splitlines()[-1]
    if "assembly" in place:
        assert last.startswith("interrupted with 3 of 3 blocks done, safe in") and "--resume" in last
    else:
        assert last.startswith("interrupted before the first block was done: nothing is left in")
        assert not (tmp_path / "o").exists()


def test_resume_needs_the_folder_alone(capsys, tmp_path, folder, stop_after):
    np.save(tmp_path / "ids.npy", tiny.ids(6, 24).numpy())
    asked = ["--method", "wanda", "--sparsity", 0.25, "--calibration", tmp_path / "ids.npy", "--no-evaluation"]
    stop_after(1)
    assert call(capsys, "prune", folder, "-o", tmp_path / "o", *asked)[0] == 130
    stop_after(-1)
    code, _, err = call(capsys, "prune", "--resume", "-o", tmp_path / "o")
    assert code == 0, err
    assert call(capsys, "prune", folder, "-o", tmp_path / "whole", *asked)[0] == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "o" / path.name).read_bytes()


def test_what_cannot_be_resumed_says_why(capsys, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "early" / ".pyprune").mkdir(parents=True)
    for name, why in [
        ("nothing", "no such folder"),
        ("foreign", "holds no interrupted run"),
        ("early", "was stopped before its first block: .* run its command again"),
    ]:
        code, _, err = call(capsys, "prune", "--resume", "-o", tmp_path / name)
        assert code == 2 and re.search(why, err), err
