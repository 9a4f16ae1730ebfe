"""The CPU kernels against float64 and exact truth, on every instruction set this processor has."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pyprune import ops
from pyprune.ops import native, reference
from pyprune.ops.packed import pack_bitmask

LEVELS = native._C.cpu_levels() if native._C else []
pytestmark = pytest.mark.skipif(native._C is None, reason=str(native.unusable("cpu")))

SHAPES = [(1, 1), (7, 63), (64, 96), (33, 1000)]
# Relative Frobenius error of a sum of products against float64 of the same inputs.
STATISTICS_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    native._C.use_cpu_level(request.param)
    with ops.backend("cpu"):
        yield request.param
    native._C.use_cpu_level("")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative(value, truth):
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def factor(b, tokens=None):
    """A Hessian (float64) and its upper inverse factor (float32), from correlated inputs."""
    x = torch.randn(tokens or 3 * b + 5, b, dtype=torch.float64) @ (torch.eye(b) + 0.3 * torch.randn(b, b)).double()
    h = x.T @ x / len(x)
    h += 0.01 * h.diagonal().mean() * torch.eye(b)
    return h, torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("tokens, columns", [(0, 5), (1, 1), (513, 96), (700, 150)])
def test_gram(tokens, columns, dtype):
    x = (torch.randn(tokens, columns) + 2).to(dtype)
    keep = torch.rand(tokens) > 0.3
    for mask in (None, keep):
        rows = (x if mask is None else x[mask]).double()
        start = torch.randn(columns, columns)
        gram, sums, count = start + start.T, torch.ones(columns), torch.tensor(3)
        truth = gram.double() + rows.T @ rows
        ops.gram_update(gram, x, sums=sums, count=count, mask=mask)
        assert relative(gram, truth) < STATISTICS_TOLERANCE[dtype]
        assert torch.equal(gram, gram.T)
        assert count == 3 + len(rows)
        torch.testing.assert_close(sums.double(), 1 + rows.sum(0), rtol=1e-5, atol=1e-4)


def test_gram_is_positive_semi_definite_and_batches_do_not_matter():
    x = torch.randn(2000, 90)
    whole, parts = torch.zeros(90, 90), torch.zeros(90, 90)
    ops.gram_update(whole, x)
    for part in x.split([1, 700, 299, 1000]):
        ops.gram_update(parts, part)
    assert torch.linalg.eigvalsh(whole.double()).min() > 0
    assert relative(parts, whole.double()) < 1e-6


def test_gram_in_bfloat16_is_the_gram_of_rounded_inputs():
    x = torch.randn(1000, 70)
    gram = torch.zeros(70, 70)
    ops.gram_update(gram, x, precision="bfloat16")
    rounded = x.bfloat16().double()
    assert relative(gram, rounded.T @ rounded) < 2e-6


@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_cross_gram(dtype):
    y, x = torch.randn(600, 37).to(dtype), torch.randn(600, 101).to(dtype)
    mask = torch.rand(600) > 0.5
    cross = torch.ones(37, 101)
    ops.cross_gram_update(cross, y, x, mask=mask)
    assert relative(cross, 1 + y[mask].double().T @ x[mask].double()) < STATISTICS_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("tokens, columns", [(1, 1), (1000, 63), (300, 130)])
def test_column_moments_survive_a_large_mean(tokens, columns, dtype):
    x = (torch.randn(tokens, columns) + 500).to(dtype)
    count, mean, m2 = ops.column_moments(x)
    truth = x.double()
    assert count == tokens
    torch.testing.assert_close(mean.double(), truth.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double(), (truth - truth.mean(0)).square().sum(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_select_mask_is_exact(rows, columns, scope, dtype):
    w, scale = torch.randn(rows, columns).to(dtype), torch.rand(columns)
    size = columns if scope == "row" else rows * columns
    for k in sorted({0, 1, size // 3, size // 2, size - 1, size}):
        for s in (None, scale):
            pruned = w.clone()
            keep = ops.select_mask(pruned, k, scale=s, scope=scope, apply=True)
            assert torch.equal(keep, reference.select_mask(w, k, scale=s, scope=scope))
            assert torch.equal(pruned, w.masked_fill(~keep, 0))


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_ties_zeros_and_infinities(scope):
    w = torch.tensor([[0.0, -0.0, 1.0, -1.0, torch.inf, 1.0, 0.0], [2.0, -2.0, 2.0, -0.0, -torch.inf, 1e-45, 3.0]])
    for k in range(w.shape[1] + 1):
        keep = ops.select_mask(w, k, scope=scope)
        assert torch.equal(keep, reference.select_mask(w, k, scope=scope))
    equal = torch.ones(50, 33)
    keep = ops.select_mask(equal, 500, scope="matrix").flatten()
    assert not keep[:500].any()
    assert keep[500:].all()


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 8), (8, 16), (1, 3), (5, 12)])
def test_nm_mask_is_exact(n, m, dtype):
    for rows, columns in ((1, m), (9, 16 * m), (5, 7 * m)):
        w, scale = torch.randn(rows, columns).to(dtype), torch.rand(columns)
        for s in (None, scale):
            pruned = w.clone()
            keep = ops.nm_mask(pruned, n, m, scale=s, apply=True)
            assert torch.equal(keep, reference.nm_mask(w, n, m, scale=s))
            assert (keep.view(rows, -1, m).sum(-1) == n).all()
            assert torch.equal(pruned, w.masked_fill(~keep, 0))
            assert not torch.signbit(pruned[~keep]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_24_round_trip(dtype):
    w = torch.randn(64, 160).to(dtype)
    ops.nm_mask(w, 2, 4, apply=True)
    w[0, :8] = 0
    w[1, :3] = 0
    values, meta = ops.compress_24(w)
    truth_values, truth_meta = reference.compress_24(w)
    assert torch.equal(values, truth_values)
    assert torch.equal(meta, truth_meta)
    assert torch.equal(ops.expand_24(values, meta), w)


def sweep_in_float64(w, r, keep, nm):
    """Algorithm 1 of SparseGPT, one column and one row group at a time."""
    w, r, keep = w.double().clone(), r.double(), keep.clone()
    for j in range(w.shape[1]):
        if nm and j % nm[1] == 0:
            score = w[:, j : j + nm[1]].abs() / r.diagonal()[j : j + nm[1]]
            keep[:, j : j + nm[1]] = score.argsort(1).argsort(1) >= nm[1] - nm[0]
        error = w[:, j] * ~keep[:, j] / r[j, j]
        w[:, j:] -= error[:, None] * r[j, j:]
    return w * keep, keep


@pytest.mark.parametrize("rows, b", [(1, 1), (5, 8), (33, 64), (63, 128), (17, 1000)])
@pytest.mark.parametrize("choice", ["mask", "k", "2:4", "1:2", "3:5"])
def test_obs_sweep(rows, b, choice):
    nm = tuple(map(int, choice.split(":"))) if ":" in choice else None
    if nm and b % nm[1]:
        b = (b // nm[1] + 1) * nm[1]
    h, r = factor(b)
    w = torch.randn(rows, b)
    mask = torch.rand(rows, b) > 0.5
    if choice == "k":
        mask = reference.select_mask(w, rows * b // 2, scale=1 / r.diagonal(), scope="matrix")
    arguments = {"nm": nm} if nm else {"k": rows * b // 2} if choice == "k" else {"mask": mask}
    swept = w.clone()
    keep, error, loss = ops.obs_sweep(swept, r, **arguments)
    truth, truth_keep = sweep_in_float64(w, r, mask, nm)

    def objective(solution):
        change = solution.double() - w.double()
        return float(((change @ h) * change).sum())

    assert (swept[~keep] == 0).all()
    assert (keep == truth_keep).double().mean() >= 0.99
    assert objective(swept) == pytest.approx(objective(truth), rel=1e-3, abs=1e-9)
    assert float(loss.double().sum()) == pytest.approx(objective(swept), rel=2e-3, abs=1e-9)
    torch.testing.assert_close(loss, error.square().sum(1), rtol=1e-4, atol=1e-7)
    if torch.equal(keep, truth_keep):
        assert relative(swept, truth) < 1e-4 or not truth.any()


def test_trailing_update_leaves_its_neighbours():
    matrix, e, r = torch.randn(50, 130), torch.randn(50, 33), torch.randn(33, 100)
    truth = matrix.double()
    truth[:, 30:] -= e.double() @ r.double()
    before = matrix[:, :30].clone()
    ops.trailing_update(matrix[:, 30:], e, r)
    assert torch.equal(matrix[:, :30], before)
    assert relative(matrix, truth) < 1e-6


@pytest.mark.parametrize("batch, n, k", [(1, 1, 1), (5, 7, 3), (40, 64, 64), (17, 33, 20), (2, 128, 1), (2, 150, 2)])
def test_cholesky_and_solve(batch, n, k):
    x = torch.randn(batch, n, 2 * n + 3)
    a, b, damping = x @ x.mT / n, torch.randn(batch, n, k), torch.rand(batch) + 0.1
    damped = a.double() + damping.double()[:, None, None] * torch.eye(n)
    lower, info = ops.cholesky(a, damping=damping)
    solution, _ = ops.cholesky_solve(a, b, damping=damping)
    assert not info.any()
    assert torch.equal(lower, lower.tril())
    assert relative(lower.double() @ lower.double().mT, damped) < 1e-5
    assert relative(damped @ solution.double(), b.double()) < 1e-4
    torch.testing.assert_close(solution.double(), torch.linalg.solve(damped, b.double()), rtol=5e-3, atol=1e-4)


def test_cholesky_reports_the_failing_minor_and_only_that_system():
    a = torch.eye(20).repeat(9, 1, 1)
    a[3, 6, 6] = -1
    a[5, 0, 0] = torch.nan
    lower, info = ops.cholesky(a)
    assert info.tolist() == [0, 0, 0, 7, 0, 1, 0, 0, 0]
    x, _ = ops.cholesky_solve(a, torch.ones(9, 20, 2))
    failed = info != 0
    assert lower[failed].tril().isnan().sum() == 2 * 210
    assert x[failed].isnan().all()
    assert (x[~failed] == 1).all()


@pytest.mark.parametrize("rows, inputs, outputs", [(1, 5, 3), (64, 1, 1), (100, 333, 77), (130, 700, 48), (2, 0, 5)])
def test_linear(rows, inputs, outputs):
    x, w, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for b in (bias, None):
        truth = x.double() @ w.double().T + (0 if b is None else b.double())
        value = ops.linear(x, w, b)
        assert value.shape == (rows, outputs)
        assert relative(value, truth) < 1e-6


def with_zeros(rows, columns, dtype, share):
    w = torch.randn(rows, columns).to(dtype)
    w[torch.rand(rows, columns) < share] = 0
    if rows > 5:
        w[2], w[4] = 0, 3
    return w


# The unit roundoff of 16-bit results, 2^-8 and 2^-11; float32 sums of up to 1000 terms that cancel in part.
PRODUCT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 63), (33, 1000), (130, 64), (0, 5), (4, 0), (67, 129)])
def test_sparse_linear(rows, columns, dtype):
    for share in (0.0, 0.5, 0.9, 1.0):
        w = with_zeros(rows, columns, dtype, share)
        packed, bias = pack_bitmask(w), torch.randn(rows).to(dtype)
        for tokens in (0, 1, 2, 3, 5, 8, 9, 16, 17, 40):
            x = torch.randn(tokens, columns + 3).to(dtype)[:, 1 : columns + 1]  # rows apart, not aligned
            for b in (None, bias):
                with poisoned():
                    value = ops.sparse_linear(x, packed, b)
                truth = x.double() @ w.double().T + (0 if b is None else b.double())
                assert value.shape == (tokens, rows)
                assert value.dtype == dtype
                assert relative(value, truth) < PRODUCT_TOLERANCE[dtype]


@contextlib.contextmanager
def poisoned():
    """New memory is NaN, so that what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_sparse_linear_by_parts_is_the_product_of_the_expanded_weight(dtype, monkeypatch):
    """Every weight comes out in its place and to the bit: x is the identity."""
    monkeypatch.setattr(native, "EXPANDED", 0)  # parts of 64 rows
    w = with_zeros(150, 83, dtype, 0.6)
    assert torch.equal(ops.sparse_linear(torch.eye(83, dtype=dtype), pack_bitmask(w)).T, w)
    assert torch.equal(
        torch.cat([ops.sparse_linear(row, pack_bitmask(w)) for row in torch.eye(83).to(dtype).split(7)]).T, w
    )


