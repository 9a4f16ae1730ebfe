"""Blocks that a model applies several times: calibrated on all applications, pruned once."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf
from hooked import linear_inputs, wanda_mask
from torch import nn

import pyprune
from pyprune.config import ConfigError
from pyprune.execution.executor import Executor
from pyprune.masks.statistics import Statistics, observe
from pyprune.model.blocks import ModelView, weights_of

QUIET = dict(progress=False, evaluation=pyprune.Evaluation(enabled=False))


def albert(groups: int = 1, inner: int = 1, layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = hf.AlbertModel(
        hf.AlbertConfig(
            vocab_size=tiny.VOCABULARY,
            embedding_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_hidden_groups=groups,
            inner_group_num=inner,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim >= 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def shared(order: tuple[int, ...]) -> nn.Module:
    """A LLaMA whose block list holds some blocks several times."""
    model = tiny.model("llama")
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList(layers[k] for k in order)
    model.config.num_hidden_layers = len(order)
    model.config.use_cache = False  # the two places of a block would share their keys
    return model


MODELS = {
    "albert": albert,
    "albert, two groups of two": lambda: albert(2, 2),
    "A A B": lambda: shared((0, 0, 1)),
    "A B A": lambda: shared((0, 1, 0)),
    "A B B C": lambda: shared((0, 1, 1, 2)),
}


def prune(model, **fields):
    return pyprune.prune(model, **{"sparsity": 0.5, "calibration": tiny.ids(8, 24), **QUIET, **fields})


@pytest.mark.parametrize("name", MODELS)
def test_masks_come_from_the_inputs_of_every_application(name):
    model = MODELS[name]()
    truth = linear_inputs(model, tiny.ids(8, 24))
    result = prune(model, method="wanda", inputs="dense")
    names = [row["name"] for row in result.report["weights"]]
    assert len(names) == len(set(names)) == sum(isinstance(m, nn.Linear) for m in ModelView(model).slots.modules())
    for weight in names:
        keep = result.model.get_parameter(weight) != 0
        assert torch.equal(keep, wanda_mask(model.get_parameter(weight).detach(), truth[weight])), weight
    assert result.report["coverage"]["fraction"] == 1 and not result.report["coverage"]["skipped"]


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_is_the_models_own_forward(name):
    model = MODELS[name]()
    view = ModelView(model)
    executor = Executor(view)
    ids = tiny.ids(3, 20)
    stream = executor.embed(list(ids))
    for i in range(len(view.blocks)):
        with executor.compute(i) as module:
            executor.run(i, module, stream, stream)
    with torch.no_grad():
        out = model(ids)
        got = view.complete(ids, stream.data[20])
    for field in ("last_hidden_state", "logits"):
        if hasattr(out, field):
            torch.testing.assert_close(getattr(got, field), getattr(out, field), rtol=1e-4, atol=1e-4)


def test_a_block_behind_a_shared_one_sees_the_pruned_stream():
    """Propagated inputs: the second unit of [A A B] is calibrated behind both applications of the pruned A."""
    model = shared((0, 0, 1))
    result = prune(model, method="wanda")
    half = shared((0, 0, 1))
    half.model.layers[0].load_state_dict(result.model.model.layers[0].state_dict())
    truth = linear_inputs(half, tiny.ids(8, 24))
    for ref in weights_of(half.model.layers[2]):
        weight = f"model.layers.2.{ref.path}"
        keep = result.model.get_parameter(weight) != 0
        assert torch.equal(keep, wanda_mask(half.get_parameter(weight).detach(), truth[weight])), weight


def looped() -> nn.Module:
    """A LLaMA whose forward pass goes through all blocks twice."""
    model = tiny.model("llama", use_cache=False)
    plain = type(model.model.layers).__getitem__

    class Twice(nn.ModuleList):
        def __getitem__(self, index):
            if isinstance(index, slice):
                return [plain(self, i % len(self)) for i in range(2 * len(self))]
            return plain(self, index)

    model.model.layers = Twice(model.model.layers)
    return model


def test_a_loop_over_the_whole_list_is_one_unit():
    model = looped()
    truth = linear_inputs(model, tiny.ids(8, 24))
    assert len(truth["model.layers.0.self_attn.q_proj.weight"]) == 2 * 8 * 24
    result = prune(model, method="wanda", inputs="dense")
    for row in result.report["weights"]:
        keep = result.model.get_parameter(row["name"]) != 0
        assert torch.equal(keep, wanda_mask(model.get_parameter(row["name"]).detach(), truth[row["name"]]))


def test_a_loop_with_something_between_its_blocks_is_refused():
    model = looped()
    inner = type(model.model.layers).__getitem__

    def between(layers, index):
        blocks = inner(layers, index)
        return (
            [lambda hidden, *a, b=b, **k: b(hidden + 1, *a, **k) for b in blocks]
            if isinstance(index, slice)
            else blocks
        )

    type(model.model.layers).__getitem__ = between
    with pytest.raises(ConfigError, match="not each to the output of the one before"):
        ModelView(model)


@pytest.mark.parametrize("reconstruct", ["layer", "block", "cross_block"])
@pytest.mark.parametrize("name", ["albert", "A A B"])
def test_reconstruction_saves_and_reloads(name, reconstruct, tmp_path):
    model = MODELS[name]()
    training = {} if reconstruct == "layer" else {"reconstruction": pyprune.Reconstruction(epochs=2)}
    result = prune(
        model, method="sparsegpt", pattern="2:4", reconstruct=reconstruct, output=str(tmp_path / "out"), **training
    )
    auto = hf.AutoModel if name == "albert" else hf.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "out").eval()
    ids = tiny.ids(2, 16, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids)[0], result.model(ids)[0], rtol=0, atol=0)
    assert "2:4" in pyprune.inspect(tmp_path / "out")["holds"]
    assert 0 < result.report["blocks"][-1]["error"] < 1


@pytest.mark.parametrize(
    "fields,match", [({"pattern": "neurons"}, "applied"), ({"pattern": "heads", "criterion": "magnitude"}, "applied")]
)
@pytest.mark.parametrize("name", ["albert", "A A B"])
def test_structured_pruning_of_shared_blocks_is_refused_before_any_work(name, fields, match, monkeypatch):
    from pyprune.data import calibration

    monkeypatch.setattr(calibration, "load", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(ConfigError, match=match):
        prune(MODELS[name](), **fields)


def test_streaming_shared_blocks_is_refused_before_any_work(tmp_path):
    albert().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="cannot be streamed.*applied"):
        prune(str(tmp_path / "dense"), stream="always", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.safetensors"))


def test_plan_counts_every_application(tmp_path):
    albert(layers=6).save_pretrained(tmp_path / "dense")
    albert(layers=3).save_pretrained(tmp_path / "half")
    flops = [
        pyprune.plan(
            pyprune.PruneConfig(
                model=str(tmp_path / name),
                method="wanda",
                calibration=pyprune.Calibration(num_samples=4, seq_len=16),
                evaluation=pyprune.Evaluation(enabled=False),
            )
        )["flops"]["forward"]
        for name in ("dense", "half")
    ]
    assert flops[0] == pytest.approx(2 * flops[1])


def test_refine_trains_every_application():
    dense = albert()
    pruned = prune(dense, method="magnitude").model
    rows = pyprune.refine(pruned, dense, tiny.ids(8, 24), settings=pyprune.Reconstruction(epochs=4))
    assert rows[0]["after_calibration"] < 0.9 * rows[0]["before_calibration"]


def test_resumed_run_of_shared_blocks_is_the_same(tmp_path, monkeypatch):
    from pyprune.execution.journal import Interrupted, Journal

    fields = dict(method="sparsegpt", reconstruct="block", reconstruction=pyprune.Reconstruction(epochs=1))
    whole = prune(shared((0, 0, 1)), output=str(tmp_path / "whole"), **fields)

    def stop(self):
        raise Interrupted("here")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "safe_point", stop)
        with pytest.raises(Interrupted):
            prune(shared((0, 0, 1)), output=str(tmp_path / "part"), **fields)
    again = prune(shared((0, 0, 1)), output=str(tmp_path / "part"), resume=True, **fields)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_global_propagation_within_one_unit_changes_nothing():
    """Before anything is pruned both streams are the same, in every application: the cross Gram is the Gram."""
    plain = prune(albert(), method="sparsegpt").model
    propagated = prune(albert(), method="sparsegpt", global_propagation=True).model
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(propagated.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_matrix_that_two_blocks_share_is_pruned_once_on_the_inputs_of_both():
    model = tiny.model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    truth = linear_inputs(model, tiny.ids(8, 24))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    result = prune(model, method="wanda", inputs="dense")
    x = torch.cat([truth[name] for name in names])
    keep = [result.model.get_parameter(name) != 0 for name in names]
    assert torch.equal(keep[0], keep[1])
    assert torch.equal(keep[0], wanda_mask(model.get_parameter(names[0]).detach(), x))
    reported = [row["name"] for row in result.report["weights"]]
    assert names[0] in reported and names[1] not in reported and len(reported) == 3 * 7 - 1


def test_a_batch_that_runs_out_of_memory_in_a_later_application_is_counted_once():
    """The first application has counted the whole batch: of its halves, only what came after is new."""
    model, ids = albert(layers=3), tiny.ids(8, 12)
    truth, view = linear_inputs(model, ids), ModelView(model)
    unit = view.blocks[0]

    def refuse(module, args):
        if unit.step == 1 and len(args[0]) > 2:
            raise torch.OutOfMemoryError("simulated")

    unit.get_submodule("0.albert_layers.0.ffn").register_forward_pre_hook(refuse)
    executor = Executor(view, batch_size=8)
    stream = executor.embed(list(ids))
    with executor.compute(0) as module:
        observer = observe(executor, 0, module, weights_of(module), stream, lambda c, d: Statistics(c, d))
    for name, leader in observer.leader.items():
        x = truth[f"{view.path}.{name}"]
        assert observer.sinks[leader].tokens == len(x) == 3 * 8 * 12
        torch.testing.assert_close(observer.sinks[leader].gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)


class _Gated(nn.Module):
    """A block that also reads the embedded tokens of its own sequence."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden, tokens):
        return hidden + self.down(torch.tanh(self.up(torch.cat([hidden, tokens], -1))))


