"""``inputs="sequential"`` for heads and neurons: one pass per block, in which they go when all tokens are there."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import zoo
import zoo_reference as reference
from same_bytes import assert_same

import pyprune
from pyprune.config import Calibration
from pyprune.execution.executor import Executor
from pyprune.execution.journal import Interrupted
from pyprune.execution.lanes import Declined
from pyprune.execution.spilling import Spilled
from pyprune.model.blocks import ModelView
from pyprune.structured.groups import find_groups
from pyprune.structured.sequential import SequentialBlock
from pyprune.structured.stop_order import record

IDS, PROBE = tiny.ids(20, 16), tiny.ids(3, 12, seed=9)
DAMPING = 0.02


def pruned(model, **fields):
    settings = {
        "calibration": IDS,
        "inputs": "sequential",
        "pattern": "structured",
        "sparsity": 0.5,
        "probe_samples": 0,
    }
    return pyprune.prune(model, evaluation={"enabled": False}, progress=False, **{**settings, **fields})


def fell_back(result) -> list[str]:
    return [text for text in result.report["warnings"] if "inputs='propagated'" in text]


LANDS = {
    "llama": ("{}.post_attention_layernorm", "{}"),
    "qwen3": ("{}.post_attention_layernorm", "{}"),
    "gpt2": ("{}.ln_2", "{}"),
    "gpt_neox": ("{}", "{}"),
    "cohere": ("{}", "{}"),
    "bert": ("{}.attention.output.LayerNorm", "{}.output.LayerNorm"),
    "mixtral": ("{}.post_attention_layernorm", None),
    "gemma2": (None, None),
}
"""Where what heads and neurons give lands: before a module, at the end of the block, or (None) nowhere but itself."""


def sums(model, consumer: str, block: str, place: str | None) -> torch.Tensor:
    """What the output of a consumer adds up to when the whole model runs, ``[tokens, hidden]``."""
    seen = []
    if place is None:
        module = reference.owner(model, consumer)[0]
        handle = module.register_forward_hook(lambda _, args, out: seen.append(out))
    elif place == "{}":
        module = model.get_submodule(block)
        handle = module.register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    else:
        module = model.get_submodule(place.format(block))
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    reference.forward(model, IDS)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("name", LANDS)
def test_weights_are_those_of_a_float64_reference_that_prunes_group_by_group(name):
    model = zoo.build(name)
    structured = dict(token_weights="uniform", damping=DAMPING, nonstandard="save")
    result = pruned(model, structured=structured)
    assert not fell_back(result)
    assert {row["inputs"] for row in result.report["blocks"]} == {"sequential"}
    dense, walk = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    for one in (dense, walk):
        one.config._experts_implementation = "eager"  # the others have no float64
    blocks, methods = ModelView(model).path, set()
    for row in result.report["weights"]:
        block, place = f"{blocks}.{row['block']}", LANDS[name][row["kind"] == "neurons"]
        expert = row["name"].endswith("]")
        seen = reference.inputs(walk, [row["name"]], IDS)
        (before, _, _), (after, _, _) = (reference.owner(m, row["name"]) for m in (walk, result.model))
        weight, ours = (reference.matrix(m, row["name"]) for m in (model, result.model))
        x = seen[row["name"]]
        kept, clear = reference.neurons(weight, x, row["kept"], row["units"])
        assert clear, "the case is a tie: choose another seed"
        kept = torch.arange(weight.shape[1]).reshape(row["units"], -1)[kept].flatten()
        bias = error = None
        if not expert:
            error = sums(dense, row["name"], block, place) - sums(walk, row["name"], block, place)
            if after.bias is not None:
                bias = torch.zeros(len(weight)) if before.bias is None else before.bias.data
        methods.add(row["method"])
        if row["method"] == "none":
            new, moved = weight[:, kept], bias
        else:
            new, moved = reference.liar(weight, bias, x, kept, DAMPING, row["method"] == "liar", error)
        assert (ours - new).norm() <= 1e-3 * new.norm(), row["name"]
        theirs = reference.matrix(walk, row["name"])
        theirs.zero_()
        theirs[:, kept] = ours.double()
        if bias is not None:
            assert (after.bias.data - moved).norm() <= 1e-3 * max(moved.norm(), new.norm()), row["name"]
            before.bias = torch.nn.Parameter(after.bias.data.double())
    assert "liar" in methods
    out = [reference.forward(m, PROBE).double() for m in (walk, result.model)]
    assert (out[0] - out[1]).norm() < 1e-4 * out[0].norm(), "nothing else changed"


@pytest.mark.parametrize("fields", [
    dict(criterion="obs_greedy"),
    dict(pattern="neurons", reconstruct="mask_tuning"),
    dict(pattern="heads", reconstruct="bias", structured={"head_scope": "queries"}),
    dict(reconstruct="none"),
    dict(criterion="fisher"),
    dict(pattern="neurons", structured={"allocation": "global", "nonstandard": "pad"}),
    dict(compute_dtype="bfloat16", batch_size=3),
], ids=str)  # fmt: skip
def test_every_way_to_choose_and_repair_is_what_propagated_inputs_make_of_it(fields):
    """For heads and neurons both ways see the same inputs; this one sees them in one pass."""
    data = Calibration(source=[*IDS, *PROBE], num_samples=len(IDS), seq_len=16, held_out=len(PROBE))
    want, got = (pruned(tiny.model("llama"), inputs=inputs, probe_samples=2, calibration=data, **fields)
                 for inputs in ("propagated", "sequential"))  # fmt: skip
    assert not fell_back(got)
    close = dict(rtol=2e-2, atol=2e-2) if "compute_dtype" in fields else dict(rtol=1e-4, atol=1e-5)
    for (name, one), (_, other) in zip(want.model.named_parameters(), got.model.named_parameters()):
        torch.testing.assert_close(one, other, msg=name, **close)
    for key in ("error", "error_held_out"):
        for one, other in zip(want.report["blocks"], got.report["blocks"]):
            assert one[key] == pytest.approx(other[key], rel=5e-2 if "compute_dtype" in fields else 1e-4), key
    left = [[{**row, "damping": 0} for row in one.report["structured"]["layers"]] for one in (want, got)]
    assert [(row["name"], row["kept"], row["method"]) for row in left[0]] == [
        (row["name"], row["kept"], row["method"]) for row in left[1]
    ]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("inputs", ["propagated", "sequential"])
def test_batches_change_nothing_beyond_rounding(architecture, inputs):
    """Nor do they decide which of an expert's tokens are set aside for the choice of λ."""
    one, other = (pruned(tiny.model(architecture), batch_size=size, inputs=inputs) for size in (20, 3))
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_every_block_runs_once_but_for_the_dense_stream(monkeypatch):
    calls, forward = [], Executor.forward

    def counting(self, index, module, hidden, beside=None):
        calls.append((index, len(hidden)))
        return forward(self, index, module, hidden, beside)

    monkeypatch.setattr(Executor, "forward", counting)
    pruned(tiny.model("llama"), batch_size=20)
    assert [calls.count((index, 20)) for index in range(3)] == [2, 2, 2]
    calls.clear()
    pruned(tiny.model("llama"), batch_size=20, reconstruct="none")
    assert [calls.count((index, 20)) for index in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral", "gemma2"])
def test_a_resumed_run_has_the_same_bytes(architecture, tmp_path, stop_after):
    """The streams pass a finished block again as they did when it was pruned: products of the full width, which a
    smaller block might round otherwise."""
    zoo.build(architecture).save_pretrained(tmp_path / "dense")

    def run(output, **more):
        fields = dict(output=str(tmp_path / output), probe_samples=2, criterion="obs", **more)
        return pruned(str(tmp_path / "dense"), structured={"nonstandard": "save"}, batch_size=7, **fields)

    whole = run("whole")
    stop_after(1)
    with pytest.raises(Interrupted):
        run("parts")
    stop_after(-1)
    ended = run("parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    for one, other in zip(whole.report["blocks"], ended.report["blocks"]):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def same_as_propagated(result, model, rounding: float = 0, **fields):
    """rounding: of blocks that were pruned in passing before."""
    want = pruned(model, inputs="propagated", **fields)
    for (name, one), (_, other) in zip(want.model.named_parameters(), result.model.named_parameters()):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding, msg=name)
    for one, other in zip(want.report["blocks"], result.report["blocks"]):
        assert one["error"] == other["error"] or one["error"] == pytest.approx(other["error"], rel=rounding)


def test_a_block_that_is_declined_halfway_is_pruned_as_by_propagated_inputs(monkeypatch):
    choose, calls = SequentialBlock._choose, []

    def decline(self, i, split):
        choose(self, i, split)
        calls.append((self.index, i))
        if calls[-1] == (1, 0):  # the heads of the second block are repaired already
            raise Declined("of a test's whim")

    monkeypatch.setattr(SequentialBlock, "_choose", decline)
    result = pruned(tiny.model("llama"), probe_samples=2)
    assert fell_back(result) == [
        f"block {index} was pruned as by inputs='propagated': of a test's whim" for index in (1, 2)
    ]
    assert [row["inputs"] for row in result.report["blocks"]] == ["sequential", "propagated", "propagated"]
    assert len(result.report["weights"]) == 6
    same_as_propagated(result, tiny.model("llama"), 1e-5, probe_samples=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mixtral"])
def test_passes_that_there_is_no_room_for_spill_and_give_the_same_bytes(architecture, monkeypatch):
    spilled, out = [], Spilled.out

    def noting(self, alive):
        out(self, alive)
        spilled.append(len(self._away))

    monkeypatch.setattr(Spilled, "out", noting)
    fields = dict(structured={"nonstandard": "save"}, batch_size=4, probe_samples=2)
    want = pruned(zoo.build(architecture), **fields)
    assert not spilled
    got = pruned(zoo.build(architecture), memory_budget_gb=1e-6, **fields)
    assert max(spilled) > 1 and not fell_back(got)
    for (name, one), (_, other) in zip(want.model.named_parameters(), got.model.named_parameters()):
        assert torch.equal(one, other), name


def order(model, index: int = 0):
    view = ModelView(model)
    executor = Executor(view)
    groups = find_groups(view, "structured")
    with executor.compute(index) as module:
        return record(executor, index, module, groups[index], executor.embed(list(tiny.ids(2, 16))))


def test_stops_are_where_outputs_land():
    places = [stop.groups for stop in order(zoo.build("llama")).stops]
    assert places == [(0,), (1,)], "heads, then neurons"
    assert [stop.groups for stop in order(zoo.build("gpt_neox")).stops] == [(0, 1)], "both at the end of the block"
    experts = order(zoo.build("mixtral")).stops
    assert [stop.groups for stop in experts] == [(k,) for k in range(len(experts))]
    assert [stop.place[1] for stop in experts[1:]] == list(range(len(experts) - 1)), "one after the other"


def test_a_sum_that_is_copied_before_it_is_read_is_seen_by_the_recorded_pass():
    model = tiny.model("llama")

    class Copies(type(model.model.layers[0])):
        def forward(self, hidden_states, **kwargs):
            out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            total = hidden_states + out
            residual = total * 1.0  # what is added to the sum later does not reach it
            return residual + self.mlp(self.post_attention_layernorm(total))

    for block in model.model.layers:
        block.__class__ = Copies
    found = order(model)
    assert found.trouble == "what its heads or neurons give goes other ways than to the residual sum"
    result = pruned(model)
    assert len(fell_back(result)) == 3
    same_as_propagated(result, model)
