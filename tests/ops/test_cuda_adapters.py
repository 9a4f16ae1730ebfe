"""``<op>_cuda`` of pyprune/ops/native.py and the bindings under them, over the simulated kernels and CPU tensors.

What is checked here is what lies between ops and the kernels: argument order, strides and copies, wide column blocks
in pieces, and how faults of the data surface. The kernels' own tests are in tests/ops/test_cuda_sim.py.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from simulated import factor_of_inverse, load_module, objects, strided

from pyprune import ops
from pyprune.ops import choice, classes, native, qualification, reference
from pyprune.ops.packed import pack_bitmask

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the simulated kernels")

LAUNCH = native._launch


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_adapters")


@pytest.fixture(scope="module")
def module(built):
    return load_module(built, objects(built))


@pytest.fixture(autouse=True)
def simulated(module, monkeypatch):
    """The adapters launch on the simulation: device 0, no stream."""

    def launch(op, device, *arguments):
        getattr(module, f"{op}_cuda")(0, *arguments, 0)

    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(native, "_launch", launch)
    monkeypatch.setattr(native, "_faults", {})


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_select_mask_of_any_layout(scope, dtype):
    scale = (rand(60, 2).abs() + 0.1)[:, 0]  # not contiguous
    for w in (
        rand(70, 60).to(dtype),
        rand(60, 70).to(dtype).T,
        strided(70, 60, 67, 1, dtype),
        rand(140, 120).to(dtype)[::2, ::2],
    ):
        expected, k = w.clone(), 17 if scope == "row" else 1900
        keep = reference.select_mask(expected, k, scale=scale, scope=scope, apply=True)
        assert torch.equal(native.select_mask_cuda(w, k, scale=scale, scope=scope), keep)
        assert torch.equal(native.select_mask_cuda(w, k, scale=scale, scope=scope, apply=True), keep)
        assert torch.equal(w, expected)


def test_nm_mask_of_any_layout():
    scale = rand(24, seed=5).abs()
    for w in (rand(9, 24), rand(24, 9).T, strided(9, 24, 29, 1), rand(9, 24).to(torch.float16)):
        expected = w.clone()
        keep = reference.nm_mask(expected, 2, 4, scale=scale, apply=True)
        assert torch.equal(native.nm_mask_cuda(w, 2, 4, scale=scale, apply=True), keep)
        assert torch.equal(w, expected)


def test_compress_and_expand():
    for w in (rand(32, 64).to(torch.bfloat16), rand(64, 32).to(torch.float16).T):
        reference.nm_mask(w, 2, 4, apply=True)
        values, meta = native.compress_24_cuda(w)
        expected = reference.compress_24(w)
        assert torch.equal(values, expected[0]) and torch.equal(meta, expected[1])
        assert torch.equal(native.expand_24_cuda(values, meta), w)


def test_sparse_linear_of_any_layout():
    w, bias = rand(9, 70), rand(9, seed=4)
    w[w < 0.2] = 0
    packed = pack_bitmask(w)
    for x in (rand(70), rand(70, 5, seed=1).T, strided(3, 70, 75, 1), rand(2, 3, 70), rand(40, 70), rand(0, 70)):
        expected = torch.nn.functional.linear(x, w, bias)
        torch.testing.assert_close(native.sparse_linear_cuda(x, packed, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "columns, choice",
    [
        (100, {"k": 700}),
        (100, {"nm": (2, 4)}),
        (300, {"k": 2000}),
        (300, {"mask": True}),
        (256, {"nm": (4, 8)}),
        (258, {"nm": (2, 6)}),
    ],
    ids=str,
)
def test_obs_sweep_in_pieces(columns, choice):
    w, r = strided(19, columns, columns + 5, 0), factor_of_inverse(columns, 1)
    if "mask" in choice:
        choice = {"mask": rand(columns, 19).T > 0}
    exact = w.double()
    expected = reference.obs_sweep(exact, r.double(), **choice)
    keep, error, loss = native.obs_sweep_cuda(w, r.T.contiguous().T, **choice)
    assert torch.equal(keep, expected[0])
    torch.testing.assert_close(w.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected[2], rtol=1e-5, atol=1e-6)


def test_obs_sweep_refuses_groups_wider_than_a_launch():
    with pytest.raises(ValueError, match="at most 128 weights while it sweeps, got 3:200"):
        native.obs_sweep_cuda(rand(2, 200), factor_of_inverse(200, 0), nm=(3, 200))


def test_cholesky_and_solve_of_transposed_systems():
    x, damping = rand(3, 50, 20), torch.tensor([0.1, 0.2, 0.3])
    a, b = (x.mT @ x).mT, rand(3, 4, 20).mT
    factor, info = native.cholesky_cuda(a, damping=damping)
    expected = reference.cholesky(a.double(), damping=damping.double())[0]
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-4)
    solved, info = native.cholesky_solve_cuda(a, b, damping=damping)
    torch.testing.assert_close(solved.double(), torch.cholesky_solve(b.double(), expected), rtol=1e-3, atol=1e-4)
    assert info.tolist() == [0, 0, 0]


def test_empty_tensors_pass():
    assert native.select_mask_cuda(torch.empty(0, 8), 3).shape == (0, 8)
    assert native.nm_mask_cuda(torch.empty(5, 0), 2, 4).shape == (5, 0)
    keep, error, loss = native.obs_sweep_cuda(torch.empty(0, 8), torch.eye(8), nm=(2, 4))
    assert keep.shape == (0, 8) and loss.shape == (0,)
    assert native.obs_sweep_cuda(torch.empty(3, 0), torch.empty(0, 0), k=0)[2].tolist() == [0, 0, 0]
    assert native.cholesky_solve_cuda(torch.empty(0, 4, 4), torch.empty(0, 4, 2))[0].shape == (0, 4, 2)


def test_a_fault_surfaces_at_the_next_call_and_once():
    w = rand(4, 16)
    w[1, 3] = torch.nan
    kept = native.select_mask_cuda(w, 8, apply=True)
    assert kept[1].all() and (kept.sum(1) == torch.tensor([8, 16, 8, 8])).all()
    with pytest.raises(ValueError, match="select_mask: w has NaN scores"):
        native.nm_mask_cuda(rand(4, 16), 2, 4)
    native.nm_mask_cuda(rand(4, 16), 2, 4)


@pytest.mark.parametrize("column", [5, 250])
def test_a_bad_factor_leaves_the_whole_block(column):
    w, r = rand(6, 300), factor_of_inverse(300, 0)
    r[column, column:] = torch.nan
    before = w.clone()
    keep, error, loss = native.obs_sweep_cuda(w, r, mask=torch.zeros(6, 300, dtype=torch.bool))
    assert torch.equal(w, before) and keep.all() and (error == 0).all() and loss.isnan().all()
    with pytest.raises(ValueError, match="obs_sweep: the sweep needs finite w and r"):
        native.select_mask_cuda(w, 3)


def test_errors_name_the_op_and_its_sizes(module):
    with pytest.raises(ValueError, match=r"compress_24 on the cuda back-end \(rows = 32, columns = 48\): rows"):
        native.compress_24_cuda(torch.zeros(32, 48, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"obs_sweep on the cuda back-end \(rows = 2, columns = 129, N = 2, M = 4\)"):
        module.obs_sweep_cuda(0, 0, 2, 129, 129, 0, 129, 0, 2, 4, 0, 0, 129, 0, 0, 0)


def test_launches_name_the_device_and_the_stream_of_their_tensors(monkeypatch):
    current, calls = [], []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    def stream(device):
        assert current == [device]
        return SimpleNamespace(cuda_stream=42)

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(native, "_C", SimpleNamespace(nm_mask_cuda=lambda *given: calls.append((*given, *current))))
    device = torch.device("cuda:1")
    LAUNCH("nm_mask", device, 7, 8)
    assert calls == [(1, 7, 8, 42, device)] and current == []


@pytest.mark.parametrize(
    "machine, reason",
    [
        ({}, None),
        ({"CUSIM_DRIVER": 13020}, None),
        (
            {"CUSIM_DRIVER": 12040},
            "made with CUDA 13.0, newer than the driver's 12.4: update the NVIDIA driver, or rebuild "
            "with a toolkit of CUDA 12",
        ),
        ({"CUSIM_DRIVER": 0}, "no NVIDIA driver"),
        ({"CUSIM_DEVICES": 0}, "CUDA finds no GPU"),
        ({"CUSIM_STATUS": 803}, "CUDA reports: system has unsupported display driver"),
    ],
)
def test_a_build_that_the_driver_cannot_run_says_so(module, monkeypatch, machine, reason):
    """And ``auto`` takes the next back-end."""
    for name, value in machine.items():
        monkeypatch.setenv(name, str(value))
    complete = SimpleNamespace(with_cuda=True, cuda_architectures="90a-real", cuda_unusable=module.cuda_unusable)
    monkeypatch.setattr(native, "_C", complete)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(ops.AUTO["cuda"], "nm_mask", ("cuda", "reference"))
    monkeypatch.setattr(choice, "_loaded", {})
    usable = [candidate["name"] for candidate in ops.candidates("cuda")["nm_mask"]]
    if reason is None:
        assert native.unusable("cuda") is None and usable == ["cuda", "reference"]
    else:
        assert reason in native.unusable("cuda") and usable == ["reference"]
        with ops.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for nm_mask but cannot run"):
            choice.implementation("nm_mask", torch.device("cuda:0"))


@pytest.mark.parametrize(
    "architectures, runs, does_not",
    [
        ("80-real", ["8.0", "8.6", "8.9"], ["9.0", "7.5"]),
        ("86-real", ["8.6", "8.9"], ["8.0"]),
        ("90a-real", ["9.0"], ["10.0", "8.9"]),
        ("120f-real", ["12.0", "12.1"], ["10.0"]),
        ("80-real;120-real;120-virtual", ["8.9", "12.0", "13.0"], ["9.0", "10.0"]),
        ("", [], ["9.0"]),
    ],
)
def test_which_gpus_a_build_covers(architectures, runs, does_not):
    for capability in runs + does_not:
        assert native._has_image(architectures, *map(int, capability.split("."))) == (capability in runs)


def test_cuda_kernels_prove_themselves_in_the_simulation_and_a_planted_fault_is_found(built, tmp_path, monkeypatch):
    """In a process of their own, as on a GPU."""
    monkeypatch.setenv("PYPRUNE_SIMULATED", str(built))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PYPRUNE_QUALIFY")
    candidates = {
        key: [
            {"name": "cuda", "module": "simulated_ops", "function": function},
            {"name": "reference", "module": "pyprune.ops.reference", "function": classes.op_of(key)},
        ]
        for key, function in {
            "nm_mask": "nm_mask_past_the_end",
            "select_mask/row": "select_mask_cuda",
            "obs_sweep": "obs_sweep_cuda",
            "cholesky/small": "cholesky_cuda",
        }.items()
    }
    monkeypatch.setattr(native, "_C", None)  # what the verdicts depend on, in this process: nothing that was built
    found = qualification.verdicts("cpu", candidates)
    assert [key for key, verdict in found.items() if verdict["failed"]] == ["nm_mask"], found
    assert "wrote outside" in found["nm_mask"]["failed"]["cuda"]
    assert all(found[key]["errors"]["cuda"] < 1e-5 for key in candidates if key != "nm_mask")
