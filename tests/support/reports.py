"""Reports of runs that never ran, for tables and curves over them."""

from __future__ import annotations


def report(seed: int, pruned: float | None, **config) -> dict:
    """Wanda at 50 % on one text: dense perplexity 10, ``pruned`` after it, block errors that grow with the seed."""
    settings = {
        "method": "wanda",
        "criterion": "wifv",
        "pattern": "unstructured",
        "sparsity": 0.5,
        "reconstruct": "none",
    }
    return {
        "config": {**settings, "seed": seed, **config},
        "sparsity": 0.5,
        "model": {"parameters": 10},
        "seconds": {"load": 1.0, "solve": seed + 1.0},
        "peak_memory_bytes": 100,
        "blocks": [{"error": 0.1 * (seed + 1), "error_held_out": None}],
        "evaluation": [{"text": "t", "dense": 10.0, "pruned": pruned}],
    }
