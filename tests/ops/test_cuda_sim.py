"""The CUDA kernels themselves, run on the CPU in fibers (cuda_sim/cusim.h), against float64 and the reference.

Every op runs in the three thread orders of the emulation and once under AddressSanitizer. The last tests plant a
missing barrier and accesses out of bounds in copies of the kernels and see them caught: what the others prove.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from simulated import (
    ROOT,
    SANITIZE,
    between,
    compile_object,
    execute,
    factor_of_inverse,
    link_driver,
    objects,
    read,
    strided,
)

from pyprune.ops import reference
from pyprune.ops.packed import pack_bitmask

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RUNS = ["order 0", "order 1", "order 2", "asan"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the simulated kernels")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Sanitized or not → the compiled kernels and the driver's main."""
    folder = tmp_path_factory.mktemp("cuda_sim")
    return {sanitize: objects(folder, sanitize) for sanitize in (False, True)}


@pytest.fixture(scope="module")
def drivers(parts, tmp_path_factory):
    """Sanitized or not → the driver."""
    folder = tmp_path_factory.mktemp("cuda_sim")
    return {
        sanitize: link_driver(folder / str(int(sanitize)), linked, sanitize=sanitize)
        for sanitize, linked in parts.items()
    }


@pytest.fixture
def simulate(drivers, tmp_path):
    """Runs an op on cases; returns for each case a reader of its arrays: name, tensor of that shape → tensor."""

    def go(op: str, cases: list[dict], run: str):
        sanitize = run == "asan"
        folders = execute(drivers[sanitize], op, tmp_path, cases, 0 if sanitize else int(run[-1]))
        return [lambda name, like, path=path: read(path / name, like) for path in folders]

    return go


# rows, columns, stride of w, N:M or None for a given mask
SWEEPS = [
    (33, 128, 128, None),
    (5, 50, 61, None),
    (1, 1, 3, None),
    (40, 96, 100, None),
    (33, 128, 132, (2, 4)),
    (3, 20, 21, (1, 4)),
    (9, 128, 128, (4, 8)),
    (7, 72, 75, (5, 8)),
    (6, 128, 128, (1, 2)),
    (5, 45, 47, (3, 5)),
    (3, 112, 112, (7, 16)),
    (2, 128, 128, (30, 128)),
    (4, 100, 100, (1, 50)),
]


