"""Statistics of activations: any batches, no cancellation, every expert on its own tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from objective import inputs

from pyprune.execution.executor import Executor
from pyprune.masks.statistics import Statistics, observe
from pyprune.model.blocks import ModelView, weights_of


def test_gram_does_not_depend_on_how_tokens_are_batched():
    x = inputs(tokens=1000, columns=40) * 3
    truth = x.double().T @ x.double()
    for split in (1000, 333, 64, 1):
        s = Statistics(40, x.device)
        for chunk in x.split(split):
            s.update(chunk)
        assert s.tokens == 1000
        assert (s.gram.double() - truth).norm() / truth.norm() < 1e-6
        assert torch.equal(s.gram, s.gram.T)
        torch.testing.assert_close(s.sums.double(), x.double().sum(0), rtol=1e-4, atol=1e-2)


def test_moments_merge_without_cancellation():
    """Mean 1e4 times the deviation: the naive sum of squares has no digit left, Chan's merge has."""
    x = torch.randn(4096, 5, generator=torch.Generator().manual_seed(11)) * 0.01 + 100
    s = Statistics(5, x.device, want_gram=False, want_moments=True)
    for chunk in x.split(100):
        s.update(chunk)
    truth = x.double()
    torch.testing.assert_close(s.m2, (truth - truth.mean(0)).square().sum(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(s.norm.double(), truth.square().sum(0).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_expert_statistics_see_only_their_tokens(architecture):
    """Each expert's Gram equals the one computed from the tokens the router sends it."""
    model = tiny.model(architecture)
    view = ModelView(model)
    executor = Executor(view, batch_size=4)
    stream = executor.embed(list(tiny.ids(8, 16)))
    block = view.blocks[0]
    moe = block.mlp
    inputs, routes = [], []
    handles = [
        moe.register_forward_pre_hook(lambda m, a: inputs.append(a[0].reshape(-1, 32))),
        moe.experts.register_forward_pre_hook(lambda m, a: routes.append(a[1])),
    ]
    with executor.compute(0) as module:
        observer = observe(executor, 0, module, weights_of(block), stream, lambda c, d: Statistics(c, d))
    for handle in handles:
        handle.remove()
    x, chosen = torch.cat(inputs), torch.cat(routes)
    for expert in range(4):
        mine = x[(chosen == expert).any(1)].double()
        name = f"mlp.experts.gate_up_proj[{expert}]"
        if len(mine) == 0:
            assert name not in observer.sinks
            continue
        assert observer.sinks[name].tokens == len(mine)
        torch.testing.assert_close(observer.sinks[name].gram.double(), mine.T @ mine, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [1, 5, 13])
def test_experts_see_every_token_routed_to_them_whatever_the_batch(architecture, batch_size):
    from pyprune.masks.statistics import Statistics, observe
    from pyprune.model.blocks import weights_of

    view = ModelView(tiny.model(architecture))
    executor = Executor(view, batch_size=batch_size)
    activations = executor.embed(list(tiny.ids(13, 24)))
    with executor.compute(0) as module:
        observer = observe(executor, 0, module, weights_of(module), activations, Statistics)
    tokens = {name: s.tokens for name, s in observer.sinks.items()}
    for kind in ("gate_up_proj", "down_proj"):
        assert sum(count for name, count in tokens.items() if kind in name) == 13 * 24 * 2, "two experts a token"
