"""Whole runs on a GPU against the same runs on the CPU: masks up to ties, models up to rounding, nothing left over."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file

import pyprune
from pyprune.config import Evaluation, Reconstruction
from pyprune.pipeline.prune import prune

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def several_batches_a_pass(monkeypatch):
    """More batches than the ring has buffers: 3 sequences of 24 tokens each, where a GPU would take all at once."""
    monkeypatch.setattr("pyprune.execution.executor.CPU_TOKENS", 3 * 24)
    monkeypatch.setattr("pyprune.execution.executor.GPU_TOKENS", 3 * 24)


def run(device, architecture="llama", **fields):
    texts = {} if architecture in tiny.ENCODERS else {"evaluation": Evaluation(text=tiny.ids(3, 24), dtype="float32")}
    settings = {"calibration": tiny.ids(15, 24), **texts, **fields}
    return prune(tiny.model(architecture), device=device, progress=False, **settings)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(method="magnitude"),
        dict(method="wanda"),
        dict(method="sparsegpt"),
        dict(method="sparsegpt", pattern="2:4"),
        dict(method="wanda", pattern="4:8"),
        dict(method="sparsegpt", inputs="dense"),
    ],
)
def test_masks_are_the_cpus_up_to_ties(architecture, fields):
    cpu, gpu = (run(device, architecture, **fields) for device in ("cpu", DEVICE))
    one, other = cpu.model.state_dict(), gpu.model.state_dict()
    assert all(value.device.type == "cpu" for value in other.values()), "the model comes back where it was"
    assert min(((one[k] == 0) == (other[k] == 0)).float().mean().item() for k in one) > 0.99
    for a, b in zip(cpu.report["evaluation"], gpu.report["evaluation"]):
        assert b["dense"] == pytest.approx(a["dense"], rel=1e-4)
        assert b["pruned"] == pytest.approx(a["pruned"], rel=5e-3)


@pytest.mark.parametrize("fields", [dict(), dict(pattern="2:4"), dict(method="wanda", reconstruct="refit")], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_recorded_sweeps_give_the_same_bytes(backend, fields, monkeypatch):
    made = [tiny.model("llama", num_hidden_layers=4) for _ in range(2)]
    results = []
    for model, switch in zip(made, ("1", "0")):
        monkeypatch.setenv("PYPRUNE_GRAPHS", switch)
        quiet = {"calibration": tiny.ids(15, 24), "evaluation": Evaluation(enabled=False), "progress": False}
        results.append(prune(model, device=DEVICE, backend=backend, **quiet, **fields))
    assert not [text for found in results for text in found.report["warnings"] if "recorded" in text]
    one, other = (found.model.state_dict() for found in results)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "fields",
    [
        dict(reconstruct="block"),
        dict(reconstruct="block", global_propagation=True),
        dict(reconstruct="cross_block", global_propagation=True),
        dict(reconstruct="layer", global_propagation=True),
    ],
)
def test_reconstruction_ends_at_the_cpus_error(fields):
    if fields["reconstruct"] != "layer":
        fields = fields | {"reconstruction": Reconstruction(epochs=2, lr=1e-3, batch_size=4, autocast="float32")}
    cpu, gpu = (run(device, **fields) for device in ("cpu", DEVICE))
    for a, b in zip(cpu.report["blocks"], gpu.report["blocks"]):
        assert b["error"] == pytest.approx(a["error"], rel=2e-2)
    for name, weight in gpu.model.state_dict().items():
        assert ((weight == 0) == (cpu.model.state_dict()[name] == 0)).float().mean() > 0.99


@pytest.mark.parametrize("architecture", ["llama", "bert", "phi3"])
@pytest.mark.parametrize("inputs", ["dense", "propagated"])
def test_smaller_models_are_the_cpus_up_to_rounding(architecture, inputs):
    fields = dict(pattern="neurons", sparsity=0.5, reconstruct="liar", inputs=inputs)
    cpu, gpu = (run(device, architecture, **fields) for device in ("cpu", DEVICE))
    for a, b in zip(cpu.report["weights"], gpu.report["weights"]):
        assert (a["name"], a["kept"], a["method"], a["tokens"]) == (b["name"], b["kept"], b["method"], b["tokens"])
        assert b["error_held_out"] == pytest.approx(a["error_held_out"], rel=2e-2, abs=1e-5)
    ids = tiny.ids(2, 16)
    with torch.no_grad():
        one, other = (r.model(ids)[0].float() for r in (cpu, gpu))
    assert (one - other).norm() / one.norm() < 2e-2


def test_streamed_gives_the_bytes_of_a_model_in_memory(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "dense")
    for stream in ("never", "always"):
        prune(
            str(tmp_path / "dense"),
            device=DEVICE,
            stream=stream,
            output=str(tmp_path / stream),
            progress=False,
            calibration=tiny.ids(15, 24),
            evaluation=Evaluation(enabled=False),
        )
    one, other = (
        {name: t for path in (tmp_path / stream).glob("*.safetensors") for name, t in load_file(path).items()}
        for stream in ("never", "always")
    )
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cross", [False, True])
def test_a_model_is_refined_to_the_cpus_error(cross):
    found = {}
    for device in ("cpu", DEVICE):
        pruned = run("cpu", method="magnitude", reconstruct="none").model
        settings = Reconstruction(epochs=2, lr=1e-3, batch_size=4, autocast="float32")
        found[device] = pyprune.refine(
            pruned, tiny.model("llama"), tiny.ids(12, 24), cross_block=cross, device=device, settings=settings
        )
    for a, b in zip(found["cpu"], found[DEVICE]):
        assert b["after_calibration"] == pytest.approx(a["after_calibration"], rel=2e-2)


def test_the_ring_goes_round_in_these_runs(monkeypatch):
    from pyprune.execution.activation_store import DEPTH, Ring

    read, counts = Ring.read, []

    def counting(self, items):
        items = list(items)
        counts.append(len(items))
        return read(self, items)

    monkeypatch.setattr(Ring, "read", counting)
    run(DEVICE)
    assert counts and max(counts) > DEPTH


def test_nothing_stays_on_the_device():
    run(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = run(DEVICE, reconstruct="block", global_propagation=True, reconstruction=Reconstruction(epochs=1))
    assert torch.cuda.memory_allocated() - before < 2**20
    assert result.report["peak_device_memory_bytes"] > 0
