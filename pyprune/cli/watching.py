"""``pyprune history`` and ``pyprune check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import pyprune
from pyprune.cli.options import with_fields
from pyprune.cli.studies import several
from pyprune.keywords import configuration_fields
from pyprune.reporting.console import print_json

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
CHECKED = [
    path
    for path in configuration_fields()
    if path.startswith("evaluation.") and path not in ("evaluation.enabled", "evaluation.off_domain")
]


def history(
    root: Annotated[Path, typer.Argument(help="A folder; runs are found in it and in all folders below.")],
    html: Annotated[Path | None, typer.Option(help="Write the trends as a page, too: one HTML file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png) of the trends to write.")] = None,
    as_json: Json = False,
):
    """List the runs below ROOT, oldest first, and plot their trend."""
    rows = pyprune.history(root)
    if html is not None:
        from pyprune.reporting.page import write
        from pyprune.watching.history_page import history_page

        write(html, history_page(rows))
    from pyprune.watching.history import picture, print_history

    if plot is not None:
        picture(rows, plot)
    return print_json(rows) if as_json else print_history(rows)


@with_fields(CHECKED, common=CHECKED)
def check(
    model: Annotated[str, typer.Argument(help="Folder of the pruned model.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model to compare with. By default the one that MODEL was pruned from."),
    ] = None,
    max_perplexity_ratio: Annotated[
        float, typer.Option(help="The most that a text's perplexity may be, relative to the other model's.")
    ] = 1.1,
    self_generated: Annotated[
        int, typer.Option(help="Check on so many sequences that the other model samples, too.")
    ] = 0,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks as pyprune eval takes them, with commas between them.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="The most that a task's score may fall.")] = 0.02,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to run: auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: Json = False,
    *,
    fields: dict[str, Any],
):
    """Exit with 1 and name the figure if MODEL is worse than allowed on a text or a task, or overfits. For CI."""
    from pyprune.watching.check import print_check

    found = pyprune.check(
        model,
        against,
        max_perplexity_ratio=max_perplexity_ratio,
        self_generated=self_generated,
        tasks=several(tasks),
        max_drop=max_drop,
        device=device,
        progress=True,
        **fields.get("evaluation", {}),
    )
    print_json(found) if as_json else print_check(found)
    if not found["passed"]:
        raise typer.Exit(1)
