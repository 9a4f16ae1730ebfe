"""The runs below a folder as a page: ``pyprune history ROOT --html FILE``."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

from pyprune.model.checkpoint import plain
from pyprune.reporting.comparison_page import tradeoff
from pyprune.reporting.page import Markup, Point, Section, Table, chart, figure, join, lines, page
from pyprune.reporting.verdict import ratio
from pyprune.reporting.words import duration_text, number, perplexity_text, size_text
from pyprune.watching.history import line_name, seconds_of


def history_page(found: Sequence[dict]) -> str:
    """The page of what :func:`pyprune.history` returns; the places of its figures are those of these rows."""
    rows: list[dict] = plain(list(found))
    sections = [
        Section("Perplexity over time", _perplexity(rows)),
        Section("Error over time", _errors(rows)),
        Section("Cost over time", _cost(rows)),
        Section("Trade-off", tradeoff(rows)),
        Section("The runs", _runs(rows)),
    ]
    first, last = rows[0]["finished"][:10], rows[-1]["finished"][:10]
    lead = f"from {first} to {last}" if first != last else f"on {first}"
    return page(
        f"{len(rows)} {'run' if len(rows) == 1 else 'runs'} over time", sections, kicker="pyprune · history", lead=lead
    )


def _three(value: float) -> str:
    return number(value, 3)


def _trend(caption: str, axis: str, points: list[Point], text: Callable[[float], str] = _three) -> Markup:
    if not points:
        return Markup("")
    table = lines(caption, "Finished", points, text)
    named = [[_moment(place), *row[1:]] for place, row in zip(sorted({point.x for point in points}), table.rows)]
    return chart(Table(caption, table.head, named, plotted=table.plotted), axis=axis, x="time")


def _moment(seconds: float) -> Markup:
    when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return figure(seconds, text=lambda _: when.strftime("%Y-%m-%d %H:%M"))


def _perplexity(rows: list[dict]) -> Markup:
    points = [
        Point(f"{line_name(row)} · {e['text']}", seconds_of(row), value)
        for row in rows
        for e in row["evaluation"]
        if (value := ratio(e)) is not None
    ]
    return _trend("Perplexity relative to the dense model's.", "× dense perplexity", points)


def _errors(rows: list[dict]) -> Markup:
    points = [
        Point(line_name(row) + more, seconds_of(row), row[key], f"{k}.{key}")
        for key, more in (("block_error", ""), ("block_error_held_out", " · held out"))
        for k, row in enumerate(rows)
        if row[key] is not None
    ]
    return _trend("Error of the last block's output relative to the dense model's.", "relative error", points)


def _cost(rows: list[dict]) -> Markup:
    seconds = [Point(line_name(row), seconds_of(row), row["seconds"], f"{k}.seconds") for k, row in enumerate(rows)]
    memory = [
        Point(line_name(row), seconds_of(row), row["peak_memory_bytes"] / 2**30)
        for row in rows
        if row["peak_memory_bytes"] is not None
    ]
    return join([_trend("Seconds of each run.", "seconds", seconds), _trend("Peak memory, GiB.", "GiB", memory)])


def _runs(rows: list[dict]) -> Markup:
    body = [
        [
            row["run"],
            row["finished"][:16].replace("T", " "),
            line_name(row),
            "; ".join(f"{perplexity_text(e['pruned'])} ({e['text']})" for e in row["evaluation"]) or None,
            figure(row["block_error"], f"{k}.block_error", _three),
            figure(row["block_error_held_out"], f"{k}.block_error_held_out", _three),
            figure(row["seconds"], f"{k}.seconds", duration_text),
            figure(row["peak_memory_bytes"], f"{k}.peak_memory_bytes", size_text),
        ]
        for k, row in enumerate(rows)
    ]
    head = ["Run", "Finished", "Model and pruning", "Perplexity", "Last block's error", "Held out", "Time", "Memory"]
    return Table("Oldest first.", head, body, words=(1, 2, 3)).html()
