"""The contract of ops: what is refused and how, which back-end runs, views and in-place arguments."""

from __future__ import annotations

import subprocess
import sys
import threading
import types

import pytest
import torch

from pyprune import ops
from pyprune.ops import choice, classes, native, reference
from pyprune.ops.packed import pack_bitmask

HAS_CPU = native.unusable("cpu") is None
BACKENDS = ["reference"] + (["cpu"] if HAS_CPU else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    torch.manual_seed(0)
    with ops.backend(request.param):
        yield request.param


def test_auto_takes_the_first_usable_back_end():
    assert choice.implementation("gram_update/float32", torch.device("cpu")) is (
        native.gram_update_cpu if HAS_CPU else reference.gram_update
    )


def test_every_op_exists_in_ops_and_reference():
    for op in ops.OPS:
        assert callable(getattr(ops, op))
        assert callable(getattr(reference, op))
        assert ops.status()[op]["reference"] == "usable"


def test_a_named_back_end_is_used_or_refused():
    with ops.backend("reference"):
        assert choice.implementation("nm_mask", torch.device("cpu")) is reference.nm_mask
        with ops.backend("auto"):
            assert (choice.implementation("nm_mask", torch.device("cpu")) is not reference.nm_mask) == HAS_CPU
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for nm_mask .* not cpu ones"):
        ops.nm_mask(torch.ones(2, 4), 2, 4)
    with pytest.raises(ValueError, match="got 'gpu'"), ops.backend("gpu"):
        pass


def test_a_missing_native_module_is_a_reason_not_a_crash():
    code = (
        "import sys; sys.modules['pyprune._C'] = None\n"
        "import torch\nfrom pyprune import ops\n"
        "assert 'reinstall with a C++ compiler' in ops.status()['nm_mask']['cpu']\n"
        "assert ops.nm_mask(torch.tensor([[1., 2, 3, 4]]), 2, 4).tolist() == [[False, False, True, True]]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_forced_back_end_belongs_to_its_thread():
    seen = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choice._forced.get()))
        thread.start()
        thread.join()
    assert seen == [None]


EYE = torch.eye(8)


def heads(*counts):
    return [torch.ones(1, count, 5, 4) for count in counts]


