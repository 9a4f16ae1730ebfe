"""Progress of what takes its time: a bar on a terminal, lines in a log, never silent for more than ten seconds.

Writes to standard error only. :class:`Progress` is for the blocks of a run, :class:`Doing` for everything around them:
loading, measuring, generating.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

QUIET = 8.0
"""Seconds without a line in a log after which the next one comes by itself."""


def announce(text: str, enabled: bool = True, label: str = "pruning") -> None:
    """A line on standard error."""
    if enabled:
        print(f"{label} · {text}", file=sys.stderr, flush=True)


class _Pulse:
    """Prints a line whenever nothing was printed for :data:`QUIET` seconds, from a thread of its own."""

    def __init__(self, line: Callable[[], str], out: TextIO):
        self.line, self.out = line, out
        self.last = time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pyprune progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1)

    def say(self, text: str) -> None:
        with self._lock, contextlib.suppress(ValueError, OSError):  # a log that was closed or is full stops no run
            print(text, file=self.out, flush=True)
        self.last = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(max(0.05, self.last + QUIET - time.monotonic())):
            if time.monotonic() - self.last >= QUIET:
                self.say(self.line())


class Doing:
    """``with Doing("loading x") as doing: doing(3, 24)``: what is done now, how far it is, how long it has taken.

    Called with (done, in all) as it goes on. In a log one line at the start, and one every few seconds if it lasts.
    """

    def __init__(
        self,
        text: str,
        enabled: bool = True,
        label: str = "pruning",
        *,
        out: TextIO | None = None,
        said: bool = True,
    ):
        """said: whether a line is due even if it is over at once."""
        self.text, self.enabled, self.label, self.said = text, enabled, label, said
        self.out = out or sys.stderr
        self.done = self.total = 0
        self._started = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._pulse: _Pulse | None = None

    def __enter__(self) -> Doing:
        self._started = time.monotonic()
        if not self.enabled:
            return self
        if self.out.isatty():
            self._bar = _activity(self.out)
            self._task = self._bar.add_task(f"{self.label} · {self.text}", total=None, note="")
            self._bar.start()
            return self
        self._pulse = _Pulse(self.line, self.out)
        if self.said:
            self._pulse.say(f"{self.label} · {self.text}")
        self._pulse.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()
            if self.said:
                print(self.line(), file=self.out, flush=True)
        if self._pulse is not None:
            self._pulse.stop()

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=f"{done}/{total}")

    def line(self) -> str:
        """``pruning · measuring the dense model 5/24 · 31 s, about 118 s left``."""
        elapsed = time.monotonic() - self._started
        count = f" {self.done}/{self.total}" if self.total else ""
        left = elapsed / self.done * (self.total - self.done) if self.done else 0
        return f"{self.label} · {self.text}{count} · {elapsed:.0f} s" + (f", about {left:.0f} s left" if left else "")


class Progress:
    """``with Progress(blocks) as p: p.update(block=i, phase="solve", error=0.01)``: block, phase, error, time left.

    total: blocks in all. block: blocks finished so far. error: the last measured reconstruction error.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str = "pruning",
        enabled: bool = True,
        out: TextIO | None = None,
        listener: Callable[[int, int], None] | None = None,
        afterwards: float = 0.0,
        following: int = 0,
    ):
        """afterwards: seconds of what follows the last block, which count as time left. following: how many times as
        much follows."""
        self.listener = listener
        """Called with (blocks finished, blocks in all) after each."""
        self.total, self.label, self.enabled = total, label, enabled
        self.afterwards, self.following = afterwards, following
        self.out = out or sys.stderr
        self.block, self.phase = 0, ""
        self.error: float | None = None
        self._started = time.monotonic()
        self._bar: RichProgress | None = None
        self._tasks: list[TaskID] = []
        self._pulse: _Pulse | None = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.enabled and self.out.isatty():
            self._bar = _bar(self.out)
            self._tasks = [self._bar.add_task(self.label, total=self.total, note="", left="")]
            self._bar.start()
        elif self.enabled:
            self._pulse = _Pulse(self.line, self.out)
            self._pulse.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._pulse is not None:
            self._pulse.stop()

    def update(self, *, block: int | None = None, phase: str | None = None, error: float | None = None) -> None:
        """Say what is known now; None leaves a value as it was."""
        advanced = block is not None and block > self.block
        self.block = self.block if block is None else block
        self.phase = self.phase if phase is None else phase
        self.error = self.error if error is None else error
        if advanced and self.listener is not None:
            self.listener(self.block, self.total)
        if not self.enabled:
            return
        if self._bar is not None:
            for task in self._tasks:
                self._bar.update(task, completed=self.block, note=self._note(), left=self._left())
        elif advanced and self._pulse is not None:
            self._pulse.say(self.line(phase=False))

    def _note(self) -> str:
        return " · ".join(filter(None, [self.phase, "" if self.error is None else f"error {self.error:.3g}"]))

    def _left(self) -> str:
        """Time left as far as the blocks so far tell, what follows the last one included."""
        if not self.block:
            return ""
        elapsed = time.monotonic() - self._started
        block = elapsed / self.block
        left = block * (self.total - self.block) + self.afterwards
        left += self.following * (block * self.total + self.afterwards)
        return f"about {left:.0f} s left" if left else ""

    def line(self, phase: bool = True) -> str:
        """The state in one line: ``pruning 3/30 · error 0.012 · 41 s, about 370 s left``."""
        parts = [f"{self.label} {self.block}/{self.total}"]
        if phase and self.phase:
            parts.append(self.phase)
        if self.error is not None:
            parts.append(f"error {self.error:.3g}")
        parts.append(", ".join(filter(None, [f"{time.monotonic() - self._started:.0f} s", self._left()])))
        return " · ".join(parts)


def _bar(out: TextIO) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(file=out),
    )


def _activity(out: TextIO) -> RichProgress:
    """A spinner with elapsed time, which leaves nothing behind."""
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(file=out),
        transient=True,
    )
