"""``pyprune study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import pyprune
from pyprune.cli.help import NAMED
from pyprune.cli.options import with_fields
from pyprune.config import ConfigError
from pyprune.keywords import configuration_fields
from pyprune.reporting.console import print_json
from pyprune.studies.grid import CHOSEN

COMMON_FIELDS = [path for path in configuration_fields() if path not in (*CHOSEN, "calibration.seed")]
"""What all runs of a study share."""


def several(text: str | None) -> list[str]:
    """``a,b`` → its parts."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(text: str, option: str, kind: type) -> list:
    try:
        return [kind(part) for part in several(text)]
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers with commas between them, got {text!r}") from error


@with_fields(COMMON_FIELDS)
def study(
    model: Annotated[str, typer.Argument(help=NAMED)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the study; several workers may share it.")],
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="Values of --method of pyprune prune, with commas between them.")
    ] = "sparsegpt",
    criteria: Annotated[
        str, typer.Option(metavar="NAMES", help="Values of --criterion, for heads and neurons.")
    ] = "wifv",
    patterns: Annotated[str, typer.Option(metavar="NAMES", help="Values of --pattern.")] = "unstructured",
    sparsities: Annotated[
        str, typer.Option(metavar="NAMES", help="Values of --sparsity; not for N:M patterns.")
    ] = "0.3,0.4,0.5,0.6",
    reconstruct: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Values of --reconstruct, with +gp for global propagation. By default each pattern's own.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0 on.")] = 3,
    max_ratio: Annotated[
        float, typer.Option(help="Perplexity relative to the dense model's up to which a setting counts as safe.")
    ] = 1.1,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the pruned models, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")] = False,
    *,
    fields: dict[str, Any],
):
    """Prune MODEL in many ways and say how far is safe: a table with spread over seeds, curves, a recommendation.

    The same command on the same folder goes on where it stopped; run it on several machines and they share the work.
    """
    from pyprune.studies.study import print_study

    found = pyprune.study(
        model,
        output,
        methods=several(methods),
        criteria=several(criteria),
        patterns=several(patterns),
        sparsities=numbers(sparsities, "--sparsities", float),
        reconstruct=several(reconstruct) or (None,),
        seeds=seeds,
        max_ratio=max_ratio,
        keep_models=keep_models,
        **fields,
    )
    return print_json(found) if as_json else print_study(found, output)
