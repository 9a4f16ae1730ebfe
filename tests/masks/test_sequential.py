"""``inputs="sequential"``: one pass a block, every group of layers pruned when all tokens have arrived at it."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import tiny
import torch
import zoo
import zoo_reference as reference

import pyprune
from pyprune.config import Calibration, ConfigError, PruneConfig, Reconstruction

IDS, PROBE = tiny.ids(16, 16), tiny.ids(2, 12, seed=9)
CHOSEN = [
    "llama",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon",
    "falcon_new",
    "bloom",
    "opt",
    "bert",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "modernbert",
    "cohere",
]


def pruned(model, **fields):
    fields = {"calibration": IDS, "probe_samples": 0, "inputs": "sequential", **fields}
    return pyprune.prune(model, evaluation={"enabled": False}, progress=False, **fields)


def fell_back(result) -> list[str]:
    return [text for text in result.report["warnings"] if "inputs='propagated'" in text]


def passes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pyprune-pass"]


def groups(model, names: list[str], ids: torch.Tensor) -> list[list[str]]:
    """Names of the weights that read the same tensor, in the order in which a forward pass comes to them."""
    found: list[tuple[torch.Tensor, list[str]]] = []
    experts: dict[torch.nn.Module, dict[str, list[str]]] = {}
    handles = []
    for name in names:
        module, key, expert = reference.owner(model, name)
        if expert is not None:
            experts.setdefault(module, {}).setdefault(key, []).append(name)
            continue

        def see(module, args, name=name):
            same = [members for x, members in found if x is args[0]]
            if same:
                same[0].append(name)
            else:
                found.append((args[0], [name]))

        handles.append(module.register_forward_pre_hook(see))
    for module, keys in experts.items():

        def see_all(module, args, keys=keys):
            found.extend(
                (torch.empty(0), [name])
                for key in ("gate_up_proj", "up_proj", "down_proj")
                for name in keys.get(key, [])
            )

        handles.append(module.register_forward_pre_hook(see_all))
    reference.forward(model, ids)
    for handle in handles:
        handle.remove()
    return [members for _, members in found]


@pytest.mark.parametrize(
    "method, pattern", [("wanda", "unstructured"), ("sparsegpt", "unstructured"), ("sparsegpt", "2:4")]
)
@pytest.mark.parametrize("name", CHOSEN)
def test_weights_are_those_of_a_reference_that_prunes_group_by_group(name, method, pattern):
    model = zoo.build(name)
    result = pruned(model, method=method, pattern=pattern, sparsity=0.5)
    assert not fell_back(result)
    walk = copy.deepcopy(model).double()
    walk.config._experts_implementation = "eager"  # the others have no float64
    rows = result.report["weights"]
    for block in sorted({row["block"] for row in rows}):
        names = [row["name"] for row in rows if row["block"] == block]
        order = groups(walk, names, IDS)
        assert len(order) > 2 and sorted(sum(order, [])) == sorted(names)
        for members in order:
            seen = reference.inputs(walk, members, IDS)
            for weight_name in members:
                dense, ours = (reference.matrix(m, weight_name) for m in (model, result.model))
                keep = ours != 0
                if weight_name not in seen:  # an expert that no token reached
                    continue
                x = seen[weight_name]
                if method == "wanda":
                    truth, clear = reference.wanda(dense, x, 0.5)
                    assert torch.equal(keep[clear], truth[clear]) and clear.double().mean() > 0.9, weight_name
                    assert torch.equal(ours[keep], dense[keep]), weight_name
                    continue
                swept, truth = reference.sparsegpt(dense, x, 0.5, (2, 4) if pattern == "2:4" else None)
                h = reference.hessian(x)
                best = reference.objective(swept - dense, h)
                assert (keep == truth).double().mean() >= 0.99, weight_name
                if not torch.equal(keep, truth):  # near-ties fell the other way: the same sweep on the same mask
                    swept, _ = reference.sparsegpt(dense, x, 0.5, None, mask=keep)
                lost = [reference.objective(w - dense, h) for w in (ours, swept)]
                assert lost[0] == pytest.approx(lost[1], rel=1e-3) and lost[0] < 1.02 * best, weight_name
            for weight_name in members:  # the next group sees what the package made of this one
                reference.matrix(walk, weight_name).copy_(reference.matrix(result.model, weight_name))
    out, expected = (reference.forward(m, PROBE).double() for m in (result.model, walk))
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "qwen2_moe"])
def test_with_global_propagation_each_group_is_fitted_to_the_dense_stream(name):
    """The sweep begins at the weights that fit the dense outputs behind the pruned groups before: a float64 walk."""
    model = zoo.build(name)
    result = pruned(model, global_propagation=True, batch_size=5)
    assert not fell_back(result) and {row["inputs"] for row in result.report["blocks"]} == {"sequential"}
    dense_model, walk = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    for one in (dense_model, walk):
        one.config._experts_implementation = "eager"  # the others have no float64
    rows = result.report["weights"]
    for block in sorted({row["block"] for row in rows}):
        for members in groups(walk, [row["name"] for row in rows if row["block"] == block], IDS):
            seen, ahead = (reference.inputs(m, members, IDS) for m in (walk, dense_model))
            for weight_name in members:
                dense, ours = (reference.matrix(m, weight_name) for m in (model, result.model))
                if weight_name in seen:
                    x, start = seen[weight_name], dense.double()
                    h = reference.hessian(x)
                    if ".experts." not in weight_name:  # the two streams send their experts different tokens
                        cross = (ahead[weight_name] - x).T @ x / len(x)
                        start = start + start @ cross @ torch.linalg.inv(h)
                    keep = ours != 0
                    swept, truth = reference.sparsegpt(start, x, 0.5, None)
                    assert (keep == truth).double().mean() >= 0.99, weight_name
                    swept, _ = reference.sparsegpt(start, x, 0.5, None, mask=keep)
                    assert (ours - swept).norm() < 1e-3 * swept.norm(), weight_name
                reference.matrix(walk, weight_name).copy_(ours)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reconstruction": {"select": "validation"}},
        {"reconstruct": "block", "reconstruction": {"layerwise_target": "dense", "epochs": 1}},
        {"reconstruct": "cross_block", "reconstruction": {"layerwise_target": "dense", "epochs": 1}},
    ],
    ids=str,
)
def test_the_dense_stream_passes_each_block_once_and_no_more(fields, monkeypatch):
    """A block's own forward is called as often as the plan says, whether the streams part or not."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from pyprune.planning.costs import passes_of

    calls, forward = Counter(), LlamaDecoderLayer.forward

    def counting(block, hidden, *args, **kwargs):
        if not torch.is_grad_enabled():
            calls[block.self_attn.layer_idx, hidden.shape[1]] += len(hidden)
        return forward(block, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counting)
    held_out = int("reconstruction" in fields and "select" in fields["reconstruction"])
    data = Calibration(source=[*tiny.ids(8, 16), *tiny.ids(held_out, 9)], num_samples=8, seq_len=16, held_out=held_out)
    settings = dict(calibration=data, probe_samples=held_out, global_propagation=True, **fields)
    result = pruned(tiny.model("llama", num_hidden_layers=4), batch_size=3, **settings)
    planned = passes_of(PruneConfig(**{**settings, "inputs": "sequential", "sparsity": 0.5}))
    probes = {16: 0, 9: 0} if not held_out else {16: 5}
    assert [calls[index, 16] - probes[16] for index in (1, 2)] == [8 * planned.forward] * 2
    assert planned.dense == 1 and not fell_back(result)


