"""Which candidate of each op ``auto`` takes on this machine: measured once, kept, and measured again when anything it
depends on has changed.

A candidate is a function by name; a list holds those of one op, or of one of its size classes. In a process of its own
(:mod:`trials`) each one proves itself against float64 and is timed against the others; what gives wrong results,
crashes or hangs is out, and one that is faster than those before it in the list by more than ``MARGIN`` takes their
place. The verdicts lie in the user's cache folder, one JSON per machine, GPU, thread class and build. Where nothing was
measured the default is taken: on a CPU, whose kernels the tests of every build have run, the first of the list, on a
GPU the library's. ``PYPRUNE_QUALIFY=0`` measures nothing and takes every default.

This module knows neither ops nor back-ends: :mod:`pyprune.ops` hands it the candidates.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from pyprune.ops import native

MARGIN = 1.1
"""A candidate has to be faster than the one before it in the list by this factor to be taken instead."""
STEP_SECONDS, START_SECONDS = 30.0, 120.0
"""Silence after which a candidate, or the start of the process, is taken to hang."""
SOURCES = ("reference.py", "packed.py", "trials.py", "qualification.py", "classes.py")
"""Files here that decide what is measured, beside those that hold the candidates."""
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "PYPRUNE_ISA")

Candidates = dict[str, list[dict]]
"""Op → its usable candidates in order of preference: ``name``, ``module``, ``function``."""

_known: dict[str, dict] = {}
_lock = threading.RLock()


class Unmeasured(Exception):
    """The measuring process did not work at all; says why."""


def enabled() -> bool:
    return os.environ.get("PYPRUNE_QUALIFY") != "0"


def verdicts(device: str, candidates: Candidates, *, measure: bool = True, again: bool = False) -> dict[str, dict]:
    """Op → its verdict: ``takes`` (a candidate's name), ``why``; where measured ``errors``, ``seconds``, ``failed``.

    device: type of the tensors. measure: measure now what is not known yet, with a line on stderr; otherwise the
    default is taken until something measures. again: measure even what is known.
    """
    if not enabled():
        return _defaults(device, candidates, f"{_default_is(device)}: PYPRUNE_QUALIFY=0 turned measuring off")
    single = {op: list_ for op, list_ in candidates.items() if len(list_) == 1}
    several = {op: list_ for op, list_ in candidates.items() if len(list_) > 1}
    found = _defaults(device, single, "the only one that is usable here")
    if not several:
        return found
    with _lock:
        depends = key(device, several)
        digest = _digest(depends)
        known = None if again else _known.get(digest) or _read(digest, depends, several)
        if known is None and not measure:
            return found | _defaults(device, several, f"{_default_is(device)}: not measured on this machine yet")
        if known is None:
            known = _qualify(device, several, digest, depends)
        _known[digest] = known
    return found | known


def _defaults(device: str, candidates: Candidates, why: str) -> dict[str, dict]:
    names = {op: [c["name"] for c in list_] for op, list_ in candidates.items()}
    return {op: {"takes": names[op][0] if device == "cpu" else _library(names[op]), "why": why} for op in names}


def _library(names: list[str]) -> str:
    """What needs no proof: PyTorch's own."""
    return "reference" if "reference" in names else names[-1]


def _default_is(device: str) -> str:
    return "the first usable one" if device == "cpu" else "the library's, since nothing else has proved itself here"


def _qualify(device: str, candidates: Candidates, digest: str, depends: dict) -> dict[str, dict]:
    _say(
        f"measuring which back-end of each op is right and fastest on this {'GPU' if device != 'cpu' else 'machine'}, "
        "once: under a minute"
    )
    started = time.perf_counter()
    try:
        records = _measure(device, candidates)
    except Unmeasured as error:
        _say(f"the back-ends could not be measured, every op takes its default: {error}")
        return _defaults(device, candidates, f"{_default_is(device)}: it could not be measured, {error}")
    found = {op: decide([c["name"] for c in candidates[op]], record) for op, record in records.items()}
    for op, verdict in found.items():
        for name, reason in verdict["failed"].items():
            _say(f"{name} is not used for {op} on this machine: {reason}; {verdict['takes']} is")
    others = [
        f"{op} {verdict['takes']}" for op, verdict in found.items() if verdict["takes"] != candidates[op][0]["name"]
    ]
    _say(
        f"measured in {time.perf_counter() - started:.0f} s; not the first of its list: {', '.join(others) or 'none'} "
        "(pyprune env shows all)"
    )
    _write(digest, {"key": depends, "measured": _now(), "verdicts": found})
    return found


def disqualify(device: str, candidates: Candidates, ops: list[str], name: str, reason: str) -> None:
    """Take what failed in a run out of the kept verdicts on some ops; ``verdicts(again=True)`` tries it anew."""
    several = {op: list_ for op, list_ in candidates.items() if len(list_) > 1}
    if not enabled() or not several:
        return
    with _lock:
        depends = key(device, several)
        digest = _digest(depends)
        known = _known.get(digest) or _read(digest, depends, several)
        if known is None:
            return
        for op in ops:
            if op not in known or "errors" not in known[op]:
                continue
            record = {part: known[op][part] for part in ("errors", "failed", "seconds", "threads") if part in known[op]}
            record["failed"] = {**record["failed"], name: reason}
            known[op] = decide([c["name"] for c in several[op]], record)
        _known[digest] = known
        _write(digest, {"key": depends, "measured": _now(), "verdicts": known})


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"pyprune · {text}", file=sys.stderr, flush=True)


