"""``report.html``: the report of one run as a page to look at."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

from pyprune.model.checkpoint import plain
from pyprune.reporting.page import (
    Markup,
    Section,
    Table,
    bar,
    chart,
    code,
    details,
    facts,
    figure,
    join,
    page,
    paragraph,
    safe,
    verdict_box,
    warnings_list,
    write,
)
from pyprune.reporting.quantiles import quantile_name, quantile_order
from pyprune.reporting.summary import inputs_text, refit_text
from pyprune.reporting.verdict import RULE, last_errors, ratio, verdict
from pyprune.reporting.words import (
    LABELS,
    RECONSTRUCTIONS,
    TASK_METRICS,
    conditions_text,
    counted,
    distinct,
    duration_text,
    headline,
    kind_of_weight,
    number,
    perplexity_text,
    size_text,
    source_text,
)

MAX_WEIGHTS = 2000
"""Rows of the table of weights; a model with thousands of experts has the others in ``report.json`` only."""


def run_page(report: dict, name: str, settings: str = "") -> str:
    """The page of a run. report: what ``report.json`` holds; name: of the model that came out; settings: its
    ``run.yaml``."""
    report = plain(report)
    found = verdict(report)
    model = report["model"]
    lead = (
        f"{model['name']} ({model['architecture']}, {model['blocks']} blocks, {model['parameters']:,} parameters, "
        f"{model['dtype']}): {headline(report)}"
    )
    sections = [
        Section("Before and after", _before_and_after(report)),
        Section("Tasks", _tasks(report)),
        Section("Error per block", _blocks(report)),
        Section("Weights", _weights(report)),
        Section("Time and memory", _time(report)),
        Section("Speed", _speed(report)),
        Section("Warnings", _warnings(report)),
        Section("How it was made", _how(report, settings)),
        Section("Environment", _environment(report)),
    ]
    top = join([verdict_box(found.sentences, RULE, found.alarm), _facts(report)])
    return page(name, sections, kicker="pyprune · report of a run", lead=lead, top=top)


def write_run_page(folder: Path, report: dict, name: str) -> None:
    """Write ``report.html`` beside ``report.json``, with the ``run.yaml`` of the same folder in it."""
    settings = folder / "run.yaml"
    write(folder / "report.html", run_page(report, name, settings.read_text() if settings.is_file() else ""))


def _facts(report: dict) -> Markup:
    seconds, coverage = report["seconds"], report["coverage"]
    error, held_out = last_errors(report)
    items: list[tuple[str, object, str]] = [
        (
            "Sparsity",
            figure(report["sparsity"], "sparsity"),
            f"{coverage['fraction']:.1%} of the blocks' weights pruned",
        )
    ]
    for k, row in enumerate(report.get("sparsity_by_key") or []):
        value = figure(row["achieved"], f"sparsity_by_key.{k}.achieved")
        items.append((f"Sparsity of {row['key']}", value, f"{row['asked']:g} asked for"))
    rows = report.get("evaluation") or []
    if rows and (factor := ratio(rows[0])) is not None:
        items.append(("Perplexity", Markup("× ") + figure(factor, text=lambda v: number(v, 3)), rows[0]["text"]))
    if (gap := (report.get("generalisation") or {}).get("gap")) is not None:
        items.append(("Generalisation gap", figure(gap, "generalisation.gap", _three), "off-domain over in-domain"))
    if error is not None:
        items.append(
            ("Last block's error", figure(error, _last_path(report), _three), "relative to dense, calibration")
        )
    if held_out is not None:
        items.append(("… on held-out text", figure(held_out, _last_path(report, True), _three), "relative to dense"))
    items += [
        ("Parameters", figure(report["model"]["parameters"], "model.parameters", _count), ""),
        ("Time", figure(sum(seconds.values()), text=_duration), ""),
        ("Peak memory", figure(report["peak_memory_bytes"], "peak_memory_bytes", size_text), "of the process"),
    ]
    if report.get("peak_device_memory_bytes"):
        value = figure(report["peak_device_memory_bytes"], "peak_device_memory_bytes", size_text)
        items.append(("Device memory", value, "at most allocated"))
    return facts(items)


def _three(value: float) -> str:
    return number(value, 3)


def _duration(value: float) -> str:
    return duration_text(value) if value >= 0.95 else f"{value:.2g} s"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _last_path(report: dict, held_out: bool = False) -> str:
    refined = report.get("refinement") or {}
    if refined.get("blocks"):
        return f"refinement.blocks.{len(refined['blocks']) - 1}.after.error{'_held_out' if held_out else ''}"
    if refined.get("windows"):
        where = len(report["refinement"]["windows"]) - 1
        return f"refinement.windows.{where}.after_{'held_out' if held_out else 'calibration'}"
    return f"blocks.{len(report['blocks']) - 1}.error" + ("_held_out" if held_out else "")


def _before_and_after(report: dict) -> Markup:
    rows = report.get("evaluation") or []
    if not rows:
        return Markup("")
    kinds = any(_kind_of_text(row) for row in rows)
    refined = any("before_refinement" in row for row in rows)
    head = [
        "Text",
        *(["Kind"] if kinds else []),
        "Dense",
        *(["Before refinement"] if refined else []),
        "Pruned",
        "Ratio",
    ]
    body = []
    for k, row in enumerate(rows):
        at = f"evaluation.{k}"
        before = [figure(row.get("before_refinement"), f"{at}.before_refinement", perplexity_text)] if refined else []
        body.append(
            [
                source_text(row),
                *([_kind_of_text(row)] if kinds else []),
                figure(row["dense"], f"{at}.dense", perplexity_text),
                *before,
                figure(row["pruned"], f"{at}.pruned", perplexity_text),
                figure(ratio(row), f"{at}.ratio" if row.get("ratio") == ratio(row) else "", _three),
                conditions_text(row),
            ]
        )
    words = (0, 1) if kinds else (0,)
    table = Table(
        "Perplexity of the dense and the pruned model, measured by the same code on the same windows; lower is better.",
        [*head, "Windows"],
        body,
        words=words,
    )
    return table.html()


def _kind_of_text(row: dict) -> str:
    """``in-domain``, ``off-domain``, where the report says it."""
    return str(row.get("domain") or row.get("kind") or "")


def _tasks(report: dict) -> Markup:
    """Tasks, each metric in a row, as :func:`pyprune.evaluation.task_runs.evaluate_tasks` returns them; beside the
    dense model where that was measured, too."""
    rows = report.get("tasks") or []
    compared = any("dense" in row for row in rows)
    body = []
    for k, row in enumerate(rows):
        for metric in TASK_METRICS:
            if metric not in row:
                continue
            at, test, dense = f"tasks.{k}", (row.get("paired") or {}).get(metric, {}), row.get("dense") or {}
            body.append(
                [
                    row["task"],
                    metric,
                    figure(row["items"], f"{at}.items", _count),
                    *([figure(dense.get(metric), f"{at}.dense.{metric}")] if compared else []),
                    figure(row[metric], f"{at}.{metric}"),
                    figure(row.get(f"{metric}_standard_error"), f"{at}.{metric}_standard_error"),
                    *(
                        figure(test.get(key), f"{at}.paired.{metric}.{key}")
                        for key in ("difference", "standard_error", "mcnemar_p")
                        if compared
                    ),
                ]
            )
    if not body:
        return Markup("")
    head = ["Task", "Metric", "Items", *(["Dense"] if compared else []), "Pruned", "± of pruned"]
    head += ["Difference", "± of difference", "p (McNemar)"] if compared else []
    return Table("Tasks; ± is one standard error.", head, body, words=(0, 1)).html()


def _blocks(report: dict) -> Markup:
    """Error after each block on calibration and held-out text, and what each step of the reconstruction left."""
    if (windows := (report.get("refinement") or {}).get("windows")) is not None:
        return _windows(windows)
    blocks = report.get("blocks") or []
    names = {
        "error": "Calibration text",
        "error_held_out": "Held-out text",
        "error_self_generated": "Self-generated text",
    }
    measured = [key for key in names if any(row.get(key) is not None for row in blocks)]
    if not measured:
        return Markup("")
    table = Table(
        "Error of each block's output, ‖pruned − dense‖² / ‖dense‖², carried on from block to block.",
        ["Block", *(names[key] for key in measured), "Seconds"],
        [
            [
                figure(row["block"], f"blocks.{k}.block", _count),
                *(figure(row.get(key), f"blocks.{k}.{key}") for key in measured),
                figure(row.get("seconds"), f"blocks.{k}.seconds", _three),
            ]
            for k, row in enumerate(blocks)
        ],
        plotted=range(1, 1 + len(measured)),
    )
    return join([chart(table, axis="relative error", log=True, x="whole"), _steps(blocks), _quantiles(report)])


def _windows(windows: list[dict]) -> Markup:
    keys = [
        key
        for key in ("before_calibration", "after_calibration", "before_held_out", "after_held_out")
        if any(row.get(key) is not None for row in windows)
    ]
    names = {
        "before_calibration": "Calibration, before",
        "after_calibration": "Calibration, after",
        "before_held_out": "Held out, before",
        "after_held_out": "Held out, after",
    }
    table = Table(
        "Error of each refined window's output against the dense model's, before and after its training.",
        ["Window", *(names[key] for key in keys)],
        [
            [
                figure(k, text=_count),
                *(figure(row.get(key), f"refinement.windows.{k}.{key}") for key in keys),
            ]
            for k, row in enumerate(windows)
        ],
        plotted=range(1, 1 + len(keys)),
    )
    return chart(table, axis="relative error", log=True, x="whole")


def _steps(blocks: list[dict]) -> Markup:
    """What each step of a reconstruction left of a block's error."""
    rows = [
        [
            f"{row['block']} · {step['step']}",
            figure(step.get("calibration"), f"blocks.{k}.steps.{s}.calibration"),
            figure(step.get("held_out"), f"blocks.{k}.steps.{s}.held_out"),
        ]
        for k, row in enumerate(blocks)
        for s, step in enumerate(row.get("steps") or [])
    ]
    if not rows:
        return Markup("")
    caption = "Error of the block after each step: the choice of the mask, the layer-wise step, the training."
    table = Table(caption, ["Block · step", "Calibration", "Held out"], rows)
    return details("Step by step", table.html())


