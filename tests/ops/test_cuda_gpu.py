"""The CUDA back-end on a GPU, through ops, against the reference and float64.

Skipped without a GPU or a build with CUDA kernels; benchmarks/GPU_QUEUE.md has the command, also under
compute-sanitizer. Every ``torch.empty`` is filled with NaN or the largest integer, so an unwritten output is seen.
"""

from __future__ import annotations

import pytest
import torch

from pyprune import ops
from pyprune.ops import native, reference
from pyprune.ops.packed import pack_bitmask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(native.unusable("cuda") is not None, reason=str(native.unusable("cuda"))),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def cuda_backend(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    native.check_cuda()
    with ops.backend("cuda"):
        yield
    torch.use_deterministic_algorithms(False)
    native.check_cuda()  # the test met no bad data that it did not mean to


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def factor_of_inverse(n, seed=0):
    x = rand(4 * n + 8, n, seed=seed).double()
    h = x.T @ x / len(x) + 0.01 * torch.eye(n, dtype=torch.float64, device="cuda")
    return h, torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("shape", [(1, 1), (63, 1000), (300, 4096), (5, 28672), (4096, 128)], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.93, 1.0])
def test_select_mask(dtype, scope, shape, fraction):
    for seed, scaled in enumerate([False, True]):  # 16-bit weights without a scale are full of ties
        w, scale = rand(*shape, seed=seed, dtype=dtype), rand(shape[1], seed=9).abs() if scaled else None
        k = int(fraction * (shape[1] if scope == "row" else w.numel()))
        expected = w.clone()
        keep = reference.select_mask(expected, k, scale=scale, scope=scope, apply=True)
        assert torch.equal(ops.select_mask(w, k, scale=scale, scope=scope), keep)
        assert torch.equal(ops.select_mask(w, k, scale=scale, scope=scope, apply=True), keep)
        assert torch.equal(w, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 8), (3, 8), (8, 16), (2, 5), (7, 12)])
def test_nm_mask(dtype, n, m):
    for columns in (m, 17 * m, 64 * m):
        whole = rand(513, columns + 3, seed=columns, dtype=dtype)
        for w in (whole[:, :columns], whole[:, 3:], rand(columns, 100, dtype=dtype).T):
            scale, expected = rand(columns, seed=2).abs(), w.clone()
            keep = reference.nm_mask(expected, n, m, scale=scale, apply=True)
            assert torch.equal(ops.nm_mask(w, n, m, scale=scale, apply=True), keep)
            assert torch.equal(w, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 1000), (4096, 4096), (5, 11008)])
def test_sparse_linear(dtype, rows, columns):
    w, bias = rand(rows, columns, dtype=dtype), rand(rows, dtype=dtype, seed=2)
    w[rand(rows, columns, seed=3) < 0.2] = 0
    packed = pack_bitmask(w)
    for tokens in (1, 2, 7, 8, 13, 16, 17, 300):
        x = rand(tokens, columns, dtype=dtype, seed=4)
        want = x.double() @ w.double().T + bias.double()
        error = (ops.sparse_linear(x, packed, bias).double() - want).norm() / want.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (4096, 11008), (96, 320)], ids=str)
def test_compress_24_multiplies_as_it_is(dtype, shape):
    w = rand(*shape, dtype=dtype)
    ops.nm_mask(w, 2, 4, apply=True)
    values, meta = ops.compress_24(w)
    expected = reference.compress_24(w)
    assert torch.equal(values, expected[0]) and torch.equal(meta, expected[1])
    assert torch.equal(ops.expand_24(values, meta), w)
    if torch.cuda.get_device_capability()[0] == 8 and min(shape) >= 64:  # CUTLASS's kernels are for 8.x
        x = rand(shape[1], 64, dtype=dtype, seed=3)
        product = torch._sparse_semi_structured_mm(values, meta, x)
        torch.testing.assert_close(product, w @ x, rtol=2e-2, atol=2e-1)


