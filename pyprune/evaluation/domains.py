"""Which texts a run measures, and how far its result carries: text of the calibration's kind beside text of another.

A model that is repaired on one kind of text may lose far more on every other (LIAR on half of SmolLM2's neurons: 1.66
times the dense perplexity on Wikipedia, above 3 times elsewhere). So each run measures both. The *generalisation gap*
is the ratio of perplexities, pruned over dense, on text of another kind, divided by the same ratio on text of the
calibration's kind.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pyprune.config import SHORT_WINDOWS, Calibration, Evaluation
from pyprune.data import builtin, calibration
from pyprune.sources import split

IN, OFF = "in-domain", "off-domain"
GAP = 1.25
"""A generalisation gap above this is a warning."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One text to measure."""

    source: Any
    """As in ``Evaluation.text``; None: sequences of the calibration's source that it does not see."""
    domain: str | None = None
    """``in-domain``: of the kind of the calibration text; ``off-domain``: of another; None: nothing was calibrated."""
    most: int | None = None
    """Windows at most; None: all."""


def of_run(evaluation: Evaluation, settings: Calibration) -> list[Asked]:
    """What a run measures, the texts that are named first."""
    if not evaluation.enabled:
        return []
    own, few = settings.source is None, evaluation.other_windows
    named = split(evaluation.text) if evaluation.text is not None else []
    found = [Asked(source, OFF if own else IN, evaluation.max_windows) for source in named]
    if own:
        found.append(Asked(builtin.REST, IN, few))
    elif not named:
        found.append(Asked(None, IN, SHORT_WINDOWS if few is None else min(few, SHORT_WINDOWS)))
    return found + others(evaluation, calibration.sources_of(settings), not (own and named))


def alone(evaluation: Evaluation) -> list[Asked]:
    """What is measured of a model by itself: the texts that are named, else the documentation and the novel."""
    if evaluation.text is None:
        return [Asked(builtin.REST, None, evaluation.other_windows), *others(evaluation, [], True)]
    named = [Asked(source, None, evaluation.max_windows) for source in split(evaluation.text)]
    return named + others(evaluation, [], False)


def others(evaluation: Evaluation, calibrated: list, needed: bool) -> list[Asked]:
    """Texts of another kind: those that are named, else, where one is needed, one that nothing was calibrated on."""
    if evaluation.off_domain is not None:
        named = [] if evaluation.off_domain == "none" else split(evaluation.off_domain)
        return [Asked(source, OFF, evaluation.max_windows) for source in named]
    names = [source for source in calibrated if isinstance(source, str)]
    unseen = next(name for name in (builtin.NOVEL, builtin.ESSAYS, builtin.REST) if name not in names)
    return [Asked(unseen, OFF, evaluation.other_windows)] if needed else []


def generalisation(rows: list[dict]) -> dict | None:
    """How much more a model lost on other kinds of text than on the calibration's, from rows with ``domain`` and
    ``ratio``; of several texts of a kind the geometric mean. None where one kind was not measured or is not finite."""
    means = {}
    for domain in (IN, OFF):
        ratios = [row["ratio"] for row in rows if row["domain"] == domain]
        if not ratios or None in ratios:
            return None
        means[domain] = statistics.geometric_mean(ratios)
    return {
        "in_domain_ratio": means[IN],
        "off_domain_ratio": means[OFF],
        "gap": means[OFF] / means[IN],
        "warn_above": GAP,
    }


def gap_warning(found: dict | None) -> list[str]:
    """A sentence where the gap is large."""
    if found is None or found["gap"] <= found["warn_above"]:
        return []
    return [
        f"generalisation gap {found['gap']:.2f}: perplexity is {found['off_domain_ratio']:.2f} times the dense model's "
        f"on text of another kind than the calibration's, {found['in_domain_ratio']:.2f} times on its own kind; "
        "calibrate on a mixture (several sources, self-generated sequences with self_generated_for='all'), or remove "
        "less"
    ]
