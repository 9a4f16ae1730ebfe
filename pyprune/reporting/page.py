"""Parts of a self-contained HTML page: figures, tables, charts drawn from their tables, and the page around them.

A page needs no network: style, script and the charting library (uPlot, folder ``assets``) are inside it. Every figure
carries its exact value beside its text, ``<data value="0.0676622668508" data-path="weights.0.error">0.06766</data>``,
where ``data-path`` is its place in ``report.json``; charts read these values, so that they show what the table says.
"""

from __future__ import annotations

import functools
import html
import importlib.resources
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyprune.reporting.words import number


class Markup(str):
    """Text that is HTML already; what is added to it is escaped."""

    def __add__(self, other: object) -> Markup:
        return Markup(f"{self}{safe(other)}")


def safe(value: object) -> Markup:
    """Markup as it is; anything else escaped, None as a dash."""
    if isinstance(value, Markup):
        return value
    return Markup("–" if value is None else html.escape(str(value)))


def join(parts: Iterable[object], between: str = "\n") -> Markup:
    """Parts one after the other; empty ones are left out."""
    return Markup(between.join(part for part in map(safe, parts) if part))


def figure(value: float | None, path: str = "", text: Callable[[float], str] = number) -> Markup:
    """A number to be read, with its exact value.

    path: where it stands in the data behind the page, keys and positions with dots between them; empty for a figure
    that is computed from others. text: how it is written.
    """
    if value is None:
        return Markup("–")
    place = f' data-path="{html.escape(path)}"' if path else ""
    return Markup(f'<data value="{float(value)!r}"{place}>{html.escape(text(value))}</data>')


@dataclass(frozen=True)
class Table:
    """A table: its first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    """Cells are Markup, text, or None for a dash."""
    words: Sequence[int] = ()
    """Columns of text, which stand to the left and may wrap."""
    plotted: Sequence[int] = ()
    """Columns that the chart above draws as lines."""
    bands: Sequence[tuple[int, int, int]] = ()
    """Columns between which the chart is shaded, in the colour of a line: lower edge, upper edge, the line."""

    def html(self) -> Markup:
        head = "".join(
            f'<th scope="col"{_class(k in self.words)}{self._drawn_as(k)}>{safe(cell)}</th>'
            for k, cell in enumerate(self.head)
        )
        body = "\n".join(
            "<tr>"
            + "".join(
                f'<th scope="row">{safe(cell)}</th>' if k == 0 else f"<td{_class(k in self.words)}>{safe(cell)}</td>"
                for k, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        return Markup(
            f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(self.caption)}">\n'
            f"<table><caption><span>{html.escape(self.caption)}</span></caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )

    def _drawn_as(self, column: int) -> str:
        """What the head of a column tells the script."""
        line = next((line for low, high, line in self.bands if column in (low, high)), None)
        if line is not None:
            return f' data-band="{line}"'
        return " data-plot" if column in self.plotted else ""


def _class(words: bool) -> str:
    return ' class="text"' if words else ""


def chart(table: Table, *, axis: str = "", log: bool = False, x: str = "number") -> Markup:
    """A line chart of a table's plotted columns and bands over its first one, whose values ascend, and the table below.

    axis: what the vertical axis says. log: its scale is logarithmic. x: ``number``, ``whole`` or ``time`` (seconds
    since 1970).
    """
    if not table.rows:
        return Markup("")
    names = ", ".join(table.head[k] for k in table.plotted)
    label = f"Line chart over {table.head[0]}: {names}. The table below it has the values; arrow keys move along it."
    scale = ' data-scale="log"' if log else ""
    return Markup(
        f'<figure class="chart" data-x="{x}" data-y="{html.escape(axis)}"{scale}>\n'
        f"<figcaption>{html.escape(table.caption)}</figcaption>\n"
        f'<div class="plot" role="img" tabindex="0" aria-label="{html.escape(label)}"></div>\n'
        f"{details('The figures as a table', table.html())}\n</figure>"
    )


@dataclass(frozen=True)
class Point:
    """One point of a line. path: where its value stands in the data behind the page, empty for a computed one."""

    line: str
    x: float
    y: float
    path: str = ""


def lines(caption: str, x: str, points: Sequence[Point], text: Callable[[float], str] = number) -> Table:
    """A table with one column per line and one row per place, as :func:`chart` draws it. Of two points of one line at
    one place the last one counts."""
    names = list(dict.fromkeys(point.line for point in points))
    cells = {(point.line, point.x): figure(point.y, point.path, text) for point in points}
    places = sorted({point.x for point in points})
    rows = [[figure(place), *(cells.get((name, place)) for name in names)] for place in places]
    return Table(caption, [x, *names], rows, plotted=range(1, 1 + len(names)))


def details(summary: str, inside: object) -> Markup:
    """Something that opens on demand."""
    return Markup(f"<details><summary>{html.escape(summary)}</summary>\n{safe(inside)}\n</details>")


def bar(share: float) -> Markup:
    """A bar beside a number, for the eye alone: ``share`` of its full width."""
    return Markup(
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'
    )


def facts(items: Iterable[tuple[str, object, str]]) -> Markup:
    """The few figures that matter: label, value, and a remark that may be empty."""
    parts = [
        f"<div><dt>{html.escape(label)}</dt><dd>{safe(value)}"
        + (f"<small>{html.escape(remark)}</small>" if remark else "")
        + "</dd></div>"
        for label, value, remark in items
    ]
    return Markup(f'<dl class="facts">{"".join(parts)}</dl>')


def code(text: str) -> Markup:
    return Markup(f'<pre tabindex="0"><code>{html.escape(text)}</code></pre>')


def paragraph(text: object, kind: str = "") -> Markup:
    return Markup(f"<p{f' class={kind!r}' if kind else ''}>{safe(text)}</p>")


def warnings_list(texts: Sequence[str]) -> Markup:
    return Markup(f'<ul class="warnings">{"".join(f"<li>{html.escape(text)}</li>" for text in texts)}</ul>')


def verdict_box(sentences: Sequence[str], rule: str, alarm: bool) -> Markup:
    """What all of it comes to: the first sentence large, ``rule`` says how it was reached."""
    said = "".join(
        f"<p{' class=' + chr(34) + 'say' + chr(34) if k == 0 else ''}>{html.escape(text)}</p>"
        for k, text in enumerate(sentences)
    )
    kind = "verdict alarm" if alarm else "verdict"
    return Markup(f'<div class="{kind}" role="note">{said}<p class="rule">{html.escape(rule)}</p></div>')


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading; one without content is left out."""

    title: str
    content: Markup

    @property
    def name(self) -> str:
        return self.title.lower().replace(" ", "-")


