"""matplotlib, for the pictures that are files: an extra, and never a window."""

from __future__ import annotations

import importlib.util
from typing import Any

from pyprune.config import ConfigError


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing into files. Raises ConfigError where it is not installed."""
    if not can_plot():
        raise ConfigError("a picture needs matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