def decide(names: list[str], record: dict) -> dict:
    """The verdict on an op from what its candidates did: the first right one, unless a later one is clearly faster."""
    right = [name for name in names if name in record["errors"] and name not in record["failed"]]
    if not right:
        return {**record, "takes": _library(names), "why": "no candidate passed its checks: the last resort"}
    taken = right[0]
    if len(right) == 1:
        return {**record, "takes": taken, "why": "the only one that passed its checks"}
    for name in right[1:]:
        if _ratio(record["seconds"], taken, name) > MARGIN:
            taken = name
    ratios = {name: _ratio(record["seconds"], name, taken) for name in right if name != taken}
    shown = ", ".join(f"{ratio:.2f} times as fast as {name}" for name, ratio in ratios.items())
    stays = f": the first in the list stays within a factor of {MARGIN}" if min(ratios.values()) < 1 else ""
    return {**record, "takes": taken, "why": shown + stays}


def _ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How much faster ``fast`` is, the geometric mean over the sizes."""
    logs = [math.log(a / b) for a, b in zip(seconds[slow], seconds[fast])]
    return math.exp(sum(logs) / len(logs))


def _measure(device: str, candidates: Candidates) -> dict[str, dict]:
    """Op → ``errors``, ``failed``, ``seconds`` by candidate. A process that a candidate ends is followed by another."""
    threads = _free_threads()
    records: dict[str, dict] = {
        op: {"errors": {}, "failed": {}, "seconds": {}, "threads": threads} for op in candidates
    }
    waiting = list(candidates)
    while waiting:
        jobs = [
            {"op": op, "candidates": [c for c in candidates[op] if c["name"] not in records[op]["failed"]]}
            for op in waiting
        ]
        ended = _run({"device": device, "threads": threads, "jobs": jobs}, records, waiting)
        if ended is not None:
            op, name, reason = ended
            records[op]["failed"].setdefault(name, reason)
            records[op]["errors"].pop(name, None)
    return records


def _free_threads() -> int:
    """As many as torch uses, if the machine is quiet enough to time them, else one, which is timed in CPU seconds."""
    threads = torch.get_num_threads()
    with contextlib.suppress(OSError):
        if len(os.sched_getaffinity(0)) - os.getloadavg()[0] < threads - 0.5:
            return 1
    return threads


def _run(order: dict, records: dict[str, dict], waiting: list[str]) -> tuple[str, str, str] | None:
    """One process over the jobs of ``order``: fills ``records``, takes finished ops from ``waiting``. Returns the op,
    the candidate and the reason if it was ended in the middle of one; raises Unmeasured if it ended anywhere else."""
    from pyprune.ops.trials import MARK

    start = f"import sys; sys.path[:] = {sys.path!r}; from pyprune.ops.trials import main; main()"
    lines: queue.Queue[str | None] = queue.Queue()
    trying = None
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYPRUNE_QUALIFY": "0"},
        )
        stdin, stdout = child.stdin, child.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a process that was started with pipes has none")
        reader = threading.Thread(target=_read_lines, args=(stdout, lines), daemon=True)
        reader.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(order))
                stdin.close()
            limit = START_SECONDS
            while (line := lines.get(timeout=limit)) is not None:
                if not line.startswith(MARK):
                    continue
                event, limit = json.loads(line[len(MARK) :]), STEP_SECONDS
                if "trying" in event:
                    trying = event["op"], event["trying"]
                elif "done" in event:
                    waiting.remove(event["op"])
                    trying = None
                elif "op" in event:
                    _record(records[event["op"]], event)
            code = child.wait(timeout=STEP_SECONDS)
            reason = None if code == 0 else _ending(code)
        except (queue.Empty, subprocess.TimeoutExpired):
            reason = f"it did not answer within {limit:.0f} s"
        finally:
            child.kill()
            child.wait()
            reader.join()
            stdout.close()
        if trying is not None:
            return (*trying, reason or "the process ended in the middle of it")
        if reason is not None or waiting:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise Unmeasured(f"{reason or 'the process ended early'}{': ' + said[-1] if said else ''}")
    return None


def _read_lines(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _record(record: dict, event: dict) -> None:
    if "error" in event:
        record["errors"][event["name"]] = event["error"]
    elif "failed" in event:
        record["failed"][event["name"]] = event["failed"]
    else:
        record["seconds"] = event["seconds"]


def _ending(code: int) -> str:
    if code > 0:
        return f"the process ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"it took the process down ({signal.Signals(-code).name})"
    return f"it took the process down (signal {-code})"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _digest(depends: dict) -> str:
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def key(device: str, candidates: Candidates) -> dict:
    """Everything that a verdict for tensors on ``device`` depends on."""
    name, flags = _processor()
    return {
        "device": device,
        "processor": name,
        "flags": flags,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "limits": {limit: os.environ[limit] for limit in LIMITS if limit in os.environ},
        "level": native._C.cpu_level() if native._C else None,
        "threads": "one" if torch.get_num_threads() == 1 else "several",
        "native": _file_digest(native._C.__file__) if native._C else None,
        "sources": _sources(tuple(sorted({c["module"] for list_ in candidates.values() for c in list_}))),
        "candidates": {
            op: [[c["name"], c["module"], c["function"]] for c in list_] for op, list_ in candidates.items()
        },
        **({} if device == "cpu" else {"gpu": _gpu()}),
    }


def _gpu() -> dict:
    """The GPU that is current, and what turns kernels into its code."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = Path("/proc/driver/nvidia/version")
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
        "cuda": torch.version.cuda,
        "triton": triton,
        "tuned": os.environ.get("PYPRUNE_AUTOTUNE") == "1",
    }


