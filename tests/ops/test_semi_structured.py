"""Products of 2:4 weights by sparse tensor cores: layout, padding and choice, with a stand-in for the kernels."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from pyprune import config, ops
from pyprune.ops import classes, qualification, reference, semi_structured, trials
from pyprune.ops.packed import pack_bitmask

KEYS = ("sparse_linear/few-tokens-2:4", "sparse_linear/tokens-2:4")


@pytest.fixture
def kernels(monkeypatch):
    """The two kernels, from their metadata; B is what they take: columns in eights, each one contiguous."""
    calls = []

    def mm(values, meta, b):
        assert values.is_contiguous() and b.T.is_contiguous() and b.shape[1] % 8 == 0
        calls.append(b.shape[1])
        return (sparse_semi_structured_to_dense_cutlass(values, meta).float() @ b.float()).to(values.dtype)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(
        torch, "_sparse_semi_structured_addmm", lambda bias, *rest: mm(*rest) + bias[:, None], raising=False
    )
    return calls


def weight(rows=64, columns=128, dtype=torch.bfloat16):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    reference.nm_mask(w, 2, 4, apply=True)
    return w


@pytest.mark.parametrize("tokens", [2, 8, 13, 40])
def test_packed_values_are_what_the_kernels_multiply(kernels, tokens):
    w, bias = weight(), torch.randn(64).bfloat16()
    x = torch.randn(128, tokens, generator=torch.Generator().manual_seed(1)).bfloat16().T
    packed = pack_bitmask(w)
    assert packed.semi_structured
    for b in (None, bias):
        want = reference.sparse_linear(x[None], packed, b)
        torch.testing.assert_close(semi_structured.sparse_linear(x[None], packed, b), want, rtol=2e-2, atol=5e-2)
    assert set(kernels) == {-(-tokens // 8) * 8}


def test_metadata_follow_a_weight_that_is_changed_in_place(kernels):
    packed, other = pack_bitmask(weight()), pack_bitmask(weight().flip(1))
    x = torch.eye(128).bfloat16()
    semi_structured.sparse_linear(x, packed)
    packed.mask.copy_(other.mask)
    packed.values.copy_(other.values)
    assert torch.equal(semi_structured.sparse_linear(x, packed), weight().flip(1).T)


def test_only_exact_24_weights_of_a_fitting_shape_are_in_the_class():
    x = torch.ones(3, 128)
    holed = weight()
    holed[3, holed[3].nonzero()[0]] = 0
    four = torch.zeros(64, 128).bfloat16()
    four[:, :64] = 1  # as many, but not two of every four
    for w, is_24 in [
        (weight(), True),
        (weight(dtype=torch.float16), True),
        (weight(dtype=torch.float32), False),
        (weight(33), False),
        (weight(columns=100), False),
        (holed, False),
        (four, False),
    ]:
        packed = pack_bitmask(w)
        assert packed.semi_structured == is_24
        assert classes.sparse_product(x, packed) == f"sparse_linear/few-tokens{'-2:4' if is_24 else ''}"
    assert classes.sparse_product(x[:1], pack_bitmask(weight())) == "sparse_linear/one-token"
    assert classes.sparse_product(torch.ones(17, 128), pack_bitmask(weight())) == KEYS[1]


def test_it_is_a_candidate_of_auto_alone_and_proves_itself(kernels, monkeypatch):
    assert "semi_structured" not in config.BACKENDS
    with pytest.raises(config.ConfigError, match="semi_structured"):
        config.parse_backend("sparse_linear=semi_structured")
    assert {key for key, names in ops.AUTO["cuda"].items() if "semi_structured" in names} == set(KEYS)
    assert "not cpu ones" in ops.TABLE["semi_structured"].unusable("cpu")
    for key in KEYS:
        assert trials.check(key, semi_structured.sparse_linear, "cpu") < 4e-3
    right = torch._sparse_semi_structured_mm
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda bias, *rest: right(*rest))
    with pytest.raises(trials.Broken, match="is off by"):
        trials.check(KEYS[0], semi_structured.sparse_linear, "cpu")


def test_time_decides():
    names = list(ops.AUTO["cuda"][KEYS[1]])
    record = {"errors": dict.fromkeys(names, 1e-3), "failed": {}, "seconds": dict.fromkeys(names, [2.0])}
    assert qualification.decide(names, record)["takes"] == "cuda"
    record["seconds"]["semi_structured"] = [1.5]
    assert qualification.decide(names, record)["takes"] == "semi_structured"
    record["failed"]["semi_structured"] = "RuntimeError: only for compute capability 8.x"
    assert qualification.decide(names, record)["takes"] == "cuda"