def test_a_block_that_is_declined_with_its_dense_stream_ahead_is_pruned_as_by_propagated_inputs():
    fields = dict(global_propagation=True, calibration=IDS, probe_samples=2)
    result = pruned(odd(), batch_size=1, **fields)
    if not fell_back(result):
        pytest.fail("the block was to be declined")
    same_as_propagated(result, odd(), batch_size=1, **fields)


def linear_layers(model) -> dict[str, torch.nn.Module]:
    return {
        name: part
        for name, part in model.get_submodule("model.layers").named_modules()
        if isinstance(part, torch.nn.Linear)
    }


def test_every_product_is_computed_once_for_every_batch():
    model, counts = tiny.model("llama"), Counter()
    for name, part in linear_layers(model).items():
        part.register_forward_hook(lambda *given, name=name: counts.update([(name, *given[1][0].shape[:2])]))
    pruned(
        model,
        calibration={"source": tiny.ids(14, 24), "num_samples": 12, "held_out": 2},
        batch_size=4,
        probe_samples=2,
        in_place=True,
    )
    for name in linear_layers(model):
        last = name.startswith("2.")
        # the last block's output is needed of the error probes alone: the others' passes end before its last product
        assert counts[name, 4, 24] == (0 if name == "2.mlp.down_proj" else 3), name
        # calibration and held-out sequences of the probes, in the dense and in the pruned stream
        assert counts[name, 2, 24] == 4, (name, last)
        # the order of the groups is recorded once, on one sequence
        assert counts[name, 1, 24] == (1 if name.startswith("0.") else 0), name


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bert"])
def test_batches_change_nothing_beyond_rounding(architecture):
    model = tiny.model(architecture)
    sequences = [*tiny.ids(9, 16), *tiny.ids(4, 21, seed=3)]
    settings = {"calibration": {"source": sequences, "num_samples": 13, "held_out": 0}}
    wanda = [pruned(model, method="wanda", batch_size=size, **settings).model.state_dict() for size in (1, 3, None)]
    for other in wanda[1:]:
        for name, value in wanda[0].items():
            same = ((value == 0) == (other[name] == 0)).float().mean()
            assert same > 0.998, f"{name}: near-ties alone may fall the other way"
    one, other = (pruned(model, batch_size=size, **settings).report["weights"] for size in (2, 7))
    assert [row["name"] for row in one] == [row["name"] for row in other]
    assert [row["sparsity"] for row in one] == [row["sparsity"] for row in other]


