"""Structured models and folders of several sparsities, inspected, compared and described as what they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from calling import call

import pyprune
from pyprune.config import ConfigError


@pytest.fixture(scope="module")
def curve(tmp_path_factory, folder):
    """Two sparsities of one run, from a folder whose card has a licence."""
    root = tmp_path_factory.mktemp("curve")
    np.save(root / "ids.npy", tiny.ids(8, 24).numpy())
    result = pyprune.prune(
        folder,
        output=root / "out",
        pattern="neurons",
        sparsity=[0.25, 0.5],
        text=str(root / "ids.npy"),
        calibration=str(root / "ids.npy"),
        num_samples=6,
        progress=False,
    )
    return root / "out", result


def test_a_structured_model_is_inspected_by_its_structure(capsys, curve):
    path = curve[0] / "sparsity-0.5"
    code, out, _ = call(capsys, "inspect", path)
    text = " ".join(out.split())
    report = json.loads((path / "report.json").read_text())
    left, dense = report["model"]["parameters"], report["model"]["parameters_dense"]
    assert code == 0 and f"structured: 0.5 of the neurons removed; {left:,} parameters are left of {dense:,}" in text
    assert "the config says intermediate_size 32" in text and "violations" not in text and "2:4" not in text
    assert "32×32" in text and "neurons" in text


def test_a_folder_of_several_sparsities_is_one_thing(capsys, curve):
    root, result = curve
    found = pyprune.inspect(root)
    assert [member["path"] for member in found["members"]] == [str(root / "sparsity-0.25"), str(root / "sparsity-0.5")]
    code, out, _ = call(capsys, "inspect", root)
    assert code == 0 and out.count("structured: ") == 2
    rows = pyprune.compare([root])
    assert [row["sparsity"] for row in rows] == [0.25, 0.5]
    with pytest.raises(
        ConfigError, match="holds several sparsities; name one of them: .*sparsity-0.25, .*sparsity-0.5"
    ):
        pyprune.load(root)
    summary = "".join(result.summary().split())
    for name in ("sparsity-0.25", "sparsity-0.5"):
        assert f"{root}/{name}/report.html" in summary and (root / name / "report.html").is_file()


def test_a_card_says_sizes_and_how_to_repeat(curve, folder):
    path = curve[0] / "sparsity-0.5"
    card, report = (path / "README.md").read_text(), json.loads((path / "report.json").read_text())
    assert "pipeline_tag: text-generation" in card.split("---")[1]
    sizes = [sum(f.stat().st_size for f in where.glob("*.safetensors")) for where in (path, folder)]
    assert [report["model"]["file_bytes"], report["model"]["file_bytes_dense"]] == sizes
    assert "smaller than the dense model's" in card and "`run.yaml` repeats the pruning" in card


def test_a_live_model_s_card_says_what_run_yaml_lacks(tmp_path, tokenizer):
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    secret = "a customer's own words, many of them. " * 20
    result = pyprune.prune(
        model,
        tokenizer=tokenizer,
        method="wanda",
        calibration=secret,
        num_samples=2,
        seq_len=16,
        evaluation=False,
        progress=False,
    )
    result.save(tmp_path / "o")
    card, run = (tmp_path / "o" / "README.md").read_text(), (tmp_path / "o" / "run.yaml").read_text()
    assert "repeats the run once the model and texts given in memory have a name there" in card
    assert "customer" not in card + run + (tmp_path / "o" / "report.json").read_text() and "sha256" in run
    with pytest.raises(ConfigError, match="was in memory when this configuration was written"):
        pyprune.prune(model, tmp_path / "o" / "run.yaml", tokenizer=tokenizer, progress=False)
    again = pyprune.prune(model, tmp_path / "o" / "run.yaml", calibration=secret, tokenizer=tokenizer, progress=False)
    assert again.report["calibration"]["fingerprint"] == result.report["calibration"]["fingerprint"]


def test_a_result_in_a_notebook(curve):
    result = curve[1]
    assert len(repr(result)) < 300 and repr(result).startswith("<PruneResult of ") and "neurons" in repr(result)
    page = result._repr_html_()
    assert page.startswith("<table>") and "asked for" in page or "at 0.25" in page
    assert "at 0.25" in result.summary()
