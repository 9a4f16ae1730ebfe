"""Who works on which cell, told by files alone, so that workers on several machines can share one folder.

The claim ``NAME.K`` is created exclusively, which exactly one worker can do, also on NFS. Its owner touches it every
few seconds. One whose owner is dead, or silent for longer than ``STALE``, is not removed, as two workers could do that
at once: the next claim, ``NAME.K+1``, is created exclusively instead, and the one with the highest number counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BEAT = 10.0
"""Seconds between two signs of life."""
STALE = 120.0
"""Seconds of silence after which a cell is taken over."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claims:
    """The claims in one folder."""

    def __init__(self, folder: Path, *, beat: float = BEAT, stale: float = STALE):
        self.folder, self.beat, self.stale = folder, beat, stale
        self.me = Owner(socket.gethostname(), os.getpid())
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Yields whether the cell is this worker's inside the ``with`` block; if so, it shows signs of life there."""
        path = self._take(name)
        if path is None:
            yield False
            return
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(path, ended), daemon=True, name="pyprune-claim")
        heart.start()
        try:
            yield True
        finally:
            ended.set()
            heart.join()
            for old in self._of(name):
                if old[0] <= int(path.suffix[1:]):
                    old[1].unlink(missing_ok=True)

    def owner(self, name: str) -> Owner | None:
        """Who works on a cell; None if nobody does."""
        held = self._of(name)
        return self._owner(held[-1][1]) if held and not self._dead(held[-1][1]) else None

    def _take(self, name: str) -> Path | None:
        held = self._of(name)
        number = 0
        if held:
            number, latest = held[-1]
            if not self._dead(latest):
                return None
            number += 1
        path = self.folder / f"{name}.{number}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return None
        with os.fdopen(handle, "w") as file:
            json.dump({"host": self.me.host, "pid": self.me.pid, "since": time.time()}, file)
        return path

    def _of(self, name: str) -> list[tuple[int, Path]]:
        """All claims on a cell, the one that counts last."""
        found = [path for path in self.folder.iterdir() if path.stem == name and path.suffix[1:].isdigit()]
        return sorted((int(path.suffix[1:]), path) for path in found)

    def _beat(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(path)

    def _owner(self, path: Path) -> Owner | None:
        try:
            found = json.loads(path.read_text())
            return Owner(found["host"], found["pid"])
        except (OSError, ValueError, KeyError):
            return None  # being written, or its writer died before it was

    def _dead(self, path: Path) -> bool:
        owner = self._owner(path)
        if owner is not None and owner.host == self.me.host and not _alive(owner.pid):
            return True
        try:
            return self.now() - path.stat().st_mtime > self.stale
        except FileNotFoundError:
            return True

    def now(self) -> float:
        """The time by the clock that stamps this folder's files, which need not be this machine's."""
        probe = self.folder / f".clock-{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
