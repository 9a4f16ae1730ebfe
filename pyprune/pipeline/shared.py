"""What several runs on one model have in common, worked out by the first of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyprune.config import PruneConfig
from pyprune.data.calibration import fingerprint
from pyprune.effects import needs_sequences, reads_sequences, watches
from pyprune.evaluation.windows import Text

T = TypeVar("T")


class Shared:
    """Values by the name of what they depend on. A run of its own starts with none."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self._alive: list[object] = []
        """Sources in memory whose identity is part of a name."""

    def once(self, name: str, work: Callable[[], T]) -> T:
        """The value of this name, worked out if nobody has yet."""
        if name not in self.values:
            self.values[name] = work()
        return self.values[name]  # type: ignore[return-value]

    def sequences(self, config: PruneConfig) -> str:
        """The name of a run's calibration sequences: equal if all settings that they depend on are."""
        source = config.calibration.source
        if not isinstance(source, str):
            self._alive.append(source)
            source = id(source)
        settings = dataclasses.replace(config.calibration, source=None)
        decides = (needs_sequences(config), reads_sequences(config), watches(config))
        return f"sequences {source!r} {settings!r} {decides}"

    @staticmethod
    def dense(config: PruneConfig, texts: Sequence[Text]) -> str:
        """The name of the dense model's perplexity on these windows."""
        evaluation = config.evaluation
        conditions = [evaluation.dtype, evaluation.batch_size, config.device]
        read = [[text.name, text.domain, fingerprint(text.windows)] for text in texts]
        return "dense " + json.dumps([*read, conditions])
