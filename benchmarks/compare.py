"""What changed between two result files, beyond noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.rows import Row

LEVEL, LEAST = 0.01, 0.03
"""A change counts if Mann and Whitney's test calls it significant at ``LEVEL`` and medians differ by ``LEAST``; of rows
with too few samples for a test, if they differ by a quarter."""
ALONE = 0.25


@dataclass(frozen=True)
class Change:
    """One measurement that both files have."""

    key: tuple[str, ...]
    before: float
    after: float
    p: float | None
    """Of the two-sided test; None where there are too few samples."""
    colour: str = ""
    """What happened to its correctness, if anything did."""

    @property
    def ratio(self) -> float:
        return self.before / self.after

    @property
    def counts(self) -> bool:
        if self.colour:
            return True
        apart = abs(math.log(self.ratio))
        if self.p is None:
            return apart > math.log1p(ALONE)
        return self.p < LEVEL and apart > math.log1p(LEAST)


def p_value(a: list[float], b: list[float]) -> float | None:
    """Two-sided Mann–Whitney, exact for few samples (scipy). None if no result of that many could be significant."""
    if math.comb(len(a) + len(b), len(a)) * LEVEL < 2:
        return None
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(a, b).pvalue)


def changes(before: list[Row], after: list[Row]) -> list[Change]:
    """Of all rows that are in both, the largest change first; Benjamini and Hochberg's correction keeps the share of
    false alarms among many rows at ``LEVEL``."""
    old = {row.key: row for row in before}
    found = []
    for row in after:
        was = old.get(row.key)
        if was is None:
            continue
        colour = "" if was.correct == row.correct else f"{was.correct} → {row.correct}"
        if row.samples and was.samples:
            found.append(Change(row.key, was.median, row.median, p_value(was.samples, row.samples), colour))
        elif colour:
            found.append(Change(row.key, 1, 1, None, colour))
    return sorted(_corrected(found), key=lambda change: -abs(math.log(change.ratio)))


def _corrected(found: list[Change]) -> list[Change]:
    tested = sorted((change for change in found if change.p is not None), key=lambda change: change.p or 0.0)
    adjusted, least = {}, 1.0
    for place in range(len(tested), 0, -1):
        change = tested[place - 1]
        least = min(least, (change.p or 0.0) * len(tested) / place)
        adjusted[change.key] = least
    return [Change(c.key, c.before, c.after, adjusted.get(c.key), c.colour) for c in found]


def differences(before: dict, after: dict) -> list[str]:
    """What of the two environments differs, as far as it explains a change."""
    names = ("cpu", "cores", "instruction_set", "threads", "gpu", "python", "torch", "transformers", "commit")
    a, b = before.get("environment", {}), after.get("environment", {})
    return [f"{name}: {a.get(name)} → {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def text(before: tuple[list[Row], dict], after: tuple[list[Row], dict]) -> str:
    """What ``compare`` prints."""
    found = changes(before[0], after[0])
    lines = [*differences(before[1], after[1])]
    most, now = before[1].get("ceilings", {}), after[1].get("ceilings", {})
    lines += [
        f"ceiling {name}: {most[name] / 1e9:.0f} → {now[name] / 1e9:.0f} G/s, so times say little about the code"
        for name in most
        if name in now and abs(math.log(now[name] / most[name])) > math.log1p(ALONE)
    ]
    counted = [change for change in found if change.counts]
    keys = [{row.key for row in rows} for rows, _ in (before, after)]
    lines.append(f"{len(found)} rows in both, {len(counted)} changed beyond noise, {len(found) - len(counted)} did not")
    for name, missing in (("only before", keys[0] - keys[1]), ("only after", keys[1] - keys[0])):
        if missing:
            lines.append(f"{name}: {len(missing)} rows")
    for change in counted:
        group, job, case, dtype, device, backend, isa = change.key
        device = f"{device} ({isa})" if isa else device
        p = "few samples" if change.p is None else f"p {change.p:.1g}"
        faster = f"{change.ratio:.2f}× as fast"
        times = f"{change.before * 1e3:.4g} → {change.after * 1e3:.4g} ms, {faster}, {p}"
        lines.append(f"  {group} {job} {case} {dtype} {device} {backend}: {change.colour or times}")
    return "\n".join(lines)
