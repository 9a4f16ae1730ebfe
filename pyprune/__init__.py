"""pyprune: one-shot pruning of transformers, fast and honest."""

from __future__ import annotations

__version__ = "0.1.0"
