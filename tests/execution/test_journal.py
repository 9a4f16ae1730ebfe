"""Crash safety: a run killed at any moment resumes to the same bytes, and nothing else may touch its folder."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny

from pyprune.config import ConfigError, Evaluation
from pyprune.execution.journal import FOLDER, Interrupted, Journal
from pyprune.model.shards import OutputError
from pyprune.pipeline.prune import prune

SUPPORT = Path(__file__).parents[1] / "support"


def run(output, model=None, **fields):
    fields = {"calibration": tiny.ids(12, 24), "evaluation": Evaluation(text=tiny.ids(2, 24)), **fields}
    return prune(model or tiny.model("llama"), output=str(output), progress=False, **fields)


def weights_hash(output) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(output).glob("*.safetensors")))).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return weights_hash(run(output).config.output)


@pytest.fixture
def stop_after(monkeypatch):
    """Stop runs as a signal would, after the given number of blocks."""
    point = Journal.safe_point

    def after(count: int) -> None:
        def stopping(self):
            self._stopping = len(self.entries) == count
            point(self)

        monkeypatch.setattr(Journal, "safe_point", stopping)

    return after


@pytest.fixture
def interrupted(tmp_path, stop_after):
    """A folder with two of three blocks done."""
    stop_after(2)
    with pytest.raises(Interrupted, match="2 of 3 blocks done.*--resume"):
        run(tmp_path / "out")
    stop_after(-1)
    return tmp_path / "out"


DRIVER = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
import tiny, torch
from pathlib import Path
from pyprune.model import shards
from pyprune.pipeline.prune import prune
from pyprune.config import Evaluation
from transformers import AutoModelForCausalLM

output = Path(sys.argv[2])
model, ids = tiny.model("llama"), tiny.ids(12, 24)
shards.CHUNK = 16384  # several writes a shard, so that some kills fall between them
events, fatal = 0, -1

def counted(function):
    def call(*args, **kwargs):
        global events
        events += 1
        if events == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

class File:
    def __init__(self, file): self.file, self.write = file, counted(file.write)
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *rest): self.file.close()

def child(at=-1):
    global fatal
    pid = os.fork()
    if pid == 0:
        fatal = at
        os.replace, os.fsync = counted(os.replace), counted(lambda handle: None)  # SIGKILL loses no written page
        plain = open
        shards.open = lambda path, mode="r": File(plain(path, mode)) if mode == "wb" else plain(path, mode)
        code = 1
        try:
            prune(model, calibration=ids, evaluation=Evaluation(enabled=False), progress=False, output=str(output),
                  resume=True)
            code = 0
        finally:
            if at == 0:
                Path(sys.argv[3]).write_text(str(events))
            os._exit(code)
    return pid

def finished(pid):
    return os.waitpid(pid, 0)[1] == 0

def weights():
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}

def same():
    equal = weights() == reference and sorted(p.name for p in output.iterdir()) == names
    shutil.rmtree(output)
    return equal

started = time.time()
assert finished(child(0))
wall = time.time() - started
total = int(Path(sys.argv[3]).read_text())
reference, names = weights(), sorted(p.name for p in output.iterdir())
shutil.rmtree(output)
for n in sorted({*range(1, total + 1, 5), total}):  # at writes, fsyncs and renames all over the run
    assert not finished(child(n)), n
    assert finished(child()), n
    assert same(), n
random.seed(0)
kills = 0
for trial in range(3):  # at random moments, again and again until a run gets through
    patience = 0.3 * wall
    while True:
        pid = child()
        time.sleep(random.uniform(0, patience))
        os.kill(pid, signal.SIGKILL)
        if finished(pid) or (not (output / ".pyprune").exists() and (output / "config.json").exists()):
            break
        kills += 1
        patience *= 1.3
    assert same(), trial
print(total, kills, round(wall, 2))
"""


def test_sigkill_during_writes_and_at_random_moments_changes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(SUPPORT), str(tmp_path / "out"), str(tmp_path / "count")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    events, kills = map(int, done.stdout.split()[-3:-1])
    assert events > 40 and kills > 3


def test_resume_gives_the_same_bytes_and_a_whole_report(interrupted, whole):
    result = run(interrupted, resume=True)
    assert weights_hash(interrupted) == whole
    assert not (interrupted / FOLDER).exists()
    assert [row["block"] for row in result.report["blocks"]] == [0, 1, 2]
    assert len({row["name"] for row in result.report["weights"]}) == len(result.report["weights"]) == 21


@pytest.mark.parametrize(
    "fields",
    [
        dict(method="wanda", pattern="2:4"),
        dict(method="magnitude"),
        dict(inputs="dense"),
        dict(compute_dtype="bfloat16", probe_samples=0),
    ],
)
def test_every_method_resumes_to_the_same_bytes(tmp_path, stop_after, fields):
    run(tmp_path / "whole", **fields)
    stop_after(1)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", **fields)
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", resume=True, **fields)
    stop_after(-1)
    run(tmp_path / "parts", resume=True, **fields)
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")


