"""The choice among candidates: what is broken is out, what is faster is taken, and the verdict is kept and pinned."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import same_bytes
import tiny
import torch

from pyprune import ops
from pyprune.config import ConfigError, Evaluation
from pyprune.execution.journal import Interrupted, Journal
from pyprune.ops import native, qualification, trials
from pyprune.pipeline.prune import prune

BREAKS = {"gram_update": ("wrong", "result 0 is off by"), "linear": ("unwritten", "not all of it was written"),
          "cross_gram_update": ("outside", "wrote outside"), "cholesky": ("fickle", "gave different bits"),
          "nm_mask": ("raising", "ValueError: no image for this processor"), "column_moments": ("crash", "SIGABRT"),
          "cholesky_solve": ("hang", "did not answer within")}


def pair(op: str, function: str) -> list[dict]:
    return [{"name": "own", "module": "broken", "function": function},
            {"name": "reference", "module": "pyprune.ops.reference", "function": op}]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Measuring is on, in a cache folder of its own."""
    monkeypatch.delenv("PYPRUNE_QUALIFY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(qualification, "_known", {})
    monkeypatch.setattr(ops, "_settled", {})
    return tmp_path / "cache" / "pyprune"


@pytest.fixture
def measured(monkeypatch):
    """What was measured, op by op, without a process: own is twice as fast as the rest."""
    calls = []

    def measure(device, candidates):
        calls.append(sorted(candidates))
        return {op: {"errors": dict.fromkeys([c["name"] for c in list_], 1e-7), "failed": {}, "threads": 1,
                     "seconds": {c["name"]: [1.0 + index] for index, c in enumerate(list_)}}
                for op, list_ in candidates.items()}
    monkeypatch.setattr(qualification, "_measure", measure)
    return calls


def test_broken_candidates_are_out_and_the_next_one_is_taken(cache, monkeypatch, capsys):
    """Three processes: the first is aborted, the second hangs, the third ends."""
    monkeypatch.setattr(qualification, "STEP_SECONDS", 6.0)
    candidates = {op: pair(op, function) for op, (function, _) in BREAKS.items()}
    candidates["select_mask"] = pair("select_mask", "slow")
    found = qualification.verdicts("cpu", candidates)
    said = capsys.readouterr().err
    for op, (_, reason) in BREAKS.items():
        assert found[op]["takes"] == "reference" and reason in found[op]["failed"]["own"], (op, found[op])
        assert f"own is not used for {op} on this machine: " in said
    assert not found["select_mask"]["failed"] and found["select_mask"]["takes"] == "reference"
    assert "times as fast as own" in found["select_mask"]["why"]
    assert len(list(cache.glob("*.json"))) == 1 and not list(cache.glob("*.tmp"))


def test_every_op_has_its_cases_and_what_is_right_passes_them():
    assert set(trials.CASES) == {*ops.OPS, *ops.FORWARDS}
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
    candidates = {"linear": pair("linear", "unwritten")}
    first = qualification.verdicts("cpu", candidates)
    assert first["linear"]["takes"] == "own" and len(measured) == 1
    qualification._known.clear()
    assert qualification.verdicts("cpu", candidates) == first and len(measured) == 1, "read from the file"
    for change in (lambda m: m.setattr(qualification, "_file_digest", lambda path: "another build"),
                   lambda m: m.setattr(torch, "__version__", "9.9"),
                   lambda m: m.setattr(qualification, "_processor", lambda: ("another", "flags"))):
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
    candidates = {"linear": pair("linear", "unwritten")}
    assert qualification.verdicts("cpu", candidates)["linear"]["takes"] == "own"
    assert "the verdicts cannot be kept in" in capsys.readouterr().err
    qualification.verdicts("cpu", candidates)
    assert len(measured) == 1


def test_a_process_that_cannot_start_leaves_the_defaults(cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = qualification.verdicts("cpu", {"linear": pair("linear", "unwritten")})
    assert found["linear"]["takes"] == "own" and "could not be measured" in capsys.readouterr().err
    assert not list(cache.glob("*")), "not a verdict"


def test_ops_take_the_verdict_a_name_and_the_switch_go_before_it(cache, measured, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(ops.AUTO, "cpu", dict.fromkeys(ops.OPS, ("reference", "cpu")))
    if native._C is not None:
        assert ops._implementation("linear", cpu).__module__ == "pyprune.ops.reference"
        with ops.pinned({"cpu": dict.fromkeys([*ops.OPS, *ops.FORWARDS], "cpu")}):
            assert ops._implementation("linear", cpu) is native.linear_cpu
        with ops.backend("cpu"):
            assert ops._implementation("linear", cpu) is native.linear_cpu
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
        ops._implementation("linear", cpu)
    count = len(measured)
    monkeypatch.setenv("PYPRUNE_QUALIFY", "0")
    monkeypatch.setattr(ops, "_settled", {})
    assert ops.taken("linear", "cpu") == "reference" and len(measured) == count


def run(output, **fields):
    return prune(tiny.model("llama"), calibration=tiny.ids(12, 24), evaluation=Evaluation(enabled=False),
                 progress=False, output=str(output), **fields)


def test_resume_takes_what_the_interrupted_run_took(tmp_path, monkeypatch):
    """The machine's verdict changes between the two; the bytes do not."""
    everything = [*ops.OPS, *ops.FORWARDS]
    before = {op: "torch" if op in ops.FORWARDS else "reference" for op in everything}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(ops, "_settled", {("cpu", one): before for one in (True, False)})
    report = run(whole).report
    assert report["backends"] == {"cpu": before}
    point = Journal.safe_point

    def stopping(self):
        self._stopping = len(self.entries) == 2
        point(self)
    with monkeypatch.context() as stop, pytest.raises(Interrupted):
        stop.setattr(Journal, "safe_point", stopping)
        run(cut)
    monkeypatch.setattr(ops, "_settled", {})  # the fixed list, which takes the native module
    assert run(cut, resume=True).report["backends"] == {"cpu": before}
    same_bytes.assert_same(whole, cut)
    assert json.loads((cut / "report.json").read_text())["backends"]["cpu"]["linear"] == "reference"


def test_a_record_that_cannot_be_followed_is_refused():
    with pytest.raises(ConfigError, match="took the cuda back-end for linear, which cannot run here"):
        ops.settle("cpu", {"cpu": {"linear": "cuda"}})


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
    code = ("from pyprune import ops\nfrom pyprune.ops import native\n"
            "assert native._C.cpu_level() == 'portable' and ops.taken('linear', 'cpu') == 'cpu'\n")
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYPRUNE_ISA": "portable"}, check=True)
    code = "from pyprune import ops; ops.taken('linear', 'cpu')"
    refused = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYPRUNE_ISA": "sse9"},
                             capture_output=True, text=True)
    assert "ConfigError: PYPRUNE_ISA=sse9: instruction set sse9 is not one of this processor's" in refused.stderr