def test_sparse_linear_rounds_halves_to_nearest_even_and_keeps_what_is_not_finite():
    one, two = torch.ones(1, 1).half(), torch.ones(1, 2).half()
    x = torch.tensor([2049.0, 65504.0, 6e-8, 1.5 * 2.0**-24, -torch.inf, torch.nan]).half().view(-1, 1)
    torch.testing.assert_close(ops.sparse_linear(x, pack_bitmask(one)), x, rtol=0, atol=0, equal_nan=True)
    sums = [(2048, 1, 2048), (2050, 1, 2052), (65504, 15, 65504), (65504, 16, torch.inf), (-65504, -16, -torch.inf)]
    for a, b, want in sums:
        assert ops.sparse_linear(torch.tensor([[a, b]]).half(), pack_bitmask(two)).item() == want
    tiny, parts = torch.full((1, 3), 2.0**-24).half(), torch.tensor([[0.5, 0, 0], [0.75, 0.75, 0], [1, 1, 1]]).half()
    assert ops.sparse_linear(tiny, pack_bitmask(parts)).tolist() == [[0.0, 2.0**-23, 3 * 2.0**-24]]


# Float32 sums; of 16-bit types the rounding of probabilities and of the result.
ATTENTION_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def projections(batch, heads, groups, queries, keys, width, value_width, dtype=torch.float32):
    """Tokens before heads in memory, and rows apart."""
    sizes = [(queries, heads, width), (keys, groups, width), (keys, groups, value_width)]
    wide = [torch.randn(batch, tokens, count, d + 3).to(dtype) for tokens, count, d in sizes]
    return [x[..., 1 : d + 1].transpose(1, 2) for x, (_, _, d) in zip(wide, sizes)]


