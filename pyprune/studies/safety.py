"""How far is safe: the largest sparsity within a limit, the knee of the curve, a recommended setting in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyprune.reporting.words import number
from pyprune.studies.tables import STRUCTURED, line_name, lines_of, worst_ratio

KNEE = 0.1
"""The least distance from the straight line, of 1, at which a bend is called a knee."""


def rule(limit: float) -> str:
    """How :func:`safe` decides, for the reader."""
    return (
        f"Safe is the largest sparsity up to which perplexity, in the mean over seeds, stays within {limit:g} times "
        "the dense model's on every text that was measured. The knee is where the loss in nats per token, over "
        "sparsity, bends most: the point farthest below the straight line from the dense model to the last point "
        "(Kneedle, Satopää et al. 2011)."
    )


def curves(rows: Sequence[dict], limit: float) -> list[dict]:
    """Per way of pruning: ``line``, ``pattern``, ``points`` (sparsity, worst mean ratio over the texts), ``safe`` (the
    largest safe sparsity, None if none is), ``crosses`` (where the limit is reached between two points, None if it is
    not, or of a single point), ``knee`` (its sparsity, None if the curve has none)."""
    found = []
    for line, members in lines_of(rows).items():
        points = [(row["asked"], value) for row in members if (value := worst_ratio(row)) is not None]
        if points:
            found.append(
                {
                    "line": line,
                    "pattern": members[0]["pattern"],
                    "points": [{"sparsity": s, "ratio": r if math.isfinite(r) else None} for s, r in points],
                    "safe": safe(points, limit),
                    "crosses": crossing(points, limit) if len(points) > 1 else None,
                    "knee": knee(points),
                }
            )
    return found


def safe(points: Sequence[tuple[float, float]], limit: float) -> float | None:
    """The largest sparsity up to which every ratio is within the limit. points: ascending sparsity, ratio to dense."""
    best = None
    for sparsity, ratio in points:
        if not ratio <= limit:
            break
        best = sparsity
    return best


def crossing(points: Sequence[tuple[float, float]], limit: float) -> float | None:
    """The sparsity at which the limit is reached, by a straight line in loss between the points around it, the dense
    model (0, 1) being the first; None if it is not reached, or on the way to a ratio that is not finite."""
    before = (0.0, 1.0)
    for sparsity, ratio in points:
        if not ratio <= limit:
            if not math.isfinite(ratio):
                return None
            share = (math.log(limit) - math.log(before[1])) / (math.log(ratio) - math.log(before[1]))
            return before[0] + share * (sparsity - before[0])
        before = (sparsity, ratio)
    return None


def knee(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity of the knee: in the unit square of sparsity and loss, the point of ``sparsity, log ratio`` farthest
    below the diagonal from the dense model (0, 0) to the last finite point. None with fewer than three points, a curve
    that does not rise, or a distance below ``KNEE``."""
    known = [(0.0, 0.0), *((s, math.log(r)) for s, r in points if math.isfinite(r) and s > 0)]
    if len(known) < 4 or known[-1][1] <= 0:
        return None
    width, height = known[-1]
    distance, place = max((s / width - loss / height, s) for s, loss in known)
    return place if distance >= KNEE else None


def recommendation(rows: Sequence[dict], limit: float) -> list[str]:
    """What to use, in sentences: for zeros inside matrices, and for smaller matrices, as far as either was tried."""
    sentences = []
    kinds = (
        ("Zeros inside the matrices", [row for row in rows if row["pattern"] not in STRUCTURED]),
        ("Smaller matrices (heads or neurons removed)", [row for row in rows if row["pattern"] in STRUCTURED]),
    )
    for what, members in kinds:
        tried = [(row, value) for row in members if (value := worst_ratio(row)) is not None]
        if tried:
            sentences.append(f"{what}: {_best(members, tried, limit)}")
    return sentences or ["No perplexity was measured, so nothing is recommended: compare the blocks' held-out errors."]


def _best(members: Sequence[dict], tried: Sequence[tuple[dict, float]], limit: float) -> str:
    reach = {found["line"]: found["safe"] for found in curves(members, limit)}
    fine = [(row, value) for row, value in tried if (top := reach[line_name(row)]) is not None and row["asked"] <= top]
    if not fine:
        row, value = min(tried, key=lambda item: item[1])
        return (
            f"nothing that was tried stays within {limit:g} times the dense perplexity. Nearest is {line_name(row)} at "
            f"sparsity {row['asked']:g} with {_times(value)}; try lower sparsities or a stronger reconstruction."
        )
    row, value = max(fine, key=lambda item: (item[0]["asked"], -item[1]))
    beyond = [(other, v) for other, v in tried if line_name(other) == line_name(row) and other["asked"] > row["asked"]]
    more = "; nothing higher was tried"
    if beyond:
        further, ratio = min(beyond, key=lambda item: item[0]["asked"])
        more = f"; at {further['asked']:g} it is {_times(ratio)}"
    seeds = len(row["seeds"])
    return (
        f"{line_name(row)}, sparsity {row['asked']:g}. Its perplexity is {_times(value)} the dense model's on the text "
        f"that suffers most ({'one run' if seeds == 1 else f'mean of {seeds} seeds'}){more}."
    )


def _times(value: float) -> str:
    return f"{number(value, 3)} times" if math.isfinite(value) else "not finite"