def test_errors_are_those_of_passes_of_their_own():
    model = tiny.model("qwen2")
    calibration = Calibration(source=[*tiny.ids(15, 16)], num_samples=12, held_out=3, seq_len=16)
    result = pruned(model, calibration=calibration, probe_samples=2)
    assert not fell_back(result)
    calibrated, held_out = list(tiny.ids(15, 16))[:2], list(tiny.ids(15, 16))[12:14]
    for key, ids in (("error", calibrated), ("error_held_out", held_out)):
        outputs: list[dict[int, torch.Tensor]] = []
        for member in (model, result.model):
            seen = {}
            for index, block in enumerate(member.model.layers):
                block.register_forward_hook(lambda *given, seen=seen, index=index: seen.update({index: given[2]}))
            reference.forward(member, torch.stack(ids))
            outputs.append({index: out[0] if isinstance(out, tuple) else out for index, out in seen.items()})
        for row in result.report["blocks"]:
            dense, own = (out[row["block"]].double() for out in outputs)
            assert row[key] == pytest.approx(float((dense - own).square().sum() / dense.square().sum()), rel=1e-4)
            assert row["inputs"] == "sequential"
        names = [row["name"] for row in result.report["weights"]]
        seen = reference.inputs(result.model, names, torch.stack(ids))  # behind pruned groups, all final
        for row in result.report["weights"]:
            dense, own = (reference.matrix(m, row["name"]).double() for m in (model, result.model))
            x = seen[row["name"]]
            lost, total = (x @ (dense - own).T).square().sum(), (x @ dense.T).square().sum()
            assert row[key] == pytest.approx(float(lost / total), rel=1e-3), row["name"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "wanda", "pattern": "2:4"},
        {"reconstruct": "refit"},
        {"global_propagation": True},
        {"reconstruct": "block", "reconstruction": Reconstruction(epochs=1)},
    ],
)
def test_a_resumed_run_gives_the_same_bytes(fields, tmp_path, monkeypatch):
    from pyprune.execution.journal import Interrupted, Journal

    settings = {
        "calibration": Calibration(source=tiny.ids(15, 16), num_samples=12, held_out=3, seq_len=16),
        "probe_samples": 2,
        **fields,
    }
    whole = pruned(tiny.model("llama"), output=str(tmp_path / "whole"), **settings)
    for blocks in (1, 2):
        point = Journal.safe_point

        def stopping(self, blocks=blocks, point=point):
            self._stopping = len(self.entries) == blocks
            point(self)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "safe_point", stopping)
            with pytest.raises(Interrupted):
                pruned(tiny.model("llama"), output=str(tmp_path / str(blocks)), **settings)
        # what is free decides where activations lie, and nothing else
        resumed = pruned(
            tiny.model("llama"), output=str(tmp_path / str(blocks)), resume=True, memory_budget_gb=1e-5, **settings
        )
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert [row["error"] for row in resumed.report["blocks"]] == [row["error"] for row in whole.report["blocks"]]
        assert resumed.report["weights"] == whole.report["weights"]
        assert [row["inputs"] for row in resumed.report["blocks"]] == ["sequential"] * 3


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_streamed_and_whole_give_the_same_weights(architecture, tmp_path):
    tiny.model(architecture).save_pretrained(tmp_path / "dense")
    whole, streamed = (
        pruned(str(tmp_path / "dense"), output=str(tmp_path / stream), stream=stream) for stream in ("never", "always")
    )
    assert not fell_back(streamed)
    for (name, one), other in zip(whole.model.state_dict().items(), streamed.model.state_dict().values()):
        assert torch.equal(one, other), name