def _quantiles(report: dict) -> Markup:
    """The distribution of each block's error over tokens and over sequences, where the report has quantiles: the median
    of each kind of text as a line, the quantiles on either side of it as bands."""
    found = [row.get("error_quantiles") or {} for row in report.get("blocks") or []]
    over = dict.fromkeys(name for row in found for spread in row.values() for name in spread)
    charts = [_spread(report, found, name) for name in over]
    more = details("How errors spread over sequences", join(charts[1:])) if charts[1:] else ""
    return join([*charts[:1], more])


def _spread(report: dict, found: list[dict], over: str) -> Markup:
    """One chart: how the errors of ``over``, tokens or sequences, spread on every kind of text."""
    levels = report["error_quantile_levels"]
    texts = list(dict.fromkeys(text for row in found for text in row))
    order, bands = quantile_order(levels)
    head, plotted, shaded = ["Block"], [], []
    for text in texts:
        name, first = text.replace("_", "-").capitalize(), len(head)
        head += [f"{name}, {quantile_name(levels[q])}" for q in order]
        plotted.append(first)
        shaded += [(first + low, first + high, first) for low, high in bands]
    rows = [
        [
            figure(row["block"], f"blocks.{k}.block", _count),
            *(
                figure(_at(found[k], text, over, q), f"blocks.{k}.error_quantiles.{text}.{over}.{q}")
                for text in texts
                for q in order
            ),
        ]
        for k, row in enumerate(report["blocks"])
    ]
    shown = " and ".join(
        f"{quantile_name(levels[order[low]])} to {quantile_name(levels[order[high]])}" for low, high in bands
    )
    caption = f"How the error spreads over {over}: the median" + (f", shaded from {shown}." if shown else ".")
    return chart(Table(caption, head, rows, plotted=plotted, bands=shaded), axis="relative error", log=True, x="whole")


