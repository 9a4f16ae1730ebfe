"""What changed between two result files, beyond noise.

Times say something about the code only where the machine was as fast both times. Where the ceilings of the two runs are
apart, the machine was so many times as fast as they say, or as fast as before, or anything between: what counts as a
change does by every one of these factors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TextIO

from benchmarks.listing import milliseconds, rate
from benchmarks.rows import Row
from pyprune.reporting import words
from pyprune.reporting.console import open_console

LEVEL, LEAST = 0.01, 0.03
"""A change counts if Mann and Whitney's test calls it significant at ``LEVEL`` and medians differ by ``LEAST``."""
ALONE = 0.25
"""Rows with too few samples for the test are named if they differ by this."""
MOVED = 0.1
"""Ceilings that differ by more say that the machine was not as fast both times."""


@dataclass(frozen=True)
class Change:
    """One measurement that both files have."""

    key: tuple[str, ...]
    before: float
    after: float
    ratio: float
    """Times as fast as before; of all that the machine's speed allows the one next to 1."""
    p: float | None
    """Of the two-sided test; None where there are too few samples."""
    samples: tuple[int, int] = (0, 0)
    colour: str = ""
    """What happened to its correctness, if anything did."""

    @property
    def counts(self) -> bool:
        if self.colour:
            return True
        return self.p is not None and self.p < LEVEL and self._apart > math.log1p(LEAST)

    @property
    def large(self) -> bool:
        """Whether a row that cannot be tested is worth a look."""
        return not self.colour and self.p is None and self._apart > math.log1p(ALONE)

    @property
    def _apart(self) -> float:
        return abs(math.log(self.ratio))


def p_value(a: list[float], b: list[float]) -> float | None:
    """Two-sided Mann–Whitney, exact for few samples (scipy). None if no result of that many could be significant."""
    if not _can_be_significant(len(a), len(b)):
        return None
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(a, b).pvalue)


def _can_be_significant(a: int, b: int) -> bool:
    """Whether so many samples, all of one below all of the other, are enough for ``LEVEL``."""
    return math.comb(a + b, a) * LEVEL >= 2


def speeds(before: dict[str, float], after: dict[str, float], isa: str = "") -> tuple[float, float]:
    """How many times as fast the machine was in the second run, at least and at most, by the ceilings of both."""
    found = [after[name] / before[name] for name in before if name in after and name.partition(" ")[2] == isa]
    moved = any(abs(math.log(speed)) > math.log1p(MOVED) for speed in found)
    return (min(1.0, *found), max(1.0, *found)) if moved else (1.0, 1.0)


def changes(
    before: list[Row], after: list[Row], most: dict[str, float] | None = None, now: dict[str, float] | None = None
) -> list[Change]:
    """Of all rows that are in both, the largest change first; ``most`` and ``now`` are the ceilings of both runs.

    Benjamini and Hochberg's correction keeps the share of false alarms among many rows at ``LEVEL``.
    """
    old = {row.key: row for row in before}
    found = []
    for row in after:
        was = old.get(row.key)
        if was is None:
            continue
        colour = "" if was.correct == row.correct else f"{was.correct} → {row.correct}"
        if row.samples and was.samples:
            found.append(_change(was, row, colour, speeds(most or {}, now or {}, row.isa)))
        elif colour:
            found.append(Change(row.key, math.nan, math.nan, 1.0, None, colour=colour))
    return sorted(_corrected(found), key=lambda change: -abs(math.log(change.ratio)))


def _change(was: Row, row: Row, colour: str, machine: tuple[float, float]) -> Change:
    """Seconds of the second run as the machine of the first would have needed them, at its least and at its most."""
    ratios = [was.median / (row.median * speed) for speed in machine]
    p = [p_value(was.samples, [seconds * speed for seconds in row.samples]) for speed in machine]
    if ratios[1] <= 1 <= ratios[0]:  # the machine alone explains it, whichever way
        ratio = 1.0
    else:
        ratio = min(ratios, key=lambda ratio: abs(math.log(ratio)))
    worst = None if None in p else max(value for value in p if value is not None)
    counts = len(was.samples), len(row.samples)
    return Change(row.key, was.median, row.median, ratio, worst, counts, colour)


def _corrected(found: list[Change]) -> list[Change]:
    tested = sorted((change for change in found if change.p is not None), key=lambda change: change.p or 0.0)
    adjusted, least = {}, 1.0
    for place in range(len(tested), 0, -1):
        change = tested[place - 1]
        least = min(least, (change.p or 0.0) * len(tested) / place)
        adjusted[change.key] = least
    return [replace(change, p=adjusted.get(change.key)) for change in found]


