"""Command-line options made from the configuration dataclasses, so that the two cannot drift apart.

``num_samples`` of ``Calibration`` is ``--num-samples``, as :mod:`pyprune.keywords` names it. Options that most runs use
are listed in ``COMMON``; the others stand in the advanced sections of ``--help``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import typer

from pyprune.cli.help import ADVANCED
from pyprune.config import ConfigError, choices, members
from pyprune.effects import default
from pyprune.keywords import configuration_fields, keywords

SHORT = {"output": "-o"}
SEVERAL = ("calibration.source", "evaluation.text", "evaluation.off_domain")
"""Fields that take one source or several: the option may be given more than once."""
TEXTUAL = {"sparsity": str, "evaluation.max_windows": str, **dict.fromkeys(SEVERAL, list[str])}
"""Fields of any type in Python; on the command line they are text."""
VALUES = {
    "memory_budget_gb": "GB",
    "output": "FOLDER",
    "pattern": "PATTERN",
    "sparsity": "NUMBER",
    "device": "DEVICE",
    "backend": "NAME",
    "evaluation.max_windows": "N",
    "calibration.self_generated_path": "FILE",
    "calibration.language": "CODE",
    **{
        f"{section}.{name}": "NAME"
        for section in ("calibration", "evaluation")
        for name in ("split", "subset", "text_column")
    },
    **dict.fromkeys(SEVERAL, "SOURCE"),
}
"""What ``--help`` calls the value of an option, where its type would say little."""

COMMON = (
    "output",
    "method",
    "pattern",
    "sparsity",
    "criterion",
    "reconstruct",
    "targets",
    "ignore",
    "device",
    "compute_dtype",
    "seed",
    "calibration.source",
    "calibration.subset",
    "calibration.num_samples",
    "calibration.seq_len",
    "evaluation.text",
    "evaluation.window",
    "evaluation.max_windows",
    "evaluation.enabled",
)
"""Fields that most runs set, in a section of their own before the advanced ones."""
PANELS = {
    "": "Choice and repair of weights, and how the run goes",
    "calibration": "Calibration text",
    "evaluation": "Evaluation",
    "reconstruction": "Training of pruned blocks",
    "structured": "Heads and neurons",
}


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


def option_of(path: str, paths: list[str]) -> str:
    """``--text`` for ``evaluation.text``, in a command that has the options of ``paths``."""
    return next("--" + name.replace("_", "-") for name, found in keywords(paths).items() if found == path)


def as_options(text: str) -> str:
    """A sentence of the library with its settings as the command line spells them: ``num_samples=4`` becomes
    ``--num-samples 4``, ``evaluation.enabled=False`` becomes ``--no-evaluation``."""
    names = {path: name for name, path in keywords().items()}
    names |= {name: name for name in keywords() if name not in names}

    def spelt(match: re.Match) -> str:
        flag, value = names[match["name"]].replace("_", "-"), match["value"]
        if value is None:
            return f"--{flag}" if "_" in match["name"] or "." in match["name"] else match[0]
        if value in ("True", "False"):
            return f"--{'' if value == 'True' else 'no-'}{flag}"
        return f"--{flag} " + value.replace("'", "")

    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(
        rf"(?<![\w./-])(?P<name>{known})(?![\w./-])(?:=(?P<value>'[^']*'(?:(?:, | or )'[^']*')*|[\w.:,-]*[\w]))?",
        spelt,
        text,
    )


def panel_of(path: str, common: Collection[str]) -> str | None:
    """The section of ``--help`` that an option stands in; None is the command's own."""
    section = path.rpartition(".")[0]
    if path in common:
        return PANELS[section] if section else None
    return f"{ADVANCED}: {PANELS[section]}"


def _annotation(path: str, cls, field: dataclasses.Field, name: str, common: Collection[str], said: Mapping[str, str]):
    hint = TEXTUAL.get(path) or typing.get_type_hints(cls)[field.name]
    allowed = choices(cls).get(field.name)
    kind = str if allowed else next(member for member in members(hint) if member is not type(None))
    flag = "--" + name.replace("_", "-")
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    named: dict[str, Any] = {"metavar": VALUES[path]} if path in VALUES else {}
    if allowed:
        named = {"metavar": f"[{'|'.join(allowed)}]", "autocompletion": lambda: list(allowed)}
    return Annotated[
        kind | None,
        typer.Option(
            *filter(None, [flags, SHORT.get(path)]),
            rich_help_panel=panel_of(path, common),
            help=as_options(said.get(path) or described(cls, field.name) or ""),
            show_default=False,
            **named,
        ),
    ]


def described(cls, name: str) -> str | None:
    """A field's documentation, and its default where the text does not give it."""
    text, standard = field_docs(cls).get(name), default(cls, name)
    if text is None or "default is" in text or "By default" in text or standard in (None, []):
        return text
    if isinstance(standard, bool):
        standard = "on" if standard else "off"
    return f"{text} [default: {', '.join(map(str, standard)) if isinstance(standard, tuple) else standard}]"


def with_fields(paths: list[str], common: Collection[str] = COMMON, said: Mapping[str, str] = {}):
    """Decorator: add the options of these configuration fields to a typer command.

    common: fields that do not stand in an advanced section. said: by field, what the help of this command says of it,
    if not what the field's documentation does. The command receives ``fields``, a nested dict of what was given; its
    other parameters stay as they are.
    """
    every, names = configuration_fields(), keywords(paths)

    def decorate(function):
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "fields"]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_annotation(path, *every[path], name, common, said),
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
        if path == "evaluation.max_windows":
            value = _count(value)
        if path in SEVERAL and len(value) == 1:
            value = value[0]
        (result.setdefault(section, {}) if section else result)[name] = value
    return result


def _count(text: str) -> int | None:
    """``24``, or ``all``, which is None."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"max_windows must be a whole number or all, got {text!r}") from error


def _sparsity(text: str) -> float | list[float] | dict[str, float]:
    """``0.5``, ``0.3,0.5`` or ``mlp=0.6,*=0.4``."""
    parts = [part.rpartition("=") for part in text.split(",")]
    if len({bool(equals) for _, equals, _ in parts}) > 1:
        raise ConfigError(
            f"sparsity {text!r} has parts with and without a name; write *=0.5 for the rest, or numbers only"
        )
    try:
        values = [float(value) for _, _, value in parts]
    except ValueError as error:
        percent = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
        hint = f"; did you mean {float(percent[1]) / 100:g}?" if percent else ""
        raise ConfigError(
            "sparsity must be a number, several with commas between them, or names with theirs, such as "
            f"mlp=0.6,attention=0.4, got {text!r}{hint}"
        ) from error
    names = [name.strip() for name, equals, _ in parts if equals]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"sparsity {text!r} names {twice} twice; leave one of them out")
    if names:
        return dict(zip(names, values))
    return values if len(values) > 1 else values[0]
