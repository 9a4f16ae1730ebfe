"""A tiny LLaMA pruned from calibration tokens to checkpointable weights by interpreted Triton kernels: the masks are
those of the reference."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyprune import ops
from pyprune.config import Evaluation
from pyprune.ops import choice
from pyprune.pipeline.prune import prune

pytestmark = pytest.mark.usefixtures("interpreter")


def pruned(backend, method, **fields):
    model = tiny.model("llama", num_hidden_layers=2)
    with ops.backend(backend):
        result = prune(
            model,
            calibration=tiny.ids(6, 24),
            evaluation=Evaluation(enabled=False),
            progress=False,
            backend=backend,
            method=method,
            **fields,
        )
    return result.model.state_dict()


@pytest.mark.parametrize(
    "method, fields",
    [
        ("wanda", dict(pattern="2:4")),
        ("sparsegpt", dict(sparsity=0.5)),
        ("sparsegpt", dict(pattern="2:4")),
    ],
    ids=str,
)
def test_same_masks_as_the_reference(monkeypatch, method, fields):
    chosen: dict[tuple[str, str, str], object] = {}
    monkeypatch.setattr(choice, "_loaded", chosen)  # op, device and back-end of what ran
    got = pruned("triton", method, **fields)
    used = {op for op, _, _ in chosen}
    assert {name for _, _, name in chosen} == {"triton"}
    assert used >= ({"gram_update", "obs_sweep"} if method == "sparsegpt" else {"nm_mask"})
    want = pruned("reference", method, **fields)
    masks = {key: (got[key] == 0, want[key] == 0) for key in want if "proj" in key}
    assert len(masks) == 14
    for key, (mine, reference) in masks.items():
        assert torch.equal(mine, reference), f"{key}: {(mine != reference).sum()} of {mine.numel()} differ"
        assert mine.float().mean() == pytest.approx(0.5, abs=0.01)
        assert torch.allclose(got[key], want[key], atol=1e-3 * want[key].abs().max().item())
