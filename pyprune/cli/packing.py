"""``pyprune pack`` and ``pyprune unpack``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import pyprune

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write.")]


def _shown(doing: str) -> Callable[[int, int], None]:
    """Print how far it is, every few seconds, so that a small model says nothing."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 3:
            last = time.monotonic()
            print(f"{doing} · {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr)

    return show


def pack(
    directory: Annotated[Path, typer.Argument(help="Folder of a pruned safetensors checkpoint.")],
    output: Output,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")] = False,
):
    """Write a checkpoint without its zeros: smaller, and faster to decode with pyprune.load."""
    found = pyprune.pack(directory, output, progress=_shown("packing"))
    print(json.dumps(dataclasses.asdict(found)) if as_json else f"{found.sentence()}\nwritten to {output}")


def unpack(
    directory: Annotated[Path, typer.Argument(help="Folder that pyprune pack, or a run with --packed, wrote.")],
    output: Output,
):
    """Write the plain checkpoint that was packed, the same to the byte."""
    pyprune.unpack(directory, output, progress=_shown("unpacking"))
    print(f"written to {output}")