def page(
    title: str, sections: Sequence[Section], *, kicker: str = "pyprune", lead: str = "", top: object = Markup("")
) -> str:
    """A whole page as HTML. kicker, lead: lines above and below the title; top: what comes before the sections."""
    sections = [section for section in sections if section.content]
    links = "".join(f'<li><a href="#{s.name}">{html.escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title">\n'
        f'<h2 id="{s.name}-title">{html.escape(s.title)}</h2>\n{s.content}\n</section>'
        for s in sections
    )
    script = ""
    if any('<figure class="chart"' in s.content for s in sections):
        script = (
            f"<style>{asset('uPlot.min.css')}</style>\n"
            f"<script>/*\n{asset('uPlot.LICENSE')}*/\n{asset('uPlot.iife.min.js')}</script>\n"
            f"<script>{asset('page.js')}</script>\n"
        )
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n<style>{asset("page.css")}</style>\n'
        "</head>\n<body>\n"
        '<a class="skip" href="#content">Skip to the content</a>\n'
        f'<header>\n<p class="kicker">{html.escape(kicker)}</p>\n<h1>{html.escape(title)}</h1>\n'
        + (f'<p class="lead">{html.escape(lead)}</p>\n' if lead else "")
        + f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n'
        f'<main id="content">\n{safe(top)}\n{body}\n</main>\n'
        "<footer><p>Written by pyprune. This file needs no network and sends nothing anywhere.</p></footer>\n"
        f"{script}</body>\n</html>\n"
    )


@functools.cache
def asset(name: str) -> str:
    """A file of the folder ``assets``."""
    return (importlib.resources.files("pyprune.reporting") / "assets" / name).read_text(encoding="utf-8")


def write(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all. Raises OutputError where that is impossible."""
    from pyprune.model.shards import write_bytes

    path = Path(path).expanduser()
    write_bytes(path, text.encode())
    return path
