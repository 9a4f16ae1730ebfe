"""One format for every result: what was measured, its samples, and what they mean on this machine.

A file holds ``format``, ``preset``, ``environment`` (machine, versions, commit), ``ceilings`` and ``rows``. A row is
one contender (a back-end of ours, or a baseline) at one case; :class:`Row` documents its fields. Files are written
whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from pyprune.config import ConfigError

FORMAT = 1


@dataclass
class Row:
    """One contender at one case."""

    group: str
    """Of the suite: ops, pruning, reconstruction, liar, streaming, inference, scaling, peers."""
    name: str
    """The op with its class of sizes, or the job."""
    case: str
    """The shape, or what the job works on."""
    dtype: str
    device: str
    backend: str
    """What computed it: a back-end of ours, or a baseline (``eager``, ``compile``, ``published loop``, a tool)."""
    samples: list[float]
    """Seconds of each call, in the order of the calls; contenders of a case took turns."""
    clock: str = "wall"
    """``wall``, ``cpu`` (user and system, all threads) or ``events`` (a GPU's own)."""
    correct: str = "green"
    """``green``; ``red: why``; or ``not checked: why``. A red row's time is no result."""
    flops: float = 0.0
    bytes: float = 0.0
    """Floor of the work: floating-point operations, and bytes that must be read and written once."""
    figures: dict[str, float] = field(default_factory=dict)
    """Whatever else was measured, by name: error, perplexity, tokens per second, peak bytes."""
    baseline: str | None = None
    ratio: float | None = None
    """Median seconds of the baseline over those of this row."""
    gb_s: float | None = None
    tflop_s: float | None = None
    ceiling: str | None = None
    """What bounds it here: ``copy`` or a type's FLOP/s."""
    share: float | None = None
    """Of that ceiling, as measured in the same run."""
    isa: str = ""
    """The instruction set that PyTorch and our kernels were kept to; empty: whatever the processor has."""

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for the same measurement in two files."""
        return self.group, self.name, self.case, self.dtype, self.device, self.backend, self.isa

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        """Linear between the samples."""
        ordered = sorted(self.samples)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def to_dict(self) -> dict:
        found = {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, {}, 0.0, "")}
        found["samples"] = [float(f"{value:.5g}") for value in self.samples]
        if self.samples:  # none where the contender failed
            found["quantiles"] = {f"p{int(q * 100)}": float(f"{self.quantile(q):.5g}") for q in (0.1, 0.5, 0.9)}
        for name in ("ratio", "gb_s", "tflop_s", "share"):
            if name in found:
                found[name] = float(f"{found[name]:.4g}")
        return found

    @classmethod
    def from_dict(cls, found: dict) -> Row:
        names = {f.name for f in dataclasses.fields(cls)}
        case = re.sub(r"\b1 (block|process)e?s\b", r"1 \1", found["case"])  # older files: 1 blocks, 1 processes
        return cls(**{key: value for key, value in {**found, "case": case}.items() if key in names})


def against(rows: list[Row], baseline: str) -> list[Row]:
    """The rows of one case, each with its ratio to the one of ``baseline``, if that is there and right."""
    base = next((row for row in rows if row.backend == baseline and not row.correct.startswith("red")), None)
    for row in rows:
        if base is not None and row.samples and base.samples:
            row.baseline, row.ratio = baseline, base.median / row.median
    return rows


def bounded(rows: list[Row], ceilings: dict[str, float]) -> list[Row]:
    """The rows with their rates and the share of what this machine can do at most: of bytes per second by a large copy,
    of FLOP/s in the type of their products, whichever takes longer."""
    for row in rows:
        if not row.samples or not (row.flops or row.bytes):
            continue
        row.gb_s, row.tflop_s = row.bytes / row.median / 1e9, row.flops / row.median / 1e12
        floors = {"copy": row.bytes / ceilings["copy"]} if "copy" in ceilings else {}
        rate = row.dtype if row.dtype in ceilings else "float32"
        if row.flops and rate in ceilings:
            floors[rate] = row.flops / ceilings[rate]
        if floors:
            row.ceiling = max(floors, key=floors.__getitem__)
            row.share = floors[row.ceiling] / row.median
    return rows


def write(path: Path, rows: list[Row], **about) -> Path:
    """Write rows, and what else the file says, whole."""
    text = json.dumps(
        {"format": FORMAT, **about, "rows": [row.to_dict() for row in rows]}, indent=1, ensure_ascii=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text(text + "\n")
    part.replace(path)
    return path


def read(path: Path) -> tuple[list[Row], dict]:
    """Rows of a file, and what else it says. Raises ConfigError if it is none of ours."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no result file: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path} is no result file of `python -m benchmarks run` (format {FORMAT})")
    return [Row.from_dict(row) for row in found.pop("rows")], found
