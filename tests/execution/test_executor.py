"""The executor: sequences of any length, the fewest passes, memory that runs out."""

from __future__ import annotations

import collections

import pytest
import tiny
import torch

from pyprune.config import ConfigError, Evaluation
from pyprune.execution.activation_store import Store
from pyprune.execution.executor import Activations, Executor, target_tokens
from pyprune.model.blocks import ModelView
from pyprune.pipeline import mask_work
from pyprune.pipeline.prune import prune


def run(model=None, **fields):
    fields = {"evaluation": Evaluation(enabled=False), "calibration": tiny.ids(12, 24), **fields}
    return prune(model or tiny.model("llama"), progress=False, **fields)


def equal(one, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.model.state_dict().values(), other.model.state_dict().values()))


def test_sequences_of_different_length_are_never_padded():
    sequences = [torch.arange(3, 3 + n) for n in (7, 4, 7, 9, 4)]
    activations = Activations(sequences, 2, torch.float32)
    assert {length: tuple(data.shape) for length, data in activations.data.items()} == {
        4: (2, 4, 2),
        7: (2, 7, 2),
        9: (1, 9, 2),
    }
    assert activations.rows == {4: [1, 4], 7: [0, 2], 9: [3]} and activations.tokens == 31
    covered = [row for b in activations.batches(1) for row in activations.rows[b.length][b.start : b.stop]]
    assert sorted(covered) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "fields, whole, stopped",
    [
        (dict(method="magnitude"), [0, 0, 0], [0, 0, 0]),
        (
            dict(method="wanda"),
            [5, 5, 1],
            [3, 3, 3],
        ),  # the first batch finds the order, the rest stop; last: not passed on
        (dict(method="sparsegpt"), [5, 5, 1], [3, 3, 3]),
        (dict(method="wanda", inputs="dense"), [4, 4, 4], [0, 0, 0]),  # one pass in all
    ],
)
def test_blocks_run_no_more_than_the_method_needs(monkeypatch, fields, whole, stopped):
    """12 sequences in 4 batches; calls of a block that reach its end, and that stop before its last product."""
    started, ended = collections.Counter(), collections.Counter()
    forward = Executor.forward

    def counting(self, index, module, hidden, beside):
        started[index] += 1
        out = forward(self, index, module, hidden, beside)
        ended[index] += 1
        return out

    monkeypatch.setattr(Executor, "forward", counting)
    reads = {"calibration": tiny.ids(12, 24), "batch_size": 3} if any(whole) else {}
    prune(tiny.model("llama"), evaluation=Evaluation(enabled=False), progress=False, probe_samples=0, **reads, **fields)
    assert [ended[i] for i in range(3)] == whole
    assert [started[i] - ended[i] for i in range(3)] == stopped


def limited(most: int, where: str):
    """A model that runs out of memory at a layer with more than ``most`` sequences."""
    model = tiny.model("llama")

    def refuse(module, args):
        if args[0].shape[0] > most:
            raise torch.OutOfMemoryError("simulated")

    model.get_submodule(where).register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("where", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("inputs", ["propagated", "dense"])
def test_a_batch_that_does_not_fit_is_halved_and_counted_once(where, inputs, monkeypatch):

    counts = []
    gather = mask_work.gather

    def counting(run, index, *args):
        observer = gather(run, index, *args)
        counts.append({name: s.tokens for name, s in observer.sinks.items()})
        return observer

    monkeypatch.setattr(mask_work, "gather", counting)
    result = run(limited(3, where), batch_size=12, inputs=inputs)
    assert [set(c.values()) for c in counts] == [{12 * 24}] * 3
    assert "ran out of memory" in " ".join(result.report["warnings"]) and "batch_size=3" in " ".join(
        result.report["warnings"]
    )
    monkeypatch.undo()
    plain = run(batch_size=12, inputs=inputs)
    agree = [
        ((p == 0) == (q == 0)).float().mean().item()
        for p, q in zip(result.model.parameters(), plain.model.parameters())
    ]
    assert min(agree) > 0.99


def test_one_sequence_that_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match="one sequence of 24 tokens does not fit on cpu beside block 1.*about 12"):
        run(limited(0, "model.layers.1.mlp.down_proj"))


def test_statistics_that_do_not_fit_are_not_counted_twice(monkeypatch):
    from pyprune.masks.statistics import Statistics

    def refuse(self, x):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(Statistics, "_update", refuse)
    with pytest.raises(ConfigError, match="the statistics of self_attn.q_proj.weight in block 0 do not fit"):
        run()


def test_a_moved_block_is_a_copy_in_the_compute_type():
    view = ModelView(tiny.model("llama"))
    executor = Executor(view, compute_dtype=torch.bfloat16)
    with executor.compute(1) as module:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        for p, q in zip(module.parameters(), view.blocks[1].parameters()):
            assert torch.equal(p, q.bfloat16()) and p.data_ptr() != q.data_ptr()
        assert module.self_attn.config is not None and type(module) is type(view.blocks[1])


def test_cuda_and_cuda_0_are_one_device(monkeypatch):
    """Where a block lies already it is not copied, whichever of the GPU's names was given."""
    from pyprune.execution.device import pick_device

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pyprune.execution.executor.transfers", lambda device, dtype: device)
    view, here = ModelView(tiny.model("llama")), torch.device("cuda:1")
    for name in ("cuda", "cuda:1", torch.device("cuda")):
        executor = Executor(view, device=name, store=Store())
        assert executor.device == executor.transfers == here
    assert pick_device("auto") == here and Executor(view).device == torch.device("cpu")


def test_a_copy_of_a_block_goes_with_its_turn():
    model = tiny.model("llama")
    before = [p.clone() for p in model.parameters()]
    executor = Executor(ModelView(model), compute_dtype=torch.bfloat16)
    with executor.compute(0) as module:
        assert sum(p.numel() for p in module.parameters()) > 0
    assert not any(p.numel() for p in module.parameters()), "memory that its last user still holds"
    with Executor(ModelView(model)).compute(0) as own:
        assert own is model.model.layers[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_tokens_per_batch_follow_the_device_of_the_run_not_what_the_machine_has(monkeypatch):
    """A run on the CPU of a machine with a GPU takes the CPU's batches, and says the same when it is planned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (target_tokens("cpu"), target_tokens(torch.device("cuda", 1))) == (2048, 16384)
    sequences = [torch.zeros(64, dtype=torch.long)] * 300
    executor = Executor(ModelView(tiny.model("llama")), device="cpu")
    on_cpu = executor.embed(sequences)
    assert [b.size for b in on_cpu.batches()] == [32] * 9 + [12]
    assert [b.size for b in on_cpu.like().batches()] == [32] * 9 + [12]
    on_gpu = Activations(sequences, 4, torch.float32, batch_tokens=target_tokens("cuda"))
    assert [b.size for b in on_gpu.batches()] == [256, 44]


def test_bfloat16_is_not_taken_where_its_products_are_forbidden(monkeypatch):
    from pyprune.execution.device import cpu_has_bfloat16

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert cpu_has_bfloat16()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert not cpu_has_bfloat16()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert cpu_has_bfloat16()
