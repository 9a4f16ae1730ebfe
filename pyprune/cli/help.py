"""``--help`` as plain text: every option name whole at 80 columns, what most runs use apart from what few need."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

NAMED = "Hub id, local folder, .gguf file, or a name that comes with pyprune (smollm2-135m, minilm-l6-v2)."
"""What a command may be told of a model."""
ADVANCED = "Advanced"
"""Panels whose names begin so come last."""


class Command(TyperCommand):
    """A command whose options stand in sections, and that ends in one sentence where it is interrupted."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.context_settings.setdefault("max_content_width", 100)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for title, rows in sections(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=26)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(130) from None


class Group(TyperGroup):
    """The commands by what they are for, in the order of their definition."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = command.rich_help_panel  # type: ignore[attr-defined]
                panel = panel if isinstance(panel, str) else "Commands"
                panels.setdefault(panel, []).append((name, command.get_short_help_str(limit=200)))
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


VALUES = {
    "int": "N",
    "int range": "N",
    "float": "NUMBER",
    "str": "TEXT",
    "path": "PATH",
    "list[str]": "PATTERN",
    "list[Path]": "FOLDER",
    "float,float": "NUMBER NUMBER",
}
"""What ``--help`` calls a value of each type, where the option does not say it."""


def plain(name: str) -> str:
    """An option or an argument without the names of Python's types: ``--seed N``, ``model``."""
    if not name.startswith("-"):
        return re.sub(r" <[^>]*>", "", name)
    return re.sub(r"<([^>]*)>(\.\.\.)?", lambda match: VALUES.get(match[1], match[1]), name)


def sections(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """Title → rows of name and help; arguments and the command's own options first, the advanced ones last."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        panel = panel if isinstance(panel, str) else "Options"
        record = plain(record[0]), record[1]
        found.setdefault("Arguments" if parameter.param_type_name == "argument" else panel, []).append(record)
    ordered = sorted(found.items(), key=lambda item: item[0].startswith(ADVANCED))
    return {title: rows for title, rows in ordered if rows}
