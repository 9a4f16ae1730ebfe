"""What a run prints: rows as they come, in columns under a heading."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.rows import Row

LEAST = [24, 42, 8, 28, 10, 0, 0]
"""Widths that the columns of a job's rows begin with: few rows are wider."""
NUMBERS = (4, 5)
"""Columns that end at the right."""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rate(name: str, value: float) -> str:
    """A ceiling with its unit: ``23 GB/s`` of a copy, ``264 GFLOP/s`` of a type."""
    return f"{value / 1e9:.0f} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}"


class Listing:
    """The columns of the rows so far. Its heading is printed anew where a row is wider or has another baseline.

    ``expected`` are op, shape, type and back-end of the ops' rows that will come: columns are wide enough for them from
    the first one on.
    """

    def __init__(self, expected: Iterable[tuple[str, str, str, str]] = ()):
        columns = [max(map(len, column)) for column in zip(*expected)]
        self._ops = [*columns, 10, 0, 0] if columns else LEAST
        self._group = ""
        self._heads: list[str] = []
        self._widths: list[int] = []

    def lines(self, rows: list[Row]) -> list[str]:
        """The rows of one case, below a heading if that is another than before."""
        group, baseline = rows[0].group, next((row.baseline for row in rows if row.baseline), "")
        found = [_cells(row) for row in rows]
        heads = _heads(group, baseline)
        widths = list(self._widths)
        if group != self._group:
            widths = self._ops if group == "ops" else LEAST
        elif not baseline:  # a row that failed
            heads = self._heads
        texts = [heads, *found]
        widths = [max(width, *(len(text[i]) for text in texts)) for i, width in enumerate(widths)]
        anew = (group, heads, widths) != (self._group, self._heads, self._widths)
        self._group, self._heads, self._widths = group, heads, widths
        lines = [self._line(text, _rest(row)) for text, row in zip(found, rows)]
        if not anew:
            return lines
        said = f'   × {baseline}: how many times as fast as the row "{baseline}" of the same {heads[1]}'
        return [*[said] * bool(baseline), self._line(heads, ""), *lines]

    def _line(self, texts: list[str], rest: str) -> str:
        """Columns that are empty in all rows take no place."""
        fitted = [
            text.rjust(width) if i in NUMBERS else text.ljust(width)
            for i, (text, width) in enumerate(zip(texts, self._widths))
            if width
        ]
        return f"   {'  '.join([*fitted, rest])}".rstrip()


def _heads(group: str, baseline: str) -> list[str]:
    what = ["op", "shape"] if group == "ops" else ["job", "case"]
    ratio = f"× {baseline}" if baseline else ""
    return [*what, "type", "back-end", "time", ratio, "share of ceiling" if group == "ops" else ""]


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        row.case,
        row.dtype,
        row.backend,
        milliseconds(row.median) if row.samples else "",
        f"{row.ratio:.2f}" if row.ratio else "",
        f"{row.share:.0%} of {row.ceiling}" if row.share else "",
    ]


def _rest(row: Row) -> str:
    """Other figures, and why a row is not green."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
    return "  ".join(part for part in (figures, "" if row.correct == "green" else row.correct) if part)
