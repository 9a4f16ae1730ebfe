"""Tables of README and documentation, made from the committed results and kept between markers.

A Markdown file names a table by a pair of comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what stands
between them is rewritten by ``python -m benchmarks readme``, and a test fails where it is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import scaling
from benchmarks.common import RESULTS, ROOT
from benchmarks.listing import milliseconds, rate
from benchmarks.ops_group import BASELINES
from benchmarks.rows import Row, read
from pyprune.config import ConfigError

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end of table -->)", re.DOTALL)


def conditions(about: dict) -> str:
    """One sentence about the machine of a file."""
    e = about["environment"]
    kernels = e["instruction_set"] or "no native module"
    where = e["gpu"] or f"{e['cpu']}, {e['threads']} of {e['cores']} cores, {kernels}"
    rates = [f"{name} {rate(name, value)}" for name, value in about["ceilings"].items()]
    most = f" ({', '.join(rates)})" if rates else ""
    return f"{where}{most}; torch {e['torch']}, commit {e['commit']}, preset {about['preset']}, {e['time'][:10]}."


def ops_table(rows: list[Row], about: dict) -> str:
    """Our fastest back-end of each case beside eager PyTorch."""
    lines = [
        "| op | size | type | back-end | time | × eager | share of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.group == "ops":
            groups.setdefault(row.key[1:5], []).append(row)
    for (op, case, dtype, _), found in groups.items():
        ours = [r for r in found if r.backend not in (*BASELINES, "reference") and r.samples and r.correct == "green"]
        if not ours:
            continue
        best = min(ours, key=lambda row: row.median)
        share = f"{best.share:.0%} of {best.ceiling}" if best.share else ""
        ratio = f"{best.ratio:.1f}" if best.ratio else ""
        lines.append(
            f"| `{op}` | {case} | {dtype} | {best.backend} | {milliseconds(best.median)} | {ratio} | {share} |"
        )
    return "\n".join([*lines, "", conditions(about)])


def isa_table(rows: list[Row], about: dict) -> str:
    """Our fastest back-end of each case beside eager PyTorch, once per instruction set."""
    best: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.group == "ops" and row.backend not in (*BASELINES, "reference") and row.samples:
            found = best.setdefault(row.key[1:4], {})
            if row.correct == "green" and (row.isa not in found or row.median < found[row.isa].median):
                found[row.isa] = row
    names = {"": about["environment"]["instruction_set"], **{row.isa: row.isa for row in rows if row.isa}}
    heads = [f"{name} | × eager | share" for name in names.values()]
    lines = [f"| op | size | type | {' | '.join(heads)} |", "|---" * (3 + 3 * len(names)) + "|"]
    for (op, case, dtype), found in best.items():
        cells = []
        for isa in names:
            row = found.get(isa)
            ratio, share = (f"{row.ratio or 0:.1f}", f"{row.share or 0:.0%} of {row.ceiling}") if row else ("", "")
            cells.append(f"{milliseconds(row.median)} | {ratio} | {share}" if row else " | | ")
        lines.append(f"| `{op}` | {case} | {dtype} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions(about)])


def peers_table(rows: list[Row], about: dict) -> str:
    """Every contender of every case; what failed says so."""
    lines = ["| what | tool | seconds | times as fast | peak memory | perplexity |", "|---|---|---|---|---|---|"]
    case = dense = ""
    for row in rows:
        if row.group != "peers":
            continue
        case, dense = row.case, f"{row.figures['dense_perplexity']:.2f}"
        if not row.samples:
            lines.append(f"| {row.name} | {row.backend} | {row.correct} | | | |")
            continue
        ratio = f"{row.ratio:.2f}" if row.ratio and row.backend != row.baseline else ""
        memory, found = f"{row.figures['peak_bytes'] / 1e9:.2f} GB", f"{row.figures['perplexity']:.2f}"
        found += "" if row.correct == "green" else f" ({row.correct})"
        lines.append(f"| {row.name} | {row.backend} | {row.median:.3g} ({row.clock}) | {ratio} | {memory} | {found} |")
    return "\n".join([*lines, "", f"{case}; perplexity of the dense model {dense}. {conditions(about)}"])


def jobs_table(rows: list[Row], about: dict) -> str:
    """Every contender of every job."""
    lines = ["| job | what | seconds | × baseline | output error |", "|---|---|---|---|---|"]
    for row in rows:
        if row.group in ("pruning", "reconstruction", "liar"):
            ratio = f"{row.ratio:.2f}" if row.ratio else ""
            error = f"{row.figures['output_error']:.3g}" if "output_error" in row.figures else ""
            lines.append(f"| {row.name} | {row.backend} | {row.median:.3g} ({row.clock}) | {ratio} | {error} |")
    return "\n".join([*lines, "", conditions(about)])


def inference_table(rows: list[Row], about: dict) -> str:
    lines = ["| | model | tokens per second | × dense float32 |", "|---|---|---|---|"]
    for row in rows:
        if row.group == "inference":
            speed, ratio = row.figures["tokens_per_second"], f"{row.ratio:.2f}" if row.ratio else ""
            lines.append(f"| {row.name} | {row.backend} | {speed:,.0f} | {ratio} |")
    return "\n".join([*lines, "", conditions(about)])


def scaling_table(rows: list[Row], about: dict) -> str:
    lines = ["| as … grows | exponent of the cost | points |", "|---|---|---|"]
    lines += [f"| {name} | {fit['exponent']:.2f} | {fit['points']} |" for name, fit in about["fits"].items()]
    return "\n".join([*lines, "", conditions(about)])


def whole_table(rows: list[Row], about: dict) -> str:
    lines = ["| model | one block | of it solves | the whole, predicted |", "|---|---|---|---|"]
    for row in rows:
        if "predicted_whole_seconds" in row.figures:
            hours, solve = row.figures["predicted_whole_seconds"] / 3600, row.figures["solve_seconds"]
            name = row.name.split(", ")[1]
            lines.append(f"| {name}: {row.case} | {row.median:.0f} s ({row.clock}) | {solve:.0f} s | {hours:.1f} h |")
    return "\n".join([*lines, "", conditions(about)])


TABLES: dict[str, tuple[str, Callable[[list[Row], dict], str]]] = {
    "ops-cpu": ("ops_cpu.json", ops_table),
    "jobs-cpu": ("suite_cpu.json", jobs_table),
    "inference-cpu": ("scaling_cpu.json", inference_table),
    "scaling-cpu": ("scaling_cpu.json", scaling_table),
    "whole-cpu": ("whole_cpu.json", whole_table),
    "ops-isa": ("suite_isa.json", isa_table),
    "peers-cpu": ("peers_cpu.json", peers_table),
    "peers-avx2": ("peers_avx2.json", peers_table),
    "peers-width": ("peers_width_cpu.json", peers_table),
    "ops-cuda": ("suite_cuda.json", ops_table),
    "jobs-cuda": ("suite_cuda.json", jobs_table),
}
"""Name in the marker → file in ``benchmarks/results`` and how it is made of it."""


PICTURES: dict[str, tuple[str, Callable[[list[Row], Path], bool]]] = {"scaling.svg": ("scaling_cpu.json", scaling.plot)}
"""Name in ``docs/images`` → file in ``benchmarks/results`` and how it is drawn of it."""


def draw() -> list[Path]:
    """Draw the pictures anew whose results are there, if matplotlib is installed."""
    folder = ROOT / "docs" / "images"
    there = {name: found for name, found in PICTURES.items() if (RESULTS / found[0]).exists()}
    return [folder / name for name, (file, make) in there.items() if make(read(RESULTS / file)[0], folder / name)]


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A document with its tables made anew. Raises ConfigError for a table that nobody knows or that has no result."""

    def made(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ConfigError(f"no table is named {name!r}; there are {', '.join(TABLES)}")
        file, make = TABLES[name]
        return f"{match[1]}{make(*read(results / file))}\n{match[4]}"

    return MARKED.sub(made, text)


def outdated() -> list[Path]:
    """Documents whose tables are not those of the results."""
    return [path for path in documents() if rewritten(path.read_text()) != path.read_text()]
