"""Triton Gram kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from pyprune import ops
from pyprune.triton_kernels import gram as module
from pyprune.triton_kernels import gram_persistent
from pyprune.triton_kernels.tuning import config

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def inputs(tokens, c, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, c)
    return ((torch.randn(tokens, c, generator=generator) + 0.5) * scale).to(dtype)


@pytest.mark.parametrize(
    "tokens, c, dtype",
    [
        (1, 1, torch.float32),
        (63, 33, torch.bfloat16),
        (300, 63, torch.float16),
        (700, 65, torch.bfloat16),
        (130, 130, torch.float32),
        (1000, 16, torch.float32),
    ],
)
def test_gram_matches_float64(tokens, c, dtype):
    x = inputs(tokens, c, dtype)
    start = torch.eye(c) * 3
    gram, sums, count = start.clone(), torch.ones(c), torch.tensor(5)
    with ops.backend("triton"):
        ops.gram_update(gram, x, sums=sums, count=count)
    want = start.double() + x.double().T @ x.double()
    assert relative(gram, want) < TOLERANCE[dtype]
    assert torch.equal(gram, gram.T)
    assert relative(sums, 1 + x.double().sum(0)) < 1e-5
    assert count.item() == 5 + tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_do_not_count_even_when_nan(dtype):
    x = inputs(200, 40, dtype)
    mask = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.6
    x[~mask] = float("nan")
    gram, sums, count = torch.zeros(40, 40), torch.zeros(40), torch.tensor(0)
    with ops.backend("triton"):
        ops.gram_update(gram, x, sums=sums, count=count, mask=mask)
    kept = x[mask].double()
    assert relative(gram, kept.T @ kept) < TOLERANCE[dtype]
    assert relative(sums, kept.sum(0)) < 1e-5
    assert count.item() == int(mask.sum())


def test_strided_and_transposed_inputs():
    wide = inputs(90, 100, torch.float32)
    for x in (wide[:, 3:90:3], wide.T, wide[5::2, :64]):
        gram = torch.zeros(x.shape[1], x.shape[1])
        with ops.backend("triton"):
            ops.gram_update(gram, x)
        assert relative(gram, x.double().T @ x.double()) < 1e-5


def test_bfloat16_precision_rounds_the_input_once():
    x = inputs(150, 48, torch.float32)
    gram, sums = torch.zeros(48, 48), torch.zeros(48)
    with ops.backend("triton"):
        ops.gram_update(gram, x, sums=sums, precision="bfloat16")
    rounded = x.bfloat16().double()
    assert relative(gram, rounded.T @ rounded) < 1e-6
    assert relative(sums, rounded.sum(0)) < 1e-5


def test_gram_is_bitwise_repeatable_and_split_over_launches(monkeypatch):
    monkeypatch.setitem(module.TOKENS_PER_ACCUMULATOR, torch.bfloat16, 128)
    x = inputs(1000, 40, torch.bfloat16)
    results = []
    for _ in range(2):
        gram, count = torch.zeros(40, 40), torch.tensor(0)
        with ops.backend("triton"):
            ops.gram_update(gram, x, count=count)
        results.append(gram)
    assert torch.equal(*results)
    assert relative(results[0], x.double().T @ x.double()) < 1e-6 and count.item() == 1000


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(
    "tokens, c, dtype, splits", [(40, 72, torch.bfloat16, 1), (100, 100, torch.float16, 3), (16, 16, torch.bfloat16, 2)]
)
def test_persistent_programs_match_float64(monkeypatch, tma, tokens, c, dtype, splits):
    """Tiles of 128 × 256 in small: parts of tokens, launches, groups of squares, edges; unwritten memory is NaN."""
    monkeypatch.setattr(gram_persistent, "with_tma", lambda device: tma)
    monkeypatch.setattr(gram_persistent, "MOST_TOKENS", 64)
    monkeypatch.setattr(gram_persistent, "L2_GROUP", 2)
    monkeypatch.setattr(gram_persistent, "splits_of", lambda *sizes: splits)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    x = inputs(tokens, (c + 7) // 8 * 8, dtype)[:, :c]
    start = torch.eye(c) * 3
    gram, sums, count = start.clone(), torch.ones(c), torch.tensor(5)
    try:
        gram_persistent.launch_gram(config(4, 1, BT=16, BM=16, BN=32), gram, x, sums, count)
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative(gram, start.double() + x.double().T @ x.double()) < 1e-6
    assert torch.equal(gram, gram.T)
    assert relative(sums, 1 + x.double().sum(0)) < 1e-5 and count.item() == 5 + tokens


def test_persistent_programs_are_tried_where_they_can_run():
    x = torch.empty(64, 1024, dtype=torch.bfloat16)
    assert gram_persistent.configs(x, None) == gram_persistent.TMA
    assert gram_persistent.configs(x[:, 1:], None) == gram_persistent.POINTERS, "descriptors are aligned"
    for other in (x.float(), x[:, :512], x[:, ::2], torch.empty(1024, 64, dtype=x.dtype).T):
        assert gram_persistent.configs(other, None) == ()
    assert gram_persistent.configs(x, torch.ones(64)) == ()
    # 272 tiles on 132 programs are 2.06 waves of whole tiles; thirds fill the last one better
    assert gram_persistent.splits_of(272, 256, 132) == 3
    assert gram_persistent.splits_of(1892, 256, 132) == 1


@pytest.mark.parametrize("capability, expected", [((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)])
def test_descriptors_are_for_the_chips_that_gain_by_them(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gram_persistent.with_tma(torch.device("cuda:0")) is expected


def test_empty_batch_changes_nothing():
    gram, count = torch.ones(8, 8), torch.tensor(3)
    with ops.backend("triton"):
        ops.gram_update(gram, torch.empty(0, 8), count=count)
        ops.cross_gram_update(gram, torch.empty(0, 8), torch.empty(0, 8))
    assert torch.equal(gram, torch.ones(8, 8)) and count.item() == 3


@pytest.mark.parametrize("group, c", [(2, 80), (8, 144)])
def test_grouped_walk_covers_every_lower_tile_once(monkeypatch, group, c):
    monkeypatch.setattr(module, "NARROW", (config(4, 1, BT=16, BC=16),))
    monkeypatch.setattr(module, "L2_GROUP", group)
    x = inputs(20, c, torch.bfloat16)
    gram = torch.zeros(c, c)
    with ops.backend("triton"):
        ops.gram_update(gram, x)
    assert relative(gram, x.double().T @ x.double()) < 1e-6
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize(
    "cy, cx, dtype, masked",
    [(33, 70, torch.bfloat16, True), (130, 1, torch.float32, False), (64, 64, torch.float16, False)],
)
def test_cross_gram_matches_float64(cy, cx, dtype, masked):
    y, x = inputs(400, cy, dtype), inputs(400, cx, dtype, seed=2)
    mask = torch.arange(400) % 3 != 0 if masked else None
    cross = torch.full((cy, cx), 2.0)
    with ops.backend("triton"):
        ops.cross_gram_update(cross, y, x, mask=mask)
    rows = slice(None) if mask is None else mask
    assert relative(cross, 2 + y[rows].double().T @ x[rows].double()) < TOLERANCE[dtype]