def test_a_bfloat16_copy_computes_and_the_model_s_own_weights_are_written():
    result = pruned(tiny.model("llama"), compute_dtype="bfloat16")
    plain = pruned(tiny.model("llama"))
    agree = [
        ((p == 0) == (q == 0)).float().mean().item()
        for p, q in zip(result.model.parameters(), plain.model.parameters())
    ]
    assert min(agree) > 0.85 and result.model.dtype == torch.float32 and result.report["sparsity"] == 0.5


@pytest.fixture
def moved(monkeypatch):
    """Bytes that passes which stand still had in memory after each of them went to the store, and that went there."""
    from pyprune.execution import spilling

    kept, gone, out = [], [], spilling.Spilled.out

    def watched(self, alive):
        before = sum(spilling._storage(ref).nbytes() for ref in alive.refs())
        out(self, alive)
        kept.append(sum(spilling._storage(ref).nbytes() for ref in alive.refs()))
        gone.append(before)

    monkeypatch.setattr(spilling.Spilled, "out", watched)
    return kept, gone


SPILLED = ["llama", "gemma2", "gpt2", "falcon", "bloom", "bert", "qwen2_moe", "deepseek_v3", "deberta_v2", "modernbert"]


@pytest.mark.parametrize("name", SPILLED)
def test_activations_that_spill_change_no_bit(name, moved):
    settings = {"batch_size": 4, "probe_samples": 2}
    plain = pruned(zoo.build(name), **settings)
    assert not moved[1]
    result = pruned(zoo.build(name), memory_budget_gb=0, **settings)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[key]), key
    assert result.report["weights"] == plain.report["weights"] and not fell_back(result)
    assert result.report["blocks"] == [
        {**row, "seconds": own["seconds"]} for row, own in zip(plain.report["blocks"], result.report["blocks"])
    ]
    assert not any(moved[0]) and len(moved[1]) >= 4 * 4 and max(moved[1]) > 0 and not passes()


def test_as_many_batches_stay_as_there_is_room_for(moved):
    settings = {"batch_size": 2, "calibration": {"source": tiny.ids(16, 16), "num_samples": 16, "held_out": 0}}
    pruned(tiny.model("llama"), memory_budget_gb=1e-4, **settings)
    some = len(moved[1])
    pruned(tiny.model("llama"), memory_budget_gb=0, **settings)
    assert 0 < some < len(moved[1]) - some


def test_a_tensor_that_one_batch_makes_for_the_others_ends_the_sequential_way(moved):
    kept = []

    class Sharing(type(tiny.model("llama").model.layers[0].mlp)):
        def forward(self, x):
            if not kept and len(x) > 1:
                kept.append(torch.full((x.shape[-1],), 0.5))
            return super().forward(x * kept[0] if kept else x * 0.5)

    def sharing():
        kept.clear()
        model = tiny.model("llama")
        for block in model.model.layers:
            block.mlp.__class__ = Sharing
        return model

    result = pruned(sharing(), batch_size=4, memory_budget_gb=0)
    assert moved[1] and "one batch's pass uses tensors that another's has made" in fell_back(result)[0]
    assert torch.equal(kept[0], torch.full((32,), 0.5)) and not passes()  # its memory is there again
    same_as_propagated(result, sharing(), batch_size=4)