def attention_in_float64(q, k, v, mask=None, causal=False, scale=None):
    q, k, v = (x.double().contiguous() for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(repeats, 1)


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize(
    "batch, heads, groups, queries, keys, width, value_width",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (2, 6, 2, 37, 37, 24, 24),
        (1, 9, 3, 100, 100, 64, 64),
        (2, 4, 4, 33, 65, 33, 17),
        (1, 30, 1, 7, 50, 80, 96),
        (1, 2, 1, 600, 1100, 16, 128),
        (3, 2, 2, 5, 530, 7, 40),
    ],
)
def test_attention(batch, heads, groups, queries, keys, width, value_width, dtype):
    q, k, v = projections(batch, heads, groups, queries, keys, width, value_width, dtype)
    shown = torch.rand(batch, 1, queries, keys) > 0.4
    shown[:, :, 0] = False  # a row that sees nothing
    added = torch.randn(heads, queries, keys).to(dtype) * 3
    for options in [
        {},
        {"causal": True, "scale": 0.3},
        {"mask": shown},
        {"mask": shown[:, :, -1:]},
        {"mask": added},
        {"mask": added[:1, :, :1]},
    ]:
        with poisoned():
            value = ops.attention(q, k, v, **options)
        assert value.shape == (batch, heads, queries, value_width)
        assert value.dtype == dtype
        assert relative(value, attention_in_float64(q, k, v, **options)) < ATTENTION_TOLERANCE[dtype]


