"""Weights on a simulated GPU: all of them for a run, or each block when it is its turn; the same results."""

from __future__ import annotations

import pytest
import simulated_gpu
import tiny
import torch

from pyprune.config import Evaluation
from pyprune.execution.executor import Executor
from pyprune.execution.residency import Arrivals, resident, sent, weight_bytes
from pyprune.model.blocks import ModelView
from pyprune.pipeline.prune import prune

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: tests/pipeline/test_gpu_end_to_end.py"
)
GPU = torch.device("cuda:0")


def test_a_model_that_fits_is_there_for_the_duration():
    model = tiny.model("llama", num_hidden_layers=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for room, copies, there in (
        (4 * weight_bytes(model), 1, True),
        (4 * weight_bytes(model), 3, False),
        (1000, 1, False),
    ):
        with simulated_gpu.present(room), pytest.raises(KeyError), resident(model, GPU, copies):
            assert {p.is_cuda for p in model.parameters()} == {there}
            raise KeyError("the run failed")
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "back, and as they were"


def test_a_model_that_runs_out_of_memory_on_its_way_stays_at_home(monkeypatch):
    model = tiny.model("llama", num_hidden_layers=1)
    with simulated_gpu.present():
        to = torch.nn.Module.to

        def full(module, device, *args):
            to(module.model.layers, device)
            if torch.device(device).type == "cuda":
                raise torch.OutOfMemoryError("full")
            return to(module, device)

        with monkeypatch.context() as m:
            m.setattr(torch.nn.Module, "to", full)
            with resident(model, GPU):
                assert not any(p.is_cuda for p in model.parameters())


def test_blocks_that_arrive_give_the_model_of_weights_that_stay():
    models = []
    for memory in (10**11, 1000):
        with simulated_gpu.present(memory):
            result = prune(
                tiny.model("llama"),
                method="wanda",
                calibration=tiny.ids(6, 16),
                evaluation=Evaluation(enabled=False),
                progress=False,
                device="cuda",
            )
        models.append(result.model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_the_next_block_is_on_its_way_while_one_is_at_work_and_is_used_once():
    model = tiny.model("llama")
    with simulated_gpu.present():
        executor = Executor(ModelView(model), device=GPU)
        with executor.compute(0, ahead=1) as first:
            arrived = executor.arrivals._coming[1].result()[0]
            assert set(arrived) == {name for name, _ in model.model.layers[1].named_parameters()} and first.mlp
        with executor.compute(1, ahead=2) as second:
            assert second.mlp.up_proj.weight.inside.data_ptr() == arrived["mlp.up_proj.weight"].inside.data_ptr()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight += 1
        with executor.compute(1) as again:
            assert torch.equal(again.mlp.up_proj.weight.to("cpu"), model.model.layers[1].mlp.up_proj.weight)


def test_a_block_without_room_beside_the_other_comes_in_its_turn():
    with simulated_gpu.present():
        arrivals = Arrivals(GPU)
        arrivals.send(3, lambda: {"weight": torch.ones(2)}, torch.bfloat16)
        assert arrivals.take(2) == {} and arrivals.take(3)["weight"].dtype == torch.bfloat16
        assert arrivals.take(3) == {}

        def full():
            raise torch.OutOfMemoryError("full")

        arrivals.send(4, full, torch.float32)
        assert arrivals.take(4) == {}


def test_several_tensors_travel_in_one_copy_per_type():
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 50).T,
        "b": torch.nn.Parameter(torch.randn(7).bfloat16()),
        "c": torch.randn(2, 2, 2),
        "d": torch.arange(5),
        "e": torch.randn(0, 4),
    }
    assert not sent(tensors, torch.device("cpu"))
    with simulated_gpu.present() as waits:
        here = tensors | {"f": torch.ones(3).to(GPU)}
        waits.clear()
        found = sent(here, GPU, torch.bfloat16)
        assert not waits and set(found) == set(tensors), "what is there already is not sent"
        for name, tensor in tensors.items():
            want = tensor.detach().bfloat16() if tensor.is_floating_point() else tensor
            got = found[name]
            assert got.is_cuda and got.dtype == want.dtype and torch.equal(got.inside, want)
        assert {t.dtype for t in sent(here, GPU).values()} == {torch.float32, torch.bfloat16, torch.int64}
        found["a"].zero_()
        assert found["c"].any(), "each has memory of its own"
