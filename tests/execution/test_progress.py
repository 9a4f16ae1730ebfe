"""The progress bar in a log file and on a terminal."""

from __future__ import annotations

import io
import time

from pyprune.execution import progress
from pyprune.execution.progress import Doing, Progress


def test_progress_in_a_log_and_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        with Progress(2, out=stream) as bar:
            bar.update(block=0, phase="statistics")
            bar.update(block=1, phase="done", error=0.25)
            bar.update(phase="solve")
            bar.update(block=2, error=0.5)
    lines = log.getvalue().splitlines()
    assert [line.split(" · ")[:2] for line in lines] == [["pruning 1/2", "error 0.25"], ["pruning 2/2", "error 0.5"]]
    assert "left" in lines[0] and "left" not in lines[1]
    assert "2/2" in terminal.getvalue() and "error 0.5" in terminal.getvalue()
    with Progress(2, out=log, enabled=False) as bar:
        bar.update(block=1)
    assert log.getvalue().splitlines() == lines


def test_a_log_is_never_silent_for_long(monkeypatch):
    """Lines come by themselves while nothing is finished, with what is done and how long it takes."""
    monkeypatch.setattr(progress, "QUIET", 0.1)
    log = io.StringIO()
    with Doing("loading a model", out=log):
        time.sleep(0.35)
    lines = log.getvalue().splitlines()
    assert lines[0] == "pruning · loading a model" and 2 <= len(lines[1:]) <= 4
    assert all(line == "pruning · loading a model · 0 s" for line in lines[1:])
    log = io.StringIO()
    with Doing("measuring", label="evaluating", out=log) as doing:
        doing(1, 4)
        time.sleep(0.15)
    assert "evaluating · measuring 1/4 · 0 s" in log.getvalue()
    log = io.StringIO()
    with Progress(3, out=log) as bar:
        bar.update(phase="statistics")
        time.sleep(0.25)
        bar.update(block=1, phase="done")
    lines = log.getvalue().splitlines()
    assert lines[0] == "pruning 0/3 · statistics · 0 s" and lines[-1].startswith("pruning 1/3 · 0 s")


def test_what_is_over_at_once_says_nothing_unless_asked():
    log = io.StringIO()
    with Doing("reading text", out=log, said=False):
        pass
    with Doing("loading", False, out=log):
        pass
    assert log.getvalue() == ""


def test_time_left_counts_what_follows_the_last_block(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(4, enabled=False, afterwards=30) as bar:
        now = 10.0
        bar.update(block=1)
        assert bar.line() == "pruning 1/4 · 10 s, about 60 s left"
        now = 40.0
        bar.update(block=4)
        assert bar.line() == "pruning 4/4 · 40 s, about 30 s left"