@functools.cache
def _processor() -> tuple[str, str]:
    """Model name, and a digest of the instruction sets it has."""
    info = Path("/proc/cpuinfo")
    fields = (
        dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        if info.is_file()
        else {}
    )
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags") or fields.get("Features") or ""
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]


@functools.cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@functools.cache
def _sources(modules: tuple[str, ...]) -> str:
    """A digest of the files that measure, and of those that hold the candidates: of a package, all of its own."""
    files = [Path(__file__).with_name(name) for name in SOURCES]
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None:
            raise ModuleNotFoundError(f"a candidate's module {module} is not here")
        inside = [path for place in spec.submodule_search_locations or () for path in sorted(Path(place).glob("*.py"))]
        files += inside or [Path(spec.origin or "")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyprune"


def _path(digest: str) -> Path:
    return cache_folder() / f"verdicts-{digest}.json"


def _read(digest: str, depends: dict, candidates: Candidates) -> dict[str, dict] | None:
    """The verdicts kept for this key, None if there are none or the file is not what was written."""
    try:
        kept = json.loads(_path(digest).read_text())
        found = {op: kept["verdicts"][op] for op in candidates}
        right = kept["key"] == depends and all(
            found[op]["takes"] in [c["name"] for c in candidates[op]] and isinstance(found[op]["why"], str)
            for op in found
        )
        return found if right else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(digest: str, value: dict) -> None:
    path = _path(digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(value, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        _say(
            f"the verdicts cannot be kept in {path.parent} ({error.strerror or error}): they hold for this process, "
            "and the next one measures again"
        )
