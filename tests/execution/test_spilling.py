"""Memory of a paused pass: what is alive is known, and goes to a store and back."""

from __future__ import annotations

import pytest
import torch

from pyprune.execution.activation_store import Store
from pyprune.execution.spilling import Alive, Elsewhere, Spilled

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x * 1.0)))


def test_bytes_alive_at_a_pause_are_known():
    block, alive = Block(), Alive()
    seen = []

    def gauge(module, args):
        alive.update()
        seen.append(alive.peak)

    block.up.register_forward_pre_hook(gauge)
    block.down.register_forward_pre_hook(gauge)
    x = torch.randn(5, 8)
    with torch.no_grad(), alive:
        block(x)
    # x is the caller's and the weights are no activations: before up its input, before down its input alone
    assert seen == [5 * 8 * 4, 5 * 32 * 4]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
@pytest.mark.parametrize("budget", [0, 2**20])
def test_memory_goes_to_the_store_and_comes_back(budget, device, tmp_path):
    store = Store(budget, tmp_path, pin=device == "cuda")
    spilled, given = Spilled(store), torch.arange(3.0, device=device)
    with Alive() as alive:
        whole = torch.randn(7, 5, device=device)
        view, half = whole[2:, 1], torch.arange(6, dtype=torch.bfloat16, device=device)
        same = given.view(3, 1)
        passing = torch.ones(100, device=device)
    before = [tensor.clone() for tensor in (whole, view, half)]
    for _ in range(2):
        spilled.out(alive)
        assert [tensor.untyped_storage().nbytes() for tensor in (whole, view, half, same)] == [0, 0, 0, 12]
        assert (store.in_files > 0) == (budget == 0)
        passing = None  # freed while it is away
        spilled.back()
        assert all(torch.equal(one, other) for one, other in zip((whole, view, half), before))
        assert len(alive.refs()) == 2 and passing is None
    del spilled
    assert store.in_files == store.in_memory == 0


def test_a_tensor_without_its_memory_is_not_computed_with():
    spilled = Spilled(Store(0))
    with Alive() as one:
        kept = torch.ones(4)
    spilled.out(one)
    with pytest.raises(Elsewhere), Alive():
        kept + 1
    spilled.back()
    with Alive():
        assert (kept + 1).tolist() == [2, 2, 2, 2]


def test_reserved_memory_counts_as_in_use():
    store = Store(1000)
    with store.reserved(900):
        inside = store.empty((50,), torch.float32)
        assert (store.in_memory, store.in_files) == (900, 200)
    outside = store.empty((50,), torch.float32)
    assert (store.in_memory, store.in_files) == (200, 200) and inside.shape == outside.shape
