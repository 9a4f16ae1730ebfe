"""Bad input: exit code 2, one clear sentence on standard error, nothing written, nothing half done."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.cli import commands
from pyprune.config import ConfigError, Evaluation


@pytest.fixture(scope="module")
def place(tmp_path_factory, folder):
    """A folder with the inputs the cases below name."""
    path = tmp_path_factory.mktemp("bad")
    np.save(path / "ids.npy", tiny.ids(12, 24).numpy())
    np.save(path / "wide.npy", tiny.ids(12, 24).numpy() + 90)
    np.save(path / "floats.npy", np.random.default_rng(0).random((12, 24)))
    (path / "short.txt").write_text("Too short.")
    (path / "empty.txt").touch()
    (path / "prose.txt").write_text("It is a truth universally acknowledged.\n" * 40)
    (path / "misspelt.yaml").write_text("sparsty: 0.5\nseed: 1\n")
    (path / "broken.yaml").write_text("sparsity: [0.5\n")
    (path / "full").mkdir()
    (path / "full" / "something").touch()
    (path / "empty").mkdir()
    shutil.copytree(folder, path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, path / "nan" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder, path / "hot")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"].fill_(3e38)
    save_file(weights, path / "hot" / "model.safetensors", metadata={"format": "pt"})
    tiny.model("bert").save_pretrained(path / "encoder")
    tiny.model("llama").save_pretrained(path / "wordless")
    shutil.copytree(folder, path / "model")
    return path


PRUNE = ["prune", "model", "-o", "out", "--num-samples", "8"]
CALIBRATED = [*PRUNE, "--calibration", "ids.npy", "--no-evaluation"]
CASES = {
    "unknown model": (["prune", "nowhere", "-o", "out"], "cannot load model 'nowhere'"),
    "folder without a model": (["prune", "empty", "-o", "out"], "model folder 'empty' has no config.json"),
    "no model": (["prune", "-o", "out"], "no model"),
    "no output": (["prune", "model"], "no output folder: name one with -o"),
    "output not empty": ([*PRUNE, "-o", "full"], "full' is not empty; choose another or empty it"),
    "output is a file": ([*PRUNE, "-o", "short.txt"], "is a file; name a folder"),
    "sparsity 1": ([*CALIBRATED, "--sparsity", "1"], r"sparsity must be in \[0, 1\), the fraction of zeros, got 1.0"),
    "sparsity below 0": ([*CALIBRATED, "--sparsity", "-0.5"], r"got -0.5"),
    "sparsity in per cent": ([*CALIBRATED, "--sparsity", "50"], r"got 50.0; did you mean 0.5\?"),
    "sparsity with a percent sign": ([*CALIBRATED, "--sparsity", "50%"], r"got '50%'; did you mean 0.5\?"),
    "packaged model misspelt": (
        ["prune", "smolm2-135m", "-o", "out"],
        r"folder; did you mean 'smollm2-135m'\?",
    ),
    "target misspelt": ([*CALIBRATED, "--targets", "mlpp"], r"it matches nothing, did you mean 'mlp'\?"),
    "structured reconstruction of masks": (
        [*CALIBRATED, "--reconstruct", "liar"],
        "--reconstruct liar is for heads and neurons: set --pattern neurons",
    ),
    "widths that no stock configuration says": (
        [*CALIBRATED, "--pattern", "neurons", "--allocation", "global"],
        "--allocation global gives every block a width of its own.* set --nonstandard save .* or --nonstandard pad",
    ),
    "empty text": ([*PRUNE, "--calibration", "empty.txt"], "^error: empty.txt is empty"),
    "a file instead of a checkpoint": (["inspect", "short.txt"], "short.txt is a file; give the folder"),
    "task that nobody knows": (["eval", "model", "--tasks", "hellaswagg"], r"nor a task of lm-eval|not installed"),
    "device of another name": (
        [*CALIBRATED, "--device", "gpu"],
        r"cpu, cuda or cuda:N; did you mean 'cuda'\?",
    ),
    "sparsity not a number": ([*CALIBRATED, "--sparsity", "half"], "sparsity must be a number.* got 'half'"),
    "sparsity against N:M": (
        [*CALIBRATED, "--pattern", "2:4", "--sparsity", "0.3"],
        "sparsity 0.3 contradicts pattern '2:4', which is sparsity 0.5",
    ),
    "N:M reversed": ([*CALIBRATED, "--pattern", "4:2"], r"did you mean '2:4'\?"),
    "pattern does not divide": (
        [*CALIBRATED, "--pattern", "2:5"],
        "pattern 2:5 does not divide the 32 inputs of model.layers.0.self_attn.q_proj",
    ),
    "method misspelt": ([*CALIBRATED, "--method", "sparsegtp"], r"did you mean 'sparsegpt'\?"),
    "config field misspelt": (
        ["prune", "model", "-o", "out", "--config", "misspelt.yaml"],
        r"unknown field 'sparsty' in misspelt.yaml; did you mean 'sparsity'\?",
    ),
    "config not YAML": (["prune", "model", "-o", "out", "--config", "broken.yaml"], "not valid YAML"),
    "config missing": (
        ["prune", "model", "-o", "out", "--config", "gone.yaml"],
        "no such configuration file: gone.yaml",
    ),
    "text too short": (
        [*PRUNE, "--calibration", "short.txt"],
        "calibration text from short.txt is shorter than one sequence of 128 tokens",
    ),
    "fewer sequences than asked": (
        [*PRUNE, "--calibration", "prose.txt", "--seq-len", "300"],
        "8 calibration samples of 300 tokens were asked for, but prose.txt has only 5",
    ),
    "fewer rows than asked": (
        [*CALIBRATED, "--num-samples", "64"],
        "64 calibration samples were asked for, but ids.npy has 12 rows",
    ),
    "calibration missing": ([*PRUNE, "--calibration", "gone.txt"], "no such file or folder: gone.txt"),
    "calibration of floats": ([*PRUNE, "--calibration", "floats.npy"], "token ids must be integers, got float64"),
    "ids outside the vocabulary": (
        [*PRUNE, "--calibration", "wide.npy"],
        r"token id \d+ in sequence \d+ is outside the model's vocabulary of 104",
    ),
    "text without a tokenizer": (
        ["prune", "wordless", "-o", "out", "--calibration", "prose.txt"],
        "calibration text needs a tokenizer",
    ),
    "evaluation text too short": (
        [*PRUNE, "--calibration", "ids.npy", "--text", "short.txt"],
        "evaluation text from short.txt has 10 tokens, fewer than one window of 128",
    ),
    "target matches nothing": (
        [*CALIBRATED, "--targets", "qproj"],
        "targets pattern 'qproj' selects no prunable weight: it matches nothing",
    ),
    "ignore matches nothing": ([*CALIBRATED, "--ignore", "mlp.gate"[::-1]], "ignore pattern 'etag.plm' selects no"),
    "NaN in weights": (
        ["prune", "nan", "-o", "out", "--calibration", "ids.npy", "--num-samples", "8", "--no-evaluation"],
        r"model.layers.1.mlp.up_proj.weight holds nan at \[3, 5\]",
    ),
    "infinite activations": (
        ["prune", "hot", "-o", "out", "--calibration", "ids.npy", "--num-samples", "8", "--no-evaluation"],
        "input of model.layers.1.self_attn.q_proj.weight is -?inf at",
    ),
    "device": ([*CALIBRATED, "--device", "warp"], "device 'warp' cannot be used"),
    "no calibration at all": ([*PRUNE, "--num-samples", "0"], "there is nothing to calibrate on"),
    "eval of no causal model": (["eval", "encoder", "--text", "ids.npy"], "does not predict the next token"),
    "eval of NaN": (["eval", "nan", "--text", "ids.npy"], "perplexity on ids.npy is nan"),
    "eval of a missing text": (["eval", "model", "--text", "gone/no/where"], "no such file or folder: gone/no/where"),
    "inspect of nothing": (["inspect", "empty"], "empty holds no .safetensors or .bin weights"),
    "compare of a model that is not ours": (["compare", "model"], "model has no report.json"),
}


@pytest.mark.parametrize("name", CASES)
def test_exit_code_two_one_sentence_nothing_written(name, place, monkeypatch, capsys):
    arguments, sentence = CASES[name]
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2, err
    assert out == ""
    said = [
        line for line in err.splitlines() if not line.startswith(("pruning ", "evaluating "))
    ]  # progress up to the discovery
    assert len(said) == 1 and said[0].startswith("error: "), err
    assert re.search(sentence, said[0]), said[0]
    leftovers = [p for p in sorted(place.iterdir()) if p not in before]
    assert not any(p.is_file() or (p / "config.json").exists() for p in leftovers), leftovers
    for path in leftovers:
        shutil.rmtree(path)  # the journal of blocks finished before the discovery


def test_weights_are_untouched_by_a_refused_run():
    model = tiny.model("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for fields in ({"pattern": "2:5"}, {"targets": ["nothing"]}, {"calibration": tiny.ids(4, 24) + 200}):
        with pytest.raises(ConfigError):
            pyprune.prune(
                model,
                in_place=True,
                progress=False,
                evaluation=Evaluation(enabled=False),
                **{"calibration": tiny.ids(8, 24), **fields},
            )
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_unexpected_errors_keep_their_traceback(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(pyprune, "evaluate", lambda *_, **__: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        commands.main(["eval", str(folder)])
