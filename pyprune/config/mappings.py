"""Dataclasses from plain mappings and back; a field of another name or type is refused."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path

from pyprune.config.checks import ConfigError, members


def from_dict(cls, values: dict, where: str = "config"):
    """Dataclass from a mapping; an unknown field is a :class:`ConfigError` that names the nearest one."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields, got {type(values).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(
                f"unknown field {key!r} in {where}"
                + (f"; did you mean {near[0]!r}?" if near else f"; fields are {', '.join(names)}")
            )
    hints = typing.get_type_hints(cls)
    paths = {key: str(v) for key, v in values.items() if isinstance(v, Path) and str in members(hints[key])}
    values = {**values, **paths}
    for key, value in values.items():
        place = f"{where}.{key}" if where.isidentifier() else f"{key} in {where}"
        _check_type(place.removeprefix("config."), value, hints[key])
    return cls(**values)


def _check_type(name: str, value, hint) -> None:
    """Refuse a YAML value of another type than the field's (a string where a number belongs, say)."""
    options = members(hint)
    plain = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}
    if any(o not in plain and o is not type(None) for o in options):
        return
    allowed = tuple(t for o in options if o in plain for t in plain[o])
    if value is None and type(None) in options:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        kinds = " or ".join(o.__name__ for o in options if o in plain)
        raise ConfigError(f"{name} must be {kinds}, got {value!r} ({type(value).__name__})")


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ConfigError(
        f"a {type(value).__name__} cannot be written to YAML; give a path instead, so that the run can "
        "be repeated from its file"
    )


def to_dict(config) -> dict:
    """Plain nested dict of a configuration, ready for YAML or JSON."""
    return _plain(config)
