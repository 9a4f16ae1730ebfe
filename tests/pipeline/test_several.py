"""Masks of several sparsities: each is the checkpoint of a run alone, what they share is done once, all resumes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from calling import call
from fast import FAST
from same_bytes import assert_same, source

import pyprune
from pyprune.config import ConfigError, Evaluation, PruneConfig
from pyprune.data import calibration
from pyprune.evaluation.block_by_block import Meter
from pyprune.execution.journal import FOLDER, Interrupted, Journal
from pyprune.pipeline.result import several_reported
from pyprune.reporting import words
from pyprune.reporting.comparison_page import comparison_page

RECORDS = ("report.json", "report.html", "run.yaml", "pruning.json", "README.md")
"""They tell seconds and the folder's name."""
CASES = {
    "sparsegpt": dict(stream="never"),
    "streamed": dict(stream="always"),
    "magnitude": dict(method="magnitude"),
    "sequential": dict(method="wanda", inputs="sequential"),
    "dense": dict(reconstruct="refit", inputs="dense", packed=True),
    "block": dict(reconstruct="block", global_propagation=True, reconstruction=FAST),
    "cross, streamed": dict(reconstruct="cross_block", reconstruction=FAST, stream="always"),
}


def run(model, output=None, sparsity=(0.3, 0.5), **fields):
    ids = tiny.ids(12, 24)
    fields = {
        "calibration": {"source": ids, "num_samples": 8},
        "evaluation": Evaluation(text=tiny.ids(2, 24)),
        **fields,
    }
    named = {} if output is None else {"output": str(output)}
    return pyprune.prune(model, sparsity=list(sparsity), progress=False, **named, **fields)


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in RECORDS}


@pytest.mark.parametrize("name", CASES)
def test_each_is_the_checkpoint_of_a_run_alone(tmp_path, name):
    path, fields = source(tmp_path / "dense"), CASES[name]
    result = run(path, tmp_path / "out", **fields)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sparsity-0.3", "sparsity-0.5"]
    for sparsity, single in zip((0.3, 0.5), result.singles()):
        alone = run(path, tmp_path / f"{sparsity}", [sparsity], **fields)
        folder = tmp_path / "out" / f"sparsity-{sparsity}"
        assert written(folder) == written(tmp_path / f"{sparsity}")
        for key in ("sparsity", "weights", "warnings", "backends", "coverage", "calibration"):
            assert single.report[key] == alone.report[key], key
        numbers = [
            [(row["dense"], row["pruned"]) for row in report["evaluation"]] for report in (single.report, alone.report)
        ]
        errors = [[row.get("error") for row in report["blocks"]] for report in (single.report, alone.report)]
        assert numbers[0] == numbers[1] and errors[0] == errors[1]
        assert json.loads((folder / "report.json").read_text())["config"]["output"] == str(folder)


def test_a_live_model_stays_as_it_was_and_gives_a_model_each(tmp_path):
    model = tiny.model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(result.models) == [0.3, 0.5] and result.model is result.models[0.5]
    for sparsity, pruned in result.models.items():
        alone = run(model, sparsity=[sparsity]).model
        assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), alone.parameters()))
    assert "perplexity" in repr(result) and len(result.report["curve"]) == 2
    result.save(tmp_path / "out")
    loaded = pyprune.load(tmp_path / "out" / "sparsity-0.3").model
    assert torch.equal(loaded(tiny.ids(1, 8)).logits, result.models[0.3](tiny.ids(1, 8)).logits)
    with pytest.raises(ConfigError, match="in_place=True would do nothing"):
        run(model, in_place=True)


