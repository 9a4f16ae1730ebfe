"""Packed weights: the layout by hand, the round trip to the bit, and what is refused before anything is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyprune import ops
from pyprune.ops import packed as packing
from pyprune.ops.packed import DamagedWeight, pack_bitmask, unpack_bitmask


def sparse(rows, columns, dtype=torch.float32, share=0.5, seed=0):
    """Random with about ``share`` zeros, an empty row and a full one."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[torch.rand(rows, columns, generator=generator) < share] = 0
    if rows > 2:
        w[1], w[2] = 0, 3
    return w.to(dtype)


def test_the_layout_is_what_the_documents_say():
    w = torch.tensor([[0, 0, 5.0, 0, 0, 0, 0, 6, 7, 0], [0] * 10, [1.0] + [0] * 8 + [-0.0]])
    packed = pack_bitmask(w)
    assert packed.mask.tolist() == [[0b10000100, 0b01], [0, 0], [0b00000001, 0b10]]
    assert packed.values.tolist() == [5, 6, 7, 1, 0]
    assert torch.signbit(packed.values[-1])
    assert packed.offsets.tolist() == [0, 3, 3, 5]
    assert packed.shape == (3, 10)
    assert packed.nbytes == 6 + 5 * 4 + 4 * 8


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("rows, columns", [(0, 5), (3, 0), (1, 1), (5, 63), (4, 64), (7, 1000)])
def test_round_trip_to_the_bit(rows, columns, dtype, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 2000)  # in several parts
    w = sparse(rows, columns, dtype)
    if w.numel() > 10:
        w[-1, -3:] = torch.tensor([torch.nan, -0.0, -torch.inf])
    for given in (w, w.T.contiguous().T, torch.cat([w, w], 1)[:, :columns]):
        packed = pack_bitmask(given)
        back = unpack_bitmask(packed)
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(back.view(kind), w.view(kind))
        assert len(packed.values) == (w.view(kind) != 0).sum()
        assert packed.dtype == dtype


def test_sizes_are_nine_bits_at_half_and_five_point_eight_at_seventy_percent():
    for share, bits in ((0.5, 9), (0.7, 5.8)):
        w = sparse(64, 4096, torch.bfloat16, share)
        w[1:3] = w[3:5]
        assert pack_bitmask(w).nbytes * 8 / w.numel() == pytest.approx(bits, rel=0.02)


def altered(**changes):
    packed = pack_bitmask(sparse(4, 12))
    return dataclasses.replace(packed, **{name: change(getattr(packed, name)) for name, change in changes.items()})


def put(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": put((1, 0), 3)}, "the mask of row 1 has 2 bits, its offsets .* say 0 values"),
        ({"mask": put((2, 1), 0x1F)}, "the mask of row 2 has 13 bits"),
        ({"offsets": put(1, -5)}, "row 0 has . bits, its offsets 0 and -5"),
        ({"offsets": put(2, 2**40)}, "row 1 has 0 bits, .*1099511627776"),
        ({"offsets": put(0, 1)}, r"its offsets go from 1 to \d+, those of \d+ values"),
        ({"values": lambda v: v[:-1].clone()}, r"those of \d+ values"),
    ],
    ids=range(6),
)
def test_a_weight_that_contradicts_itself_is_refused_before_it_is_read(changes, message):
    broken = altered(**changes)
    for use in (unpack_bitmask, lambda p: ops.sparse_linear(torch.ones(1, 12), p)):
        with pytest.raises(DamagedWeight, match=r"packed weight \[4, 12\] is damaged: .*" + message):
            use(broken)


def test_a_bit_behind_the_last_column_is_refused():
    packed = altered(mask=lambda m: m)
    moved = packed.mask.clone()
    moved[2] = torch.tensor([0xFE, 0x1F], dtype=torch.uint8)  # as many bits as before
    with pytest.raises(DamagedWeight, match="row 2 has a bit behind column 11"):
        dataclasses.replace(packed, mask=moved).check()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": lambda m: m[:, :1].clone()}, r"mask \(4, 1\) .* cannot be that of 12 columns"),
        ({"offsets": lambda o: o[:-1]}, "4 rows has 5 offsets, got 4"),
        ({"offsets": lambda o: o.int()}, "offsets of a packed weight must be int64"),
        ({"values": lambda v: v.double()}, "float32 or bfloat16 or float16 with 1 dimension, got float64"),
        ({"mask": lambda m: m.T.contiguous().T}, "contiguous"),
        ({"values": lambda v: v.to("meta")}, "mask of a packed weight is on cpu, values on meta"),
    ],
    ids=range(6),
)
def test_shapes_and_types_are_refused_where_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        altered(**changes)


def test_data_are_checked_once_and_again_after_a_change(monkeypatch):
    looks = []
    look = packing._complaint
    monkeypatch.setattr(packing, "_complaint", lambda p: looks.append(p) or look(p))
    w = sparse(4, 12)
    packed = pack_bitmask(w)
    for _ in range(3):
        ops.sparse_linear(torch.ones(1, 12), packed)
    assert len(looks) == 1
    packed.mask[0, 0] ^= 1
    with pytest.raises(DamagedWeight):
        ops.sparse_linear(torch.ones(1, 12), packed)
    with torch.inference_mode():
        inside = pack_bitmask(w)
        for _ in range(2):
            ops.sparse_linear(torch.ones(1, 12), inside)
    assert len(looks) == 3


def test_gradients_flow_unless_a_back_end_is_named():
    w = sparse(6, 20)
    packed, x = pack_bitmask(w), torch.randn(3, 20, requires_grad=True)
    ops.sparse_linear(x, packed).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 20))


def test_any_leading_shape():
    w, bias = sparse(6, 20), torch.randn(6)
    packed = pack_bitmask(w)
    for shape in ((20,), (0, 20), (1, 1, 20), (2, 3, 20), (4, 30, 20)):
        x = torch.randn(shape)
        want = torch.nn.functional.linear(x, w, bias)
        torch.testing.assert_close(ops.sparse_linear(x, packed, bias), want, rtol=1e-5, atol=1e-5)