def test_attention_knows_the_exponential():
    """One query per score x on two keys of scores x and 0: the first value is the logistic function of x."""
    x = torch.cat([torch.linspace(-86, 20, 5001), torch.tensor([-200.0, -1e4, 0.0])])
    q, k = x.view(1, 1, -1, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    value = ops.attention(q, k, torch.eye(2)[None, None], scale=1.0)[0, 0].double()
    for column, truth in enumerate((x.double().sigmoid(), (-x.double()).sigmoid())):
        rounding = 2**-24 * x.double().abs().clamp(max=88)  # of x · log₂ e
        assert ((value[:, column] - truth).abs() <= (3e-7 + 2 * rounding) * truth + 1e-37).all()


def test_attention_of_what_is_not_finite_stays_in_its_row():
    q, k, v = projections(1, 2, 1, 70, 70, 16, 16)
    clean = ops.attention(q, k, v, causal=True)
    q[0, 1, 40], q[0, 0, 3, 2] = torch.nan, torch.inf
    value = ops.attention(q, k, v, causal=True)
    hurt = torch.zeros(1, 2, 70, dtype=torch.bool)
    hurt[0, 1, 40] = hurt[0, 0, 3] = True
    assert value[hurt].isnan().all()
    assert torch.equal(value[~hurt], clean[~hurt])


def test_attention_at_large_scores_is_as_exact_as_at_small_ones():
    """A running maximum across spans: the largest score comes last, first, and in the middle."""
    q, k, v = projections(1, 1, 1, 20, 1400, 32, 32)
    for place in (0, 700, 1399):
        k[0, 0, place] = 12 * q[0, 0, 4]
        assert relative(ops.attention(q, k, v), attention_in_float64(q, k, v)) < 3e-6


def test_liar_update_is_the_formula():
    w, mean, bias = torch.randn(50, 90), torch.randn(90), torch.randn(50)
    order = torch.randperm(90)
    keep, drop, q = order[:60].sort().values, order[60:].sort().values, torch.randn(60, 30)
    updated, shifted = ops.liar_update(w, keep, drop, q, bias=bias, mean=mean)
    wd = w.double()
    assert relative(updated, wd[:, keep] + wd[:, drop] @ q.double().T) < 1e-6
    truth = bias.double() + wd[:, drop] @ (mean.double()[drop] - q.double().T @ mean.double()[keep])
    assert relative(shifted, truth) < 1e-5


def test_repeated_runs_and_thread_counts_give_the_same_bits():
    x, w = torch.randn(3000, 150), torch.randn(100, 96)
    _, r = factor(96)

    def everything():
        gram, swept = torch.zeros(150, 150), w.clone()
        ops.gram_update(gram, x)
        sparse = [ops.sparse_linear(x[:tokens, :96], pack_bitmask(swept)) for tokens in (1, 11, 3000)]
        heads = x[:2000, :96].view(2, 1000, 6, 16).transpose(1, 2)
        mixed = ops.attention(heads, heads[:, :2], heads[:, 2:4], causal=True)
        swept_parts = ops.obs_sweep(swept, r, k=4000)
        return gram, *ops.column_moments(x), *swept_parts, swept, ops.linear(x, x[:96]), mixed, *sparse

    threads = torch.get_num_threads()
    try:
        first = everything()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, everything()))
    finally:
        torch.set_num_threads(threads)


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match="sse9 is not one of this processor's"):
        native._C.use_cpu_level("sse9")


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("columns", [1, 63, 64, 1000])
def test_between_products(columns, dtype):
    """Rounded where the written-out forms of RMSNorm, gate and rotary embedding are: the same 16-bit numbers."""

    def agree(got, want):
        assert got.dtype == want.dtype and got.shape == want.shape
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-37)
        else:
            assert (got != want).float().mean() < 0.005
            torch.testing.assert_close(got, want, rtol=0.01, atol=1e-5)

    sizes = torch.logspace(-3, 2, 33)[:, None]
    x, weight = (torch.randn(33, columns) * sizes).to(dtype), torch.randn(columns).to(dtype)
    for form in ops.NORM_FORMS:
        agree(
            ops.rms_norm(x[:, None], weight, 1e-5, form=form), reference.rms_norm(x[:, None], weight, 1e-5, form=form)
        )
    up = torch.randn(columns, 33).to(dtype).T
    agree(ops.swiglu(x, up), reference.swiglu(x, up))
    heads = torch.randn(2, 5, 3, 2 * columns).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(1, 5, 2 * columns).to(dtype), torch.randn(2, 5, 2 * columns).to(dtype)
    got, want = ops.rotary(heads, cos, sin), reference.rotary(heads, cos, sin)
    assert got.stride() == want.stride() and torch.allclose(got.float(), want.float(), atol=1e-6)


def test_the_gate_at_its_limits():
    gate = torch.tensor([0.0, -0.0, torch.inf, -1e30, 1e30, -87.0, -100.0, 88.8, torch.nan])
    got, want = ops.swiglu(gate, torch.ones(9)), reference.swiglu(gate, torch.ones(9))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-36, equal_nan=True)
