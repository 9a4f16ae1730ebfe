"""The progress bar in a log file and on a terminal."""

from __future__ import annotations

import io

from pyprune.pipeline.progress import Progress


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
