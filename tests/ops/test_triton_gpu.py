"""The Triton back-end on a GPU, through ops, at real sizes, against float64 and the reference.

What the interpreter cannot show: races, tensor core rounding, layouts. Every ``torch.empty`` is filled with NaN or the
largest integer, so an unwritten output is seen. Skipped without a GPU; benchmarks/GPU_QUEUE.md has the command.
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from pyprune.ops.packed import pack_bitmask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    faults = importlib.import_module("pyprune.triton_kernels.faults")
    monkeypatch.delenv("PYPRUNE_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    faults.check()
    with ops.backend("triton"):
        yield faults
    torch.use_deterministic_algorithms(False)
    faults.check()  # the test met no bad data that it did not mean to


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, c", [(1, 1), (513, 63), (4096, 768), (40000, 128), (20000, 1000), (18000, 4096)])
@pytest.mark.parametrize("masked", [False, True])
def test_gram(tokens, c, dtype, masked):
    x = rand(tokens, c, dtype=dtype)
    mask = rand(tokens, seed=1) > 0.3 if masked else None
    if masked:
        x[~mask] = float("nan")
    gram, sums, count = rand(c, c).tril(), rand(c), torch.tensor(7, device="cuda")
    gram = gram + gram.tril(-1).T
    kept = (x[mask] if masked else x).double()
    want = gram.double() + kept.T @ kept
    want_sums = sums.double() + kept.sum(0)
    ops.gram_update(gram, x, sums=sums, count=count, mask=mask)
    assert relative(gram, want) < (1e-5 if dtype == torch.float32 else 3e-5)
    assert torch.equal(gram, gram.T)
    assert torch.allclose(sums.double(), want_sums, rtol=1e-4, atol=1e-4 * tokens**0.5)
    assert count.item() == 7 + len(kept)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("tokens, c", [(1, 520), (513, 1000), (3000, 4096), (20000, 1288), (18000, 11008)])
def test_gram_by_persistent_programs(tokens, c, dtype):
    module = importlib.import_module("pyprune.triton_kernels.gram_persistent")
    tuning = importlib.import_module("pyprune.triton_kernels.tuning")
    x = rand(tokens, c, dtype=dtype)
    want = x.double().T @ x.double()
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for cfg in tuning.usable(module.configs(x, None), shared):
        results = []
        for _ in range(2):
            gram, sums, count = torch.zeros(c, c, device="cuda"), torch.zeros(c, device="cuda"), torch.tensor(0).cuda()
            module.launch_gram(cfg, gram, x, sums, count)
            results.append(gram)
        assert relative(gram, want) < 3e-5 and torch.equal(gram, gram.T) and torch.equal(*results)
        assert torch.allclose(sums.double(), x.double().sum(0), rtol=1e-4, atol=1e-4 * tokens**0.5)
        assert count.item() == tokens


def test_gram_is_bitwise_repeatable():
    x = rand(30000, 384, dtype=torch.bfloat16)
    results = []
    for _ in range(5):
        gram = torch.zeros(384, 384, device="cuda")
        ops.gram_update(gram, x)
        results.append(gram)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, cy, cx", [(100, 33, 70), (20000, 768, 3072), (9000, 4096, 1000)])
def test_cross_gram(tokens, cy, cx, dtype):
    y, x, cross = rand(tokens, cy, dtype=dtype), rand(tokens, cx, seed=1, dtype=dtype), rand(cy, cx)
    want = cross.double() + y.double().T @ x.double()
    ops.cross_gram_update(cross, y, x)
    assert relative(cross, want) < 3e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, c", [(1, 3), (3001, 1000), (50000, 768)])
def test_column_moments(tokens, c, dtype):
    x = (rand(tokens, c) + 10).to(dtype)
    count, mean, m2 = ops.column_moments(x)
    assert count.item() == tokens
    assert torch.allclose(mean.double(), x.double().mean(0), rtol=1e-5)
    assert torch.allclose(m2.double(), (x.double() - x.double().mean(0)).square().sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("rows, c", [(1, 1), (63, 1000), (300, 11008), (4096, 128), (7, 30000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_mask(rows, c, dtype, scope):
    w, scale = rand(rows, c, dtype=dtype), rand(c, seed=1).abs() + 0.1
    size = c if scope == "row" else rows * c
    for k in {0, size // 2, size}:
        pruned, expected = w.clone(), w.clone()
        keep = ops.select_mask(pruned, k, scale=scale, scope=scope, apply=True)
        assert torch.equal(keep, reference.select_mask(expected, k, scale=scale, scope=scope, apply=True))
        assert torch.equal(pruned, expected)


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 2), (7, 16), (1, 3), (5, 11)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nm_mask(n, m, dtype):
    for rows, groups, stride in ((1, 1, 1), (333, 97, 1), (1024, 512, 1), (64, 33, 2)):
        w = rand(rows, groups * m * stride, dtype=dtype)[:, ::stride]
        scale, expected = rand(groups * m, seed=1).abs(), w.clone()
        keep = ops.nm_mask(w, n, m, scale=scale, apply=True)
        assert torch.equal(keep, reference.nm_mask(expected, n, m, scale=scale, apply=True))
        assert torch.equal(w, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rows, c", [(32, 32), (96, 1056), (4096, 4096)])
def test_semi_structured_layout(rows, c, dtype):
    from pyprune.triton_kernels import nm_compress_24

    w = rand(rows, c, dtype=dtype)
    pruned = w.clone()
    want = reference.nm_mask(pruned, 2, 4, apply=True)
    want_values, want_meta = reference.compress_24(pruned)
    for values, meta in (ops.compress_24(pruned), nm_compress_24(w)[1:]):
        assert torch.equal(values, want_values) and torch.equal(meta, want_meta)
    assert torch.equal(nm_compress_24(w)[0], want)
    assert torch.equal(ops.expand_24(values, meta), pruned)


def factor_of_inverse(n):
    x = rand(4 * n + 8, n).double()
    h = x.T @ x / len(x) + 0.01 * torch.eye(n, dtype=torch.float64, device="cuda")
    return h, torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous()


@pytest.mark.parametrize("rows, b", [(1, 1), (63, 50), (513, 128), (4096, 128), (40, 300)])
@pytest.mark.parametrize("choice", ["mask", "k", "2:4", "1:5"])
def test_obs_sweep(rows, b, choice):
    if choice == "2:4" and b % 4 or choice == "1:5" and b % 5:
        pytest.skip("the group does not divide this width")
    h, r = factor_of_inverse(b)
    w = rand(rows, b, seed=3)
    options = {
        "mask": dict(mask=rand(rows, b, seed=4) > 0),
        "k": dict(k=rows * b // 2),
        "2:4": dict(nm=(2, 4)),
        "1:5": dict(nm=(1, 5)),
    }[choice]
    got, want = w.clone(), w.double()
    keep, error, loss = ops.obs_sweep(got, r.float(), **options)
    want_keep, want_error, want_loss = reference.obs_sweep(want, r, **options)
    assert (keep == want_keep).float().mean() >= 0.99
    assert not got[~keep].any()
    delta = (got - w).double()
    objective = ((delta @ h) * delta).sum()
    assert abs(objective - want_loss.sum()) <= 1e-3 * want_loss.sum() + 1e-12
    assert torch.allclose(loss.double().sum(), want_loss.sum(), rtol=1e-3, atol=1e-12)
    if choice == "mask":
        assert torch.allclose(got.double(), want, atol=1e-3) and torch.allclose(error.double(), want_error, atol=1e-3)


@pytest.mark.parametrize(
    "batch, n, k", [(3, 1, 1), (64, 64, 1), (16, 128, 300), (5, 250, 7), (2, 513, 40), (1, 2048, 64)]
)
def test_cholesky_and_solve(batch, n, k):
    x = rand(batch, 2 * n + 8, n)
    a, b, damping = x.mT @ x / (2 * n + 8), rand(batch, n, k, seed=1), torch.full((batch,), 0.01, device="cuda")
    matrix = a.double() + 0.01 * torch.eye(n, device="cuda", dtype=torch.float64)
    factor, info = ops.cholesky(a, damping=damping)
    assert not info.any() and torch.equal(factor, factor.tril())
    assert relative(factor @ factor.mT, matrix) < 2e-6
    solution, info = ops.cholesky_solve(a, b, damping=damping)
    assert not info.any()
    assert relative(matrix @ solution.double(), b.double()) < 1e-4
    assert relative(solution, torch.linalg.solve(matrix, b.double())) < 1e-3


@pytest.mark.parametrize("n", [40, 700])
def test_cholesky_reports_failures(n):
    x = rand(3, 2 * n, n)
    a = x.mT @ x / n
    a[1, 33, 33] = -1
    a[2, n - 1, n - 1] = float("nan")
    factor, info = ops.cholesky(a)
    solution, _ = ops.cholesky_solve(a, rand(3, n, 5))
    assert info.tolist() == [0, 34, n]
    assert torch.isfinite(factor[0]).all() and torch.isfinite(solution[0]).all()
    assert torch.isnan(solution[1:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r, c, d", [(5, 8, 3), (768, 3072, 1000), (4096, 11008, 2201)])
def test_liar_update(r, c, d, dtype):
    weight, order = rand(r, c, dtype=dtype), torch.randperm(c, generator=torch.Generator().manual_seed(0)).cuda()
    drop, keep = order[:d].sort().values, order[d:].sort().values
    q, bias, mean = rand(c - d, d, seed=1) / d**0.5, rand(r, seed=2), rand(c, seed=3)
    updated, new_bias = ops.liar_update(weight, keep, drop, q, bias=bias, mean=mean)
    w = weight.double()
    assert relative(updated, w[:, keep] + w[:, drop] @ q.double().T) < 1e-6
    shift = w[:, drop] @ (mean[drop].double() - q.double().T @ mean[keep].double())
    assert relative(new_bias, bias.double() + shift) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_between_the_products(dtype):
    """Rounded where the written-out form is: the same 16-bit numbers but for a few."""
    near = {torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    for rows, columns in ((3, 63), (5000, 128), (2000, 4096), (70, 16384)):
        x, weight = 5 * rand(rows, columns, dtype=dtype), rand(columns, seed=1, dtype=dtype)
        for form in ops.NORM_FORMS:
            want = reference.rms_norm(x, weight, 1e-6, form=form).double()
            assert relative(ops.rms_norm(x, weight, 1e-6, form=form), want) < near
        assert relative(ops.swiglu(x, x.flip(0)), reference.swiglu(x, x.flip(0)).double()) < near
    for heads, d in ((32, 128), (9, 64), (3, 80)):
        x = rand(2, 700, heads, d, dtype=dtype).transpose(1, 2)
        cos, sin = rand(1, 700, d, seed=1, dtype=dtype), rand(2, 700, d, seed=2, dtype=dtype)
        got = ops.rotary(x, cos, sin)
        assert got.stride() == x.stride() and relative(got, reference.rotary(x, cos, sin).double()) < near


def test_bad_data_is_reported_by_the_next_call(triton_backend):
    w = rand(64, 64)
    w[3, 5] = float("nan")
    before = w.clone()
    ops.select_mask(w, 32, scope="matrix", apply=True)
    with pytest.raises(ValueError, match="NaN"):
        triton_backend.check()
    assert torch.equal(w.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 1000), (4096, 4096), (5, 11008)])
def test_sparse_linear(rows, columns, dtype):
    w, bias = rand(rows, columns), rand(rows, dtype=dtype, seed=2)
    w[rand(rows, columns, seed=3) < 0] = 0
    w[0] = 0 if rows > 1 else 2
    w = w.to(dtype)
    packed = pack_bitmask(w)
    for tokens in (1, 2, 7, 16, 17, 300):
        x = rand(columns, tokens, dtype=dtype, seed=4).T  # strided
        for b in (None, bias):
            want = x.double() @ w.double().T + (0 if b is None else b.double())
            got = ops.sparse_linear(x, packed, b)
            assert relative(got, want) < {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_gpu():
    """Other than the current one, and on a stream of its own there."""
    w, x = rand(100, 64).to("cuda:1"), rand(500, 64).to("cuda:1")
    expected, gram = w.clone(), torch.zeros(64, 64, device="cuda:1")
    keep = reference.nm_mask(expected, 2, 4, apply=True)
    stream = torch.cuda.Stream("cuda:1")
    stream.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.device("cuda:1"), torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        w.mul_(1)
    with torch.cuda.stream(stream), torch.cuda.device("cuda:0"):
        assert torch.equal(ops.nm_mask(w, 2, 4, apply=True), keep) and torch.equal(w, expected)
        ops.gram_update(gram, x)
        assert relative(gram, x.double().T @ x.double()) < 1e-5
        assert torch.cuda.current_device() == 0


def test_tuning_is_kept_on_disk_and_changes_no_result(monkeypatch, tmp_path):
    monkeypatch.setenv("PYPRUNE_AUTOTUNE", "1")
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path))
    x = rand(5000, 600, dtype=torch.bfloat16)
    gram = torch.zeros(600, 600, device="cuda")
    ops.gram_update(gram, x)
    assert relative(gram, x.double().T @ x.double()) < 3e-5
    stored = json.loads((tmp_path / "kernels.json").read_text())
    assert len(stored) == 1 and "gram_update" in next(iter(stored))
