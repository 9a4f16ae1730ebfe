"""Faults of the published reconstruction code, each with a test that would catch it here.

Found in the scripts of arXiv 2406.15524: without CR only the first LLaMA block is pruned; the N:M path fails;
self-generated data must exist even when none is asked for; buffers and attention masks are sized for one batch shape
and one number of samples, so others overrun or fail; masks are chosen again on a block's second visit; a sequence that
does not fill a batch is dropped or breaks the run.
"""

from __future__ import annotations

import importlib

import pytest
import tiny
import torch

from pyprune.config import Calibration, Evaluation, Reconstruction
from pyprune.model.blocks import ModelView, weights_of
from pyprune.pipeline.prune import prune
from pyprune.reconstruction.windows import WindowTrainer


def run(samples=12, model=None, epochs=1, batch_size=4, **fields):
    calibration = Calibration(source=tiny.ids(samples + 2, 16), num_samples=samples, seq_len=16, held_out=2)
    fields.setdefault("reconstruct", "block")
    return prune(
        model or tiny.model("llama"),
        calibration=calibration,
        evaluation=Evaluation(enabled=False),
        progress=False,
        reconstruction=Reconstruction(epochs=epochs, batch_size=batch_size),
        **fields,
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("fields", [{}, {"global_propagation": True}])
def test_every_block_is_pruned_and_trained_without_cross_block_windows(method, fields):
    result = run(method=method, **fields)
    for row, block in zip(result.report["blocks"], ModelView(result.model).blocks):
        zeros = [1 - torch.count_nonzero(ref.view(block)).item() / ref.view(block).numel() for ref in weights_of(block)]
        assert all(abs(z - 0.5) < 1e-3 for z in zeros), row["block"]
        assert [t["blocks"] for t in row["training"]] == [[row["block"]]] and row["training"][0]["steps"] == 3


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_n_m_patterns_survive_reconstruction(method, pattern, n, m):
    result = run(method=method, pattern=pattern, reconstruct="cross_block", global_propagation=True)
    for block in ModelView(result.model).blocks:
        for ref in weights_of(block):
            assert (ref.view(block).reshape(-1, m) != 0).sum(1).max() == n
    assert result.report["sparsity"] == pytest.approx(1 - n / m, abs=2e-3)


def test_no_self_generated_data_is_needed_or_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        importlib.import_module("pyprune.pipeline.sequences"),
        "generate",
        lambda *args, **kwargs: pytest.fail("nothing was asked for"),
    )
    run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("samples, batch_size, forward", [(7, 4, 3), (1, 8, 8), (130, 8, 64), (5, 5, 2)])
@pytest.mark.parametrize("reconstruct", ["block", "cross_block"])
def test_any_number_of_samples_and_any_batch_size(samples, batch_size, forward, reconstruct, monkeypatch):
    """No buffer has a size of its own: every sequence moves on, the last partial batch too."""
    seen = {}
    advance = WindowTrainer.advance

    def watched(self, index, module, **passed):
        advance(self, index, module, **passed)
        if index == 0:
            seen["hidden"] = torch.cat([d.flatten() for d in self.calibration[0].pruned.data.values()]).clone()

    monkeypatch.setattr(WindowTrainer, "advance", watched)
    result = run(
        samples,
        batch_size=batch_size,
        reconstruct=reconstruct,
        global_propagation=True,
        model=(model := tiny.model("llama")),
    )
    steps = -(-samples // batch_size)
    assert result.report["blocks"][1]["training"][0]["steps"] == steps
    assert seen["hidden"].numel() == samples * 16 * model.config.hidden_size
    assert torch.isfinite(seen["hidden"]).all()


def test_batches_of_the_forward_passes_do_not_change_the_result():
    one, many = (
        prune(
            tiny.model("llama"),
            calibration=tiny.ids(7, 16),
            evaluation=Evaluation(enabled=False),
            progress=False,
            method="magnitude",
            reconstruct="block",
            batch_size=b,
            reconstruction=Reconstruction(epochs=2, batch_size=4),
        )
        for b in (1, 3)
    )
    for a, b in zip(one.model.parameters(), many.model.parameters()):
        assert torch.equal(a == 0, b == 0) and torch.allclose(a, b, atol=2e-4)


def test_masks_are_chosen_once_and_kept_on_the_second_visit(monkeypatch):
    patterns: dict[int, list] = {}
    train = WindowTrainer._train

    def watched(self, window, module):
        train(self, window, module)
        for i in window:
            patterns.setdefault(i, []).append(
                [ref.view(self.run.view.blocks[i]) != 0 for ref in weights_of(self.run.view.blocks[i])]
            )

    monkeypatch.setattr(WindowTrainer, "_train", watched)
    run(reconstruct="cross_block", global_propagation=True, method="wanda", epochs=3)
    assert sorted(patterns) == [0, 1, 2]
    for visits in patterns.values():
        assert len(visits) == 2 and all(torch.equal(a, b) for a, b in zip(*visits))


def test_the_error_reported_is_the_one_of_the_weights_returned():
    """The published loop reports a loss averaged over an epoch whose weights were still moving."""
    ids = tiny.ids(6, 16)
    result = prune(
        tiny.model("llama"),
        calibration=ids,
        evaluation=Evaluation(enabled=False),
        progress=False,
        reconstruct="block",
        global_propagation=True,
        probe_samples=6,
        reconstruction=Reconstruction(epochs=2, batch_size=4),
    )
    captured = []
    for model in (tiny.model("llama"), result.model):
        with torch.no_grad():
            inner = model.model
            handle = inner.layers[-1].register_forward_hook(
                lambda m, a, out: captured.append(out[0] if isinstance(out, tuple) else out)
            )
            inner(ids, use_cache=False)
            handle.remove()
    dense, pruned = captured
    error = ((dense - pruned).square().sum() / dense.square().sum()).item()
    assert result.report["blocks"][-1]["error"] == pytest.approx(error, rel=1e-4)
