"""Crash-safe progress of a run: finished blocks in ``OUTPUT/.pyprune/``, from which ``--resume`` goes on.

A step is one shard of a block's tensors and one entry that names it with its checksum; both are written to a
temporary name, fsynced and renamed, the entry last, so whatever moment a process dies at, a step is there whole or not
at all. The final checkpoint is assembled beside them; a mark, which names the run and every file, says that it is
complete. Then it is moved out and the folder goes, the mark last: as long as anything of a run is left here, it is
known whose it is.

A run of several sparsities that are pruned one after the other has a journal that names their folders (``members``),
and each of these has a journal of its own until its checkpoint is out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from pyprune.config import ConfigError
from pyprune.execution import distributed
from pyprune.model import checkpoint
from pyprune.model.shards import OutputError, Shard, checksum, output_error, sync, write_bytes, write_shard

FOLDER = ".pyprune"
MARK = "complete"
RESUME = "continue with --resume (resume=True)"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and did so between two blocks; says how to go on."""


class Journal:
    """Progress of one run on disk; with ``output=None`` it keeps nothing and refuses nothing."""

    def __init__(self, output: str | Path | None, resume: bool = False, parent: Journal | None = None):
        """Take the output folder: refuse one that is in use, unusable, or holds what ``resume`` does not fit to.

        parent: of the run of several sparsities that this one is part of; it is what a user resumes.
        """
        self.parent = parent
        self.entries: list[dict] = []
        self.notes: list[str] = []
        """What was found wrong and repaired, for the report."""
        self.header: dict = {}
        self.total = 0
        self._stopping = False
        self._lock: TextIO | None = None
        self._pending: dict[str, Future] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pyprune-journal")
        self._output = None if output is None else Path(output).expanduser().absolute()
        if not self.keeps:
            if resume:
                raise ConfigError("resume needs the output folder of the interrupted run")
            return
        self._admit(resume)
        self._created = not self.output.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock = open(self.folder / "lock", "a+")  # noqa: SIM115  held as long as the run
        except OSError as error:
            raise output_error(error, self.folder) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise ConfigError(
                f"another run (process {owner or 'unknown'}) is writing to {self.output}; wait for it, "
                "or choose another output folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            self._admit(resume)  # another run may have ended in the meantime
            self._read(resume)
        except ConfigError:
            self.release()
            raise

    @property
    def keeps(self) -> bool:
        """Anything is kept on disk: the run has an output folder."""
        return self._output is not None

    @property
    def output(self) -> Path:
        """The output folder of a run that has one."""
        if self._output is None:
            raise RuntimeError("a journal without an output folder keeps nothing")
        return self._output

    @property
    def folder(self) -> Path:
        """Where the steps of a run with an output folder lie."""
        return self.output / FOLDER

    @property
    def members(self) -> list[str]:
        """Folders in the output of the runs that this one consists of, each with a journal of its own; mostly none."""
        return self.header.get("members", [])

    def finished(self) -> list[str]:
        """The members whose checkpoints are out whole: ``config.json`` is moved last."""
        folders = [(name, self.output / name) for name in self.members]
        return [n for n, path in folders if (path / "config.json").is_file() and not (path / FOLDER / MARK).exists()]

    @property
    def begun(self) -> bool:
        """Anything was worked out that a resumed run need not do again."""
        steps = [step for name in self.members for step in (self.output / name / FOLDER).glob("block-*.json")]
        return bool(self.entries or steps or self.finished())

    def _stored_header(self) -> dict:
        """What the interrupted run in the folder said of itself; empty if there is none."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _admit(self, resume: bool) -> None:
        """Refuse an output folder that holds anything but an interrupted run."""
        if self.complete:
            return
        members = self._stored_header().get("members", [])
        done = any(self.output.glob("sparsity-*/pruning.json")) and not members
        if done or (resume and any(self.output.glob("pruning.json"))):
            raise ConfigError(
                f"{self.output} holds a finished checkpoint: there is nothing to resume; choose another output folder"
            )
        checkpoint.check_output(self.output, allow=(FOLDER, *members))

    def _read(self, resume: bool) -> None:
        if self.complete:
            self._read_mark(resume)
            return
        self.header = self._stored_header()
        if not self.header:
            self._clear()  # what belongs to no run known is no use to this one
            return
        self.total = self.header["blocks"]
        for index, path in enumerate(sorted(self.folder.glob("block-*.json"))):
            if path.name != f"block-{index:05}.json":
                break
            self.entries.append(json.loads(path.read_text()))
        if not resume:
            raise ConfigError(
                f"{self.output} holds an interrupted run with {self._progress()} done; {RESUME}, or remove "
                f"{self._remains}"
            )

    def _read_mark(self, resume: bool) -> None:
        """Take up a run whose checkpoint was assembled, if all its files are there as they were."""
        if not resume:
            raise ConfigError(
                f"{self.output} holds a finished run that was not moved out whole; {RESUME}, or remove {self.folder}"
            )
        try:
            mark = json.loads((self.folder / MARK).read_text())
            files = mark.pop("files")
            mark["identity"]["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.folder / MARK} does not say whose checkpoint lies there; remove {self.folder} "
                "and whatever was moved out of it, and run again"
            ) from error
        for name, known in files.items():
            if known not in (_stamp(folder / name) for folder in (self.folder / "checkpoint", self.output)):
                raise ConfigError(
                    f"{name} of the finished run in {self.output} is missing or was changed; empty that "
                    "folder and run again"
                )
        self.header = mark

    def _clear(self) -> None:
        """Remove everything but the lock and the mark, ``run.json`` first: without it nothing else counts."""
        (self.folder / "run.json").unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (MARK, "lock"):
                path.unlink()

    @property
    def complete(self) -> bool:
        """The final checkpoint was assembled: only moving it out is left. Whose it is, :meth:`begin` compares."""
        return self.keeps and (self.folder / MARK).exists()

    def check_settings(self, settings: dict) -> None:
        """Raise ConfigError naming the settings that differ from the interrupted run's."""
        if self.header:
            self._refuse(_differences(self.header["identity"]["settings"], settings))

    def begin(self, identity: dict, blocks: int, **header) -> None:
        """Record what this run is, or compare it with the interrupted one.

        identity: ``settings``, ``model`` and ``data``, plain nested dicts. Raises ConfigError that names every
        difference.
        """
        self.total = blocks
        if not self.keeps:
            return
        if not self.header:
            self.header = {"identity": identity, "blocks": blocks, **header}
            write_bytes(self.folder / "run.json", json.dumps(self.header, indent=1).encode())
            return
        self._refuse(_differences(self.header["identity"], identity))
        if not self.complete:
            self._drop_damaged()

    def _refuse(self, found: list[str]) -> None:
        if found:
            raise ConfigError(
                f"the interrupted run in {self.output} was another one: "
                + "; ".join(found)
                + f". Give what it was given, or remove {self._remains} to start anew"
            )

    def _drop_damaged(self) -> None:
        """Forget steps from the first whose files are missing or not what was written."""
        intact = len(self.entries)
        for step, entry in enumerate(self.entries):
            if not all(self._intact(file, digest) for file, digest in entry["files"].items() if _final(file)):
                intact = step
                break
        while intact and not all(self._intact(*item) for item in self.entries[intact - 1]["files"].items()):
            intact -= 1  # the drafts a step leaves for the next one are part of it
        if intact < len(self.entries):
            self.notes.append(f"files of the interrupted run were damaged: blocks from {intact} on were done again")
            for later in range(len(self.entries) - 1, intact - 1, -1):
                (self.folder / f"block-{later:05}.json").unlink(missing_ok=True)
            self.entries = self.entries[:intact]

    def _intact(self, file: str, digest: str) -> bool:
        path = self.folder / file
        return path.is_file() and checksum(path) == digest

    def kept(self, name: str) -> Any:
        """A plain value that the interrupted run worked out, None if it did not."""
        if not self.keeps:
            return None
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def keep(self, name: str, value: Any) -> None:
        if self.keeps:
            write_bytes(self.folder / f"{name}.json", json.dumps(checkpoint.plain(value)).encode())

    def shard(self, index: int) -> Path:
        """Where the finished tensors of a block lie."""
        return shard_path(self.output, index)

    def shards(self) -> list[Shard]:
        """The finished blocks of the whole run, in order; none without an output folder."""
        return [Shard(self.shard(index)) for index in range(self.total)] if self.keeps else []

    def write(self, index: int, tensors: dict[str, Tensor], *, draft: bool = False) -> None:
        """Start writing a block's tensors; they must not change until :meth:`commit`. A draft is a block that a later
        step changes again; it is kept until that step is committed."""
        if self.keeps:
            name = f"draft-{index:05}.safetensors" if draft else self.shard(index).name
            self._pending[name] = self._writer.submit(write_shard, self.folder / name, tensors)

    def commit(self, index: int, record: dict) -> None:
        """Finish the step of a block: its files are safe and ``record`` (plain JSON values) is kept with them."""
        if not self.keeps:
            self.entries.append({"block": index})
            return
        files = {name: future.result() for name, future in self._pending.items()}
        self._pending = {}
        entry = {"block": index, "files": files, **record}
        write_bytes(self.folder / f"block-{index:05}.json", json.dumps(checkpoint.plain(entry)).encode())
        old = [name for e in self.entries[:-1] for name in e["files"] if not _final(name) and name not in files]
        self.entries.append(entry)
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def read(self, index: int, *, draft: bool = False) -> dict[str, Tensor]:
        """Tensors of a block as a committed step left them (checksums were compared at the start)."""
        shard = Shard(self.folder / f"draft-{index:05}.safetensors" if draft else self.shard(index))
        return {name: shard.read(name) for name in shard.entries}

    @contextlib.contextmanager
    def interruptible(self, follow: bool = False) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops at the next :meth:`safe_point`, the second at once.

        Without an output folder there is nothing to save and signals act as always; the same outside the main thread.
        follow: another process keeps the journal.
        """
        if (not self.keeps and not follow) or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number, frame):
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True
            print(
                f"\npyprune: stopping after this block; once more stops at once, and loses it ({RESUME})",
                file=sys.stderr,
                flush=True,
            )

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    @property
    def stopping(self) -> bool:
        """A signal asked for an end."""
        return self._stopping

    def stop(self) -> None:
        """End at the next :meth:`safe_point`."""
        self._stopping = True

    def safe_point(self) -> None:
        """Between two blocks: raise :class:`Interrupted` if a signal asked for it."""
        if self._stopping:
            where = self._resumed if self.keeps else "the output folder"
            raise Interrupted(f"stopped with {self._progress()} done, safe in {where}; {RESUME}")

    @property
    def _resumed(self) -> Path:
        """The output folder that the user named."""
        return self.output if self.parent is None else self.parent.output

    @property
    def _remains(self) -> Path:
        """What to remove to be rid of an interrupted run."""
        return self.output if self.members else self.folder

    def _progress(self) -> str:
        """``3 of 30 blocks``; of one of several sparsities, these too."""
        if self.members:
            return f"{len(self.finished())} of {len(self.members)} sparsities"
        blocks = f"{len(self.entries)} of {self.total} blocks"
        if self.parent is None or not self.parent.keeps:
            return blocks
        return f"{self.parent._progress()} and {blocks} of {self.output.name}"

    def interrupted(self) -> str:
        """What a run that was stopped at any place leaves behind."""
        if not self.keeps:
            return "interrupted: nothing was written"
        if not (self.begun or (self.parent is not None and self.parent.begun)):
            return f"interrupted before the first block was done: nothing is left in {self._resumed}"
        return f"interrupted with {self._progress()} done, safe in {self._resumed}; {RESUME}"

    def explain(self, error: OutputError) -> OutputError:
        """Add to an error what is kept and how to go on."""
        if self.begun and RESUME not in str(error):
            error.args = (f"{error}. {self._progress()} are safe; mend that and {RESUME}",)
        return error

    def finish(self, fill: Callable[[Path], None]) -> None:
        """Assemble the final checkpoint with ``fill(folder)``, move it out, remove the journal."""
        if not self.keeps:
            return
        staging = self.folder / "checkpoint"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            fill(staging)
            checkpoint.settle(staging)
            files = {
                path.relative_to(staging).as_posix(): _stamp(path)
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            }
            write_bytes(self.folder / MARK, json.dumps({**self.header, "files": files}, indent=1).encode())
        except Exception as error:
            (self.folder / MARK).unlink(missing_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise self.explain(output_error(error, staging)) from error
            if type(error).__name__ == "SafetensorError":
                raise self.explain(OutputError(f"cannot write {staging}: {' '.join(str(error).split())}")) from error
            raise
        self.publish()

    def publish(self) -> None:
        """Move an assembled checkpoint out; ``config.json`` last, so that a partial move is no loadable model."""
        staging = self.folder / "checkpoint"
        files = sorted(staging.iterdir(), key=lambda p: (p.name == "config.json", p.name)) if staging.is_dir() else []
        try:
            for file in files:
                os.replace(file, self.output / file.name)
            sync(self.output)
        except OSError as error:
            raise self.explain(output_error(error, self.output)) from error
        with contextlib.suppress(OSError):  # the checkpoint is out; what stays behind is known by its mark
            self._clear()
            sync(self.folder)
            (self.folder / MARK).unlink()
            shutil.rmtree(self.folder)
        self.release()

    def dissolve(self) -> None:
        """The checkpoints of all members are out: the run is done."""
        if not self.keeps:
            return
        for name in self.members:  # what a process that died while it cleared up has left
            shutil.rmtree(self.output / name / FOLDER, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._clear()
            shutil.rmtree(self.folder)
        self.release()

    def close(self) -> None:
        """Unlock the folder. One that holds no step yet is removed, unless it was there before."""
        if not self.keeps:
            return
        for future in self._pending.values():
            future.exception()
        self._pending = {}
        if self._lock is not None and not self.begun and not self.complete:
            with contextlib.suppress(OSError):
                self._clear()
                shutil.rmtree(self.folder)
                if self._created:
                    self.output.rmdir()
        self.release()

    def release(self) -> None:
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextlib.contextmanager
def journaled(output: str | Path | None, resume: bool) -> Iterator[tuple[distributed.World, Journal]]:
    """The processes of a run and its journal, which process 0 keeps; left in order however the run ends."""
    world, failed = distributed.start(), True
    try:
        with kept_by(world, output, resume) as journal:
            yield world, journal
        failed = False
    finally:
        world.close(failed)


@contextlib.contextmanager
def kept_by(
    world: distributed.World, output: str | Path | None, resume: bool, parent: Journal | None = None
) -> Iterator[Journal]:
    """A journal that process 0 keeps. parent: as of :class:`Journal`."""
    journal = Journal(None, parent=parent)
    try:
        journal = world.lead(lambda: Journal(output, resume, parent)) or journal
        yield journal
    except OutputError as error:
        journal.explain(error)
        raise
    except KeyboardInterrupt as stop:
        if str(stop):
            raise
        raise Interrupted(journal.interrupted()) from stop
    finally:
        journal.close()


def remembered(output: str | Path) -> dict:
    """The configuration of the interrupted run in ``output``, as plain data. Raises ConfigError if there is none."""
    place = Path(output).expanduser()
    found = [path for path in (place / FOLDER / MARK, place / FOLDER / "run.json") if path.is_file()]
    if not found and (any(place.glob("pruning.json")) or any(place.glob("sparsity-*/pruning.json"))):
        raise ConfigError(f"{output} holds a finished run: there is nothing to resume")
    config = json.loads(found[0].read_text()).get("config") if found else None
    if config is None:
        if not place.is_dir():
            raise ConfigError(f"there is nothing to resume: no such folder: {output}")
        if (place / FOLDER).is_dir():
            raise ConfigError(
                f"the run in {output} was stopped before its first block: there is nothing to resume; run its command "
                "again, without resume"
            )
        raise ConfigError(f"there is nothing to resume: {output} holds no interrupted run")
    return {**config, "output": str(output)}


def shard_path(output: str | Path, index: int) -> Path:
    """Where the finished tensors of a block of the run in ``output`` lie."""
    return Path(output).expanduser().absolute() / FOLDER / f"block-{index:05}.safetensors"


def _stamp(path: Path) -> list[int] | None:
    """Size and time of the last change, which a move does not touch; None if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _final(file: str) -> bool:
    return not file.startswith("draft-")


def _differences(before, now, path: str = "") -> list[str]:
    """``sparsity was 0.5, now 0.6`` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted({*before, *now})
            for text in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    before, now = (json.loads(json.dumps(value)) for value in (before, now))
    if before == now:
        return []
    shown = [value[:12] + "…" if isinstance(value, str) and len(value) > 40 else value for value in (before, now)]
    return [f"{path} was {shown[0]!r}, now {shown[1]!r}"]
