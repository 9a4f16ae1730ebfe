"""A task of lm-eval over a file of our own: ``query``, ``options`` and the number ``gold`` of the right one per row."""

from __future__ import annotations

from pathlib import Path


def multiple_choice(path: Path) -> dict:
    """Its configuration; what the data set library keeps lies beside the file."""
    return {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{query}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
