"""The command line end to end on tiny models: what it prints, what it writes, what it repeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from calling import call
from same_bytes import stored

import pyprune


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, tiny.ids(12, 24).numpy())
    return path


@pytest.fixture
def pruned(capsys, tmp_path, folder, ids):
    """A finished run's folder and what the command printed."""
    code, out, err = call(
        capsys,
        "prune",
        folder,
        "-o",
        tmp_path / "one",
        "--method",
        "sparsegpt",
        "--pattern",
        "2:4",
        "--calibration",
        ids,
        "--num-samples",
        8,
        "--seed",
        0,
        "--text",
        ids,
    )
    assert code == 0, err
    return tmp_path / "one", out, err


def test_prune_prints_what_it_did_and_where_it_is(pruned, folder):
    path, out, err = pruned
    report = json.loads((path / "report.json").read_text())
    row = report["evaluation"][0]
    for text in (
        f"{row['dense']:.2f} dense → {row['pruned']:.2f} pruned",
        "12 windows of 24 tokens",
        "0.5000",
        "100.0%",
        "seconds",
        "peak memory",
        str(path),
        "report.json",
    ):
        assert text in out
    assert "pruning 3/3" in err and "left" in err and "error" in err, "progress, error and time left are in the log"
    order = [err.index(text) for text in ("loading", "measuring the dense", "pruning 1/3", "measuring the pruned")]
    assert order == sorted(order), "what takes its time before and after the blocks is said too"


def test_run_yaml_repeats_to_the_bit_and_options_override_it(capsys, tmp_path, pruned):
    path, _, _ = pruned
    assert call(capsys, "prune", "--config", path / "run.yaml", "-o", tmp_path / "two")[0] == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[1]["config"]["backends"] == reports[0]["backends"] == reports[1]["backends"]
    first, second = (stored(tmp_path / name) for name in ("one", "two"))
    assert first.keys() == second.keys() and first
    assert all((first[name] == second[name]).all() for name in first)
    code, _, _ = call(
        capsys,
        "prune",
        "--config",
        path / "run.yaml",
        "-o",
        tmp_path / "three",
        "--pattern",
        "4:8",
        "--method",
        "wanda",
        "--reconstruct",
        "none",
        "--num-samples",
        6,
    )
    record = json.loads((tmp_path / "three" / "pruning.json").read_text())
    assert code == 0 and (record["pattern"], record["method"]) == ("4:8", "wanda")
    assert record["settings"]["calibration"]["num_samples"] == 6 and record["settings"]["evaluation"]["text"]


def test_json_is_all_there_is_on_standard_output(capsys, tmp_path, folder, ids):
    code, out, _ = call(
        capsys,
        "prune",
        folder,
        "-o",
        tmp_path / "out",
        "--sparsity",
        0.25,
        "--method",
        "magnitude",
        "--calibration",
        ids,
        "--num-samples",
        8,
        "--text",
        ids,
        "--json",
    )
    report = json.loads(out)
    assert code == 0 and report["sparsity"] == pytest.approx(0.25, abs=1e-3)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {**written, "seconds": None} == {**report, "seconds": None}, "but for the seconds of the writing itself"


def test_eval_json(capsys, folder, ids):
    code, out, _ = call(
        capsys, "eval", folder, "--text", ids, "--window", 24, "--max-windows", 5, "--dtype", "float32", "--json"
    )
    found = json.loads(out)
    assert code == 0 and (found["windows"], found["dtype"]) == (5, "float32")
    assert found["perplexity"] == pytest.approx(
        pyprune.evaluate(pyprune.load(folder).model, tiny.ids(12, 24)[:5], dtype="float32")["perplexity"]
    )
    code, out, _ = call(capsys, "eval", folder, "--text", ids, "--text", ids, "--dtype", "float32")
    assert code == 0 and out.count("perplexity") == 2


