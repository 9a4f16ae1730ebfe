"""A block's errors and their quantiles are those of the two models' own hidden states."""

from __future__ import annotations

import pytest
import tiny
import torch

import pyprune
from pyprune.config import Calibration, Reconstruction
from pyprune.execution.error_probes import LEVELS


def hidden(model, sequences, index):
    with torch.no_grad():
        return [model(row[None], output_hidden_states=True).hidden_states[index + 1][0].double() for row in sequences]


def expected(dense, pruned, sequences, index):
    """Error as a whole, quantiles over tokens, quantiles over sequences; in float64 from whole forward passes."""
    pairs = list(zip(hidden(dense, sequences, index), hidden(pruned, sequences, index)))
    lost = [(a - b).square().sum(-1) for a, b in pairs]
    total = [a.square().sum(-1) for a, _ in pairs]
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    tokens = torch.cat([part / whole for part, whole in zip(lost, total)])
    rows = torch.stack([part.sum() / whole.sum() for part, whole in zip(lost, total)])
    error = sum(part.sum() for part in lost) / sum(whole.sum() for whole in total)
    return error.item(), tokens.quantile(levels).tolist(), rows.quantile(levels).tolist()


RUNS = {
    "masks": dict(method="sparsegpt"),
    "sequential": dict(method="wanda", inputs="sequential"),
    "trained": dict(method="wanda", reconstruct="block", reconstruction=Reconstruction(epochs=1, batch_size=4)),
    "cross": dict(method="wanda", reconstruct="cross_block", reconstruction=Reconstruction(epochs=1, batch_size=4)),
    "neurons": dict(pattern="neurons", criterion="wifv"),
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=list(RUNS))
def test_quantiles_are_those_of_the_models_hidden_states(fields):
    dense, ids = tiny.model("llama"), tiny.ids(12, 20)
    result = pyprune.prune(
        dense,
        calibration=Calibration(source=ids, num_samples=8, held_out=4),
        probe_samples=3,
        evaluation={"enabled": False},
        progress=False,
        **fields,
    )
    report = result.report
    assert report["error_quantile_levels"] == list(LEVELS)
    for index in range(2):  # behind the last block stands the final norm in hidden_states
        row = report["blocks"][index]
        for name, key, sequences in (("calibration", "error", ids[:3]), ("held_out", "error_held_out", ids[8:11])):
            error, tokens, rows = expected(dense, result.model, sequences, index)
            assert row[key] == pytest.approx(error, rel=1e-3)
            assert row["error_quantiles"][name]["tokens"] == pytest.approx(tokens, rel=2e-3)
            assert row["error_quantiles"][name]["sequences"] == pytest.approx(rows, rel=2e-3)
            assert min(tokens) < error < max(tokens)


@pytest.mark.parametrize(
    "fields", [RUNS["masks"], RUNS["trained"], RUNS["neurons"]], ids=["masks", "trained", "neurons"]
)
def test_self_generated_text_has_errors_of_its_own(fields, tokenizer):
    dense = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    asked = dict(self_generated=4, self_generated_for="reconstruction" if "reconstruct" in fields else "all")
    result = pyprune.prune(
        dense,
        tokenizer=tokenizer,
        calibration=Calibration(source=tiny.ids(12, 20), num_samples=6, held_out=3, **asked),
        evaluation={"enabled": False},
        progress=False,
        **fields,
    )
    sampled = pyprune.generate(dense, tokenizer, 4, seq_len=20)[:2]
    for index in range(2):
        row = result.report["blocks"][index]
        error, tokens, _ = expected(dense, result.model, sampled, index)
        assert row["error_self_generated"] == pytest.approx(error, rel=1e-3)
        assert row["error_quantiles"]["self_generated"]["tokens"] == pytest.approx(tokens, rel=2e-3)
