"""What a run's figures come to, in plain words, by rules that are stated beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyprune.reporting.words import number, perplexity_text

STEPS = ((1.1, "close to the dense model"), (1.5, "a visible loss"), (3.0, "a heavy loss"))
"""Highest ratio of perplexities, and what it is called; above the last the model is badly damaged."""
GAP = 1.5
"""The factor between held-out and calibration error, and between the ratios on two texts, from which on it is said."""
RULE = (
    "Rule: the text with the largest ratio of pruned to dense perplexity decides. Up to 1.1 is close to the dense "
    "model, up to 1.5 a visible loss, up to 3 a heavy loss. Differences by a factor of 1.5 and more between held-out "
    "and calibration error, or between texts, are pointed out."
)


@dataclass(frozen=True)
class Verdict:
    """level: ``close``, ``visible``, ``heavy``, ``damaged`` or ``unmeasured``."""

    level: str
    sentences: list[str]
    """The first one is the verdict, the others are what to mind."""

    @property
    def alarm(self) -> bool:
        return self.level in ("heavy", "damaged")


def ratio(row: dict) -> float | None:
    """Pruned over dense perplexity of one text; None where one of them is not a number."""
    dense, pruned = row.get("dense"), row.get("pruned")
    if dense is None or pruned is None or not (math.isfinite(dense) and math.isfinite(pruned)):
        return None
    return pruned / dense


def verdict(report: dict) -> Verdict:
    """The verdict on a run, from its report."""
    rows = report.get("evaluation") or []
    level, first = _loss(rows)
    return Verdict(level, [first, *_texts_apart(rows), *_overfit(report)])


def _loss(rows: list[dict]) -> tuple[str, str]:
    if not rows:
        return "unmeasured", "Perplexity was not measured: the errors of the blocks are all there is to judge by."
    broken = [row for row in rows if ratio(row) is None]
    if broken:
        return "damaged", f"The perplexity on {broken[0]['text']} is not finite: this model cannot be used."
    worst = max(rows, key=lambda row: ratio(row) or 0.0)
    factor = ratio(worst) or 0.0
    levels = ("close", "visible", "heavy")
    found = next(((level, name) for level, (limit, name) in zip(levels, STEPS) if factor <= limit), None)
    level, name = found or ("damaged", "the model is badly damaged")
    times = number(factor, 3)
    beside = "within 0.5 % of" if times == "1" else f"{times} times"
    moved = (
        f"Perplexity goes from {perplexity_text(worst['dense'])} to {perplexity_text(worst['pruned'])} on "
        f"{worst['text']}, {beside} the dense model's: {name}."
    )
    return level, moved


def _texts_apart(rows: list[dict]) -> list[str]:
    """A sentence where one text suffers far more than another."""
    known = [(value, row["text"]) for row in rows if (value := ratio(row)) is not None]
    if len(known) < 2:
        return []
    (low, easy), (high, hard) = min(known), max(known)
    if high < GAP * low:
        return []
    return [
        f"It depends on the text: {number(high, 3)} times the dense perplexity on {hard}, {number(low, 3)} times on "
        f"{easy}. Judge it on text of your own use."
    ]


def last_errors(report: dict) -> tuple[float | None, float | None]:
    """Error of the last block on calibration and on held-out text, after a refinement if there was one."""
    if (refined := report.get("refinement")) is not None and refined.get("blocks"):
        return refined["blocks"][-1]["after"]["error"], refined["blocks"][-1]["after"]["error_held_out"]
    if refined is not None and refined.get("windows"):
        window = refined["windows"][-1]
        return window.get("after_calibration"), window.get("after_held_out")
    last = (report.get("blocks") or [{}])[-1]
    return last.get("error"), last.get("error_held_out")


def _overfit(report: dict) -> list[str]:
    error, held_out = last_errors(report)
    if not error or held_out is None or held_out < GAP * error:
        return []
    return [
        f"The last block's error is {number(held_out / error, 3)} times as large on held-out text as on calibration "
        "text: what was fitted does not carry over fully. More or self-generated calibration sequences help."
    ]
