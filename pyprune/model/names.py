"""Patterns that name weights: whole dot-separated components, wildcards, or a regular expression.

``layers.1`` is block 1 and not block 10. ``mlp.*_proj`` has fnmatch's wildcards, which also cross dots. ``re:…`` is
searched for anywhere in the name. ``experts.down_proj[3]`` is one expert, ``experts.down_proj`` every one of them.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable

from pyprune.config import ConfigError

REGEX = "re:"
_EXPERT = re.compile(r"\[(\d+|\*)\]")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if one of the patterns names this weight."""
    return any(_matcher(pattern)(name) for pattern in patterns)


@functools.lru_cache(maxsize=256)
def _matcher(pattern: str) -> Callable[[str], bool]:
    """A function from a full name to whether the pattern names it. Raises ConfigError for a broken expression."""
    if pattern.startswith(REGEX):
        try:
            search = re.compile(pattern[len(REGEX) :]).search
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
        return lambda name: search(name) is not None
    asked = pattern.strip(".")
    if not asked:
        return lambda name: False
    # the [3] of an expert is part of its name, where fnmatch reads a set of characters
    forms = [_EXPERT.sub(r"[[]\1]", asked), *([] if "*[" in asked else [asked])]
    match = re.compile("|".join(map(fnmatch.translate, forms))).match
    return lambda name: any(match(run) for run in _runs(name))


@functools.lru_cache(maxsize=1024)
def _runs(name: str) -> list[str]:
    """Every contiguous run of components, with and without the number of an expert at its end."""
    whole = name.split(".")
    runs = [".".join(whole[i:j]) for i in range(len(whole)) for j in range(i + 1, len(whole) + 1)]
    return runs + [_EXPERT.sub("", run) for run in runs if run.endswith("]")]


def in_block(name: str) -> bool:
    """Whether a tensor of a checkpoint is of a block and no embedding: a numbered module is part of its path
    (``layers.3.``)."""
    return re.search(r"(^|\.)\d+\.", name) is not None and "embed" not in name
