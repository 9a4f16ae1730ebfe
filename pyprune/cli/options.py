"""Command-line options made from the configuration dataclasses, so that the two cannot drift apart.

``num_samples`` of ``Calibration`` is ``--num-samples``. A name that several sections share belongs to the run itself
(``--seed``, ``--dtype``) and carries the section's name elsewhere (``--evaluation-dtype``).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections import Counter
from typing import Annotated, Any

import typer

from pyprune.config import (
    Calibration,
    ConfigError,
    Evaluation,
    PruneConfig,
    Reconstruction,
    Structured,
    choices,
    members,
)

SECTIONS = {
    "calibration": Calibration,
    "evaluation": Evaluation,
    "reconstruction": Reconstruction,
    "structured": Structured,
}
RENAMED = {"calibration.source": "calibration", "evaluation.text": "text", "evaluation.enabled": "evaluation"}
SHORT = {"output": "-o"}
RECORDED = ("backends",)
"""Fields that a run writes down in ``run.yaml``; nobody names them on a command line."""
TEXTUAL = {"sparsity": str, "calibration.source": str, "evaluation.text": list[str]}
"""Fields of any type in Python; on the command line they are text."""


def field_docs(cls) -> dict[str, str]:
    """Field → the string literal below it."""
    body = next(
        node.body for node in ast.parse(textwrap.dedent(inspect.getsource(cls))).body if isinstance(node, ast.ClassDef)
    )
    return {
        node.target.id: " ".join(following.value.value.replace("``", "").split())
        for node, following in zip(body, body[1:])
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }


def configuration_fields() -> dict[str, tuple[type, dataclasses.Field]]:
    """``calibration.seq_len`` → its dataclass and field, for every field of a run that is an option."""
    found: dict[str, tuple[type, dataclasses.Field]] = {
        f.name: (PruneConfig, f) for f in dataclasses.fields(PruneConfig) if f.name not in (*SECTIONS, *RECORDED)
    }
    for section, cls in SECTIONS.items():
        found |= {f"{section}.{f.name}": (cls, f) for f in dataclasses.fields(cls)}
    return found


def option_name(path: str, counts: Counter) -> str:
    """Python name of the option of a field: unique in its command, with its section's name only where needed."""
    section, _, name = path.rpartition(".")
    if path in RENAMED:
        return RENAMED[path]
    return f"{section}_{name}" if section and counts[name] > 1 else name


def option_of(path: str, paths: list[str]) -> str:
    """``--text`` for ``evaluation.text``, in a command that has the options of ``paths``."""
    return "--" + option_name(path, Counter(p.rpartition(".")[2] for p in paths)).replace("_", "-")


def _annotation(path: str, cls, field: dataclasses.Field, name: str):
    hint = TEXTUAL.get(path) or typing.get_type_hints(cls)[field.name]
    allowed = choices(cls).get(field.name)
    kind = str if allowed else next(member for member in members(hint) if member is not type(None))
    flag = "--" + name.replace("_", "-")
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    panel = path.rpartition(".")[0].capitalize() or None
    return Annotated[
        kind | None,
        typer.Option(
            *filter(None, [flags, SHORT.get(path)]),
            rich_help_panel=panel,
            metavar=f"[{'|'.join(allowed)}]" if allowed else None,
            help=field_docs(cls).get(field.name),
        ),
    ]


def with_fields(paths: list[str]):
    """Decorator: add the options of these configuration fields to a typer command.

    The command receives ``fields``, a nested dict of what was given; its other parameters stay as they are.
    """
    every = configuration_fields()
    counts = Counter(path.rpartition(".")[2] for path in paths)
    names = {option_name(path, counts): path for path in paths}

    def decorate(function):
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "fields"]
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(path, *every[path], name)
            )
            for name, path in names.items()
        ]

        @functools.wraps(function)
        def command(**values):
            given = {path: values.pop(name) for name, path in names.items()}
            return function(**values, fields=nested({p: v for p, v in given.items() if v not in (None, [])}))

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010  (no attribute that types know)
        command.__annotations__ = {p.name: p.annotation for p in own + added}
        del command.__wrapped__
        return command

    return decorate


def nested(flat: dict[str, Any]) -> dict:
    """``{"calibration.seed": 1}`` → ``{"calibration": {"seed": 1}}``; text fields become what they say."""
    result: dict = {}
    for path, value in flat.items():
        section, _, name = path.rpartition(".")
        if path == "sparsity":
            value = _sparsity(value)
        if path == "evaluation.text" and len(value) == 1:
            value = value[0]
        (result.setdefault(section, {}) if section else result)[name] = value
    return result


def _sparsity(text: str) -> float | list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"sparsity must be a number, or several with commas between them, got {text!r}") from error
    return values if len(values) > 1 else values[0]
