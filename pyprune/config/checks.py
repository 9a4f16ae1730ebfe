"""What the checks of all sections share. Bad input is a :class:`ConfigError`."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Collection
from typing import Literal, get_args

from pyprune import effects
from pyprune.config.values import DTYPES, Dtype
from pyprune.sources import in_memory


class ConfigError(ValueError):
    """Bad input: one clear sentence with the value and the way out. The command line exits with code 2 on it."""


class Unused(ConfigError):
    """A field that was set and would do nothing."""

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


def check_effects(settings, rules: dict[str, effects.Rule], section: str = "", named: Collection[str] = ()) -> None:
    """Raise :class:`Unused` for the first field that was set, or ``named``, and would do nothing."""
    if (found := effects.idle(settings, rules, section, named)) is not None:
        raise Unused(*found)


def check_choice(name: str, value, allowed) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}{hint}")


def members(hint) -> tuple:
    """The types of a union, and of anything else itself."""
    return get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def choices(cls: type) -> dict[str, tuple[str, ...]]:
    """Field → its allowed values, for the fields of a section that have a choice of a few."""
    allowed = {
        name: [value for member in members(hint) if typing.get_origin(member) is Literal for value in get_args(member)]
        for name, hint in typing.get_type_hints(cls).items()
    }
    return {name: tuple(dict.fromkeys(values)) for name, values in allowed.items() if values}


ALIASES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def dtype_name(value):
    """``float16`` for ``fp16``, ``half``, ``torch.float16`` and itself; anything else as it is."""
    text = str(value).removeprefix("torch.")
    text = ALIASES.get(text, text)
    return text if text in DTYPES else value


def check_dtype(value, name: str = "dtype") -> Dtype:
    """The name of a number type, ``auto`` included. Raises :class:`ConfigError` for one that is none of ``DTYPES``."""
    check_choice(name, found := dtype_name(value), DTYPES)
    return found


def check_choices(owner, section: str = "") -> None:
    for name, allowed in choices(type(owner)).items():
        if "float32" in allowed:
            setattr(owner, name, dtype_name(getattr(owner, name)))
        if name == "criterion" and is_function(owner.criterion):
            continue
        check_choice(f"{section} {name}".lstrip(), getattr(owner, name), allowed)


def is_function(criterion) -> bool:
    """Whether a criterion is a function, or in a ``run.yaml`` stands for one that was given in memory."""
    return callable(criterion) or (isinstance(criterion, str) and in_memory(criterion))


def function_name(function: Callable) -> str:
    """The name of a function, of a partial one that of the whole, and of any other callable its class's."""
    whole = getattr(function, "func", function)
    return getattr(whole, "__name__", type(whole).__name__)


def check_at_least(owner, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value < minimum):
            raise ConfigError(f"{name} must be at least {minimum}, got {value!r}")
