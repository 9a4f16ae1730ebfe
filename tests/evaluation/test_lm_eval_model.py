"""lm-eval's tasks on a model whose weights are streamed."""

from __future__ import annotations

import json

import lm_eval_task
import pytest

from pyprune.config import ConfigError
from pyprune.evaluation.single import placed_on, ready
from pyprune.evaluation.task_runs import through_lm_eval

pytest.importorskip("lm_eval", reason="lm-eval is an extra (pip install 'pyprune[eval]')")
from lm_eval.api.task import ConfigurableTask  # noqa: E402


def test_a_streamed_model_scores_as_in_memory(folder, tmp_path):
    rows = [{"query": f"what is {i}", "options": [f"it is {i}", "no", f"{i * i}"], "gold": i % 3} for i in range(8)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ConfigurableTask(config=lm_eval_task.multiple_choice(tmp_path / "items.jsonl"))
    found = ready(str(folder), stream="always")
    whole = ready(str(folder), stream="never")
    apart = through_lm_eval(placed_on(found, "cpu"), found.tokenizer, task, None, 4)
    assert apart == through_lm_eval(whole.model, whole.tokenizer, task, None, 4)
    task.config.output_type = task.OUTPUT_TYPE = "generate_until"
    with pytest.raises(ConfigError, match="stream='never'"):
        through_lm_eval(placed_on(found, "cpu"), found.tokenizer, task, None, 4)