class _LoopedOverTokens(nn.Module):
    """One block applied three times, each time beside the embedded tokens."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.config = hf.PretrainedConfig(vocab_size=tiny.VOCABULARY)
        self.embedding, self.second = (nn.Embedding(tiny.VOCABULARY, width) for _ in range(2))
        self.layers = nn.ModuleList([_Gated(width)])

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        hidden, tokens = self.embedding(input_ids), self.second(input_ids)
        for _ in range(3):
            hidden = self.layers[0](hidden, tokens)
        return hidden


def test_every_application_gets_the_tokens_of_its_own_sequences():
    model, ids = _LoopedOverTokens().eval(), tiny.ids(5, 12)
    view = ModelView(model)
    executor = Executor(view, batch_size=2)
    stream = executor.embed(list(ids))
    assert len(stream.beside) == 1, "one tensor, however often it is handed on"
    executor.run(0, view.blocks[0], stream, stream)
    with torch.no_grad():
        torch.testing.assert_close(stream.data[12], model(ids), rtol=1e-4, atol=1e-5)
    truth = linear_inputs(model, ids)
    result = prune(model, method="wanda", inputs="dense", calibration=ids, batch_size=2)
    for name in ("layers.0.up.weight", "layers.0.down.weight"):
        keep = result.model.get_parameter(name) != 0
        assert torch.equal(keep, wanda_mask(model.get_parameter(name).detach(), truth[name])), name


def test_weights_that_part_after_their_second_input_are_refused():
    """One sink serves all later inputs of a weight, so two weights with one sink must read all of them."""

    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden):
            second, third = hidden + 1, hidden + 2
            return self.a(hidden) + self.b(hidden) + self.a(second) + self.b(second) + self.a(third)

    class Model(_LoopedOverTokens):
        def forward(self, input_ids):
            return self.layers[1](self.layers[0](self.embedding(input_ids)))

    model = Model(8)
    model.layers = nn.ModuleList([Parting(), Parting()])
    with pytest.raises(ConfigError, match="b.weight and a.weight read the same input at first, then different ones"):
        prune(model.eval(), method="wanda")