REFUSED = [
    (lambda: ops.gram_update(torch.zeros(3, 3), torch.ones(5, 4)), r"gram must be float32 \(4, 4\)"),
    (lambda: ops.gram_update(torch.ones(4, 4).T, torch.ones(5, 4)), "contiguous"),
    (lambda: ops.gram_update(torch.zeros(4, 4), torch.ones(5, 4), precision="tf32"), "got 'tf32'"),
    (lambda: ops.gram_update(torch.zeros(4, 4), torch.ones(5, 4), mask=torch.ones(4) > 0), r"bool \(5,\)"),
    (lambda: ops.cross_gram_update(torch.zeros(4, 4), torch.ones(5, 4), torch.ones(6, 4)), "same tokens"),
    (lambda: ops.select_mask(EYE, 9), r"k must be in \[0, 8\]"),
    (lambda: ops.select_mask(EYE, -1, scope="matrix"), r"k must be in \[0, 64\]"),
    (lambda: ops.select_mask(EYE, 1, scope="column"), "got 'column'"),
    (lambda: ops.select_mask(torch.ones(1, 8).expand(4, 8), 1, apply=True), "elements overlap"),
    (lambda: ops.nm_mask(EYE, 4, 4), "0 < N < M, got 4:4"),
    (lambda: ops.nm_mask(EYE, 2, 3), "width divisible by 3, got 8"),
    (lambda: ops.nm_mask(torch.ones(2, 32), 2, 32), "M up to 16"),
    (lambda: ops.compress_24(torch.zeros(32, 48, dtype=torch.float16)), r"columns % 32 == 0, got \(32, 48\)"),
    (lambda: ops.compress_24(torch.ones(32, 32, dtype=torch.float16)), "more than 2 non-zeros"),
    (lambda: ops.obs_sweep(EYE.clone(), EYE), "exactly one of mask, k and nm"),
    (lambda: ops.obs_sweep(EYE.clone(), EYE, k=65), r"k must be in \[0, 64\], got 65"),
    (lambda: ops.obs_sweep(torch.ones(2, 2048), torch.eye(2048), k=1), "at most 1024 columns, got 2048"),
    (lambda: ops.obs_sweep(torch.ones(8, 8).T.contiguous().T, EYE, k=1), "unit column stride"),
    (lambda: ops.obs_sweep(EYE.clone(), torch.zeros(8, 8), k=1), "positive diagonal|NaN scores"),
    (lambda: ops.trailing_update(torch.zeros(8, 8), EYE, torch.zeros(4, 8)), r"r must be float32 \(8, 8\)"),
    (lambda: ops.cholesky(torch.ones(2, 3, 4)), r"got \(2, 3, 4\)"),
    (lambda: ops.cholesky_solve(torch.ones(2, 3, 3), torch.ones(3, 3, 1)), r"matching a \(2, 3, 3\)"),
    (lambda: ops.linear(torch.ones(3, 5), torch.ones(4, 6)), r"x must be float32 \[..., 6\]"),
    (lambda: ops.sparse_linear(torch.ones(3, 5), pack_bitmask(EYE)), r"x must be float32 \[..., 8\] .* \(3, 5\)"),
    (lambda: ops.sparse_linear(EYE, pack_bitmask(EYE.half())), r"x must be float16 \[..., 8\] on cpu, got float32"),
    (lambda: ops.sparse_linear(EYE, pack_bitmask(EYE), torch.ones(7)), r"bias must be float32 \(8,\) on cpu"),
    (lambda: ops.rms_norm(EYE, torch.ones(7), 1e-5), r"weight must be float32 \(8,\) on cpu, got float32 \(7,\)"),
    (lambda: ops.rms_norm(EYE, torch.ones(8), 1e-5, form="other"), "narrow, wide, offset, got 'other'"),
    (lambda: ops.rms_norm(EYE, torch.ones(8), -1.0), "eps must not be negative, got -1.0"),
    (lambda: ops.rotary(EYE, EYE, EYE), "x must have 4 dimensions, got 2"),
    (lambda: ops.rotary(torch.ones(2, 3, 4, 5), EYE, EYE), "even number of columns, got 5"),
    (lambda: ops.rotary(torch.ones(2, 3, 4, 6), torch.ones(1, 4, 6), EYE), r"sin must be float32 \(2, 4, 6\) on cpu"),
    (lambda: ops.swiglu(EYE, EYE.half()), r"up must be float32 \(8, 8\) on cpu, got float16"),
    (lambda: ops.attention(EYE, EYE, EYE), r"must be \[batch, heads, tokens, width\], got \[\(8, 8\)"),
    (lambda: ops.attention(*heads(3, 2, 2)), r"g dividing h, got \[\(1, 3, 5, 4\), \(1, 2, 5, 4\), \(1, 2, 5, 4\)\]"),
    (lambda: ops.attention(*heads(2, 1, 2)), "need one b, d and s"),
    (lambda: ops.attention(*heads(2, 2, 2)[:2], torch.ones(1, 2, 5, 4).half()), "of one dtype"),
    (lambda: ops.attention(*heads(2, 2, 2), scale=-1.0), "positive and finite, got -1.0"),
    (lambda: ops.attention(*heads(2, 2, 2), mask=torch.ones(5, 5) > 0, causal=True), "not both"),
    (lambda: ops.attention(*heads(2, 2, 2), mask=torch.ones(3, 5)), r"\(1, 2, 5, 5\), got float32 \(3, 5\)"),
    (lambda: ops.attention(*heads(2, 2, 2), mask=torch.ones(5, 5).half()), "bool or float32 on cpu"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=range(len(REFUSED)))
def test_refusals_name_the_numbers(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_type_errors():
    with pytest.raises(TypeError, match="w must be float32 or bfloat16 or float16, got float64"):
        ops.nm_mask(torch.ones(2, 4, dtype=torch.float64), 2, 4)
    with pytest.raises(TypeError, match=r"w must be a torch\.Tensor, got list"):
        ops.select_mask([[1.0]], 0)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
def test_nan_scores_are_an_error_and_leave_w_alone(backend, bad):
    for call in (
        lambda w: ops.select_mask(w, 3, apply=True),
        lambda w: ops.select_mask(w, 3, scope="matrix", apply=True),
        lambda w: ops.nm_mask(w, 2, 4, apply=True),
    ):
        w = torch.randn(5, 20)
        w[4, 18] = bad
        before = w.clone()
        with pytest.raises(ValueError, match="NaN"):
            call(w)
        assert torch.equal(w.view(torch.int32), before.view(torch.int32))
    with pytest.raises(ValueError, match="NaN"):  # 0·inf: the score is NaN though neither factor is
        ops.select_mask(torch.zeros(2, 4), 1, scale=torch.tensor([1, torch.inf, 1, 1]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_sweep_refuses_what_is_not_finite(backend, bad):
    w, r = torch.randn(5, 16), torch.eye(16)
    for target in (w, r):
        broken = target.clone()
        broken[2, 9] = bad
        swept = broken if target is w else w.clone()
        before = swept.clone()
        for how in ({"nm": (2, 4)}, {"mask": torch.ones(5, 16, dtype=torch.bool)}):
            with pytest.raises(ValueError, match="finite"):
                ops.obs_sweep(swept, broken if target is r else r, **how)
            assert torch.equal(swept.view(torch.int32), before.view(torch.int32))


def test_views_are_read_and_written_where_they_lie(backend):
    base = torch.randn(24, 40)
    for view in (base[::2, 4:36], base.T[:32, :24], base[:, ::2][:, :16]):
        keep = ops.nm_mask(view.clone(), 2, 4)
        copy, touched = base.clone(), torch.zeros_like(base, dtype=torch.bool)
        inside = copy.as_strided(view.shape, view.stride(), view.storage_offset())
        touched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert torch.equal(ops.nm_mask(inside, 2, 4, apply=True), keep)
        assert torch.equal(inside, view * keep)
        assert torch.equal(copy[~touched], base[~touched])


def test_statistics_of_views(backend):
    base = torch.randn(60, 90)
    for x in (base.T, base[::3, 10:70], base[:, ::2], base[:1].expand(50, 90)):
        gram = torch.zeros(x.shape[1], x.shape[1])
        ops.gram_update(gram, x)
        truth = x.double().T @ x.double()
        assert (gram - truth).norm() <= 1e-6 * truth.norm()
        _, mean, _ = ops.column_moments(x)
        torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-5, atol=1e-6)


def test_a_column_block_is_swept_inside_its_matrix(backend):
    matrix = torch.randn(20, 50)
    r = torch.linalg.cholesky(torch.eye(50) + 0.1, upper=True)
    alone = matrix[:, 16:32].clone()
    keep, error, loss = ops.obs_sweep(alone, r[16:32, 16:32].clone(), nm=(2, 4))
    before = matrix.clone()
    inside = ops.obs_sweep(matrix[:, 16:32], r[16:32, 16:32], nm=(2, 4))
    assert torch.equal(matrix[:, 16:32], alone)
    assert all(torch.equal(a, b) for a, b in zip(inside, (keep, error, loss)))
    assert torch.equal(matrix[:, :16], before[:, :16])
    assert torch.equal(matrix[:, 32:], before[:, 32:])


def test_linear_keeps_gradients_unless_a_back_end_is_named():
    x, w = torch.randn(100, 30), torch.randn(20, 30, requires_grad=True)
    ops.linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(20, 30))
    if HAS_CPU:
        with ops.backend("cpu"):
            assert not ops.linear(x, w).requires_grad


def test_linear_takes_any_leading_shape(backend):
    w, bias = torch.randn(20, 30), torch.randn(20)
    for shape in ((30,), (2, 3, 30), (4, 50, 30), (0, 30)):
        x = torch.randn(shape)
        torch.testing.assert_close(ops.linear(x, w, bias), torch.nn.functional.linear(x, w, bias), rtol=1e-5, atol=1e-4)


def test_attention_is_torchs_and_keeps_gradients(backend):
    q, k, v = torch.randn(2, 6, 20, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True), want, rtol=1e-5, atol=1e-5)
    with ops.backend("auto"):
        assert ops.attention(q.requires_grad_(), k, v, causal=True).requires_grad


@pytest.mark.skipif(not HAS_CPU, reason="no native module")
@pytest.mark.parametrize("tokens, key", [(20, "linear/few-rows"), (60, "linear/rows")])
def test_many_tokens_of_a_packed_weight_follow_the_verdict_on_dense_products(monkeypatch, tokens, key):
    products = []
    own = native._C.linear_cpu
    monkeypatch.setattr(native, "_C", types.SimpleNamespace(**vars(native._C)))
    monkeypatch.setattr(native._C, "linear_cpu", lambda *arguments: products.append(key) or own(*arguments))
    w, x = torch.randn(70, 40), torch.randn(tokens, 40)
    usual = dict.fromkeys(classes.KEYS, "cpu")
    for name, count in (("cpu", 1), ("reference", 0)):
        products.clear()
        with ops.pinned({"cpu": {**usual, key: name}}):
            torch.testing.assert_close(ops.sparse_linear(x, pack_bitmask(w)), x @ w.T, rtol=1e-5, atol=1e-4)
        assert len(products) == count
