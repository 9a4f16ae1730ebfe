"""What goes to standard output: a console for tables, JSON, and perplexities, one line per text."""

from __future__ import annotations

import json
import math
import sys
from typing import TextIO

from pyprune.reporting.words import perplexity_text, source_text, windows_text


def open_console(out: TextIO | None = None):
    """A rich console; wide where it is no terminal, so that logs and pipes hold whole lines."""
    from rich.console import Console

    out = out or sys.stdout
    return Console(file=out, highlight=False, width=None if out.isatty() else 140)


def print_json(value) -> None:
    """Plain data on standard output; what is not finite is null."""
    from pyprune.model.checkpoint import plain

    print(json.dumps(plain(value), indent=1, allow_nan=False))


def print_evaluation(found: dict, out: TextIO | None = None) -> None:
    """One line per text whose perplexity is a number; the others are errors."""
    for row in found.get("texts", [found]):
        if not math.isfinite(row["perplexity"]):
            continue
        print(
            f"perplexity {perplexity_text(row['perplexity'])}  ({windows_text(row)}, "
            f"{row['dtype']}, {row['seconds']:.1f} s, {source_text(row)})",
            file=out or sys.stdout,
        )