def test_block_reconstruction_begins_with_the_same_layer_wise_step():
    layer = pruned(tiny.model("llama"))
    fields = {"calibration": {"source": tiny.ids(16, 16), "num_samples": 16, "held_out": 0}}
    for reconstruct in ("block", "cross_block"):
        untrained = pruned(
            tiny.model("llama"), reconstruct=reconstruct, reconstruction=Reconstruction(epochs=0), **fields
        )
        assert not fell_back(untrained)
        for name, value in layer.model.state_dict().items():
            assert torch.equal(value, untrained.model.state_dict()[name]), name


@pytest.mark.parametrize("global_propagation", [False, True])
def test_training_lowers_the_error_that_the_layer_wise_step_left(global_propagation):
    result = pruned(
        tiny.model("llama"),
        reconstruct="block",
        global_propagation=global_propagation,
        probe_samples=4,
        calibration={"source": tiny.ids(20, 16), "num_samples": 16, "held_out": 4},
        reconstruction=Reconstruction(epochs=8, lr=1e-3, batch_size=4),
    )
    assert not fell_back(result)
    for row in result.report["blocks"]:
        steps = {step["step"]: step["calibration"] for step in row["steps"]}
        assert steps["block"] < steps["layer"] and row["inputs"] == "sequential"


def same_as_propagated(result, model, **fields) -> None:
    plain = pruned(model, **{**fields, "inputs": "propagated"})
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    assert [{**row, "error": 0} for row in result.report["weights"]] == [
        {**row, "error": 0} for row in plain.report["weights"]
    ]
    assert {row["inputs"] for row in result.report["blocks"]} == {"propagated"}


def test_blocks_that_are_applied_several_times_are_pruned_the_published_way():
    result = pruned(zoo.build("albert"), method="wanda")
    assert "multiplied by several times in a pass" in fell_back(result)[0]
    same_as_propagated(result, zoo.build("albert"), method="wanda")


class Odd(torch.nn.Module):
    """Multiplies by the up projection a second time, for batches of which the first number is positive."""

    def __init__(self, mlp, threshold: float):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.threshold = threshold

    def forward(self, x):
        out = self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        if x[0, 0, 0] > self.threshold:
            out = out + 0.1 * self.up_proj(0.5 * x)[..., : x.shape[-1]]
        return out


def odd(threshold: float = 0.0):
    model = tiny.model("llama")
    for block in model.model.layers:
        block.mlp = Odd(block.mlp, threshold)
    return model


def test_a_batch_that_reads_otherwise_than_the_recorded_one_undoes_the_block():
    model = odd()
    firsts = []
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: firsts.append(args[0][0, 0, 0]))
        for row in IDS:
            model(row[None])
    order = sorted(range(len(IDS)), key=lambda k: firsts[k])
    assert firsts[order[0]] < 0 < firsts[order[-1]]
    ids = IDS[order]  # the one that is recorded does not do it
    result = pruned(odd(), batch_size=1, calibration=ids, probe_samples=2)
    assert "mlp.up_proj.weight does not read the same in every pass" in fell_back(result)[0]
    assert not passes()
    same_as_propagated(result, odd(), batch_size=1, calibration=ids, probe_samples=2)


def test_a_module_that_keeps_something_of_a_pass_is_seen():
    model = tiny.model("llama")

    class Keeping(type(model.model.layers[0].mlp)):
        def forward(self, x):
            self.kept = x.sum()
            return super().forward(x)

    for block in model.model.layers:
        block.mlp.__class__ = Keeping
    result = pruned(model)
    assert "mlp.kept changes during a pass" in fell_back(result)[0]


@pytest.mark.parametrize("layer", ["input_layernorm", "mlp.act_fn"])
def test_an_input_that_is_not_finite_is_named_as_before(layer):
    told = []
    for inputs in ("propagated", "sequential"):
        model = tiny.model("llama")
        model.model.layers[1].get_submodule(layer).register_forward_hook(
            lambda module, args, out: out.index_fill(-1, torch.tensor([3]), float("inf"))
        )
        with pytest.raises(ConfigError, match="is -?inf at calibration sequence 0, token 0, column 3") as caught:
            pruned(model, inputs=inputs, method="wanda")
        told.append(str(caught.value).replace("-inf", "inf"))
    assert told[0] == told[1] and not passes()


