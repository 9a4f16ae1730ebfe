"""The benchmark suite: its rows say what was measured, comparisons find changes and no noise, tables follow results."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

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


def test_what_does_not_exist_is_refused_by_name(run):
    said = str(run("run", "sparsity"))
    assert "no group 'sparsity'" in said and "scaling" in said


def test_the_list_names_groups_presets_and_studies(run, capsys):
    assert run("list") == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("pruning", "streaming", "smoke", "full", "main_job", "rates"))
