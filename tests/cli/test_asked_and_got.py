"""Sparsity as it was asked for beside what was achieved, in plan, summary, report and card; nothing for nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from calling import call

from pyprune.cli.options import as_options


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, tiny.ids(12, 24).numpy())
    return path


def heads(capsys, folder, ids, *arguments):
    return call(capsys, "prune", folder, "--pattern", "heads", "--calibration", ids, "--no-evaluation", *arguments)


def test_a_run_that_would_remove_nothing_is_refused_with_what_can_be_reached(capsys, tmp_path, folder, ids):
    """Two key/value groups: a fifth of them is none."""
    for ask in (["-o", tmp_path / "o"], ["--plan"]):
        code, out, err = heads(capsys, folder, ids, "--sparsity", 0.2, *ask)
        assert code == 2 and out == ""
        assert "sparsity 0.2 would remove nothing: heads go in steps of one in 2" in err
        assert err.endswith("so these sparsities can be reached: 0.5\n")
    assert not (tmp_path / "o").exists()
    code, _, err = call(
        capsys, "prune", folder, "-o", tmp_path / "o", "--method", "wanda", "--sparsity", "0.001", "--no-evaluation"
    )
    assert code == 2 and "would remove nothing: a row has 64 weights, of which one is sparsity 0.0156" in err


def test_asked_and_achieved_stand_side_by_side(capsys, tmp_path, folder, ids):
    asked = "0.4 asked for, 0.5 of the heads"
    code, out, _ = heads(capsys, folder, ids, "--sparsity", 0.4, "--plan")
    assert code == 0 and f"{asked} will be removed" in out and "sparsity 0.4 was asked for, 0.5 of the heads" in out
    code, out, err = heads(capsys, folder, ids, "--sparsity", 0.4, "-o", tmp_path / "o")
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    model = report["model"]
    assert f"{asked} removed; {model['parameters']:,} parameters are left of {model['parameters_dense']:,}" in out
    assert (report["sparsity_asked"], report["sparsity"]) == (0.4, 0.5)
    assert report["structured"]["removed"] == {"heads": 0.5}
    assert any("sparsity 0.4 was asked for, 0.5 of the heads are removed" in text for text in report["warnings"])
    card = (tmp_path / "o" / "README.md").read_text()
    assert "Sparsity 0.4 was asked for; 50.00% of the heads are gone" in card
    assert f"{model['parameters'] / model['parameters_dense']:.1%}" in card


def test_sizes_a_stock_config_cannot_say_get_an_option_that_works(capsys, tmp_path, ids):
    """BERT's head size is hidden size over heads, so that no number of heads but its own is a standard one."""
    tiny.model("bert").save_pretrained(tmp_path / "bert")
    code, _, err = heads(capsys, tmp_path / "bert", ids, "--sparsity", 0.5, "-o", tmp_path / "o")
    assert code == 2 and "Set --nonstandard save (pyprune.load loads it) or --nonstandard pad" in err
    code, out, err = heads(
        capsys, tmp_path / "bert", ids, "--sparsity", 0.5, "-o", tmp_path / "o", "--nonstandard", "save"
    )
    assert code == 0 and "0.5 asked for, 0.5 of the heads removed" in out, err


@pytest.mark.parametrize(
    "sentence, spelt",
    [
        (
            "give more, or set num_samples=4 or a smaller seq_len",
            "give more, or set --num-samples 4 or a smaller --seq-len",
        ),
        ("or set evaluation.enabled=False", "or set --no-evaluation"),
        (
            "method='wanda' or 'sparsegpt'; structured.damping=1",
            "--method wanda or sparsegpt; --structured-damping 1",
        ),
        ("texts/seq_len/x.jsonl: method and window stay words", "texts/seq_len/x.jsonl: method and window stay words"),
    ],
)
def test_settings_are_spelt_as_options(sentence, spelt):
    assert as_options(sentence) == spelt