def differences(before: dict, after: dict) -> list[str]:
    """What of the two environments differs, as far as it explains a change."""
    names = ("cpu", "cores", "instruction_set", "threads", "gpu", "python", "torch", "transformers", "commit")
    a, b = before.get("environment", {}), after.get("environment", {})
    return [f"{name}: {a.get(name)} → {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def print_comparison(before: tuple[list[Row], dict], after: tuple[list[Row], dict], out: TextIO | None = None) -> None:
    """What ``compare`` prints: what differs around the rows, how many changed, a table of these, and apart from it one
    of those that are not tested."""
    console = open_console(out)
    most, now = before[1].get("ceilings", {}), after[1].get("ceilings", {})
    found = changes(before[0], after[0], most, now)
    for text in [*differences(before[1], after[1]), *_machine(most, now)]:
        console.print(text)
    counted = [change for change in found if change.counts]
    untested = [change for change in found if change.p is None and not change.colour]
    same = len(found) - len(counted) - len(untested)
    few = f", {len(untested)} with too few samples for a test" if untested else ""
    console.print(
        f"{words.counted(len(found), 'row')} in both: {len(counted)} changed beyond noise, {same} did not{few}"
    )
    explained = {change.key for change in changes(before[0], after[0]) if change.counts} - {c.key for c in counted}
    if explained:
        console.print(
            f"no verdict on {len(explained)} of those that did not: they changed by no more than the machine may have"
        )
    keys = [{row.key for row in rows} for rows, _ in (before, after)]
    for place, missing in (("first", keys[0] - keys[1]), ("second", keys[1] - keys[0])):
        if missing:
            console.print(f"{words.counted(len(missing), 'row')} only in the {place} file")
    moved = {change.key for change in found if speeds(most, now, change.key[-1]) != (1.0, 1.0)}
    if counted:
        console.print(_table(counted, moved))
    if untested:
        _print_untested(console, untested, moved)


def _machine(most: dict[str, float], now: dict[str, float]) -> list[str]:
    """A sentence per instruction set whose ceilings are apart."""
    lines = []
    for isa in dict.fromkeys(name.partition(" ")[2] for name in most):
        least, greatest = speeds(most, now, isa)
        if least == greatest:
            continue
        names = [name for name in most if name in now and name.partition(" ")[2] == isa]
        shown = ", ".join(f"{name} {rate(name, most[name])} → {rate(name, now[name])}" for name in names)
        lines.append(
            f"ceilings: {shown}. The machine was another or loaded otherwise, {least:.2f} to {greatest:.2f} times as "
            "fast as before; a row counts as changed only if it did at any speed between."
        )
    return lines


def _print_untested(console, untested: list[Change], moved: set[tuple[str, ...]]) -> None:
    """How many samples there are, how many it takes, and the rows that are worth a look."""
    had = ", ".join(f"{a} before and {b} after" for a, b in sorted({change.samples for change in untested}))
    enough = next(count for count in itertools.count(1) if _can_be_significant(count, count))
    large = [change for change in untested if change.large]
    console.print(
        f"Too few samples for a test: {had}; {enough} and {enough} would do (ops take 15 from the preset quick on)."
    )
    console.print(f"Of these {len(untested)}, {len(large)} differ by more than {ALONE:.0%}, which may be noise.")
    if large:
        console.print(_table(large, moved))


def _table(found: list[Change], moved: set[tuple[str, ...]]):
    """Rows that are not as right as before, then the slower ones, then the faster ones."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for heading in ("op or job", "shape", "type", "device, back-end", "before", "after", "change"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("before", "after") else "left")
    for change in sorted(found, key=lambda change: (not change.colour, change.ratio > 1, -abs(math.log(change.ratio)))):
        group, job, case, dtype, device, backend, isa = change.key
        times = [milliseconds(seconds) if math.isfinite(seconds) else "" for seconds in (change.before, change.after)]
        where = f"{device} ({isa}), {backend}" if isa else f"{device}, {backend}"
        what = job if group == "ops" else f"{group}: {job}"
        said = escape(change.colour) or _in_words(change, change.key in moved)
        table.add_row(what, case, dtype, where, *times, said)
    return table


def _in_words(change: Change, moved: bool) -> str:
    slower = change.ratio < 1
    times = 1 / change.ratio if slower else change.ratio
    return f"{'at least ' if moved else ''}{times:.3g} times {'slower' if slower else 'faster'}"
