"""A pruned model against limits: perplexity on several texts, self-generated ones too, tasks, and overfitting."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from pyprune.config import ConfigError
from pyprune.data.self_generated import generate
from pyprune.evaluation.gain import dense_of
from pyprune.evaluation.single import NotFinite, evaluate, ready
from pyprune.evaluation.task_runs import evaluate_tasks
from pyprune.execution.progress import Doing
from pyprune.model.attributes import positions_named
from pyprune.model.blocks import predicts_next_token
from pyprune.reporting.comparison import read
from pyprune.reporting.console import open_console
from pyprune.reporting.verdict import last_errors
from pyprune.reporting.words import TASK_METRICS, number, perplexity_text

LABEL = "checking"
MAX_RATIO, MAX_DROP = 1.1, 0.02
"""The limits where nothing else is asked."""
SAMPLED = 256
"""Tokens of a self-generated sequence where nothing else is asked."""
RISE = 0.01
"""Held-out error that rises by more than this share, while calibration error falls, is overfitting."""


def check(
    directory: str | Path,
    against: str | Path | None = None,
    *,
    text: Any = None,
    max_perplexity_ratio: float = MAX_RATIO,
    self_generated: int = 0,
    seq_len: int | None = None,
    seed: int = 0,
    tasks: Sequence[str | Path] = (),
    max_drop: float = MAX_DROP,
    device: str = "auto",
    progress: bool = False,
    **fields,
) -> dict:
    """Whether a model may take another one's place: both are measured here, by the same code on the same tokens.

    directory: the model to check. against: the model it is compared with, dense or an earlier pruned one; None: the one
    that it was pruned from. text: one or several texts, as :func:`pyprune.evaluate` takes them; None: those that it
    takes by itself. Each may have at most ``max_perplexity_ratio`` times the other's perplexity.
    self_generated: that many sequences of ``seq_len`` tokens, sampled from ``against``, are one more text; None: 256
    tokens, or as many as the model has positions.
    tasks: files, folders or names of lm-eval's tasks, as ``pyprune eval --tasks`` takes them; each score may fall by at
    most ``max_drop``. progress: say on standard error what is done. fields: further ones of
    :class:`pyprune.Evaluation`. A model that does not fit into memory is streamed, unless it has to sample.
    Overfitting fails, too: the calibration error of the last block fell while the held-out one rose, in the run's own
    reconstruction or against the run in ``against``, as far as their reports say it.
    Returns ``{"passed", "directory", "against", "figures"}``; a figure has ``what``, ``before``, ``after``, ``value``,
    ``limit``, ``passed``. Raises ConfigError for bad input.
    """
    if not max_perplexity_ratio > 0:
        raise ConfigError(f"max_perplexity_ratio must be above 0, got {max_perplexity_ratio!r}")
    if not max_drop >= 0:
        raise ConfigError(f"max_drop must be at least 0, got {max_drop!r}")
    base = str(against or dense_of(directory, "--against"))
    sampled: list = []
    measured = []
    for place in (base, str(directory)):
        with Doing(f"loading {place}", progress, LABEL):
            loaded = ready(place, stream="never" if self_generated else "auto")
        found, sampled = _measure(loaded, sampled, text, self_generated, seq_len, seed, tasks, device, progress, fields)
        measured.append(found)
        del loaded
    before, after = measured
    figures = _compared(before, after, max_perplexity_ratio, max_drop) + _overfitting(Path(directory), Path(base))
    return {
        "passed": all(figure["passed"] for figure in figures),
        "directory": str(directory),
        "against": base,
        "figures": figures,
    }


def _measure(
    loaded: Any,
    sampled: list,
    text: Any,
    count: int,
    seq_len: int | None,
    seed: int,
    tasks: Sequence,
    device: str,
    progress: bool,
    fields: dict,
) -> tuple[dict[tuple[str, str], float], list]:
    """Every figure of one model, by kind and name, and the sequences that the first of them sampled."""
    found: dict[tuple[str, str], float] = {}
    causal = predicts_next_token(loaded.model)
    if not causal and not tasks:
        raise ConfigError(
            f"{type(loaded.model).__name__} predicts no next token, so it has no perplexity: name tasks to check it by"
        )
    if causal:
        if count and not sampled:
            length = seq_len or min(SAMPLED, positions_named(loaded.model.config) or SAMPLED)
            with Doing("sampling sequences", progress, LABEL) as doing:
                sampled = generate(loaded.model, loaded.tokenizer, count, seq_len=length, seed=seed, progress=doing)
        with Doing("measuring perplexity", progress, LABEL) as doing:
            rows = _rows(loaded, text, device, {**fields, "progress": doing})
        for row in rows:
            found["perplexity", row["text"]] = row["perplexity"]
        if sampled:
            with Doing("measuring perplexity on the sampled sequences", progress, LABEL) as doing:
                (row,) = _rows(loaded, sampled, device, {"progress": doing})
            name = f"{len(sampled)} self-generated sequences of {len(sampled[0])} tokens"
            found["perplexity", name] = row["perplexity"]
    scores: list[dict] = []
    if tasks:
        shown = functools.partial(Doing, enabled=progress, label=LABEL)
        scores = evaluate_tasks(loaded, list(map(str, tasks)), device=device, doing=shown)
    for row in scores:
        for metric in TASK_METRICS:
            if metric in row:
                found["task", f"{row['task']}, {metric}"] = row[metric]
    return found, sampled


def _rows(loaded: Any, text: Any, device: str, fields: dict) -> list[dict]:
    try:
        found = evaluate(loaded, text, device=device, **fields)
    except NotFinite as error:
        found = error.found
    return found.get("texts", [found])


def _compared(before: dict, after: dict, max_ratio: float, max_drop: float) -> list[dict]:
    figures = []
    for key in before:
        kind, name = key
        one, two = before[key], after[key]
        if kind == "perplexity":
            value, limit = two / one, max_ratio
            passed = math.isfinite(value) and value <= limit
            what = f"perplexity on {name}"
        else:
            value, limit = one - two, max_drop
            passed = math.isfinite(value) and value <= limit
            what = f"score of {name}"
        figures.append(
            {"what": what, "kind": kind, "before": one, "after": two, "value": value, "limit": limit, "passed": passed}
        )
    return figures


def _overfitting(directory: Path, base: Path) -> list[dict]:
    """Calibration error down and held-out error up: inside the run, and from the run in ``base`` to this one."""
    report = _report(directory)
    pairs = [("within the run", _own(report))] if report else []
    if report and (earlier := _report(base)):
        (a, b), (c, d) = last_errors(earlier), last_errors(report)
        pairs.append((f"since {base}", (a, b, c, d)))
    figures = []
    for where, errors in pairs:
        if errors is None or None in errors or not errors[1]:
            continue
        calibration, held_out, calibration_now, held_out_now = errors
        rise = held_out_now / held_out - 1
        figures.append(
            {
                "what": f"held-out error of the last block {where}, whose calibration error went from "
                f"{number(calibration, 3)} to {number(calibration_now, 3)}",
                "kind": "overfitting",
                "before": held_out,
                "after": held_out_now,
                "value": rise,
                "limit": RISE,
                "passed": not (calibration_now < calibration and rise > RISE),
            }
        )
    return figures


def _own(report: dict) -> tuple | None:
    """Calibration and held-out error of the last block before and after its reconstruction."""
    windows = (report.get("refinement") or {}).get("windows")
    if windows:
        last = windows[-1]
        names = ("before_calibration", "before_held_out", "after_calibration", "after_held_out")
        return tuple(last.get(name) for name in names)
    steps = (report.get("blocks") or [{}])[-1].get("steps") or []
    if len(steps) < 2:
        return None
    return (
        *(steps[0].get(k) for k in ("calibration", "held_out")),
        *(steps[-1].get(k) for k in ("calibration", "held_out")),
    )


def _report(folder: Path) -> dict | None:
    return read(folder) if (folder / "report.json").is_file() else None


def print_check(found: dict, out: TextIO | None = None) -> None:
    """Every figure with its limit, and the verdict."""
    console = open_console(out)
    console.print(f"{found['directory']} against {found['against']}")
    for figure in found["figures"]:
        console.print(f"{'passed' if figure['passed'] else 'FAILED'}  {sentence(figure)}")
    failed = [figure for figure in found["figures"] if not figure["passed"]]
    console.print("passed" if not failed else f"failed: {len(failed)} of {len(found['figures'])} figures")


def sentence(figure: dict) -> str:
    """A figure in words: ``perplexity on wiki.txt: 21.00 → 37.12, × 1.768, limit × 1.1``."""
    if figure["kind"] == "perplexity":
        before, after = perplexity_text(figure["before"]), perplexity_text(figure["after"])
        change = f"× {figure['value']:.4g}, limit × {figure['limit']:g}"
    else:
        before, after = number(figure["before"]), number(figure["after"])
        value, limit = figure["value"], figure["limit"]
        change = f"{'fell' if value >= 0 else 'rose'} by {abs(value):.4g}, limit {limit:g}"
        if figure["kind"] == "overfitting":
            change = f"{'rose' if value >= 0 else 'fell'} by {abs(value):.1%}, "
            beside = figure["passed"] and value > limit
            change += "as calibration did" if beside else f"limit {limit:.0%} where the calibration error falls"
    return f"{figure['what']}: {before} → {after}, {change}"