CHOICES = {"mask": None, "k": None, "2:4": (2, 4), "4:8": (4, 8), "3:5": (3, 5), "1:16": (1, 16)}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("rows, columns", [(1, 80), (63, 80), (1000, 128), (4096, 128), (100, 560)], ids=str)
def test_obs_sweep(choice, rows, columns):
    if choice == "3:5" and columns % 5 or choice == "1:16" and columns % 16:
        pytest.skip(f"{choice} does not divide {columns} columns")
    h, r = factor_of_inverse(columns)
    start = rand(rows, columns + 4, seed=1)
    given = (
        {"mask": rand(columns, rows, seed=2).T > 0}
        if choice == "mask"
        else {"k": rows * columns // 2}
        if choice == "k"
        else {"nm": CHOICES[choice]}
    )
    w, exact = start.clone()[:, :columns], start[:, :columns].double().clone()
    keep, error, loss = ops.obs_sweep(w, r.float(), **given)
    expected = reference.obs_sweep(exact, r, **given)
    assert (keep == expected[0]).float().mean() >= 0.99
    assert (w[~keep] == 0).all()
    if "mask" not in given:
        kept = rows * columns - given["k"] if choice == "k" else rows * columns * given["nm"][0] // given["nm"][1]
        assert keep.sum() == kept

    def objective(new):
        delta = new.double() - start[:, :columns]
        return ((delta @ h) * delta).sum()

    torch.testing.assert_close(objective(w), objective(exact), rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, error.square().sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.double().sum(), expected[2].sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "batch, n, k",
    [(1, 1, 1), (300, 64, 1), (64, 128, 64), (5, 129, 33), (16, 512, 8), (2, 1024, 100), (1, 2500, 7)],
    ids=str,
)
def test_cholesky_and_solve(batch, n, k):
    x, b, damping = rand(batch, 2 * n, n), rand(batch, n, k, seed=1), rand(batch, seed=2).abs() + 0.01
    a = x.mT @ x / (2 * n)
    damped = a.double() + damping.double()[:, None, None] * torch.eye(n, device="cuda", dtype=torch.float64)
    factor, info = ops.cholesky(a, damping=damping)
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(damped), rtol=1e-3, atol=1e-4)
    solved, info = ops.cholesky_solve(a, b, damping=damping)
    assert (info == 0).all() and (factor.triu(1) == 0).all()
    residual = (damped @ solved.double() - b).norm() / (damped.norm() * solved.norm())
    assert residual < 1e-5
    torch.testing.assert_close(solved.double(), torch.linalg.solve(damped, b.double()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("n", [50, 300])
def test_cholesky_reports_each_failure(n):
    a = torch.eye(n, device="cuda").repeat(4, 1, 1)
    a[1, 40, 40], a[3, n - 1, n - 1] = -1, torch.nan
    factor, info = ops.cholesky(a)
    assert info.tolist() == [0, 41, 0, n]
    assert factor[1].tril().isnan().sum() == n * (n + 1) // 2 and torch.equal(factor[2], a[2])


def test_same_bits_every_time():
    _, r = factor_of_inverse(128)
    start = rand(2000, 128, dtype=torch.bfloat16).float()  # ties
    runs = []
    for _ in range(5):
        w = start.clone()
        runs.append((w, *ops.obs_sweep(w, r.float(), k=128_000), ops.select_mask(start, 100_000, scope="matrix")))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_calls_follow_their_stream_and_do_not_synchronise():
    _, r = factor_of_inverse(128)
    r, w, host = r.float(), rand(4096, 128), None
    expected = w.clone()
    ops.obs_sweep(expected, r, nm=(2, 4))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s: the sweep must wait behind it, the host must not
            ops.obs_sweep(w, r, nm=(2, 4))
            ops.select_mask(w, 5, scope="matrix")
            ops.cholesky(r[None])
            host = stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert host is False
    stream.synchronize()
    assert torch.equal(w, expected)


def test_bad_data_is_reported_and_left():
    w = rand(64, 256)
    w[3, 5] = torch.nan
    before = w.clone()
    assert ops.select_mask(w, 5, scope="matrix", apply=True).all()
    with pytest.raises(ValueError, match="select_mask: w has NaN scores"):
        native.check_cuda()
    assert torch.equal(w.nan_to_num(7), before.nan_to_num(7))
    ops.obs_sweep(w[:, :128], torch.eye(128, device="cuda"), nm=(2, 4))
    with pytest.raises(ValueError, match="obs_sweep: the sweep needs finite"):
        native.check_cuda()
    assert torch.equal(w[3].nan_to_num(7), before[3].nan_to_num(7))
    ops.compress_24(rand(32, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="compress_24: not a 2:4 matrix"):
        native.check_cuda()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_gpu():
    w = rand(100, 64).to("cuda:1")
    expected = w.clone()
    keep = reference.nm_mask(expected, 2, 4, apply=True)
    assert torch.equal(ops.nm_mask(w, 2, 4, apply=True), keep) and torch.equal(w, expected)
    assert torch.cuda.current_device() == 0
