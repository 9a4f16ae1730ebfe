"""``study.html``: the trade-off curves, how far is safe, and the table of a study."""

from __future__ import annotations

from pathlib import Path

from pyprune.reporting.page import (
    Markup,
    Point,
    Section,
    Table,
    chart,
    figure,
    join,
    lines,
    page,
    paragraph,
    verdict_box,
    warnings_list,
)
from pyprune.reporting.words import duration_text, number, perplexity_text, size_text
from pyprune.studies.tables import line_name


def study_page(found: dict) -> str:
    """The page of what :func:`pyprune.study` returns; the places of its figures are those of ``table.json``."""
    sections = [
        Section("Trade-off", _tradeoff(found)),
        Section("How far is safe", _safety(found)),
        Section("Table", _table(found)),
        Section("Error of the last block", _errors(found)),
        Section("What is missing", _missing(found)),
    ]
    seeds = sorted({seed for row in found["rows"] for seed in row["seeds"]})
    lead = f"{found['model']}: {found['finished']} of {found['cells']} runs, seeds {', '.join(map(str, seeds))}"
    top = verdict_box(found["recommendation"], found["rule"], alarm=False)
    return page(
        f"How far can {Path(found['model']).name} be pruned?", sections, kicker="pyprune · study", lead=lead, top=top
    )


def _texts(found: dict) -> list[str]:
    return list(dict.fromkeys(text["text"] for row in found["rows"] for text in row["texts"]))


def _three(value: float) -> str:
    return number(value, 3)


def _tradeoff(found: dict) -> Markup:
    charts = []
    for text in _texts(found):
        points = [
            Point(line_name(row), row["asked"], at["ratio"]["mean"], f"rows.{k}.texts.{t}.ratio.mean")
            for k, row in enumerate(found["rows"])
            for t, at in enumerate(row["texts"])
            if at["text"] == text and at["ratio"]["mean"] is not None
        ]
        if points:
            table = lines(
                f"Perplexity on {text} relative to the dense model's, over sparsity.", "Sparsity", points, _three
            )
            charts.append(chart(table, axis="× dense perplexity", log=True))
    return join(charts)


def _safety(found: dict) -> Markup:
    if not found["curves"]:
        return Markup("")
    rows = [
        [
            curve["line"],
            figure(curve["safe"], f"curves.{k}.safe") if curve["safe"] is not None else "none that was tried",
            figure(curve["crosses"], f"curves.{k}.crosses", _three) if curve["crosses"] is not None else "not reached",
            figure(curve["knee"], f"curves.{k}.knee") if curve["knee"] is not None else "none",
        ]
        for k, curve in enumerate(found["curves"])
    ]
    head = ["Pruned by", "Safe up to", "Limit reached at about", "Knee"]
    return join([Table("Sparsities, by the rule above.", head, rows).html()])


def _spread(found: dict, path: str, text=_three) -> Markup:
    """``1.23 ± 0.04``."""
    mean = figure(found["mean"], f"{path}.mean", text)
    if found["spread"] is None:
        return mean
    return mean + Markup(" ± ") + figure(found["spread"], f"{path}.spread", lambda v: number(v, 2))


def _table(found: dict) -> Markup:
    texts = _texts(found)
    body = []
    for k, row in enumerate(found["rows"]):
        at = {text["text"]: (t, text) for t, text in enumerate(row["texts"])}
        cells: list[object] = []
        for text in texts:
            if text not in at:
                cells += [None, None]
                continue
            t, one = at[text]
            cells.append(_spread(one["pruned"], f"rows.{k}.texts.{t}.pruned", perplexity_text))
            cells.append(_spread(one["ratio"], f"rows.{k}.texts.{t}.ratio"))
        body.append(
            [
                line_name(row),
                figure(row["asked"], f"rows.{k}.asked"),
                str(len(row["seeds"])),
                *cells,
                _spread(row["block_error"], f"rows.{k}.block_error"),
                _spread(row["block_error_held_out"], f"rows.{k}.block_error_held_out"),
                figure(row["parameters"]["mean"], f"rows.{k}.parameters.mean", lambda v: f"{v:,.0f}"),
                figure(row["seconds"]["mean"], f"rows.{k}.seconds.mean", duration_text),
                figure(row["peak_memory_bytes"]["mean"], f"rows.{k}.peak_memory_bytes.mean", size_text),
            ]
        )
    asked = [name for text in texts for name in (f"Perplexity, {text}", "× dense")]
    head = ["Pruned by", "Sparsity", "Seeds", *asked, "Last block's error", "Held out", "Parameters", "Time", "Memory"]
    return Table("Mean ± sample standard deviation over the seeds.", head, body).html()


def _errors(found: dict) -> Markup:
    """The last block's error over sparsity, which encoders have too."""
    points = [
        Point(line_name(row) + more, row["asked"], row[key]["mean"], f"rows.{k}.{key}.mean")
        for key, more in (("block_error", ""), ("block_error_held_out", ", held out"))
        for k, row in enumerate(found["rows"])
        if row[key]["mean"] is not None
    ]
    if not points:
        return Markup("")
    caption = "Error of the last block's output relative to the dense model's, over sparsity."
    return chart(lines(caption, "Sparsity", points, _three), axis="relative error", log=True)


def _missing(found: dict) -> Markup:
    told = [f"Not a run: {text}" for text in found["left_out"]]
    told += [f"Failed: {name}: {text}" for name, text in found["failed"].items()]
    told += [f"Being worked on by {owner}: {name}" for name, owner in found["waiting"].items()]
    return warnings_list(told) if told else paragraph("Nothing.", "quiet")
