"""The choice among candidates: what is broken is out, what is faster is taken, and the verdict is kept and pinned."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import same_bytes
import tiny
import torch
import yaml

from pyprune import ops
from pyprune.config import ConfigError, Evaluation
from pyprune.execution.journal import Interrupted, Journal
from pyprune.ops import choice, classes, native, qualification, reference, trials
from pyprune.pipeline.prune import prune

BREAKS = {
    "gram_update/float32": ("wrong", "result 0 is off by"),
    "linear/rows": ("unwritten", "not all of it was written"),
    "cross_gram_update/float32": ("outside", "wrote outside"),
    "cholesky/small": ("fickle", "gave different bits"),
    "obs_sweep": ("between_rows", "wrote outside"),
    "compress_24": ("dense_only", "result 0 is off by"),
    "trailing_update": ("ruins", "ConnectionError: illegal"),
    "nm_mask": ("raising", "ValueError: no image for this processor"),
    "column_moments": ("crash", "SIGABRT"),
    "cholesky_solve/small": ("hang", "did not answer within"),
}


def pair(op: str, function: str) -> list[dict]:
    return [
        {"name": "own", "module": "broken", "function": function},
        {"name": "reference", "module": "pyprune.ops.reference", "function": classes.op_of(op)},
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Measuring is on, in a cache folder of its own."""
    monkeypatch.delenv("PYPRUNE_QUALIFY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(qualification, "_known", {})
    monkeypatch.setattr(choice, "_settled", {})
    return tmp_path / "cache" / "pyprune"


@pytest.fixture
def measured(monkeypatch):
    """What was measured, op by op, without a process: own is twice as fast as the rest."""
    calls = []

    def measure(device, candidates):
        calls.append(sorted(candidates))
        return {
            op: {
                "errors": dict.fromkeys([c["name"] for c in list_], 1e-7),
                "failed": {},
                "threads": 1,
                "seconds": {c["name"]: [1.0 + index] for index, c in enumerate(list_)},
            }
            for op, list_ in candidates.items()
        }

    monkeypatch.setattr(qualification, "_measure", measure)
    return calls


def test_broken_candidates_are_out_and_the_next_one_is_taken(cache, monkeypatch, capsys):
    """Four processes: of the first the device is ruined, the second is aborted, the third hangs, the fourth ends."""
    monkeypatch.setattr(qualification, "STEP_SECONDS", 10.0)  # a busy machine ends a process slowly
    candidates = {op: pair(op, function) for op, (function, _) in BREAKS.items()}
    candidates["select_mask/row"] = pair("select_mask/row", "slow")
    found = qualification.verdicts("cpu", candidates)
    said = capsys.readouterr().err
    for op, (_, reason) in BREAKS.items():
        assert found[op]["takes"] == "reference" and reason in found[op]["failed"]["own"], (op, found[op])
        assert f"own is not used for {op} on this machine: " in said
    slow = found["select_mask/row"]
    assert not slow["failed"] and slow["takes"] == "reference" and "times as fast as own" in slow["why"]
    assert len(list(cache.glob("*.json"))) == 1 and not list(cache.glob("*.tmp"))


def test_every_op_has_its_cases_and_what_is_right_passes_them():
    assert set(trials.CASES) == {*classes.KEYS, *ops.FORWARDS} == {*ops.candidates("cpu")}
    assert {*ops.AUTO["cuda"]} == {*ops.AUTO["cpu"]} == {*classes.KEYS}
    for op, candidates in ops.candidates("cpu").items():
        for candidate in candidates:
            implementation = getattr(importlib.import_module(candidate["module"]), candidate["function"])
            assert trials.check(op, implementation, "cpu") <= 2e-2
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_default_is_left_only_for_what_is_clearly_faster():
    def decided(**seconds):
        record = {"errors": dict.fromkeys(seconds, 0.0), "failed": {}, "seconds": seconds}
        return qualification.decide(list(seconds), record)["takes"]

    assert decided(own=[1.0, 1.0], other=[0.95, 0.95]) == "own"
    assert decided(own=[1.0, 1.0], other=[0.8, 0.8]) == "other"
    assert decided(own=[1.0, 4.0], other=[2.0, 1.0]) == "other", "the geometric mean over the sizes"
    assert decided(own=[1.0], other=[0.8], third=[0.75]) == "other"
    failed = {"errors": {"own": 0.0}, "failed": {"own": "crashed"}, "seconds": {}}
    assert qualification.decide(["own", "last"], failed)["takes"] == "last"


@pytest.mark.skipif(native._C is None, reason="no native module, so none that could change")
def test_a_verdict_is_kept_and_measured_again_when_what_it_depends_on_changes(cache, measured, monkeypatch):
    candidates = {"linear/rows": pair("linear", "unwritten")}
    first = qualification.verdicts("cpu", candidates)
    assert first["linear/rows"]["takes"] == "own" and len(measured) == 1
    qualification._known.clear()
    assert qualification.verdicts("cpu", candidates) == first and len(measured) == 1, "read from the file"
    for change in (
        lambda m: m.setattr(qualification, "_file_digest", lambda path: "another build"),
        lambda m: m.setattr(torch, "__version__", "9.9"),
        lambda m: m.setattr(qualification, "_processor", lambda: ("another", "flags")),
    ):
        before = len(measured)
        with monkeypatch.context() as changed:
            change(changed)
            qualification.verdicts("cpu", candidates)
        assert len(measured) == before + 1
    qualification.verdicts("cpu", candidates, again=True)
    assert len(measured) == 5
    for path in cache.glob("*.json"):
        path.write_text(path.read_text()[:100])
    qualification._known.clear()
    qualification.verdicts("cpu", candidates)
    assert len(measured) == 6, "an unreadable file is no verdict"


def test_where_nothing_can_be_kept_the_verdict_holds_for_the_process(cache, measured, capsys):
    cache.parent.write_text("a file where the folder should be")
    candidates = {"linear/rows": pair("linear", "unwritten")}
    assert qualification.verdicts("cpu", candidates)["linear/rows"]["takes"] == "own"
    assert "the verdicts cannot be kept in" in capsys.readouterr().err
    qualification.verdicts("cpu", candidates)
    assert len(measured) == 1


def test_a_process_that_cannot_start_leaves_the_defaults(cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = qualification.verdicts("cpu", {"linear/rows": pair("linear", "unwritten")})
    assert found["linear/rows"]["takes"] == "own" and "could not be measured" in capsys.readouterr().err
    assert not list(cache.glob("*")), "not a verdict"


def test_ops_take_the_verdict_a_name_and_the_switch_go_before_it(cache, measured, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(ops.AUTO, "cpu", dict.fromkeys(classes.KEYS, ("reference", "cpu")))
    if native._C is not None:
        assert choice.implementation("linear/rows", cpu).__module__ == "pyprune.ops.reference"
        with ops.pinned({"cpu": dict.fromkeys([*ops.OPS, *ops.FORWARDS], "cpu")}):
            assert choice.implementation("linear/rows", cpu) is native.linear_cpu
        with ops.backend("cpu"):
            assert choice.implementation("linear/rows", cpu) is native.linear_cpu
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
        choice.implementation("linear/rows", cpu)
    count = len(measured)
    monkeypatch.setenv("PYPRUNE_QUALIFY", "0")
    monkeypatch.setattr(choice, "_settled", {})
    assert ops.taken("linear/rows", "cpu") == "reference" and len(measured) == count


def run(output, **fields):
    return prune(
        tiny.model("llama"),
        calibration=tiny.ids(12, 24),
        evaluation=Evaluation(enabled=False),
        progress=False,
        output=str(output),
        **fields,
    )


def interrupted(output, monkeypatch):
    """A run that is stopped after two blocks."""
    point = Journal.safe_point

    def stopping(self):
        self._stopping = len(self.entries) == 2
        point(self)

    with monkeypatch.context() as stop, pytest.raises(Interrupted):
        stop.setattr(Journal, "safe_point", stopping)
        run(output)


def test_resume_takes_what_the_interrupted_run_took(tmp_path, monkeypatch):
    """The machine's verdict changes between the two; the bytes do not."""
    everything = [*classes.KEYS, *ops.FORWARDS]
    before = {op: "torch" if op in ops.FORWARDS else "reference" for op in everything}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(choice, "_settled", {("cpu", one): before for one in (True, False)})
    report = run(whole).report
    assert report["backends"] == {"cpu": before}
    interrupted(cut, monkeypatch)
    monkeypatch.setattr(choice, "_settled", {})  # the fixed list, which takes the native module
    assert run(cut, resume=True).report["backends"] == {"cpu": before}
    same_bytes.assert_same(whole, cut)
    assert json.loads((cut / "report.json").read_text())["backends"]["cpu"]["linear/rows"] == "reference"


def test_run_yaml_repeats_a_run_by_the_back_ends_that_it_took(tmp_path, monkeypatch):
    """The machine's verdict changes between the two; the bytes do not."""
    before = {op: "torch" if op in ops.FORWARDS else "reference" for op in [*classes.KEYS, *ops.FORWARDS]}
    with monkeypatch.context() as earlier:
        earlier.setattr(choice, "_settled", {("cpu", one): before for one in (True, False)})
        one = run(tmp_path / "one").report
    kept = yaml.safe_load((tmp_path / "one" / "run.yaml").read_text())["backends"]
    two = run(tmp_path / "two", backends=kept).report
    assert kept == one["backends"] == two["backends"] == {"cpu": before} and two["warnings"] == one["warnings"]
    same_bytes.assert_same(tmp_path / "one", tmp_path / "two")
    named = run(tmp_path / "three", backends=kept, backend="linear=auto,reference,obs_sweep=cpu").report["backends"][
        "cpu"
    ]
    assert named["obs_sweep"] == "cpu" and named["linear/rows"] == "reference", "what is named goes before the record"


def test_what_a_repeated_run_cannot_follow_is_said_and_never_fails(cache, measured):
    said: list[str] = []
    usual = ops.settle("cpu")["cpu"]
    wanted = {"cpu": {**usual, "obs_sweep": "cuda", "nm_mask": "cuda", "linear": "opencl", "an_op_of_old": "cpu"}}
    del wanted["cpu"]["linear/rows"]
    assert ops.settle("cpu", repeated=wanted, warn=said.append) == {"cpu": usual}
    by_reason = (
        "took the cuda back-end, which cannot be taken here (the cuda back-end takes CUDA tensors, not cpu ones)"
    )
    assert any(by_reason in text and f"obs_sweep takes {usual['obs_sweep']}" in text for text in said)
    assert any("took the opencl back-end" in text and "linear/rows takes" in text for text in said) and len(said) == 2
    said.clear()
    assert ops.settle("cpu", repeated={"cuda": {"obs_sweep": "cuda"}}, warn=said.append) == {"cpu": usual}
    assert ["took its back-ends on cuda: on cpu the choice is automatic" in text for text in said] == [True]
    with ops.pinned({"cpu": dict(usual)}):
        ops.disqualify("nm_mask", "cpu", "wrong in block 1")
    said.clear()
    if usual["nm_mask"] != "reference":
        again = ops.settle("cpu", repeated={"cpu": usual}, warn=said.append)
        assert again["cpu"]["nm_mask"] == "reference" and "wrong in block 1" in said[0]


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        ("linear", "cuda", "the cuda back-end takes CUDA tensors"),
        ("linear", "opencl", "there is no back-end 'opencl' for it"),
        ("forward_float32", "cpu", "there is no back-end 'cpu' for it"),
        ("an_op_to_come", "cpu", "there is no such op"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(key, name, reason):
    with pytest.raises(ConfigError, match=f"took the {name} back-end for {key}, which cannot run here: {reason}"):
        ops.settle("cpu", {"cpu": {key: name}})


def test_a_run_begun_before_an_op_existed_resumes_on_the_reference_and_says_so(tmp_path, monkeypatch):
    """The journal's record is cut down to what an older version would have written."""
    newer = {key for op in ("rms_norm", "rotary", "swiglu", "attention") for key in classes.keys_of(op)}
    older = {
        op: "torch" if op in ops.FORWARDS else "reference"
        for op in [*classes.KEYS, *ops.FORWARDS]
        if op not in {*newer, "forward_bfloat16"}
    }
    expected = {"cpu": older | dict.fromkeys(newer, "reference") | {"forward_bfloat16": "torch"}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(choice, "_settled", {("cpu", one): expected["cpu"] for one in (True, False)})
    run(whole)
    interrupted(cut, monkeypatch)
    header = cut / ".pyprune" / "run.json"
    record = json.loads(header.read_text())
    record["backends"] = {"cpu": older}
    header.write_text(json.dumps(record))
    monkeypatch.setattr(choice, "_settled", {})  # the fixed list, which takes the native module
    report = run(cut, resume=True).report
    assert report["backends"] == expected
    [said] = [text for text in report["warnings"] if "an older version began it" in text]
    assert all(key in said for key in newer) and "linear" not in said
    same_bytes.assert_same(whole, cut)


def test_env_shows_the_verdicts_and_measures_when_asked(cache, measured, capsys):
    from pyprune.cli.commands import main

    with pytest.raises(SystemExit):
        main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not measured and "not measured" in found["verdicts"]["cpu"]["forward_float32"]["why"]
    with pytest.raises(SystemExit):
        main(["env", "--qualify"])
    shown = " ".join(capsys.readouterr().out.split())
    assert len(measured) == 1 and "times as fast as torch" in shown.replace("│ │", " ") or "2.00" in shown
    with pytest.raises(SystemExit):
        main(["env", "--json"])
    verdict = json.loads(capsys.readouterr().out)["verdicts"]["cpu"]["forward_float32"]
    assert verdict["takes"] == "pyprune" and verdict["seconds"] == {"pyprune": [1.0], "torch": [2.0]}
    assert len(measured) == 1


@pytest.mark.skipif(native._C is None, reason="no native module")
def test_an_instruction_set_is_forced_or_refused():
    code = (
        "from pyprune import ops\nfrom pyprune.ops import native\n"
        "assert native._C.cpu_level() == 'portable' and ops.taken('linear/rows', 'cpu') == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYPRUNE_ISA": "portable"}, check=True)
    code = "from pyprune import ops; ops.taken('linear/rows', 'cpu')"
    refused = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYPRUNE_ISA": "sse9"}, capture_output=True, text=True
    )
    assert "ConfigError: PYPRUNE_ISA=sse9: instruction set sse9 is not one of this processor's" in refused.stderr


BETWEEN = ("rms_norm", "rotary", "swiglu")


def test_the_reference_takes_views_of_any_stride():
    """Its own trials found that the library's conversion did not."""
    for key in classes.KEYS:
        rounded = key.startswith("sparse_linear") or key.startswith(("attention", *BETWEEN)) and key.endswith("16-bit")
        limit = 4e-3 if rounded else 1e-4
        assert trials.check(key, getattr(reference, classes.op_of(key)), "cpu") < limit


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cuda", "backend 'cuda' cannot run on cpu: the cuda back-end takes CUDA tensors"),
        (
            "obs_sweep=cuda,gram_update=cpu",
            "backend 'obs_sweep=cuda,gram_update=cpu' cannot run on cpu: the cuda back-end",
        ),
    ],
)
def test_a_back_end_that_cannot_run_is_refused_before_the_model_is_looked_at(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prune("a folder that is not there", backend=text, device="cpu")


@pytest.mark.skipif(native._C is None, reason="no native module")
def test_back_ends_mix_by_op(monkeypatch, tmp_path):
    """A back-end without an op leaves it to auto and says so; by op each is named; the report has what ran."""
    monkeypatch.delattr(native, "gram_update_cpu")
    monkeypatch.setattr(choice, "_loaded", {})
    monkeypatch.setattr(choice, "_settled", {})
    report = run(tmp_path / "mixed", backend="cpu", seed=3).report
    taken = report["backends"]["cpu"]
    assert taken["gram_update/float32"] == "reference" and taken["obs_sweep"] == "cpu"
    assert "the cpu back-end has no gram_update: there the choice is automatic" in report["warnings"]
    with pytest.raises(ConfigError, match="gram_update has no cpu implementation"):
        ops.check_backend("reference,gram_update=cpu", "cpu")
    by_op = run(tmp_path / "by_op", backend="reference,obs_sweep=cpu,linear=auto").report["backends"]["cpu"]
    assert {key: name for key, name in by_op.items() if name == "cpu"} == {
        "obs_sweep": "cpu",
        "linear/rows": "cpu",
        "linear/rows-wide": "cpu",
    }
    assert by_op["forward_float32"] == "torch"
    assert "backend: reference,obs_sweep=cpu,linear=auto" in (tmp_path / "by_op" / "run.yaml").read_text()


def test_what_failed_in_a_run_is_out_until_it_is_measured_again(cache, measured):
    candidates = {key: pair(key, "unwritten") for key in classes.keys_of("linear")}
    qualification.verdicts("cpu", candidates)
    qualification.disqualify("cpu", candidates, classes.keys_of("linear"), "own", "wrong in block 3")
    qualification._known.clear()
    found = qualification.verdicts("cpu", candidates)
    assert {v["takes"] for v in found.values()} == {"reference"} and len(measured) == 1
    assert all(v["failed"] == {"own": "wrong in block 3"} for v in found.values())
    again = qualification.verdicts("cpu", candidates, again=True)
    assert {v["takes"] for v in again.values()} == {"own"} and len(measured) == 2


@pytest.mark.skipif(native._C is None, reason="no native module")
def test_a_resumed_run_does_not_go_back_to_what_failed_a_guard(cache, measured):
    recorded = ops.settle("cpu")
    assert recorded["cpu"]["obs_sweep"] == "cpu"
    with ops.pinned(recorded):
        assert ops.disqualify("obs_sweep", "cpu", "wrong in block 1") == "cpu"
        assert ops.taken("obs_sweep", "cpu") == "reference" and ops.taken("nm_mask", "cpu") == "cpu"
    recorded["cpu"]["obs_sweep"] = "cpu"  # as the journal has it
    assert ops.settle("cpu", recorded)["cpu"] == {**recorded["cpu"], "obs_sweep": "reference"}


def test_triton_kernels_prove_themselves_in_the_interpreter_and_a_planted_fault_is_found(cache, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(trials, "ROUNDS", 1)
    candidates = {
        key: [
            {"name": "triton", "module": "interpreted", "function": function},
            {"name": "reference", "module": "pyprune.ops.reference", "function": classes.op_of(key)},
        ]
        for key, function in {
            "gram_update/16-bit": "gram_update",
            "nm_mask": "nm_mask",
            "cholesky/small": "cholesky_that_forgets",
        }.items()
    }
    found = qualification.verdicts("cpu", candidates)
    assert [key for key, verdict in found.items() if verdict["failed"]] == ["cholesky/small"], found
    assert "not all of it was written" in found["cholesky/small"]["failed"]["triton"]
    assert found["gram_update/16-bit"]["errors"]["triton"] < 1e-6
    assert {verdict["takes"] for verdict in found.values()} == {"reference"}, "the interpreter is slower"


@pytest.fixture
def gpu(monkeypatch):
    """What a GPU tells of itself, and three usable back-ends on it."""
    told = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told)
    monkeypatch.setattr(ops.Backend, "why_not", lambda self, op, device: None)
    return told


def test_on_a_gpu_kernels_are_taken_once_they_have_proved_themselves_there(cache, measured, gpu, monkeypatch):
    before = ops.verdicts("cuda", measure=False)
    assert {verdict["takes"] for verdict in before.values()} == {"reference"}
    found = {key: verdict["takes"] for key, verdict in ops.verdicts("cuda").items()}
    assert found["obs_sweep"] == found["nm_mask"] == found["select_mask/row"] == found["cholesky/small"] == "cuda"
    assert found["gram_update/16-bit-wide"] == found["column_moments"] == "triton"
    assert found["cholesky/large"] == found["trailing_update"] == found["linear/rows"] == "reference"
    assert len(measured) == 1
    gpu.name = "another"
    ops.verdicts("cuda")
    gpu.minor = 1
    ops.verdicts("cuda")
    assert len(measured) == 3, "another GPU, another verdict"
    monkeypatch.setenv("PYPRUNE_QUALIFY", "0")
    assert {verdict["takes"] for verdict in ops.verdicts("cuda").values()} == {"reference"}