def _at(row: dict, text: str, over: str, quantile: int) -> float | None:
    values = (row.get(text) or {}).get(over)
    return values[quantile] if values else None


def _weights(report: dict) -> Markup:
    """Sparsity and error of each pruned weight; the error of each kind of weight over the blocks."""
    rows = report.get("weights") or []
    if not rows:
        return Markup("")
    errors = [key for key in ("error", "error_held_out") if any(row.get(key) is not None for row in rows)]
    names = {"error": "Error, calibration", "error_held_out": "Error, held out"}
    texts = {"error": "calibration text", "error_held_out": "held-out text"}
    units = any("kept" in row for row in rows)
    table = Table(
        "Each pruned weight: zeros or removed groups, and the relative error of its outputs.",
        ["Weight", "Shape", "Sparsity", *(["Kept"] if units else []), *(names[key] for key in errors)],
        [
            [
                row["name"],
                "×".join(map(str, row["shape"])),
                figure(row["sparsity"], f"weights.{k}.sparsity"),
                *([f"{row['kept']} of {row['units']} {row['kind']}" if "kept" in row else None] if units else []),
                *(figure(row.get(key), f"weights.{k}.{key}") for key in errors),
            ]
            for k, row in enumerate(rows[:MAX_WEIGHTS])
        ],
    )
    beyond = len(rows) - MAX_WEIGHTS
    note = paragraph(f"{beyond:,} more weights are in report.json.", "quiet") if beyond > 0 else ""
    kinds = list(dict.fromkeys(kind_of_weight(row["name"]) for row in rows))
    return join(
        [
            _by_block(rows, kinds, errors[0], f"Error of each weight's outputs, {texts[errors[0]]}", True)
            if errors
            else "",
            _by_block(rows, kinds, "sparsity", "Sparsity of each weight", False) if _varies(rows) else "",
            _kinds(rows, kinds, errors),
            details(f"Every weight ({len(rows):,})", join([table.html(), note])),
        ]
    )


