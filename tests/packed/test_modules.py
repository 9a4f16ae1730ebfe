"""``SparseLinear``: what a module can do, it can do."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from pyprune.ops.packed import DamagedWeight, pack_bitmask
from pyprune.packed.modules import SparseLinear


def linear(outputs=24, inputs=37, dtype=torch.float32, sparsity=0.6, seed=0, bias=True) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(outputs, inputs) < sparsity, 0)
    return layer


def packed_of(layer: nn.Linear) -> SparseLinear:
    return SparseLinear(pack_bitmask(layer.weight), layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_weight_are_those_of_the_dense_layer(dtype, bias):
    layer = linear(dtype=dtype, bias=bias)
    packed = packed_of(layer)
    assert torch.equal(packed.weight, layer.weight)
    for shape in ((37,), (1, 37), (2, 5, 37), (0, 37)):
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-2, atol=1e-2)
    assert packed.density == pytest.approx((layer.weight != 0).float().mean().item())
    assert "in_features=37, out_features=24" in repr(packed) and str(dtype)[6:] in repr(packed)


def test_types_devices_copies_and_pickles():
    layer = linear()
    packed, x = packed_of(layer), torch.randn(3, 37)
    packed(x)
    for one in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(one(x), packed(x)) and one.values is not packed.values
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and half.mask.dtype == torch.uint8 and half.offsets.dtype == torch.int64
    torch.testing.assert_close(half(x.bfloat16()), layer.bfloat16()(x.bfloat16()).detach(), rtol=1e-2, atol=1e-2)
    assert packed.to("meta").values.is_meta


def test_weights_that_are_swapped_for_a_call_are_the_ones_that_are_used():
    """``evaluate`` computes in bfloat16 with a cast copy of the parameters."""
    packed, x = packed_of(linear()), torch.randn(3, 37)
    own = packed(x)
    other = {"values": packed.values.detach() * 2, "bias": packed.bias.detach() * 2}
    torch.testing.assert_close(torch.func.functional_call(packed, other, (x,)), 2 * own)
    assert torch.equal(packed(x), own)


def test_a_state_of_another_weight_is_taken_and_a_damaged_one_is_not():
    packed, other = packed_of(linear()), packed_of(linear(seed=1, sparsity=0.3))
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    packed.load_state_dict(state)
    x = torch.randn(2, 37)
    assert torch.equal(packed(x), other(x)) and torch.equal(packed.weight, other.weight)
    for damage in (
        dict(values=state["values"][:-1]),
        dict(offsets=state["offsets"] + 1),
        dict(mask=state["mask"] ^ 1),
        dict(
            mask=torch.cat([state["mask"], state["mask"][:1]]),
            offsets=torch.cat([state["offsets"], state["offsets"][-1:]]),
        ),
    ):
        with pytest.raises(DamagedWeight):
            packed.load_state_dict({**state, **damage})
        assert torch.equal(packed(x), other(x))


def test_a_gradient_passes_through_to_the_input():
    layer = linear()
    packed, x = packed_of(layer), torch.randn(3, 37, requires_grad=True)
    packed(x).square().sum().backward()
    given, x.grad = x.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(given, x.grad)
    assert packed.values.grad is None
