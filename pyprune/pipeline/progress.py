"""Progress of a run over its blocks: a bar on a terminal, a plain line per block in a log. Writes to stderr only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def announce(text: str, enabled: bool = True, label: str = "pruning") -> None:
    """A line for what takes its time outside the blocks: loading, measuring."""
    if enabled:
        print(f"{label} · {text}", file=sys.stderr, flush=True)


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
    ):
        self.listener = listener
        """Called with (blocks finished, blocks in all) after each."""
        self.total, self.label, self.enabled = total, label, enabled
        self.out = out or sys.stderr
        self.block, self.phase = 0, ""
        self.error: float | None = None
        self._started = time.monotonic()
        self._bar: RichProgress | None = None
        self._tasks: list[TaskID] = []

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.enabled and self.out.isatty():
            self._bar = _bar(self.out)
            self._tasks = [self._bar.add_task(self.label, total=self.total, note="")]
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

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
                self._bar.update(task, completed=self.block, note=self._note())
        elif advanced:
            print(self.line(), file=self.out, flush=True)

    def _note(self) -> str:
        return " · ".join(filter(None, [self.phase, "" if self.error is None else f"error {self.error:.3g}"]))

    def line(self) -> str:
        """The state in one line: ``pruning 3/30 · error 0.012 · 41 s, about 370 s left``."""
        elapsed = time.monotonic() - self._started
        left = elapsed / self.block * (self.total - self.block) if self.block else None
        parts = [f"{self.label} {self.block}/{self.total}"]
        if self.error is not None:
            parts.append(f"error {self.error:.3g}")
        parts.append(f"{elapsed:.0f} s" + (f", about {left:.0f} s left" if left else ""))
        return " · ".join(parts)


def _bar(out: TextIO) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=out),
    )
