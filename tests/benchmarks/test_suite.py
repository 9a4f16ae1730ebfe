"""The benchmark suite: its rows say what was measured, comparisons find changes and no noise, tables follow results."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from pyprune.config import ConfigError

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
    with pytest.raises(ConfigError, match="no result file"):
        read(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_a_row_of_an_older_file_is_that_of_a_newer_one():
    """Both name the same measurement, so that they can be compared."""
    from benchmarks.jobs import Shape
    from benchmarks.rows import Row

    older = {**row([1.0]).to_dict(), "case": "1 blocks of 64/160, 4×32 tokens, 1 processes"}
    assert Row.from_dict(older).case == f"{Shape(64, 160, 4, 2, 1, 4, 32)}, 1 process"
    assert Row.from_dict({**older, "case": "11 blocks"}).case == "11 blocks"


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


def test_few_samples_are_no_change_however_large_and_a_lost_green_always_counts():
    from benchmarks.compare import changes

    def found(before, after):
        [change] = changes([row(before)], [row(after)])
        return change.counts, change.large

    assert found([1.0], [1.2]) == (False, False)
    assert found([1.0], [1.3]) == (False, True)
    assert found([1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]) == (False, True)  # at best p is 1 in 35
    assert found([1.0, 1.1, 1.2, 1.3, 1.4], [2.0, 2.1, 2.2, 2.3, 2.4]) == (True, False)
    [lost] = changes([row([1.0])], [row([1.0], correct="red: off by one")])
    assert lost.counts and not lost.large and "red: off by one" in lost.colour


def shown(before, after) -> str:
    """What ``compare`` prints of rows and ceilings, its lines joined."""
    from benchmarks.compare import print_comparison

    out = io.StringIO()
    print_comparison(*((rows, {"ceilings": ceilings}) for rows, ceilings in (before, after)), out)
    return " ".join(out.getvalue().split())


def test_files_of_a_faster_machine_say_so():
    rows = [row([1.0])]
    said = shown((rows, {"copy": 2e10, "float32": 2.64e11}), (rows, {"copy": 2.1e10, "float32": 1.16e11}))
    assert "copy 20 GB/s → 21 GB/s, float32 264 GFLOP/s → 116 GFLOP/s" in said
    assert "0.44 to 1.05 times as fast as before" in said and "G/s" not in said
    assert "ceilings" not in shown((rows, {"copy": 2e10}), (rows, {"copy": 2.1e10}))


@pytest.mark.parametrize("speed", [0.7, 1.4], ids=["slower", "faster"])
def test_what_the_speed_of_the_machine_explains_is_no_change(speed):
    """The same code on a machine whose ceilings moved: rows that moved with them, or did not, or lie between."""
    from benchmarks.compare import changes

    most, now = {"copy": 1e10, "float32": 1e11}, {"copy": 1e10, "float32": speed * 1e11}
    before = [row(noisy(1e-3, i), f"op{i}") for i in range(20)]
    after = [row(noisy(1e-3 / speed ** (i / 19), 100 + i), f"op{i}") for i in range(20)]
    assert len([change for change in changes(before, after) if change.counts]) > 10
    assert [change for change in changes(before, after, most, now) if change.counts] == []
    said = shown((before, most), (after, now))
    assert "20 rows in both: 0 changed beyond noise, 20 did not" in said and "no verdict on" in said
    after[3] = row(noisy(2.8e-3, 3), "op3")
    [slower] = [change for change in changes(before, after, most, now) if change.counts]
    assert slower.ratio == pytest.approx(1 / (2.8 * min(1, speed)), rel=0.05)  # the least that any speed leaves
    assert "op3" in (said := shown((before, most), (after, now))) and "at least" in said


def test_ceilings_of_one_instruction_set_say_nothing_of_another():
    from benchmarks.compare import speeds

    most, now = {"copy": 1e10, "copy avx2": 1e10}, {"copy": 1e10, "copy avx2": 2e10}
    assert speeds(most, now) == (1, 1) and speeds(most, now, "avx2") == (1, 2)


def test_a_comparison_lists_the_slower_before_the_faster_and_untested_rows_apart():
    before = [row(noisy(1e-3, i), name) for i, name in enumerate(("fast", "slow", "slowest", "same"))]
    after = [row(noisy(t, 9 + i), r.name) for i, (r, t) in enumerate(zip(before, (5e-4, 2e-3, 3e-3, 1e-3)))]
    before += [row([1.0], "wrong"), row([1.0, 1.0, 1.0], "few"), row([2.0], "gone")]
    after += [row([1.0], "wrong", correct="red: off [by one]"), row([2.0, 2.0], "few")]
    said = shown((before, {}), (after, {}))
    assert "6 rows in both: 4 changed beyond noise, 1 did not, 1 with too few samples for a test" in said
    assert "1 row only in the first file" in said
    heads = ["op or job", "shape", "type", "device, back-end", "before", "after", "change"]
    assert [cell.strip() for cell in said[said.index("┃") :].split("┃")[1:8]] == heads
    order = [said.index(f"│ {name} │") for name in ("wrong", "slowest", "slow", "fast", "few")]
    assert order == sorted(order) and "│ same" not in said
    assert "green → red: off [by one]" in said and "times slower" in said[order[2] : order[3]]
    assert "times faster" in said[order[3] : order[4]] and "cpu, cpu" in said
    assert said.index("3 before and 2 after; 5 and 5 would do") < order[4]
    assert said.endswith("│ 2 times slower │ " + said.split()[-1])


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
    with pytest.raises(ConfigError, match="no table is named 'ops-tpu'"):
        tables.rewritten(document.replace("ops-cpu", "ops-tpu"))


@pytest.fixture
def run(monkeypatch):
    """The command line, in this process; returns its exit status."""

    def call(*arguments: str) -> int | str | None:
        from benchmarks.__main__ import main
        from benchmarks.common import command_line

        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        try:
            command_line(main)
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


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("run sparsity", "there is no group 'sparsity'; there are ops, "),
        ("run ops --only nosuch", "no op's name contains 'nosuch'; ops are gram_update/float32, "),
        ("run ops --isa own --only nosuch", "no op's name contains 'nosuch'"),
        ("run scaling --only nosuch", "no case of scaling contains 'nosuch'; cases of scaling are width, tokens, "),
        ("run peers --only nosuch", "no case of peers contains 'nosuch'; cases of peers are sparsegpt unstructured, "),
        ("run --only nosuch", "; no case of scaling contains 'nosuch'"),
        ("run liar --only heads", "--only chooses from ops, peers, scaling, not from liar"),
        ("run ops --backends foo", "unknown back-end 'foo'; choose from cuda, triton, cpu, reference"),
        ("run ops --backends cpu,cuda", "back-end 'cuda' computes none of these ops: the cuda back-end takes CUDA"),
        ("compare nosuch.json nosuch.json", "nosuch.json does not exist"),
        ("study rate", "there is no study 'rate'; there are first_contact, "),
        ("study main_job", "set PYPRUNE_DATA to the folder"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2_before_anything_is_measured(
    arguments, said, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYPRUNE_DATA", raising=False)
    arguments = arguments.split()
    if arguments[0] == "run":
        arguments += ["--device", "cpu", "--preset", "smoke", "--out", "rows.json"]
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not out and not list(tmp_path.iterdir())


def test_every_case_of_scaling_has_a_name_to_choose_it_by(monkeypatch):
    from benchmarks import jobs, scaling

    for call in ("_in_processes", "_memory", "_predicted", "pruned", "model"):
        monkeypatch.setattr(scaling, call, lambda *_, call=call, **__: call)
    monkeypatch.setattr(scaling, "_row", lambda job, name, *_: name)
    job = jobs.Job("cpu", "full")
    measured = [name for [name] in scaling.scaling(job)]
    found = {"_memory": "memory of a streamed run", "_predicted": "one block, 1B"}
    assert list(dict.fromkeys(found.get(name, name) for name in measured)) == scaling.names(job)[:-1]
    assert scaling.names(job)[-1] == "one block, 7B" and "one block, 7B" not in scaling.names(jobs.Job("cpu", "quick"))


def test_a_study_that_is_not_named_is_all_that_is_missing(run, capsys):
    assert run("study") == 2
    assert "the following arguments are required: STUDY\n" in capsys.readouterr().err


def test_help_describes_the_files_of_a_comparison(run, capsys):
    assert run("compare", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "before the JSON file of an earlier run" in said and "after that of a later run" in said


def test_the_reference_is_measured_where_it_is_named():
    from benchmarks import ops_group

    wanted = ops_group.Wanted("cpu", "smoke", backends=("reference",))
    assert list(ops_group.contenders("column_moments", wanted)) == ["reference", "eager"]


def test_a_run_prints_its_rows_in_line_below_a_heading():
    from benchmarks.listing import Listing

    name = "sparse_linear/few-tokens-2:4"
    listing = Listing([(name, "16×1536×1536", "bfloat16", "reference")])
    told = {"baseline": "eager", "ceiling": "copy"}
    first = listing.lines([row([1e-3], ratio=2.0, share=0.5, **told), row([2e-3], backend="eager", ratio=1.0, **told)])
    assert 'how many times as fast as the row "eager" of the same shape' in first[0] and len(first) == 4
    places = [first[1].index(head) for head in ("op", "shape", "type", "back-end", "share of ceiling")]
    second = listing.lines([row([1.234567], name, "reference", ratio=12.34, share=0.5, **told)])
    assert len(second) == 1  # wide enough from the start: no second heading
    starts = ["sparse", "63×70", "float32", "reference", "50% of copy"]
    assert [second[0].index(text) for text in starts] == places
    ratios = {first[1]: "× eager", first[2]: "2.00", second[0]: "12.34"}
    assert len({line.index(ratio) + len(ratio) for line, ratio in ratios.items()}) == 1
    [failed] = listing.lines([row([], correct="red: ValueError")])
    assert failed.endswith("red: ValueError")
    wider = listing.lines([row([1e-3], f"{name}-and-wider", ratio=1.0, **told)])
    assert len(wider) == 3 and wider[1].index("shape") == wider[2].index("63×70")
    job = row([1.0], figures={"perplexity": 20.5})
    job.group = "scaling"
    heading, line = listing.lines([job])
    assert heading.split() == ["job", "case", "type", "back-end", "time"] and line.endswith("1 s  perplexity 20.5")


def test_the_documentation_names_every_key_of_a_row():
    from benchmarks.rows import Row

    text = (ROOT / "docs" / "benchmarks.md").read_text()
    table = text.partition("| key | meaning | unit |\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {f.name for f in fields(Row)} | {"quantiles"}


def test_the_list_names_groups_presets_and_studies(run, capsys):
    assert run("list") == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("pruning", "streaming", "smoke", "full", "main_job", "rates"))
    assert "installs both tools; runs only if named" in listed


def test_rows_are_added_only_to_a_file_of_the_same_machine_and_versions(tmp_path, monkeypatch):
    from benchmarks.__main__ import earlier
    from benchmarks.rows import write

    was = {"preset": "quick", "environment": {"cpu": "one", "torch": "2.13.0"}, "ceilings": {"copy": 1e10}}
    path = write(tmp_path / "a.json", [row([1.0])], **was)
    about = {**was, "ceilings": {}}
    assert earlier(path, about) == [row([1.0])] and about["ceilings"] == {"copy": 1e10}
    with pytest.raises(ConfigError, match="torch: 2.13.0 → 2.14.0"):
        earlier(path, {**about, "environment": {"cpu": "one", "torch": "2.14.0"}})
    with pytest.raises(ConfigError, match="preset: quick → full"):
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


def test_a_study_is_started_with_its_own_arguments(run, capsys):
    assert run("study", "rates", "--help") == 0 and "--sheet" in capsys.readouterr().out


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
    with pytest.raises(ConfigError, match="could not be installed: ERROR: No matching distribution found for tool"):
        peers.environment(("tool==1",))
    assert list((tmp_path / "pyprune").iterdir()) == []
