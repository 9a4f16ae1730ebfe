"""A process that dies at any file operation leaves nothing that another run could take for its own result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"
COMMON = """
import builtins, io, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny, torch
from pyprune.config import Calibration, ConfigError, Evaluation, Reconstruction
from pyprune.execution.journal import journaled
from pyprune.pipeline.prune import prune
from pyprune.pipeline.refine_checkpoint import refine_checkpoint

root = Path(sys.argv[2])
os.fsync = lambda handle: None  # a process that dies loses no written page
events, fatal = 0, -1
# they tell seconds, or the output folder
RECORDS = ("report.json", "report.html", "README.md", "refinement.json", "refine.yaml", "run.yaml", "pruning.json")

def written(output):
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()
            and path.name not in RECORDS and ".pyprune" not in path.parts}

def counted(function, when=lambda *_, **__: True):
    def call(*args, **kwargs):
        global events
        if when(*args, **kwargs):
            events += 1
            if events == fatal:
                os._exit(9)
        return function(*args, **kwargs)
    return call

def writing(path, mode="r", *_, **__):
    return any(letter in mode for letter in "wax+") and str(root) in str(path)

def dies(at, output, **fields):
    '''Whether a process died at that file operation of a run; -1: how many there are.'''
    global fatal
    pid = os.fork()
    if pid:
        code = os.waitpid(pid, 0)[1]
        assert code in (0, 9 << 8), code
        return code != 0 if at > 0 else int((root / "count").read_text())
    code = 1
    try:
        fatal = at
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "chmod", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        io.open = builtins.open = counted(open, writing)
        run(output, **fields)
        fatal, total = -1, events
        (root / "count").write_text(str(total))
        code = 0
    finally:
        os._exit(code)

def copied(one, other):
    shutil.rmtree(other, ignore_errors=True)
    if one.exists():
        shutil.copytree(one, other, copy_function=shutil.copy2)
    return other

def outcome(output, resume, **fields):
    '''What a run makes of a folder as a dead process left it: its own result, or a refusal.'''
    try:
        run(output, resume=resume, **fields)
    except ConfigError as refusal:
        assert any(words in str(refusal) for words in (
            "was another one", "nothing to resume", "is not empty", "interrupted run", "not moved out whole")), refusal
        return str(refusal)
    assert not (output / ".pyprune").exists()
    assert written(output) == references[tuple(fields.items())], fields
    return "done"

OTHERS = [(dict(seed=1), True), (dict(model="two"), True), (dict(seed=1), False)]

def check(left):
    '''The same run goes on to its own result, unless that is out already; no other run gets it.'''
    own = outcome(copied(left, root / "copy"), True)
    out = "nothing to resume" in own or "is not empty" in own
    assert own == "done" or out and written(left) == references[()], own
    return own == "done", *(outcome(copied(left, root / "copy"), resume, **fields) == "done"
                            for fields, resume in OTHERS)

def refer():
    found = {}
    for fields in ({}, *(fields for fields, _ in OTHERS)):
        shutil.rmtree(root / "reference", ignore_errors=True)
        run(root / "reference", **fields)
        found[tuple(fields.items())] = written(root / "reference")
    assert found[()] not in list(found.values())[1:]
    return found
"""

JOURNAL = (
    COMMON
    + """
def run(output, seed=0, model="one", resume=False):
    '''A run as prune and refine make theirs, without the arithmetic.'''
    def fill(folder):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(f"{kept}")
        (folder / "model.safetensors").write_bytes(b"".join(journal.shard(i).read_bytes() for i in range(2)))
        (folder / "config.json").write_text(f"{seed} {model} {kept}")
        (folder / "pruning.json").write_text("{}")
    with journaled(str(output), resume) as (_, journal):
        journal.check_settings({"seed": seed})
        journal.begin({"settings": {"seed": seed}, "model": model, "data": "same"}, 2, streamed=False)
        if journal.complete:
            return journal.publish()
        kept = journal.kept("dense")
        if kept is None:
            kept = f"measured with {model}"
            journal.keep("dense", kept)
        for index in range(len(journal.entries), 2):
            journal.write(index, {"weight": torch.full((3,), 10.0 * seed + len(model) + ord(model[0]) + index)})
            journal.commit(index, {"row": {}})
        journal.finish(fill)

references = refer()
total = dies(-1, root / "out")
seen, deaths = set(), 0
for k in range(1, total + 1):
    shutil.rmtree(root / "out", ignore_errors=True)
    assert dies(k, root / "out")
    seen.add(check(root / "out"))
    if deaths or not (root / "out" / ".pyprune" / "complete").exists():
        continue
    # the first that left a mark dies again, at every operation of moving out
    while dies(deaths + 1, copied(root / "out", root / "second"), resume=True):
        check(root / "second")
        deaths += 1
assert deaths > 15, deaths
assert len(seen) > 2, seen
print(total)
"""
)

REAL = (
    COMMON
    + """
ids, kind = tiny.ids(6, 8), ""
for name in ("one", "two"):
    tiny.model("llama", seed=ord(name[0]), num_hidden_layers=2).save_pretrained(root / name)
    (root / name / "1_Pooling").mkdir()
    (root / name / "1_Pooling" / "config.json").write_text(name)
    prune(str(root / name), method="magnitude", output=str(root / f"{name}-pruned"), calibration=ids,
          evaluation=Evaluation(enabled=False), progress=False)

def run(output, seed=0, model="one", resume=False):
    if kind == "refine":
        refine_checkpoint(root / f"{model}-pruned", output, dense=root / model, seed=seed, resume=resume,
                          calibration=Calibration(source=ids, num_samples=6, seq_len=8), progress=False,
                          evaluation=Evaluation(enabled=False), reconstruction=Reconstruction(epochs=1, batch_size=2))
        return
    fields = dict(pattern="neurons", criterion="random", sparsity=[0.25, 0.5], inputs="dense") \\
        if kind == "sparsities" else dict(method="magnitude", stream="always" if kind == "always" else "never",
                                          sparsity=[0.25 + seed / 4, 0.75] if kind == "masks" else 0.25 + seed / 4)
    prune(str(root / model), output=str(output), calibration=ids, evaluation=Evaluation(enabled=False), progress=False,
          seed=seed, resume=resume, **fields)

OTHERS.pop()
for kind in ("never", "always", "sparsities", "masks", "refine"):
    shutil.rmtree(root / "out", ignore_errors=True)
    references = refer()
    total = dies(-1, root / "out")
    for k in (*[total // 4] * (kind == "masks"), total // 2, total - 20, total - 8, total - 2):
        shutil.rmtree(root / "out", ignore_errors=True)
        assert dies(k, root / "out"), (kind, k)
        check(root / "out")
print(total)
"""
)


def drive(code, *arguments) -> int:
    """Standard output of a driver in a process of its own, which may fork before any thread runs."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(SUPPORT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def test_a_crash_at_any_file_operation_never_gives_another_run_s_model(tmp_path):
    """Every operation in turn; then the same run, other settings and another model resumed, other settings anew. Some
    three hundred processes and runs: it takes its seconds."""
    assert drive(JOURNAL, tmp_path) > 60


def test_real_runs_keep_their_journal_in_that_order(tmp_path):
    """In memory, streamed, to several sparsities, refined, its blocks linked. Some forty runs: it takes its seconds."""
    assert drive(REAL, tmp_path) > 60
