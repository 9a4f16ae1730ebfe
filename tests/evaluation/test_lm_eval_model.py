"""lm-eval's tasks on a model whose weights are streamed."""

from __future__ import annotations

import json

import pytest

from pyprune.config import ConfigError
from pyprune.evaluation.single import placed_on, ready
from pyprune.evaluation.task_runs import through_lm_eval

pytest.importorskip("lm_eval", reason="lm-eval is an extra (pip install 'pyprune[eval]')")
from lm_eval.api.task import ConfigurableTask  # noqa: E402


def test_a_streamed_model_scores_as_in_memory(folder, tmp_path):
    rows = [{"query": f"what is {i}", "options": [f"it is {i}", "no", f"{i * i}"], "gold": i % 3} for i in range(8)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ConfigurableTask(
        config={
            "task": "ours",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "items.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{query}}\nAnswer:",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    found = ready(str(folder), stream="always")
    whole = ready(str(folder), stream="never")
    apart = through_lm_eval(placed_on(found, "cpu"), found.tokenizer, task, None, 4)
    assert apart == through_lm_eval(whole.model, whole.tokenizer, task, None, 4)
    task.config.output_type = task.OUTPUT_TYPE = "generate_until"
    with pytest.raises(ConfigError, match="stream='never'"):
        through_lm_eval(placed_on(found, "cpu"), found.tokenizer, task, None, 4)
