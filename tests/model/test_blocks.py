"""Every supported architecture through the same file: forward, coverage, pruning, saving, plain reloading."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers as hf

import pyprune
from pyprune.execution.executor import Executor
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.recording import call_block
from pyprune.model.watching import expert_loop

ALL = list(tiny.CONFIGS)


def logits(model, ids):
    with torch.no_grad(), expert_loop(model.config):
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("architecture", ALL)
def test_block_by_block_forward_is_the_models_own(architecture):
    model = tiny.model(architecture)
    view = ModelView(model)
    seen = {}
    for i, block in enumerate(view.blocks):
        block.register_forward_hook(
            lambda m, a, out, i=i: seen.__setitem__(i, out[0] if isinstance(out, tuple) else out)
        )
    ids = tiny.ids(3, 20)
    with expert_loop(model.config):
        logits(model, ids)
        truth = dict(seen)
        hidden, arguments = view.record(ids)
        for i, block in enumerate(view.blocks):
            with torch.no_grad():
                hidden = call_block(block, hidden, arguments[i])
            torch.testing.assert_close(hidden, truth[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3", "bert"])
def test_ragged_sequences_through_the_store_match_one_by_one(architecture):
    model = tiny.model(architecture)
    view = ModelView(model)
    sequences = [tiny.ids(1, length, seed=length)[0] for length in (5, 17, 5, 30, 17, 17)]
    executor = Executor(view, batch_size=2)
    stream = executor.embed(sequences)
    for i, block in enumerate(view.blocks):
        executor.run(i, block, stream, stream)
    outputs = []
    view.blocks[-1].register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for sequence in sequences:
        logits(model, sequence[None])
    for length, rows in stream.rows.items():
        for place, row in enumerate(rows):
            torch.testing.assert_close(stream.data[length][place], outputs[row][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ALL)
def test_only_routers_are_uncovered(architecture):
    model = tiny.model(architecture)
    coverage = ModelView(model).coverage([weights_of(b) for b in ModelView(model).blocks])
    routers = [name for name in coverage["skipped"] if "gate.weight" in name]
    assert coverage["skipped"] == routers
    assert len(routers) == (3 if architecture in ("mixtral", "qwen3_moe") else 0)


@pytest.mark.parametrize(
    "method,pattern",
    [("magnitude", "2:4"), ("wanda", "unstructured"), ("sparsegpt", "2:4"), ("sparsegpt", "unstructured")],
)
@pytest.mark.parametrize("architecture", ALL)
def test_prune_save_reload(architecture, method, pattern, tmp_path):
    model = tiny.model(architecture)
    before = copy.deepcopy(model.state_dict())
    ids = tiny.ids(16, 24)
    result = pyprune.prune(
        model,
        method=method,
        pattern=pattern,
        sparsity=0.5,
        calibration=ids,
        progress=False,
        evaluation=pyprune.Evaluation(enabled=False),
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "the input was touched"
    view = ModelView(result.model)
    blocks = {key for key in before if key.startswith(view.path)}
    for key, value in result.model.state_dict().items():
        if key not in blocks:
            assert torch.equal(value, before[key]), f"{key} lies outside the blocks and must not change"
    for block in view.blocks:
        for ref in weights_of(block):
            weight = ref.view(block)
            if pattern == "2:4":
                assert int((weight.reshape(len(weight), -1, 4) != 0).sum(-1).max()) <= 2
            assert abs((weight == 0).float().mean().item() - 0.5) < 0.02
    if method != "magnitude":
        assert all(0 < row["error"] < 1 for row in result.report["weights"] if row.get("error") is not None)
    result.save(tmp_path / "out")
    auto = hf.AutoModel if architecture in tiny.ENCODERS else hf.AutoModelForCausalLM
    reloaded = auto.from_pretrained(tmp_path / "out").eval()
    probe = tiny.ids(2, 16, seed=9)
    torch.testing.assert_close(logits(reloaded, probe), logits(result.model, probe), rtol=0, atol=0)