def test_what_they_share_is_done_once(tmp_path, folder, monkeypatch):
    drawn, measured, sampled = [], [], []
    load, meter = calibration.load, Meter.__call__
    monkeypatch.setattr(calibration, "load", lambda *a, **k: (drawn.append(1), load(*a, **k))[1])
    monkeypatch.setattr(Meter, "__call__", lambda self, model, *a: (measured.append(model), meter(self, model, *a))[1])
    generate = pyprune.generate.__globals__["generate"]
    monkeypatch.setattr(
        "pyprune.pipeline.sequences.generate", lambda *a, **k: (sampled.append(1), generate(*a, **k))[1]
    )
    text = {"source": "the quick brown fox jumps over the lazy dog. " * 40, "num_samples": 4, "seq_len": 16}
    text |= {"self_generated": 2, "self_generated_for": "all"}
    result = run(str(folder), tmp_path / "out", (0.3, 0.5, 0.7), calibration=text)
    assert len(drawn) == len(sampled) == 1 and len(measured) == 4, "the dense model and three pruned ones"
    assert {single.report["calibration"]["samples"] for single in result.singles()} == {6}
    alone = run(str(folder), tmp_path / "alone", (0.7,), calibration=text)
    assert_same(tmp_path / "out" / "sparsity-0.7", alone.config.output)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_an_interrupted_list_goes_on_with_the_first_that_is_not_finished(tmp_path, monkeypatch, capsys, stream):
    path, place = source(tmp_path / "dense"), tmp_path / "out"
    np.save(tmp_path / "ids.npy", tiny.ids(12, 24).numpy())
    fields = dict(calibration=str(tmp_path / "ids.npy"), num_samples=8, evaluation={"text": str(tmp_path / "ids.npy")})
    run(path, tmp_path / "whole", stream=stream, **fields)
    point, stops = Journal.safe_point, [("sparsity-0.3", 1), ("sparsity-0.5", 2)]

    def stopping(self):
        self._stopping |= bool(stops) and (self._resumed == place) and (self.output.name, len(self.entries)) == stops[0]
        point(self)

    monkeypatch.setattr(Journal, "safe_point", stopping)
    with pytest.raises(
        Interrupted, match="stopped with 0 of 2 sparsities and 1 of 3 blocks of sparsity-0.3 done, safe"
    ):
        run(path, place, stream=stream, **fields)
    with pytest.raises(
        ConfigError, match="holds an interrupted run with 0 of 2 sparsities done; continue with --resume"
    ):
        run(path, place, stream=stream, **fields)
    with pytest.raises(ConfigError, match=r"was another one: sparsity was \[0.3, 0.5\], now 0.3"):
        run(path, place, [0.3], stream=stream, resume=True, **fields)
    stops.pop(0)
    with pytest.raises(Interrupted) as stop:
        run(path, place, stream=stream, resume=True, **fields)
    assert f"1 of 2 sparsities and 2 of 3 blocks of sparsity-0.5 done, safe in {place}; continue" in str(stop.value)
    first = place / "sparsity-0.3" / "config.json"
    changed, measured, meter = first.stat().st_mtime_ns, [], Meter.__call__
    monkeypatch.setattr(Meter, "__call__", lambda self, *a: (measured.append(1), meter(self, *a))[1])
    stops.clear()
    code, out, _ = call(capsys, "prune", "--resume", "-o", place)
    assert code == 0 and "at 0.3" in out and "at 0.5" in out
    assert len(measured) == 1, "what is known of the dense model and of the first stays"
    assert first.stat().st_mtime_ns == changed and not (place / FOLDER).exists()
    assert_same(tmp_path / "whole", place)
    with pytest.raises(ConfigError, match="nothing to resume"):
        run(path, place, stream=stream, resume=True, **fields)
    code, _, err = call(capsys, "prune", "--resume", "-o", place)
    assert code == 2 and "holds a finished run: there is nothing to resume" in err


def test_a_list_stopped_between_two_runs_keeps_the_first(tmp_path, monkeypatch):
    path, place = source(tmp_path / "dense"), tmp_path / "out"
    commit = Journal.commit

    def signalled(self, index, record):
        commit(self, index, record)
        self._stopping |= index == 2

    monkeypatch.setattr(Journal, "commit", signalled)
    with pytest.raises(Interrupted, match="stopped with 1 of 2 sparsities done"):
        run(path, place)
    monkeypatch.undo()
    assert (place / "sparsity-0.3" / "config.json").is_file() and not (place / "sparsity-0.5").exists()
    run(path, place, resume=True)
    run(path, tmp_path / "whole")
    assert_same(tmp_path / "whole", place)


def test_a_list_stopped_before_its_first_block_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Meter, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="nothing is left"):
        run(source(tmp_path / "dense"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(pattern="2:4", sparsity=[0.3, 0.5]), "contradicts pattern '2:4', which is sparsity 0.5"),
        (dict(sparsity=[0.5, 0.3, 0.5]), "two values for the folder sparsity-0.5: 0.5,0.3,0.5"),
        (dict(sparsity=[0.3, 1.0]), r"sparsity must be in \[0, 1\)"),
        (dict(sparsity=[]), "empty list"),
    ],
)
def test_lists_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**fields)


def test_a_list_of_one_is_that_sparsity(tmp_path):
    assert PruneConfig(sparsity=[0.3]) == PruneConfig(sparsity=0.3)