def _varies(rows: list[dict]) -> bool:
    values = [row["sparsity"] for row in rows]
    return max(values) - min(values) > 0.005


def _by_block(rows: list[dict], kinds: Sequence[str], key: str, caption: str, log: bool) -> Markup:
    """One line per kind of weight over the blocks; experts of one block are averaged."""
    cells: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for k, row in enumerate(rows):
        if row.get(key) is not None:
            cells.setdefault((row["block"], kind_of_weight(row["name"])), []).append((k, row[key]))
    blocks = sorted({row["block"] for row in rows})
    body = [
        [figure(block, text=_count), *(_mean_cell(cells.get((block, kind)), key) for kind in kinds)] for block in blocks
    ]
    averaged = ", the mean over the experts of a block" if any(len(found) > 1 for found in cells.values()) else ""
    table = Table(f"{caption}{averaged}.", ["Block", *map(_short, kinds)], body, plotted=range(1, 1 + len(kinds)))
    return chart(table, axis="sparsity" if key == "sparsity" else "relative error", log=log, x="whole")


def _mean_cell(found: list[tuple[int, float]] | None, key: str) -> Markup:
    if not found:
        return safe(None)
    if len(found) == 1:
        return figure(found[0][1], f"weights.{found[0][0]}.{key}")
    return _mean([value for _, value in found])


def _mean(values: list[float]) -> Markup:
    return figure(statistics.fmean(values)) if values else safe(None)