def test_inspect_and_compare(capsys, tmp_path, pruned, folder):
    path, _, _ = pruned
    code, out, _ = call(capsys, "inspect", path, "--json")
    found = json.loads(out)
    assert code == 0 and found["sparsity"] == 0.5 and found["patterns"]["2:4"]["violations"] == 0
    code, out, _ = call(capsys, "inspect", folder)
    assert code == 0 and "0 of 21 matrices are pruned" in out and "self_attn.q_proj" in out
    code, out, _ = call(capsys, "compare", path, path, "--json")
    runs = json.loads(out)
    assert code == 0 and len(runs["runs"]) == 2 and runs["notes"] == []
    code, out, _ = call(capsys, "compare", path, path)
    assert code == 0 and "sparsegpt + layer" in out
    assert call(capsys, "compare", folder)[0] == 2
    pytest.importorskip("matplotlib")
    assert call(capsys, "compare", path, "--plot", tmp_path / "errors.png")[0] == 0
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_says_what_does_not_compare(pruned):
    from pyprune.reporting.comparison import compare, differences

    path, _, _ = pruned
    rows = compare([path, path])
    rows[1] = {**rows[1], "calibration": "other", "model": "other", "evaluation": []}
    assert [text.split()[3] for text in differences(rows)] == ["evaluated", "from", "calibrated"]


def test_a_warning_of_our_own_is_one_line(monkeypatch):
    import warnings

    from pyprune.cli import commands

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        commands.main(["--version"])
    own = warnings.formatwarning("short windows", UserWarning, commands.__file__, 3)
    other = warnings.formatwarning("old", UserWarning, "/elsewhere/torch.py", 3)
    assert own == "warning: short windows\n" and "/elsewhere/torch.py:3: UserWarning: old" in other


def test_env(capsys):
    code, out, _ = call(capsys, "env", "--json")
    found = json.loads(out)
    assert code == 0 and found["pyprune"] == pyprune.__version__ and found["packages"]["torch"]
    assert set(found["backends"]["cpu"]["obs_sweep"]) == {"cuda", "triton", "cpu", "reference"}
    assert found["chosen"]["cpu"]["obs_sweep"] in ("cpu", "reference")
    code, out, _ = call(capsys, "env")
    assert code == 0 and "obs_sweep" in out and "reference" in out


def test_generate_then_calibrate_on_it(capsys, tmp_path, folder):
    code, out, _ = call(capsys, "generate", folder, "-o", tmp_path / "own.jsonl", "-n", 3, "--seq-len", 12)
    assert code == 0 and "3 sequences of 12 tokens" in out
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 4


def test_help_and_usage_errors(capsys):
    code, out, _ = call(capsys, "prune", "--help")
    assert code == 0 and "--sparsity" in out and "--calibration" in out and "--plan" in out
    code, _, err = call(capsys, "prune", "--sparsty", "0.5")
    assert code == 2 and "--sparsity" in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--version"], f"pyprune {pyprune.__version__}\n"),
        (["--help"], "prune"),
        (["prune", "--help"], "wanda|sparsegpt"),
        (["eval", "--help"], "--latency"),
    ],
)
def test_what_needs_no_model_loads_no_library(arguments, said):
    """Loading torch takes seconds; help and version are there at once."""
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'triton', 'safetensors'}\n"
        "atexit.register(lambda: print('loaded', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from pyprune.cli.commands import main\n"
        f"main({arguments!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert run.returncode == 0 and run.stderr == "loaded []\n"
    assert run.stdout == said if "--version" in arguments else said in run.stdout


def test_help_shows_the_choices_and_a_wrong_one_is_refused_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = call(capsys, "prune", "--help")
    for choice in (
        "[magnitude|wanda|sparsegpt]",
        "[auto|always|never]",
        "[groups|queries]",
        "[propagated|dense|sequential]",
    ):
        assert choice in out
    code, _, err = call(capsys, "prune", "somewhere", "-o", "out", "--method", "wander")
    assert (code, err) == (
        2,
        "error: method must be one of magnitude, wanda, sparsegpt, got 'wander'; did you mean 'wanda'?\n",
    )


def test_import_is_light_and_module_runs(tmp_path):
    """``import pyprune`` pulls in no torch; ``python -m pyprune`` is the command; output is only what it says."""
    light = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pyprune, sys; pyprune.PruneConfig; pyprune.ConfigError\n"
            "sys.exit(bool({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))",
        ]
    )
    assert light.returncode == 0
    run = subprocess.run(
        [sys.executable, "-m", "pyprune", "prune", "nowhere/at/all", "-o", str(tmp_path / "o")],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (2, "")
    *waiting, said = run.stderr.splitlines()
    assert said == "error: unknown model 'nowhere/at/all': no such file or folder"
    assert all(line.startswith("pruning · ") for line in waiting)  # where imports take longer than a few seconds


def test_every_public_name_is_there():
    assert set(pyprune.__all__) <= set(dir(pyprune))
    assert all(getattr(pyprune, name) is not None for name in pyprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        pyprune.prone  # noqa: B018