def test_a_warning_that_does_not_hold_for_all_names_its_sparsity():
    def report(*warnings):
        model = {"parameters": 7}
        return {
            "sparsity": 0.3,
            "model": model,
            "evaluation": [],
            "generalisation": None,
            "seconds": {"solve": 2.0},
            "peak_memory_bytes": 1,
            "warnings": list(warnings),
        }

    found = several_reported([report("all", "one"), report("all")], PruneConfig(sparsity=[0.3, 0.5]))
    assert found["warnings"] == ["all", "at 0.3: one"] and found["seconds"] == {"solve": 4.0}


def test_each_scalar_names_its_sparsity(tmp_path):
    told = []
    run(tiny.model("llama"), track=lambda step, values: told.append((step, sorted(values))))
    assert [step for step, _ in told] == [0, 1, 2, 3] * 2
    assert "sparsity-0.3/block/error" in told[0][1] and any("sparsity-0.5/perplexity/pruned" in n for n in told[-1][1])


def test_a_new_user_s_list_from_the_plan_to_the_comparison(tmp_path, folder, capsys):
    np.save(tmp_path / "ids.npy", tiny.ids(8, 24).numpy())
    arguments = [
        "prune",
        folder,
        "-o",
        tmp_path / "out",
        "--sparsity",
        "0.3,0.5",
        "--calibration",
        tmp_path / "ids.npy",
    ]
    arguments += ["--num-samples", 6, "--text", tmp_path / "ids.npy"]
    code, out, _ = call(capsys, *arguments, "--plan")
    assert code == 0 and "4 per block (statistics, propagation), 2 for each of 2 sparsities" in out
    code, out, err = call(capsys, *arguments)
    text = "".join(out.split())
    assert code == 0 and "sparsity 0.5, 2 of 2" in err and err.count("measuring the dense model") == 1
    result = json.loads((tmp_path / "out" / "sparsity-0.5" / "report.json").read_text())
    rows = result["evaluation"]
    shown = [f"{words.perplexity_text(row['pruned'])}(×{row['ratio']:.2f}" for row in rows]
    assert len(rows) == 2 and f"perplexity{shown[0]}" in text and shown[1] in text
    assert all(f"perplexity{words.perplexity_text(row['dense'])}({row['windows']}windows" in text for row in rows)
    for name in ("sparsity-0.3", "sparsity-0.5"):
        assert f"{tmp_path}/out/{name}/report.html" in text and (tmp_path / "out" / name / "report.html").is_file()
        assert f"# {name}" in (tmp_path / "out" / name / "README.md").read_text()
    found = pyprune.inspect(tmp_path / "out")["members"]
    assert [round(member["sparsity"], 2) for member in found] == [0.3, 0.5]
    rows = pyprune.compare([tmp_path / "out"])
    assert [round(row["sparsity"], 2) for row in rows] == [0.3, 0.5]
    assert rows[0]["evaluation"][0]["dense"] == rows[1]["evaluation"][0]["dense"]
    page = comparison_page([tmp_path / "out"])
    assert "sparsity-0.3" in page and "sparsity-0.5" in page and "Trade-off" in page
    for command in (["eval"], ["eval", "--latency"], ["pack", "-o", tmp_path / "p"], ["refine", "-o", tmp_path / "r"]):
        code, _, err = call(capsys, *command, tmp_path / "out")
        assert code == 2 and "holds several sparsities; name one of them" in err, command
    with pytest.raises(ConfigError, match="holds several sparsities; name one of them"):
        pyprune.load(tmp_path / "out")


def test_the_plan_counts_every_sparsity(tmp_path):
    path = source(tmp_path / "dense")

    def plan(sparsity, **fields):
        settings = {"calibration": tiny.ids(8, 24), "evaluation": {"text": tiny.ids(4, 24), "max_windows": 4}, **fields}
        return pyprune.plan(path, sparsity=sparsity, output=str(tmp_path / "out"), **settings)

    one, two, three = plan(0.5), plan([0.3, 0.5]), plan([0.3, 0.5, 0.7])
    size = one["disk_bytes"]["checkpoint"]
    assert [found["disk_bytes"]["checkpoint"] for found in (two, three)] == [2 * size, 3 * size]
    assert two["passes"] == {name: 2 * count for name, count in one["passes"].items()}
    assert two["flops"]["solve"] == 2 * one["flops"]["solve"]
    assert two["flops"]["evaluation"] == 1.5 * one["flops"]["evaluation"], "the dense model is measured once"
    assert two["memory_bytes"]["weights"] == three["memory_bytes"]["weights"] == 2 * one["memory_bytes"]["weights"]
    assert [entry["asked"] for entry in two["achieved"]] == [0.3, 0.5]
    packed = plan([0.3, 0.9], packed=True)["disk_bytes"]
    assert packed["checkpoint"] < 2 * size < packed["while_running"]
