"""Property test: whatever shape, stride, type, NaN or infinity, every op answers as the reference does or refuses in a
sentence; memory outside the arguments is never written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import native
from pyprune.ops.packed import DamagedWeight, Packed, pack_bitmask, unpack_bitmask

pytestmark = pytest.mark.skipif(native._C is None, reason=str(native.unusable("cpu")))
GUARD = 97  # elements of a poisoned margin around every matrix
fuzz = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

sizes = st.one_of(st.integers(0, 5), st.integers(6, 70), st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
dtypes = st.sampled_from(ops.FLOATS)
specials = st.sampled_from([None, None, None, torch.nan, torch.inf, -torch.inf, -0.0, 1e-42])


@st.composite
def matrices(draw, rows=sizes, columns=sizes, dtype=dtypes, special=specials):
    """A matrix in the middle of poisoned memory: dense, padded, transposed, strided or all equal."""
    r, c, kind = draw(rows), draw(columns), draw(st.sampled_from(["dense", "padded", "transposed", "strided", "ties"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    strides = {"padded": (c + 7, 1), "transposed": (1, max(r, 1)), "strided": (2 * c + 3, 2)}.get(kind, (max(c, 1), 1))
    span = (r - 1) * strides[0] + (c - 1) * strides[1] + 1 if r and c else 0
    memory = torch.full((span + 2 * GUARD,), 12345.0).to(draw(dtype))
    view = memory.as_strided((r, c), strides, GUARD)
    view.copy_(torch.ones(r, c) if kind == "ties" else torch.randn(r, c, generator=generator))
    value = draw(special)
    if value is not None and view.numel():
        view[draw(st.integers(0, r - 1)), draw(st.integers(0, c - 1))] = value
    return view


def untouched_outside(view, memory_before):
    memory = view.as_strided(memory_before.shape, (1,), 0)
    outside = torch.ones(memory.shape, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return torch.equal(memory[outside], memory_before[outside])


def memory_of(view):
    return view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).clone()


def answers(call, *tensors):
    """Result, or the message of a refusal, of both back-ends on equal copies (strides kept) of the tensors."""
    outcomes = []
    for name in ("reference", "cpu"):
        copies = [
            None if t is None else memory_of(t).as_strided(t.shape, t.stride(), t.storage_offset()) for t in tensors
        ]
        before = [None if t is None else memory_of(t) for t in tensors]
        try:
            with ops.backend(name):
                result = call(*copies)
        except (ValueError, TypeError) as error:
            result = str(error)
            assert len(result) > 10
        for copy, memory in zip(copies, before):
            assert copy is None or untouched_outside(copy, memory)
            if isinstance(result, str) and copy is not None:  # refused: nothing was changed
                assert torch.equal(memory_of(copy).nan_to_num(nan=7), memory.nan_to_num(nan=7))
        outcomes.append((result, copies))
    return outcomes


def same(a, b, rtol=2e-5, atol=2e-4):
    torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol, equal_nan=True)


@fuzz
@given(matrices(), st.data())
def test_select_mask(w, data):
    scope = data.draw(st.sampled_from(["row", "matrix"]))
    k = data.draw(st.integers(0, (w.shape[1] if scope == "row" else w.numel()) + 1))
    scale = data.draw(st.sampled_from([None, torch.rand(w.shape[1])]))
    (truth, expected), (found, changed) = answers(
        lambda x: ops.select_mask(x, k, scale=scale, scope=scope, apply=True), w
    )
    assert found == truth if isinstance(truth, str) or isinstance(found, str) else torch.equal(found, truth)
    same(changed[0], expected[0], 0, 0)


@fuzz
@given(st.data())
def test_nm_mask(data):
    m = data.draw(st.integers(2, 17))
    n = data.draw(st.integers(0, m))
    w = data.draw(matrices(columns=st.integers(0, 20).map(lambda groups: groups * m)))
    (truth, expected), (found, changed) = answers(lambda x: ops.nm_mask(x, n, m, apply=True), w)
    assert found == truth if isinstance(truth, str) or isinstance(found, str) else torch.equal(found, truth)
    same(changed[0], expected[0], 0, 0)


@fuzz
@given(matrices(special=st.sampled_from([None, torch.nan, torch.inf])), st.data())
def test_gram_and_moments(x, data):
    mask = data.draw(st.sampled_from([None, torch.rand(x.shape[0]) > 0.4]))
    precision = data.draw(st.sampled_from(["float32", "bfloat16"]))
    c = x.shape[1]

    def call(view):
        gram, sums, count = torch.zeros(c, c), torch.zeros(c), torch.tensor(0)
        ops.gram_update(gram, view, sums=sums, count=count, mask=mask, precision=precision)
        return gram, sums, count, *ops.column_moments(view, mask=mask)

    (truth, _), (found, _) = answers(call, x)
    broken = ~x.isfinite().all()
    for a, b in zip(found, truth):
        if broken:  # inf − inf: which of NaN and inf appears depends on the order of the sum, being finite does not
            assert torch.equal(a.isfinite(), b.isfinite())
        else:
            same(a, b, 1e-4, 2e-3)


@fuzz
@given(st.integers(1, 40), st.integers(1, 150), st.data())
def test_obs_sweep(rows, b, data):
    finite = st.sampled_from([None, None, None, torch.nan, torch.inf, -0.0])
    w = data.draw(matrices(st.just(rows), st.just(b), st.just(torch.float32), finite))
    x = torch.randn(2 * b + 3, b, generator=torch.Generator().manual_seed(b))
    r = torch.linalg.cholesky(torch.linalg.inv((x.T @ x / len(x) + 0.1 * torch.eye(b)).double()), upper=True).float()
    r = data.draw(st.sampled_from([r, r, torch.cat([r, r], 1)[:, :b], torch.zeros(b, b)]))
    choice = data.draw(
        st.sampled_from(
            [{"k": rows * b // 2}, {"nm": (1, 2)}, {"nm": (2, 4)}, {"nm": (3, 7)}, {"mask": torch.rand(rows, b) > 0.5}]
        )
    )
    (truth, expected), (found, changed) = answers(lambda v: ops.obs_sweep(v, r, **choice), w)
    if isinstance(truth, str) or isinstance(found, str):
        assert isinstance(truth, str)
        assert isinstance(found, str)
    elif torch.equal(found[0], truth[0]):  # rounding may flip a near-tie
        same(changed[0], expected[0], 1e-3, 2e-3)
        same(found[1], truth[1], 1e-3, 2e-3)
    else:
        assert "mask" not in choice
        assert (found[0] == truth[0]).float().mean() > 0.9
        assert float(found[2].sum()) == pytest.approx(float(truth[2].sum()), rel=0.05)


@fuzz
@given(st.integers(0, 20), st.integers(0, 40), st.integers(0, 20), specials, st.booleans())
def test_cholesky(batch, n, k, special, damped):
    x = torch.randn(batch, n, 2 * n + 1, generator=torch.Generator().manual_seed(n))
    a, b = x @ x.mT / (2 * n + 1) + 0.1 * torch.eye(n), torch.ones(batch, n, k)
    if special is not None and a.numel():
        a[batch // 2, n // 2, n // 2] = special
    damping = torch.full((batch,), 0.5) if damped else None
    (truth, _), (found, _) = answers(
        lambda u, v: (*ops.cholesky(u, damping=damping), *ops.cholesky_solve(u, v, damping=damping)), a, b
    )
    if special == torch.inf and a.numel():  # an infinite pivot passes LAPACK's test and ours; nothing after it is told
        ours = torch.arange(batch) != batch // 2
        truth, found = [t[ours] for t in truth], [t[ours] for t in found]
    for a_, b_ in zip(found, truth):
        same(a_, b_, 1e-3, 1e-3)


@fuzz
@given(matrices(dtype=st.just(torch.float32)), st.integers(0, 70))
def test_linear_and_trailing_update(w, outputs):
    x = torch.randn(outputs, w.shape[1])
    (truth, _), (found, _) = answers(lambda v: ops.linear(v, x), w)
    if w.isfinite().all():
        same(found, truth, 1e-4, 1e-3)
    if w.stride(1) == 1 and w.isfinite().all():
        e, r = torch.randn(w.shape[0], 9), torch.randn(9, w.shape[1])
        (_, expected), (_, changed) = answers(lambda v: ops.trailing_update(v, e, r), w)
        same(changed[0], expected[0], 1e-4, 1e-3)


@fuzz
@given(
    st.integers(0, 3),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_24(row_blocks, column_blocks, valid, dtype, seed):
    w = torch.randn(32 * row_blocks, 32 * column_blocks, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w[torch.rand(w.shape) > 0.7] = 0
    if valid:
        w = w * ops.nm_mask(w, 2, 4)
    (truth, _), (found, _) = answers(ops.compress_24, w)
    if isinstance(truth, str) or isinstance(found, str):
        assert found == truth
        return
    assert all(torch.equal(a, b) for a, b in zip(found, truth))
    assert torch.equal(ops.expand_24(*found), w)
    with ops.backend("cpu"):
        try:  # any bits at all as metadata
            ops.expand_24(found[0], torch.randint(-(2**15), 2**15, found[1].shape, dtype=torch.int16))
        except ValueError as error:
            assert "names one place twice" in str(error)


@fuzz
@given(matrices(), st.integers(0, 21), st.floats(0, 1), st.booleans(), st.data())
def test_sparse_linear(w, tokens, share, biased, data):
    """The packed tensors lie at the end of their memory, so that the sanitizer sees a read behind them."""
    w = w.masked_fill(torch.rand(w.shape) < share, 0)
    packed = pack_bitmask(w)
    assert torch.equal(unpack_bitmask(packed).nan_to_num(nan=7), w.nan_to_num(nan=7))
    x = data.draw(matrices(st.just(tokens), st.just(w.shape[1]), st.just(w.dtype), st.just(None)))
    bias = torch.randn(w.shape[0]).to(w.dtype) if biased else None
    (truth, _), (found, _) = answers(lambda v: ops.sparse_linear(v, packed, bias), x)
    finite = truth.isfinite()
    if w.isfinite().all():
        size = x.float().abs() @ w.float().abs().T + (bias.float().abs() if biased else 0)
        rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[w.dtype]
        assert ((found.float() - truth.float()).abs() <= rounding * size + 1e-6)[finite].all()
    else:
        assert torch.equal(found.isfinite(), finite)
    damaged = packed.offsets.clone()
    damaged[data.draw(st.integers(0, w.shape[0]))] += data.draw(st.sampled_from([-1, 1, 2**40]))
    with pytest.raises(DamagedWeight):
        ops.sparse_linear(x, Packed(packed.mask, packed.values, damaged, packed.columns))


@fuzz
@given(st.data())
def test_attention(data):
    """q may hold a NaN or an infinity, which stays in its row; no row of a boolean mask is empty by chance alone."""
    draw, few = data.draw, st.integers(1, 5)
    batch, groups, times = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(few)
    queries, keys, width, value_width = draw(sizes), draw(sizes), draw(few) * draw(few), draw(few) * draw(few)
    queries, keys, dtype = max(1, queries), max(1, keys), draw(dtypes)
    exact = draw(specials) if dtype == torch.float32 else None
    q = draw(matrices(st.just(batch * queries), st.just(groups * times * width), st.just(dtype), st.just(exact)))
    k = draw(matrices(st.just(batch * keys), st.just(groups * width), st.just(dtype), st.just(None)))
    v = draw(matrices(st.just(batch * keys), st.just(groups * value_width), st.just(dtype), st.just(None)))
    kind = draw(st.sampled_from(["none", "causal", "bool", "added"]))
    mask = {"bool": torch.rand(batch, 1, queries, keys) > 0.5, "added": torch.randn(queries, keys).to(dtype)}.get(kind)

    def call(q, k, v):
        split = (x.unflatten(0, (batch, -1)).unflatten(2, (-1, d)).transpose(1, 2) for x, d in zip((q, k, v), widths))
        return ops.attention(*split, mask=mask, causal=kind == "causal")

    widths = (width, width, value_width)
    (truth, _), (found, _) = answers(call, q, k, v)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    seen = torch.ones(truth.shape[:3], dtype=torch.bool) if kind != "bool" else mask.any(-1).expand(truth.shape[:3])
    same(found[seen], truth[seen], rtol, rtol)
    assert not found[~seen].any()
