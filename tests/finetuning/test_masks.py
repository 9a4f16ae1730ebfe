"""``keep_sparse``: zeros stay zeros under every optimizer, and the kept weights are trained as they would be alone."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

import pyprune
from pyprune.config import ConfigError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


def train(model, optimizer, steps=3, accumulate=2):
    for step in range(steps):
        for part in range(accumulate):
            ids = tiny.ids(2, 12, seed=10 * step + part)
            (model(ids, labels=ids).loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()


def zeros(model) -> dict:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if "proj" in name}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_the_rest_learns(name):
    model = tiny.zeroed(tiny.model("llama"), 0.5)
    optimizer = OPTIMIZERS[name](model.parameters())
    before, start = zeros(model), copy.deepcopy(model.state_dict())
    kept = pyprune.keep_sparse(model, optimizer)
    assert kept.sparsity == pytest.approx(0.5) and len(kept.weights) == 21 and "0.5000" in repr(kept)
    train(model, optimizer)
    kept.check()
    assert all(torch.equal(mask, zeros(model)[key]) for key, mask in before.items())
    assert all(not torch.equal(start[key], model.state_dict()[key]) for key in before)
    # and what the optimizer remembers has the same zeros, whatever it remembers
    for weight_name, weight in kept.weights.items():
        for tensor in optimizer.state[weight].values():
            if torch.is_tensor(tensor) and tensor.shape == weight.shape:
                assert not tensor[before[weight_name]].any()
    kept.remove()
    train(model, optimizer, steps=1)
    assert not all(torch.equal(mask, zeros(model)[key]) for key, mask in before.items())
    with pytest.raises(ConfigError, match="zeros of model.layers.0.*were filled"):
        kept.check()


def test_kept_weights_move_as_if_the_zeros_were_not_there():
    """A product with a fixed mask inside the model is the same training, known without any hook."""

    class Masked(nn.Module):
        def __init__(self, weight, mask):
            super().__init__()
            self.weight, self.mask = nn.Parameter(weight.clone()), mask

        def forward(self, x):
            return x @ (self.weight * self.mask).T

    torch.manual_seed(0)
    mask = (torch.rand(8, 6) < 0.5).double()
    start, data, target = torch.randn(8, 6).double() * mask, torch.randn(32, 6).double(), torch.randn(32, 8).double()
    plain = nn.Linear(6, 8, bias=False).double()
    plain.weight.data.copy_(start)
    known = Masked(start, mask)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (plain, known)]
    with pyprune.keep_sparse(plain, optimizers[0]):
        for _ in range(20):
            for model, optimizer in zip((plain, known), optimizers):
                optimizer.zero_grad()
                (model(data) - target).square().mean().backward()
                # the norm that clipping sees is that of the kept weights
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
    torch.testing.assert_close(plain.weight, known.weight * mask, rtol=1e-12, atol=1e-14)


def test_an_optimizer_with_a_past_is_cleaned():
    model = tiny.zeroed(tiny.model("llama"), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    train(model, optimizer, steps=1)
    before = zeros(model)
    kept = pyprune.keep_sparse(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(model, optimizer, steps=1)
    assert all(torch.equal(mask, zeros(model)[key]) for key, mask in before.items())
    kept.remove()


def test_what_cannot_be_kept_is_refused():
    dense, sparse = tiny.model("llama"), tiny.zeroed(tiny.model("llama"), 0.5)
    with pytest.raises(ConfigError, match="no weight of it has zeros"):
        pyprune.keep_sparse(dense, torch.optim.SGD(dense.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"trains none of its 21 sparse weights, such as model\.layers\.0"):
        pyprune.keep_sparse(sparse, torch.optim.SGD(dense.parameters(), lr=0.1))
    packed = pyprune.sparse(sparse)
    with pytest.raises(ConfigError, match=r"pyprune\.dense"):
        pyprune.keep_sparse(packed, torch.optim.SGD(packed.parameters(), lr=0.1))