def _short(kind: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.*.self_attn.q_proj.weight``."""
    return kind.split("*.", 1)[-1].removesuffix(".weight")


def _kinds(rows: list[dict], kinds: Sequence[str], errors: Sequence[str]) -> Markup:
    names = {"error": "Mean error, calibration", "error_held_out": "Mean error, held out"}
    body = []
    for kind in kinds:
        own = [row for row in rows if kind_of_weight(row["name"]) == kind]
        low, high = (edge(row["sparsity"] for row in own) for edge in (min, max))
        body.append(
            [
                _short(kind),
                str(len(own)),
                figure(low) if high - low < 5e-4 else figure(low) + Markup(" … ") + figure(high),
                *(_mean([row[key] for row in own if row.get(key) is not None]) for key in errors),
            ]
        )
    head = ["Kind of weight", "Number", "Sparsity", *(names[key] for key in errors)]
    return Table("The weights by kind.", head, body).html()


def _time(report: dict) -> Markup:
    seconds = report["seconds"]
    total = sum(seconds.values())
    rows = [
        [
            phase,
            figure(value, f"seconds.{phase}", _duration),
            figure(value / total if total else 0.0, text=lambda v: f"{v:.0%}") + bar(value / total if total else 0.0),
        ]
        for phase, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    table = Table("Wall time by phase, longest first.", ["Phase", "Time", "Share"], rows)
    memory: list[Sequence[object]] = [
        ["Host", figure(report["peak_memory_bytes"], "peak_memory_bytes", size_text)],
    ]
    if report.get("peak_device_memory_bytes"):
        device = figure(report["peak_device_memory_bytes"], "peak_device_memory_bytes", size_text)
        memory.append(["Device", device])
    memory += [
        [f"Host, {phase}", figure(value, f"memory_by_phase.{phase}", size_text)]
        for phase, value in (report.get("memory_by_phase") or {}).items()
    ]
    return join([table.html(), Table("Peak memory.", ["Where", "At most"], memory).html()])


def _speed(report: dict) -> Markup:
    rows = report.get("gain") or []
    if len(rows) < 2:
        return Markup("")
    keys = [key for key in LABELS if any(row.get(key) for row in rows)]
    body = []
    for key in keys:
        cells = [
            figure(row.get(key), f"gain.{k}.{key}", functools.partial(_measure, key)) for k, row in enumerate(rows)
        ]
        shared = (rows[-1].get("ratios") or {}).get(key)
        ratios = figure(shared, f"gain.{len(rows) - 1}.ratios.{key}", lambda v: f"× {v:.2f}")
        body.append([LABELS[key][0], *cells, ratios])
    last = rows[-1]
    caption = (
        f"Size, memory and speed on {last.get('device')}, {last.get('dtype')}, {last.get('tokens')} tokens, batch size "
        f"{last.get('batch_size')}, each model in a process of its own."
    )
    return Table(caption, ["Measure", *(str(row["model"]) for row in rows), "Ratio"], body).html()


def _measure(key: str, value: float) -> str:
    _, unit, name = LABELS[key]
    return f"{value / unit:,.1f} {name}"


def _warnings(report: dict) -> Markup:
    found = [*(report.get("warnings") or []), *((report.get("refinement") or {}).get("warnings") or [])]
    if not found:
        return paragraph("There are none.", "quiet")
    every = details(f"All {len(found)} of them", warnings_list(found)) if len(distinct(found)) < len(found) else ""
    return join([warnings_list(distinct(found)), every])


def _how(report: dict, settings: str) -> Markup:
    config, calibration = report["config"], report["calibration"]
    said = [
        ("Calibration", calibration["description"]),
        ("Calibration tokens", f"{counted(calibration['samples'], 'sequence')}, {calibration['tokens']:,} tokens"),
        ("SHA-256 of their token ids", calibration["fingerprint"]),
        ("Statistics of inputs", inputs_text(report)),
        ("Reconstruction", RECONSTRUCTIONS.get(config["reconstruct"])),
        ("Refit", refit_text(report)),
    ]
    refined = report.get("refinement")
    if refined is not None:
        how = "cross-block" if refined["cross_block"] else "block"
        said.append(("Refined afterwards", f"{how} training against {refined['dense']}"))
    table = Table("What was done.", ["", "Value"], [[a, b] for a, b in said if b], words=(1,))
    command = code("pyprune prune --config run.yaml -o again")
    parts = [table.html(), Markup("<h3>The command that repeats it</h3>"), command]
    if settings:
        parts += [paragraph("with this run.yaml, which lies beside the model:"), details("run.yaml", code(settings))]
    if refined is not None and "model" in refined:  # a folder was refined, which left a record of its own
        parts += [paragraph("and its refinement:"), code("pyprune refine --config refine.yaml -o again")]
    return join(parts)


def _environment(report: dict) -> Markup:
    machine, versions = report.get("machine") or {}, report.get("versions") or {}
    rows: list[Sequence[object]] = [
        *([key.capitalize(), value] for key, value in machine.items()),
        *([key, value] for key, value in versions.items()),
    ]
    table = Table("Machine and versions.", ["", "Value"], rows, words=(1,))
    taken = [
        [op, f"{name} ({device})"]
        for device, ops in (report.get("backends") or {}).items()
        for op, name in (ops.items() if isinstance(ops, dict) else ())
    ]
    backends = Table("The back-end that each op took.", ["Op", "Back-end"], taken, words=(1,))
    return join([table.html(), details("Back-ends", backends.html()) if taken else ""])