def failing(at: int, error: Exception):
    model, calls = tiny.model("llama"), Counter()

    def fail(module, args):
        calls["all"] += 1
        if calls["all"] == at:
            raise error

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    return model


def test_an_exception_in_a_pass_reaches_the_caller_and_leaves_no_thread_and_the_model_alone():
    model = failing(3, ValueError("a model's own"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="a model's own"):
        pruned(model, batch_size=4)
    assert not passes()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_that_run_out_of_memory_are_halved_and_the_block_begins_again():
    model = tiny.model("llama")

    def refuse(module, args):
        if args[0].shape[0] > 5:
            raise torch.OutOfMemoryError("simulated")

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(refuse)
    result = pruned(model, batch_size=12)
    assert not fell_back(result) and not passes()
    assert any(
        "block 1 ran out of memory on cpu with batches of 12 sequences" in text and "batch_size=3" not in text
        for text in result.report["warnings"]
    )
    assert any("batch_size=3" in text for text in result.report["warnings"])
    plain = pruned(tiny.model("llama"), batch_size=3)
    agree = [
        ((p == 0) == (q == 0)).float().mean().item()
        for p, q in zip(result.model.parameters(), plain.model.parameters())
    ]
    assert min(agree) > 0.99


def test_a_thread_that_the_system_refuses_is_no_failure(monkeypatch):
    start = threading.Thread.start

    def refuse(self):
        if self.name == "pyprune-pass" and len(passes()) >= 3:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = pruned(tiny.model("llama"), batch_size=2)
    assert "need a thread each" in fell_back(result)[0] and not passes()
    same_as_propagated(result, tiny.model("llama"), batch_size=2)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(pattern="neurons", sparsity=[0.25, 0.5]), r"prunes to one sparsity, not to a list \(0.25, 0.5\)"),
        (dict(method="magnitude"), "inputs"),
    ],
)
def test_what_it_does_not_serve_is_refused_before_any_work(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        pruned(tiny.model("llama"), **fields)


def test_report_summary_and_model_card_say_which_way_was_used(tmp_path):
    from pyprune.reporting.card import model_card
    from pyprune.reporting.summary import summary_rows

    result = pruned(tiny.model("llama"), output=str(tmp_path / "out"))
    assert (
        "inputs",
        "sequential: of each group of layers behind the pruned groups before it, in one pass",
    ) in summary_rows(result.report)
    assert "- statistics of inputs, sequential: of each group" in model_card(result.report, "out")
    assert "inputs: sequential" in (tmp_path / "out" / "run.yaml").read_text()
    mixed = copy.deepcopy(result.report)
    mixed["blocks"][0]["inputs"] = "propagated"
    text = dict(summary_rows(mixed))["inputs"]
    assert "propagated: of the dense block" in text and "(1 of 3 blocks)" in text and "(2 of 3 blocks)" in text


@pytest.mark.parametrize(
    "fields, passes",
    [
        ({}, {"statistics": 1, "propagation": 0, "dense": 0}),
        ({"reconstruct": "block"}, {"statistics": 1, "propagation": 1, "dense": 1}),
        ({"reconstruct": "block", "global_propagation": True}, {"statistics": 1, "propagation": 1, "dense": 1}),
    ],
)
def test_the_plan_counts_the_passes_that_a_run_makes(fields, passes, tmp_path, monkeypatch):
    from pyprune.execution.executor import Executor

    tiny.model("llama").save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "inputs": "sequential", "probe_samples": 0, **fields}
    found = pyprune.plan(settings)
    assert {name: found["passes"][name] for name in passes} == passes
    counts, forward = Counter(), Executor.forward

    def counting(self, index, module, hidden, beside):
        counts[index, len(hidden)] += 1
        return forward(self, index, module, hidden, beside)

    monkeypatch.setattr(Executor, "forward", counting)
    training = {"reconstruction": Reconstruction(epochs=0)} if fields else {}
    pruned(tiny.model("llama"), batch_size=16, **fields, **training)
    assert counts[1, 16] == sum(passes.values())
    assert [counts[index, 1] for index in range(3)] == [1, 0, 0], "one sequence tells the order of the groups"
