"""The benchmark suite: its rows say what was measured, comparisons find changes and no noise, tables follow results."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The benchmarks are modules of the repository, not of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def row(samples, name="gram_update/float32", backend="cpu", **more):
    from benchmarks.rows import Row

    return Row("ops", name, "63×70", "float32", "cpu", backend, samples, **more)


def noisy(seconds: float, seed: int, count: int = 15) -> list[float]:
    generator = random.Random(seed)
    return [seconds * (1 + 0.1 * generator.random()) for _ in range(count)]


def test_a_row_survives_its_file(tmp_path):
    from benchmarks.rows import read, write

    rows = [row([0.003, 0.001, 0.002], figures={"error": 1e-6}, flops=10, bytes=20)]
    found, about = read(write(tmp_path / "a.json", rows, preset="quick"))
    assert found == rows and about["preset"] == "quick"
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["quantiles"] == {
        "p10": 0.0012,
        "p50": 0.002,
        "p90": 0.0028,
    }
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(SystemExit, match="no result file"):
        read(tmp_path / "b.json")


def test_ratio_and_share_are_those_of_the_medians_and_the_floor():
    from benchmarks.rows import against, bounded

    ours, eager = row([1.0, 3.0, 2.0], flops=4e9, bytes=3e9), row([6.0, 5.0, 6.0], backend="eager")
    against([ours, eager], "eager")
    assert ours.ratio == 3 and eager.ratio == 1 and ours.baseline == "eager"
    bounded([ours], {"copy": 1e10, "float32": 4e9})
    assert (ours.ceiling, ours.share) == ("float32", 0.5)  # a second of products, 0.3 of bytes, took two
    bounded([ours], {"copy": 2e9, "float32": 4e9})
    assert (ours.ceiling, ours.share) == ("copy", 0.75)


def test_no_ratio_to_a_baseline_that_is_red():
    from benchmarks.rows import against

    ours = row([1.0])
    against([ours, row([2.0], backend="eager", correct="red: off")], "eager")
    assert ours.ratio is None


def test_comparing_finds_a_change_and_not_the_noise():
    from benchmarks.compare import changes

    before = [row(noisy(1e-3, i), f"op{i}") for i in range(40)]
    after = [row(noisy(1e-3, 100 + i), f"op{i}") for i in range(40)]
    assert [change for change in changes(before, after) if change.counts] == []
    after[7] = row(noisy(1.2e-3, 7), "op7")
    [slower] = [change for change in changes(before, after) if change.counts]
    assert slower.key[1] == "op7" and slower.ratio == pytest.approx(1 / 1.2, rel=0.05)


def test_few_samples_need_a_large_change_and_a_lost_green_always_counts():
    from benchmarks.compare import changes

    assert [c.counts for c in changes([row([1.0])], [row([1.2])])] == [False]
    assert [c.counts for c in changes([row([1.0])], [row([1.3])])] == [True]
    [lost] = changes([row([1.0])], [row([1.0], correct="red: off by one")])
    assert lost.counts and "red: off by one" in lost.colour


def test_files_of_a_faster_machine_say_so():
    from benchmarks.compare import text

    rows = [row([1.0])]
    said = text(
        (rows, {"ceilings": {"copy": 2e10, "float32": 2.64e11}}),
        (rows, {"ceilings": {"copy": 2.1e10, "float32": 1.16e11}}),
    )
    assert "ceiling float32: 264 → 116 G/s" in said and "ceiling copy" not in said


def test_exponents_are_those_of_a_power_law():
    from benchmarks.rows import Row
    from benchmarks.scaling import fits

    rows = [
        Row("scaling", "width", f"{x}", "float32", "cpu", "pyprune", [2e-9 * x**2.5], figures={"x": x})
        for x in (64, 128, 512)
    ]
    assert fits(rows) == {"width": {"exponent": 2.5, "points": 3}}


def test_every_op_says_its_work_and_every_case_is_of_its_size():
    """An op without an entry would be measured without a floor."""
    from benchmarks import ops_group
    from pyprune.config import OPS
    from pyprune.ops import classes

    assert set(ops_group.WORK) == set(OPS)
    for device in ("cpu", "cuda"):
        for preset in ("smoke", "quick", "full"):
            for key, size in ops_group.cases(ops_group.Wanted(device, preset)):
                flops, moved = ops_group.WORK[classes.op_of(key)](*size)
                assert flops >= 0 and moved > 0, (key, size)


def test_a_wrong_kernel_is_red_and_a_raising_one_has_no_time(monkeypatch):
    from benchmarks import ops_group
    from pyprune.ops import reference

    def wrong(w, k, **options):
        return ~reference.select_mask(w, k, **options)

    def raising(w, k, **options):
        raise ValueError("no such size")

    monkeypatch.setattr(
        ops_group,
        "contenders",
        lambda key, wanted: {"wrong": wrong, "raising": raising, "eager": reference.select_mask},
    )
    wanted = ops_group.Wanted("cpu", "smoke")
    found = ops_group.measure("select_mask/row", (5, 71, "row"), wanted, {"copy": 1e10}, 1)
    colours = {r.backend: r.correct for r in found}
    assert colours["wrong"].startswith("red") and colours["eager"] == "green"
    assert "no such size" in colours["raising"] and not [r for r in found if r.backend == "raising"][0].samples


def test_tables_of_the_documents_are_those_of_the_results():
    from benchmarks.tables import outdated

    assert [str(path) for path in outdated()] == [], "run python -m benchmarks readme"


def test_a_table_that_was_edited_by_hand_is_found(tmp_path):
    from benchmarks import tables

    document = "before\n<!-- table: ops-cpu -->\nold\n<!-- end of table -->\nafter\n"
    made = tables.rewritten(document)
    assert "old" not in made and "| `gram_update/float32` |" in made and made.startswith("before\n")
    assert tables.rewritten(made) == made
    with pytest.raises(SystemExit, match="no table is named 'ops-tpu'"):
        tables.rewritten(document.replace("ops-cpu", "ops-tpu"))


@pytest.fixture
def run(monkeypatch):
    """The command line, in this process; returns its exit status or its message."""

    def call(*arguments: str) -> int | str | None:
        from benchmarks.__main__ import main

        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code
        return 0

    return call


def test_a_run_leaves_right_rows_with_machine_and_commit(run, tmp_path, capsys):
    out = tmp_path / "rows.json"
    arguments = ["ops", "liar", "--preset", "smoke", "--device", "cpu", "--only", "nm_mask"]
    assert run("run", *arguments, "--out", str(out)) == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    rows = {(r["group"], r["backend"], r["name"]): r for r in found["rows"]}
    assert rows["ops", "eager", "nm_mask"]["ratio"] == 1 and rows["ops", "eager", "nm_mask"]["correct"] == "green"
    errors = {name: rows["liar", name, "neurons 0.5"]["figures"]["output_error"] for name in ("none", "bias", "liar")}
    assert errors["liar"] < errors["bias"] < errors["none"]
    assert {"torch", "cpu", "commit", "threads"} <= set(found["environment"]) and found["ceilings"]["copy"] > 1e8
    assert run("compare", str(out), str(out)) == 0 and "0 changed beyond noise" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("group", ["pruning", "reconstruction", "streaming", "inference", "scaling"])
def test_a_group_runs_whole_at_the_smallest_preset(group, run, tmp_path, capsys):
    out = tmp_path / "rows.json"
    status = run("run", group, "--preset", "smoke", "--device", "cpu", "--out", str(out))
    found = json.loads(out.read_text())["rows"]
    assert {row["group"] for row in found} == {group}, capsys.readouterr().out
    assert status == (1 if any(row["correct"].startswith("red") for row in found) else 0)
    assert all(row["quantiles"]["p50"] > 0 for row in found)


def test_what_does_not_exist_is_refused_by_name(run):
    said = str(run("run", "sparsity"))
    assert "no group 'sparsity'" in said and "scaling" in said


def test_the_list_names_groups_presets_and_studies(run, capsys):
    assert run("list") == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("pruning", "streaming", "smoke", "full", "main_job", "rates"))


def test_rows_are_added_only_to_a_file_of_the_same_machine_and_versions(tmp_path, monkeypatch):
    from benchmarks.__main__ import earlier
    from benchmarks.rows import write

    was = {"preset": "quick", "environment": {"cpu": "one", "torch": "2.13.0"}, "ceilings": {"copy": 1e10}}
    path = write(tmp_path / "a.json", [row([1.0])], **was)
    about = {**was, "ceilings": {}}
    assert earlier(path, about) == [row([1.0])] and about["ceilings"] == {"copy": 1e10}
    with pytest.raises(SystemExit, match="torch: 2.13.0 → 2.14.0"):
        earlier(path, {**about, "environment": {"cpu": "one", "torch": "2.14.0"}})
    with pytest.raises(SystemExit, match="preset: quick → full"):
        earlier(path, {**about, "preset": "full"})


def test_each_instruction_set_is_measured_by_a_process_that_is_kept_to_it(run, tmp_path, monkeypatch):
    from benchmarks import __main__ as command
    from benchmarks.rows import read, write

    def measured(arguments, *, env, **_):
        part = Path(arguments[arguments.index("--out") + 1])
        rate = 2.0 if env.get("PYPRUNE_ISA") == "avx2" else 1.0
        write(part, [row([rate])], ceilings={"copy": rate}, preset="smoke", environment={})

    monkeypatch.setattr(command.subprocess, "run", measured)
    monkeypatch.setattr(command, "environment", lambda: {"instruction_set": "avx512"})
    out = tmp_path / "isa.json"
    assert run("run", "ops", "--device", "cpu", "--preset", "smoke", "--isa", "own", "avx2", "--out", str(out)) == 0
    rows, about = read(out)
    assert [(r.isa, r.median) for r in rows] == [("", 1.0), ("avx2", 2.0)] and rows[0].key != rows[1].key
    assert about["ceilings"] == {"copy": 1.0, "copy avx2": 2.0}


def test_a_study_is_started_with_its_own_arguments_and_an_unknown_one_refused(run, capsys):
    assert run("study", "rates", "--help") == 0 and "--sheet" in capsys.readouterr().out
    said = str(run("study", "rate"))
    assert "no study 'rate'" in said and "main_job" in said


def test_a_peer_that_cannot_run_says_why(tmp_path):
    from benchmarks import peers

    np.save(tmp_path / "ids.npy", [[1, 2]])
    call = peers.Call("no such tool", "float32", {"pattern": "2:4", "sparsity": 0.5})
    assert peers._called(sys.executable, call, tmp_path) == "KeyError: 'no such tool'"


def test_a_result_of_a_peer_is_checked_for_what_was_asked():
    from benchmarks import jobs, peer_calls, peers

    dense = jobs.model(jobs.TINY)
    settings = {"method": "magnitude", "pattern": "2:4"}
    job = {"settings": settings, "reads_tokens": False}
    changed = peer_calls.pyprune(job)(copy.deepcopy(dense), jobs.ids(jobs.TINY))
    assert peers.what_is_wrong(changed, dense, {"pattern": "2:4", "sparsity": 0.5}) == "green"
    assert "2:4" not in peers.what_is_wrong(changed, dense, {"pattern": "unstructured", "sparsity": 0.5})
    weight = changed.model.layers[1].mlp.up_proj.weight.data
    weight[0, :4], weight[0, 4:8] = 0.0, 1.0  # as many zeros, in other places
    assert peers.what_is_wrong(changed, dense, {"pattern": "2:4", "sparsity": 0.5}).endswith(
        "up_proj.weight is not 2:4"
    )
    assert "0.0% of" in peers.what_is_wrong(dense, dense, {"pattern": "unstructured", "sparsity": 0.5})
    assert "160 neurons are left, not 128" in peers.what_is_wrong(dense, dense, peers.NEURONS)


def test_ours_is_red_where_its_perplexity_is_far_above_the_peers():
    from benchmarks.peers import judged

    peer, near, far = (row([1.0], figures={"perplexity": found}) for found in (40.0, 41.0, 43.0))
    judged([peer, near, far])
    assert peer.correct == near.correct == "green" and far.correct == "red: perplexity 43, the peer's is 40"


def test_an_environment_that_cannot_be_had_leaves_nothing_behind(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from benchmarks import peers

    def failing(command, **_):
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return SimpleNamespace(returncode=1, stderr="looking\nERROR: No matching distribution found for tool\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peers.subprocess, "run", failing)
    with pytest.raises(SystemExit, match="could not be installed: ERROR: No matching distribution found for tool"):
        peers.environment(("tool==1",))
    assert list((tmp_path / "pyprune").iterdir()) == []
