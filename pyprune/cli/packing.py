"""``pyprune pack`` and ``pyprune unpack``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

import pyprune

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write.")]


def pack(
    directory: Annotated[Path, typer.Argument(help="Folder of a pruned safetensors checkpoint.")],
    output: Output,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")] = False,
):
    """Write a checkpoint without its zeros: smaller, and faster to decode with pyprune.load."""
    found = pyprune.pack(directory, output)
    print(json.dumps(dataclasses.asdict(found)) if as_json else f"{found.sentence()}\nwritten to {output}")


def unpack(
    directory: Annotated[Path, typer.Argument(help="Folder that pyprune pack, or a run with --packed, wrote.")],
    output: Output,
):
    """Write the plain checkpoint that was packed, the same to the byte."""
    pyprune.unpack(directory, output)
    print(f"written to {output}")