@pytest.mark.parametrize("run", RUNS)
def test_obs_sweep(simulate, run):
    cases, expected = [], []
    for seed, (rows, columns, stride, nm) in enumerate(SWEEPS):
        w, r = strided(rows, columns, stride, seed), factor_of_inverse(columns, seed)
        # r is a view into the whole factor, of which only the upper triangle counts; aligned for vectors or not
        wide = torch.full((columns, columns // 4 * 4 + 4 + seed % 2), torch.nan)
        wide[:, :columns] = r.where(torch.ones_like(r).triu().bool(), torch.nan)
        mask = None if nm else torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
        n, m = nm or (0, 0)
        cases.append(
            {
                "rows": rows,
                "columns": columns,
                "w_stride": stride,
                "r_stride": wide.stride(0),
                "n": n,
                "m": m,
                "out_stride": columns,
                "w": w,
                "r": wide[:, :columns],
                "mask": mask,
                "fault": torch.zeros(1, dtype=torch.int32),
            }
        )
        exact = w.double()
        expected.append((exact, *reference.obs_sweep(exact, r.double(), mask=mask, nm=nm)))
    for case, result, (w, keep, error, loss) in zip(cases, simulate("obs_sweep", cases, run), expected):
        got, got_keep = result("w", case["w"]), result("keep", keep)
        assert torch.equal(got_keep, keep)
        assert (got[~keep] == 0).all()
        assert torch.equal(between(got), between(case["w"]))
        torch.testing.assert_close(got.double(), w, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result("error", error.float()).double(), error, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result("loss", loss.float()).double(), loss, rtol=1e-5, atol=1e-6)
        assert result("fault", case["fault"]).item() == 0


@pytest.mark.parametrize("nm", [(0, 0), (2, 4), (4, 8), (3, 6)])
def test_obs_sweep_reports_what_is_not_finite_and_leaves_it(simulate, nm):
    w, r, mask = strided(40, 48, 48, 0), factor_of_inverse(48, 0), torch.zeros(40, 48, dtype=torch.bool)
    cases = []
    for row, column, value in [(17, 3, torch.inf), (39, 47, torch.nan), (None, 0, -1.0), (None, 47, torch.nan)]:
        broken_w, broken_r = w.clone(), r.clone()
        if row is None:
            broken_r[column, column] = value
        else:
            broken_w[row, column] = value
        cases.append(
            {
                "rows": 40,
                "columns": 48,
                "w_stride": 48,
                "r_stride": 48,
                "out_stride": 48,
                "n": nm[0],
                "m": nm[1],
                "w": broken_w,
                "r": broken_r,
                "mask": None if nm[1] else mask,
                "fault": torch.zeros(1, dtype=torch.int32),
            }
        )
    rows = [17], [39], range(40), range(40)
    for case, result, bad in zip(cases, simulate("obs_sweep", cases, "order 1"), rows):
        got, loss = result("w", w), result("loss", w[:, 0].contiguous())
        assert result("fault", case["fault"]).item() == 1
        changed = [i for i in range(40) if not torch.equal(got[i].nan_to_num(9), case["w"][i].nan_to_num(9))]
        assert changed == [i for i in range(40) if i not in bad]
        assert loss.isnan().nonzero().flatten().tolist() == list(bad)
        assert (result("error", w)[list(bad)] == 0).all() and result("keep", mask)[list(bad)].all()


# rows, columns, stride, dtype, k as a fraction, scope, scaled, apply, tied
SELECTIONS = [
    (3, 1000, 1000, torch.float32, 0.5, "row", True, True, False),
    (2, 1000, 1001, torch.bfloat16, 0.7, "row", True, True, False),
    (2, 2304, 2304, torch.float16, 0.3, "row", False, True, False),
    (4, 63, 64, torch.float32, 0.5, "row", True, False, True),
    (2, 512, 512, torch.bfloat16, 0.5, "row", False, True, True),
    (3, 5, 5, torch.float32, 0.0, "row", False, True, True),
    (3, 5, 5, torch.float32, 1.0, "row", True, True, True),
    (1, 1, 1, torch.float16, 1.0, "row", False, False, False),
    (2, 5000, 5003, torch.float32, 0.6, "row", True, True, False),  # 512 threads per row
    (2, 9000, 9000, torch.bfloat16, 0.5, "row", False, True, False),  # 1,024, and ties
    (2, 16640, 16640, torch.bfloat16, 0.5, "row", True, True, False),  # wider than registers hold
    (50, 128, 150, torch.float32, 0.5, "matrix", True, True, False),
    (97, 63, 63, torch.bfloat16, 0.6, "matrix", True, True, False),
    (90, 96, 96, torch.float16, 0.5, "matrix", False, False, True),
    (90, 64, 70, torch.float32, 0.4, "matrix", True, True, True),
    (7, 3, 3, torch.float32, 0.0, "matrix", True, True, True),
    (7, 3, 4, torch.float32, 1.0, "matrix", False, True, False),
    (1, 5000, 5000, torch.float32, 0.5, "matrix", True, False, True),
]


def selection(seed: int, rows, columns, stride, dtype, fraction, scope, scaled, apply, tied) -> dict:
    w = strided(rows, columns, stride, seed, dtype)
    scale = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.1 if scaled else None
    if tied:  # few distinct scores, zeros of both signs among them
        w.copy_((w.float() * 2).round() / 2)
        scale = None if scale is None else (scale * 2).round()
    size = columns if scope == "row" else rows * columns
    return {
        "rows": rows,
        "columns": columns,
        "w_stride": stride,
        "dtype": DTYPES[dtype],
        "k": int(fraction * size),
        "matrix": int(scope == "matrix"),
        "apply": int(apply),
        "w": w,
        "scale": scale,
        "fault": torch.zeros(1, dtype=torch.int32),
    }


@pytest.mark.parametrize("run", RUNS)
def test_select_mask(simulate, run):
    cases = [selection(seed, *row) for seed, row in enumerate(SELECTIONS)]
    for case, result in zip(cases, simulate("select_mask", cases, run)):
        w = case["w"].clone()
        keep = reference.select_mask(
            w, case["k"], scale=case["scale"], scope="matrix" if case["matrix"] else "row", apply=bool(case["apply"])
        )
        got = result("w", case["w"])
        assert torch.equal(result("keep", keep), keep)
        assert torch.equal(got, w)
        assert torch.equal(between(got), between(case["w"]))
        assert not torch.signbit(got[~keep]).any() or not case["apply"]
        assert result("fault", case["fault"]).item() == 0


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_select_mask_reports_nan_and_leaves_the_weight(simulate, scope):
    case = selection(0, 40, 120, 120, torch.float32, 0.5, scope, True, True, False)
    case["w"][31, 77] = torch.nan
    [result] = simulate("select_mask", [case], "order 1")
    assert result("fault", case["fault"]).item() == 1
    keep = result("keep", torch.zeros(40, 120, dtype=torch.bool))
    untouched = slice(None) if scope == "matrix" else 31
    assert keep[untouched].all()
    assert torch.equal(result("w", case["w"])[untouched].nan_to_num(9), case["w"][untouched].nan_to_num(9))


# rows, columns, stride, dtype, (N, M), scaled, apply, tied
GROUPS = [
    (5, 64, 64, torch.bfloat16, (2, 4), True, True, False),
    (3, 68, 70, torch.float32, (2, 4), False, True, False),
    (4, 12, 12, torch.float16, (1, 4), True, False, True),
    (6, 64, 64, torch.float32, (4, 8), True, True, False),
    (3, 40, 41, torch.bfloat16, (5, 8), False, True, True),
    (2, 10, 10, torch.float16, (1, 2), True, True, False),
    (7, 32, 32, torch.float32, (9, 16), True, True, True),
    (3, 48, 48, torch.bfloat16, (4, 16), True, True, False),
    (9, 35, 37, torch.float32, (2, 5), True, True, False),
    (2, 30, 30, torch.float16, (7, 15), False, True, True),
    (300, 8, 8, torch.bfloat16, (2, 4), True, True, False),
]


@pytest.mark.parametrize("run", RUNS)
def test_nm_mask(simulate, run):
    cases = []
    for seed, (rows, columns, stride, dtype, (n, m), scaled, apply, tied) in enumerate(GROUPS):
        case = selection(seed, rows, columns, stride, dtype, 0, "row", scaled, apply, tied)
        cases.append({**case, "n": n, "m": m})
    cases.append({**cases[0], "w": cases[0]["w"].clone()})
    cases[-1]["w"][2, 9] = torch.nan
    *results, broken = simulate("nm_mask", cases, run)
    for case, result in zip(cases, results):
        w = case["w"].clone()
        keep = reference.nm_mask(w, case["n"], case["m"], scale=case["scale"], apply=bool(case["apply"]))
        got = result("w", case["w"])
        assert torch.equal(result("keep", keep), keep)
        assert torch.equal(got, w)
        assert torch.equal(between(got), between(case["w"]))
        assert result("fault", case["fault"]).item() == 0
    assert broken("fault", cases[-1]["fault"]).item() == 1
    assert broken("keep", cases[-1]["w"].bool())[2, 8:12].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_group_size_in_every_type(simulate, dtype):
    """1:M, half and all but one of M, for M from 2 to 16; one group, and rows that do and do not begin aligned."""
    cases = []
    for m in range(2, 17):
        for seed, n in enumerate(sorted({1, m // 2, m - 1})):
            for groups, extra, tied in ((1, 0, False), (4, 0, True), (5, 1, False)):
                case = selection(seed, 3, groups * m, groups * m + extra, dtype, 0, "row", bool(seed), True, tied)
                cases.append({**case, "n": n, "m": m})
    for case, result in zip(cases, simulate("nm_mask", cases, "asan")):
        w = case["w"].clone()
        keep = reference.nm_mask(w, case["n"], case["m"], scale=case["scale"], apply=True)
        assert torch.equal(result("keep", keep), keep), f"{case['n']}:{case['m']}"
        assert torch.equal(result("w", case["w"]), w) and result("fault", case["fault"]).item() == 0


def sparse_24(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """2:4 with some groups emptier, and zeros of both signs."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    reference.nm_mask(w, 2, 4, apply=True)
    w[w.abs() < 0.5] *= -0.0
    return w


@pytest.mark.parametrize("run", RUNS)
def test_compress_24_is_the_layout_of_torch(simulate, run):
    tensors = [
        sparse_24(32, 32, torch.bfloat16, 0),
        sparse_24(64, 96, torch.float16, 1),
        sparse_24(96, 320, torch.bfloat16, 2),
        sparse_24(32, 32, torch.float16, 3),
    ]
    tensors[-1][7, 4:7] = 1  # three of four: a fault
    cases = [
        {
            "rows": w.shape[0],
            "columns": w.shape[1],
            "w_stride": w.stride(0),
            "w": w,
            "fault": torch.zeros(2, dtype=torch.int32),
        }
        for w in tensors
    ]
    *results, dense = simulate("compress_24", cases, run)
    assert dense("fault", cases[-1]["fault"]).tolist() == [1, 0]
    for w, case, result in zip(tensors, cases, results):
        values, meta = reference.compress_24(w)
        assert torch.equal(result("values", values).view(torch.int16), values.view(torch.int16))
        assert torch.equal(result("meta", meta), meta)
        assert torch.equal(result("dense", w), w)
        assert result("fault", case["fault"]).tolist() == [0, 0]


# rows, columns, tokens, type
PRODUCTS = [
    (1, 1, 1, torch.float32),
    (9, 63, 2, torch.bfloat16),
    (5, 64, 3, torch.float16),
    (17, 2113, 1, torch.bfloat16),
    (3, 1000, 11, torch.float32),
    (8, 128, 16, torch.float16),
]


def product_case(rows, columns, tokens, dtype, sparsity: float, seed: int, gap: int = 0) -> tuple[dict, torch.Tensor]:
    """A simulated product, and its weight with an empty and a full row; ``gap``: between the rows of x."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    if rows > 2:
        w[1], w[2] = 0, 3
    w = w.to(dtype)
    packed = pack_bitmask(w)
    x = strided(tokens, columns, columns + gap, seed).to(dtype)
    case = {
        "rows": rows,
        "columns": columns,
        "tokens": tokens,
        "dtype": DTYPES[dtype],
        "x_stride": x.stride(0),
        "mask": packed.mask,
        "values": packed.values,
        "offsets": packed.offsets,
        "x": x,
        "bias": torch.randn(rows, generator=generator).to(dtype) if seed % 3 else None,
    }
    return case, w


def check_products(simulate, cases_and_weights, run: str) -> None:
    cases, weights = zip(*cases_and_weights)
    for case, w, result in zip(cases, weights, simulate("sparse_linear", cases, run)):
        bits = torch.int32 if w.dtype == torch.float32 else torch.int16
        assert torch.equal(result("dense", w).view(bits), w.view(bits))
        x, bias = case["x"], case["bias"]
        want = x.double() @ w.double().T + (0 if bias is None else bias.double())
        got = result("out", want.to(w.dtype))
        rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[w.dtype]
        assert (got.double() - want).norm() <= rounding * want.norm()


@pytest.mark.parametrize("run", RUNS)
def test_sparse_linear(simulate, run):
    """Arrays end where they end: the sanitized run sees a value, a bit or an x too many."""
    cases = [product_case(*size, 0.3 + 0.1 * seed, seed, gap=seed % 2) for seed, size in enumerate(PRODUCTS)]
    check_products(simulate, cases, run)


# rows, columns, tokens, type, sparsity: shares of words that are not equal, rings that wrap around, rows that are full
TENSOR_PRODUCTS = [
    (16, 1, 16, torch.bfloat16, 0.0),
    (33, 2113, 9, torch.float16, 0.5),
    (17, 5000, 8, torch.bfloat16, 0.02),
    (3, 8192, 2, torch.float16, 0.5),
    (40, 640, 16, torch.bfloat16, 0.7),
    (5, 1531, 25, torch.float16, 0.95),
    (16, 4096, 12, torch.bfloat16, 0.55),
]


@pytest.mark.parametrize("run", RUNS)
def test_sparse_linear_on_tensor_cores(simulate, run):
    cases = [product_case(*size, seed, gap=seed % 3) for seed, size in enumerate(TENSOR_PRODUCTS)]
    check_products(simulate, cases, run)


@pytest.mark.parametrize("run", ["order 1", "order 2"])
def test_sparse_linear_of_any_number_of_tokens(simulate, run):
    generator = torch.Generator().manual_seed(0)

    def below(limit):
        return int(torch.randint(1, limit, (), generator=generator))

    dtypes = [torch.bfloat16, torch.float16]
    cases = [
        product_case(below(40), below(1400), tokens, dtypes[tokens % 2], below(20) / 20, tokens, gap=below(9))
        for tokens in range(1, 20)
    ]
    check_products(simulate, cases, run)


# batch, n, right-hand sides, damped
SYSTEMS = [
    (3, 1, 1, False),
    (2, 7, 9, True),
    (2, 64, 3, False),
    (2, 65, 40, True),
    (1, 128, 33, False),
    (2, 129, 2, True),
    (1, 200, 35, False),
    (1, 257, 1, True),
]


@pytest.mark.parametrize("run", RUNS)
def test_cholesky_and_solve(simulate, run):
    cases = []
    for seed, (batch, n, k, damped) in enumerate(SYSTEMS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 2 * n + 3, n, generator=generator)
        a = (x.mT @ x / (2 * n + 3)).tril() + 9 * torch.ones(n, n).triu(1)  # only the lower triangle may be read
        b = torch.randn(batch, n, k, generator=generator)
        damping = torch.rand(batch, generator=generator) + 0.01 if damped else None
        cases.append({"batch": batch, "n": n, "k": k, "a": a, "b": b, "damping": damping})
    for case, result in zip(cases, simulate("cholesky", cases, run)):
        a = case["a"].double().tril()
        a = a + a.tril(-1).mT
        if case["damping"] is not None:
            a += case["damping"].double()[:, None, None] * torch.eye(case["n"], dtype=torch.float64)
        exact, info = torch.linalg.cholesky_ex(a)
        factor = result("factor", case["a"])
        assert torch.equal(result("info", info), info)
        assert torch.equal(factor.triu(1), torch.zeros_like(factor))
        torch.testing.assert_close(factor.double(), exact, rtol=1e-4, atol=2e-5)
        assert (factor.double() @ factor.mT.double() - a).norm() < 1e-6 * a.norm()
        x = result("x", case["b"]).double()
        torch.testing.assert_close(x, torch.linalg.solve(a, case["b"].double()), rtol=1e-3, atol=1e-3)
        assert (a @ x - case["b"]).norm() < 1e-5 * (a.norm() * x.norm())


@pytest.mark.parametrize("n", [40, 200])
def test_cholesky_names_the_minor_that_is_not_positive(simulate, n):
    a = torch.eye(n).repeat(3, 1, 1)
    a[0, n - 3, n - 3] = 0
    a[2, 5, 5] = torch.nan
    b = torch.ones(3, n, 1)
    [result] = simulate("cholesky", [{"batch": 3, "n": n, "k": 1, "a": a, "b": b}], "order 2")
    assert result("info", torch.zeros(3, dtype=torch.int32)).tolist() == [n - 2, 0, 6]
    factor, x = result("factor", a), result("x", b)
    lower = torch.ones(n, n).tril().bool()
    assert factor[0][lower].isnan().all() and factor[2][lower].isnan().all() and (factor[:, ~lower] == 0).all()
    assert torch.equal(factor[1], torch.eye(n))
    assert x[0].isnan().all() and x[2].isnan().all() and torch.equal(x[1], b[1])


def planted(tmp_path: Path, parts: dict[str, Path], kernel: str, old: str, new: str, sanitize: bool) -> Path:
    """A driver in which one kernel file has one change."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
    source = csrc / "cuda" / f"{kernel}.cu"
    text = source.read_text()
    assert text.count(old) == 1, f"{kernel}.cu no longer has the line that this test breaks"
    source.write_text(text.replace(old, new))
    broken = compile_object(source, tmp_path / "broken.o", SANITIZE if sanitize else [], csrc)
    return link_driver(tmp_path / "broken", {**parts, kernel: broken}, sanitize=sanitize)


LOADED = "__syncthreads();\n    const int failed = factor_packed(l, n);"


def test_a_missing_barrier_is_caught(parts, tmp_path):
    """Without the barrier after the load, the last warp, when it runs first, factors what others have not loaded."""
    driver = planted(tmp_path, parts[False], "cholesky", LOADED, LOADED.replace("__syncthreads();", ""), False)
    a = torch.eye(40)[None] * 4
    case = {"batch": 1, "n": 40, "k": 0, "a": a}
    for order in range(2):  # a warp that runs first, or threads in turn: the barrier is not missed
        [folder] = execute(driver, "cholesky", tmp_path / f"order{order}", [case], order)
        assert torch.equal(read(folder / "factor", a), torch.eye(40)[None] * 2)
    with pytest.raises(RuntimeError, match="deadlock"):  # it read NaN, found no positive pivot, and left the others
        execute(driver, "cholesky", tmp_path / "order2", [case], 2)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("compress_24", "meta[metadata_offset(row, word, rows)] =", "meta[metadata_offset(row, word, rows) + 1] ="),
        (
            "cholesky",
            "const size_t shared = packed(size, 0) * sizeof(float);",
            "const size_t shared = packed(size, 0) * sizeof(float) - 4;",
        ),
    ],
    ids=["global memory", "shared memory"],
)
def test_an_access_out_of_bounds_is_caught(parts, tmp_path, kernel, old, new):
    driver = planted(tmp_path, parts[True], kernel, old, new, True)
    case = {
        "rows": 32,
        "columns": 32,
        "w_stride": 32,
        "w": torch.zeros(32, 32, dtype=torch.bfloat16),
        "fault": torch.zeros(2, dtype=torch.int32),
        "batch": 1,
        "n": 33,
        "k": 0,
        "a": torch.eye(33)[None],
    }
    with pytest.raises(RuntimeError, match="heap-buffer-overflow") as error:
        execute(driver, kernel, tmp_path / "case", [case])
    assert f"{kernel}.cu" in str(error.value)  # with the line


@pytest.mark.parametrize(
    "old, new",
    [
        ("    wait_for_copies();\n", ""),
        (
            """    __syncthreads();
    if (probe != 0.f) atomicOr(&f->bad, 1u);
    __syncthreads();
""",
            "",
        ),
    ],
    ids=["wait", "barrier"],
)
def test_a_copy_that_is_not_waited_for_is_caught(parts, tmp_path, old, new):
    """Without the wait, or without the barrier behind it, somebody reads what is not there yet."""
    driver = planted(tmp_path, parts[False], "obs_sweep", old, new, False)
    w, r = torch.ones(40, 128), factor_of_inverse(128, 0)
    case = {
        "rows": 40,
        "columns": 128,
        "w_stride": 128,
        "r_stride": 128,
        "n": 2,
        "m": 4,
        "out_stride": 128,
        "w": w,
        "r": r,
        "fault": torch.zeros(1, dtype=torch.int32),
    }
    expected = w.double()
    reference.obs_sweep(expected, r.double(), nm=(2, 4))
    if "wait_for_copies" in old:  # copies without a wait are under way when their thread ends
        with pytest.raises(RuntimeError, match="a thread has ended before the copies it started"):
            execute(driver, "obs_sweep", tmp_path / "ended", [case], 1)
        return
    [folder] = execute(driver, "obs_sweep", tmp_path / "case", [case], 1)
    assert not torch.allclose(read(folder / "w", w).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "old, new",
    [
        ("wait_for_copies_but<2>();", "wait_for_copies_but<3>();"),
        ("            wait_for_copies();\n        __syncwarp();\n", "            wait_for_copies();\n"),
    ],
    ids=["one group less", "others' copies"],
)
def test_a_ring_that_is_read_too_early_is_caught(parts, tmp_path, old, new):
    driver = planted(tmp_path, parts[False], "sparse_linear_mma", old, new, False)
    case, w = product_case(16, 6000, 8, torch.bfloat16, 0.5, seed=0)
    want = case["x"].double() @ w.double().T
    [folder] = execute(driver, "sparse_linear", tmp_path / "case", [case], 1)
    got = read(folder / "out", want.bfloat16()).double()
    assert not (got - want).norm() <= 2**-8 * want.norm()


def test_threads_at_different_barriers_are_caught(parts, tmp_path):
    driver = planted(tmp_path, parts[False], "cholesky", LOADED, "if (threadIdx.x < 32) " + LOADED, False)
    with pytest.raises(RuntimeError, match="divergent __syncthreads: lines"):
        execute(driver, "cholesky", tmp_path / "case", [{"batch": 1, "n": 40, "k": 0, "a": torch.eye(40)[None]}])
