"""A whole study on a tiny model: its figures are those of single runs, and it is done once, by whoever is there."""

from __future__ import annotations

import json

import pytest
import tiny

import pyprune
from pyprune.cli.commands import main
from pyprune.config import Calibration, ConfigError, Evaluation
from pyprune.evaluation.block_by_block import Meter
from pyprune.studies.claims import Claims

COMMON = dict(
    calibration=Calibration(source=tiny.ids(8, 16), held_out=2),
    evaluation=Evaluation(text=[tiny.ids(3, 16, seed=1), tiny.ids(2, 16, seed=2)]),
    progress=False,
)
AXES = dict(methods=["magnitude", "sparsegpt"], sparsities=[0.25, 0.5], seeds=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama"
    tiny.model("llama", num_hidden_layers=2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "s"
    return folder, pyprune.study(model, folder, **AXES, **COMMON)


def reports(folder) -> dict[str, dict]:
    found = folder.glob("cells/**/report.json")
    return {p.parent.relative_to(folder / "cells").as_posix(): json.loads(p.read_text()) for p in found}


def measures(report: dict) -> list:
    """What a run found, but for times and places."""
    rows = [[row["dense"], row["pruned"]] for row in report["evaluation"]]
    errors = [row.get("error") for row in [*report["weights"], *report["blocks"]]]
    return [rows, errors, report["sparsity"], report["calibration"]["fingerprint"]]


def test_cells_find_what_single_runs_find(model, done):
    folder, result = done
    cells = reports(folder)
    assert set(cells) == {f"magnitude-unstructured-{s}-none-seed0" for s in (0.25, 0.5)} | {
        f"sparsegpt-unstructured-{s}-layer-seed{seed}" for s in (0.25, 0.5) for seed in (0, 1)
    }
    alone = pyprune.prune(str(model), method="sparsegpt", sparsity=0.5, seed=1, **COMMON)
    assert measures(alone.report) == measures(cells["sparsegpt-unstructured-0.5-layer-seed1"])
    assert result["finished"] == result["cells"] == 6 and not result["failed"] and not result["waiting"]
    row = next(row for row in result["rows"] if row["how"] == "sparsegpt + layer" and row["asked"] == 0.5)
    both = [cells[f"sparsegpt-unstructured-0.5-layer-seed{seed}"]["evaluation"][0]["pruned"] for seed in (0, 1)]
    assert row["texts"][0]["pruned"]["mean"] == pytest.approx(sum(both) / 2)
    for name in ("table.json", "table.md", "table.csv", "study.html", "settings.json", "dense.json"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "table.json").read_text()) == result
    page = (folder / "cells/sparsegpt-unstructured-0.5-layer-seed1/report.html").read_text()
    assert "<h1>sparsegpt-unstructured-0.5-layer-seed1</h1>" in page
    assert not list((folder / "cells").glob(".*")) and not list(folder.glob("**/*.safetensors"))


def test_the_dense_model_is_loaded_and_measured_once(model, tmp_path, monkeypatch):
    from pyprune.studies import study

    measured, loaded, measure, whole = [], [], Meter.__call__, study.whole
    monkeypatch.setattr(Meter, "__call__", lambda *a: measured.append(1) or measure(*a))
    monkeypatch.setattr(study, "whole", lambda *a: loaded.append(1) or whole(*a))
    pyprune.study(model, tmp_path / "s", **AXES, **COMMON)
    assert len(loaded) == 1 and len(measured) == 6 + 1
    measured.clear()
    pyprune.study(model, tmp_path / "s", **{**AXES, "sparsities": [0.25, 0.5, 0.75]}, **COMMON)
    assert len(measured) == 3, "the three new runs; the dense model's figures lie in the folder"


def test_a_finished_study_does_nothing_and_other_settings_are_refused(model, done, monkeypatch):
    folder, result = done
    monkeypatch.setattr("pyprune.studies.study.prune_copy", lambda *a: pytest.fail("it was done"))
    assert pyprune.study(model, folder, **AXES, **COMMON) == result
    other = {**COMMON, "calibration": Calibration(source=tiny.ids(8, 16, seed=9), held_out=2)}
    with pytest.raises(ConfigError, match="a study with another calibration"):
        pyprune.study(model, folder, **AXES, **other)


def test_another_model_under_the_same_name_is_refused(model, tmp_path):
    place = tmp_path / "m"
    tiny.model("llama", num_hidden_layers=2).save_pretrained(place)
    pyprune.study(place, tmp_path / "s", seeds=1, **COMMON)
    tiny.model("llama", seed=1, num_hidden_layers=2).save_pretrained(place)
    with pytest.raises(ConfigError, match="a study with another weights"):
        pyprune.study(place, tmp_path / "s", seeds=2, **COMMON)


def test_structured_sparsities_on_shared_statistics_are_those_of_single_runs(model, tmp_path):
    axes = dict(patterns=["neurons"], sparsities=[0.25, 0.5], seeds=1)
    common = dict(COMMON, inputs="dense", calibration=tiny.ids(8, 16))
    result = pyprune.study(model, tmp_path / "s", **axes, **common)
    assert result["cells"] == 1 and [row["asked"] for row in result["rows"]] == [0.25, 0.5]
    alone = pyprune.prune(str(model), pattern="neurons", sparsity=0.25, **common)
    cell = reports(tmp_path / "s")["wifv-neurons-0.25_0.5-liar-seed0/sparsity-0.25"]
    rows = [[row["dense"], row["pruned"]] for row in alone.report["evaluation"]]
    assert [[row["dense"], row["pruned"]] for row in cell["evaluation"]] == [pytest.approx(row) for row in rows]


def test_a_run_that_fails_is_told_and_the_others_are_done(model, tmp_path):
    """3:8 divides the inputs of no weight of 36 columns, which only the run itself sees."""
    place = tmp_path / "odd"
    tiny.model("llama", num_hidden_layers=2, intermediate_size=36).save_pretrained(place)
    result = pyprune.study(place, tmp_path / "s", patterns=["unstructured", "3:8"], seeds=1, **COMMON)
    assert result["finished"] == 1 and "does not divide" in result["failed"]["sparsegpt-3to8-0.625-layer-seed0"]
    assert "does not divide" in (tmp_path / "s" / "study.html").read_text()


def test_what_somebody_else_has_is_left_to_them_and_models_are_kept(model, tmp_path):
    with Claims(tmp_path / "s" / "claims").claim("magnitude-unstructured-0.5-none-seed0") as mine:
        assert mine
        axes = dict(methods=["magnitude", "wanda"], seeds=1)
        result = pyprune.study(model, tmp_path / "s", keep_models=True, **axes, **COMMON)
    assert list(result["waiting"]) == ["magnitude-unstructured-0.5-none-seed0"] and result["finished"] == 1
    kept = tmp_path / "s" / "cells" / "wanda-unstructured-0.5-none-seed0"
    assert pyprune.inspect(kept)["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_streamed_runs_leave_reports_and_no_models(model, tmp_path):
    result = pyprune.study(model, tmp_path / "s", methods=["wanda"], seeds=1, stream="always", **COMMON)
    assert result["finished"] == 1 and not list((tmp_path / "s").glob("**/*.safetensors"))
    assert (tmp_path / "s/cells/wanda-unstructured-0.5-none-seed0/report.html").is_file()


def test_two_workers_share_one_folder(model, done, tmp_path, monkeypatch):
    """While one worker is at its first run, another one comes and does all the others."""
    from pyprune.studies import study

    prune_copy, at_work, by = study.prune_copy, [], []

    def met(opened, config, *rest):
        at_work.append(config)
        by.append(len(at_work))
        if len(by) == 1:
            second = pyprune.study(model, tmp_path / "s", **AXES, **COMMON)
            assert second["finished"] == 5 and len(second["waiting"]) == 1
        result = prune_copy(opened, config, *rest)
        at_work.remove(config)
        return result

    monkeypatch.setattr(study, "prune_copy", met)
    first = pyprune.study(model, tmp_path / "s", **AXES, **COMMON)
    assert first["finished"] == 6 and by == [1, 2, 2, 2, 2, 2], "each run was one worker's"
    both, one = reports(tmp_path / "s"), reports(done[0])
    assert {name: measures(report) for name, report in both.items()} == {n: measures(r) for n, r in one.items()}


def test_the_command_says_how_far_is_safe(folder, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    arguments = (
        f"study {folder} -o {tmp_path / 's'} --methods wanda --sparsities 0.2,0.4 --seeds 1 --calibration {text}"
    )
    arguments += f" --num-samples 4 --seq-len 16 --text {text} --window 16 --max-windows 4 --max-ratio 100"
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    told = " ".join(out.out.split())
    assert "recommended: Zeros inside the matrices: wanda + none, unstructured, sparsity 0.4." in told
    assert "0 of 2 runs done" in out.err