def test_an_interrupted_folder_is_refused_without_resume(interrupted):
    with pytest.raises(ConfigError, match="2 of 3 blocks done; continue with --resume"):
        run(interrupted)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sparsity=0.6), "sparsity was 0.5, now 0.6"),
        (dict(calibration=tiny.ids(12, 24, seed=9)), "data.calibration was"),
        (dict(model=tiny.model("llama", seed=5)), "model.weights was"),
        (
            dict(method="wanda", reconstruct="layer", damping=0.1),
            "damping was 0.01, now 0.1; method was 'sparsegpt', now 'wanda'",
        ),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_named(interrupted, whole, change, message):
    with pytest.raises(ConfigError, match=message):
        run(interrupted, resume=True, **change)
    run(interrupted, resume=True)
    assert weights_hash(interrupted) == whole


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_noticed_and_its_block_done_again(interrupted, whole, damage):
    path = interrupted / FOLDER / "block-00000.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-100])
    else:
        path.unlink()
    result = run(interrupted, resume=True)
    assert weights_hash(interrupted) == whole
    assert "damaged: blocks from 0 on were done again" in " ".join(result.report["warnings"])


def test_a_finished_folder_has_nothing_to_resume(tmp_path):
    run(tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to resume"):
        run(tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="not empty"):
        run(tmp_path / "out")


def test_resume_in_an_empty_folder_starts_from_the_beginning(tmp_path, whole):
    run(tmp_path / "out", resume=True)
    assert weights_hash(tmp_path / "out") == whole


def test_a_move_cut_short_is_completed(interrupted, whole, monkeypatch):
    monkeypatch.setattr(Journal, "publish", lambda self: None)
    run(interrupted, resume=True)
    first = sorted(path.name for path in (interrupted / FOLDER / "checkpoint").glob("*.safetensors"))[0]
    os.replace(interrupted / FOLDER / "checkpoint" / first, interrupted / first)
    monkeypatch.undo()
    result = run(interrupted, resume=True)
    assert weights_hash(interrupted) == whole and not (interrupted / FOLDER).exists()
    assert result.report["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_two_runs_on_one_folder_are_refused(tmp_path):
    first = Journal(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"another run \\(process {os.getpid()}\\)"):
        run(tmp_path / "out")
    first.close()
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out")


def test_a_run_that_fails_before_its_first_block_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="selects no prunable weight"):
        run(tmp_path / "out", targets=["nonsense"])
    assert not (tmp_path / "out").exists()


def test_sigint_stops_after_the_block_at_work(tmp_path, whole, monkeypatch, capfd):
    commit = Journal.commit

    def commit_and_signal(self, index, record):
        if index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        commit(self, index, record)

    monkeypatch.setattr(Journal, "commit", commit_and_signal)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="1 of 3 blocks done"):
        run(tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this block" in capfd.readouterr().err
    monkeypatch.undo()
    run(tmp_path / "out", resume=True)
    assert weights_hash(tmp_path / "out") == whole


def test_a_second_sigint_stops_at_once(tmp_path):
    journal = Journal(tmp_path / "out")
    with journal.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    journal.close()
    assert not isinstance(caught.value, Interrupted)


def test_signals_are_left_alone_outside_the_main_thread_and_without_output(tmp_path):
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside(journal):
        with journal.interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    inside(Journal(None))
    other = Journal(tmp_path / "out")
    thread = threading.Thread(target=inside, args=(other,))
    thread.start()
    thread.join()
    other.close()
    assert seen == [before, before]


@pytest.mark.parametrize("number, text", [(errno.ENOSPC, "no room to write"), (errno.EIO, "cannot write")])
def test_a_disk_that_fails_loses_nothing(tmp_path, whole, monkeypatch, number, text):
    sync, calls = os.fsync, 0

    def failing(handle):
        nonlocal calls
        calls += 1
        if calls == 9:  # the second block's shard: run.json, dense.json and the first block's two files took two each
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError, match=f"{text}.*1 of 3 blocks are safe; mend that and continue with --resume"):
        run(tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out" / FOLDER).glob(".*partial"))
    run(tmp_path / "out", resume=True)
    assert weights_hash(tmp_path / "out") == whole


def test_a_full_disk_at_the_very_end_loses_nothing(tmp_path):
    """A real limit on file sizes: a block's shard fits, the embeddings do not."""
    model = tiny.model("llama", vocab_size=1000)
    run(tmp_path / "whole", model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(OutputError, match="3 of 3 blocks are safe"):
            run(tmp_path / "out", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out" / "config.json").exists()
    run(tmp_path / "out", model, resume=True)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="cannot write .*Permission denied"):
        run(tmp_path / "out")
