"""Blocks whose arguments depend on the tokens, or on what earlier blocks left, get those of their own sequences.

The truth is the whole model run on one sequence at a time (``hooked.py``).
"""

from __future__ import annotations

import copy

import hooked
import pytest
import tiny
import torch
from token_models import MODELS, Synthetic, build, gemma3n

import pyprune
from pyprune.config import ConfigError, Evaluation, Reconstruction
from pyprune.evaluation.block_by_block import Blockwise, measure_streamed
from pyprune.evaluation.perplexity import measure
from pyprune.evaluation.windows import Text
from pyprune.execution.activation_store import Store
from pyprune.execution.executor import Executor, Resident
from pyprune.execution.journal import Interrupted, Journal
from pyprune.model.blocks import ModelView, weights_of
from pyprune.reconstruction.trained_window import TrainedWindow
from pyprune.reconstruction.training import relative_error, train

NONE = Evaluation(enabled=False)


def ragged() -> list[torch.Tensor]:
    return [tiny.ids(1, length, seed=length + k)[0] for k, length in enumerate((12, 7, 12, 20, 7, 12, 12))]


def assert_outputs(stream, truth) -> None:
    for length, rows in stream.rows.items():
        for place, row in enumerate(rows):
            assert (stream.data[length][place] - truth[row]).norm() < 1e-4 * truth[row].norm()


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_models_without_such_arguments_store_nothing(architecture):
    view = ModelView(tiny.model(architecture))
    assert view.tokenwise.numbers(range(len(view.blocks))) == []
    assert Executor(view).embed(list(tiny.ids(2, 8))).beside == {}


@pytest.mark.parametrize("name,count", [("gemma4", 4), ("gemma4 with shared keys", 4), ("zamba2", 1), ("synthetic", 1)])
def test_each_tensor_is_stored_once_with_its_sequences(name, count):
    view = ModelView(build(name))
    assert len(view.tokenwise.numbers(range(len(view.blocks)))) == count
    stream = Executor(view, batch_size=2).embed(ragged())
    assert len(stream.beside) == count
    assert all(
        {length: len(t) for length, t in tensors.items()} == {7: 2, 12: 4, 20: 1} for tensors in stream.beside.values()
    )
    assert stream.like().beside is stream.beside


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_they_give_in_the_whole_model(name, batch_size, budget):
    model, sequences = build(name), ragged()
    truth, _ = hooked.run_whole(model, sequences)
    view = ModelView(model)
    executor = Executor(view, batch_size=batch_size, store=Store(budget))
    stream = executor.embed(sequences)
    ahead = stream.like()
    for index, block in enumerate(view.blocks):
        executor.run(index, block, stream, ahead)  # another target than the source
        assert_outputs(ahead, truth[index])
        executor.run(index, block, stream)
        executor.run(index, block, stream, stream)
        assert_outputs(stream, truth[index])


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_that_is_halved_keeps_its_own_arguments(name):
    model, sequences = build(name), list(tiny.ids(8, 12))
    truth, _ = hooked.run_whole(model, sequences)
    view = ModelView(model)
    executor = Executor(view, batch_size=8)
    stream = executor.embed(sequences)

    def refuse(module, arguments):
        if len(arguments[0]) > 3:
            raise torch.OutOfMemoryError("out of memory")

    for index, block in enumerate(view.blocks):
        executor.batch_size = 8
        handle = block.register_forward_pre_hook(refuse)
        executor.run(index, block, stream, stream)
        handle.remove()
        assert_outputs(stream, truth[index])


@pytest.mark.parametrize("name", MODELS)
def test_a_window_in_training_sees_its_own_sequences(name):
    """Against the outputs of the whole model the unpruned window has no loss, in shuffled micro-batches too."""
    model, sequences = build(name), ragged()
    truth, _ = hooked.run_whole(model, sequences)
    view = ModelView(model)
    executor = Executor(view, batch_size=3)
    stream = executor.embed(sequences)
    last = len(view.blocks) - 1
    for index, block in enumerate(view.blocks):
        for window in ([index], [index, index + 1])[: 1 if index == last else 2]:
            target = stream.like()
            for length, rows in target.rows.items():
                target.data[length].copy_(torch.stack([truth[window[-1]][row] for row in rows]))
            blocks = [copy.deepcopy(view.blocks[i]) for i in window]
            trained = TrainedWindow(executor, window, blocks, [{} for _ in window], torch.float32)
            assert relative_error(trained, [(stream, target)]) < 1e-8
            power = sum(t.square().mean().item() for t in truth[window[-1]]) / len(sequences)
            trace = train(
                trained,
                [(stream, target), (stream, target)],
                Reconstruction(epochs=1, lr=1e-12, batch_size=4, micro_batch_size=2),
            )
            assert trace.loss[0] < 1e-8 * power
        executor.run(index, block, stream, stream)


def test_a_window_in_training_in_another_type_gets_its_arguments_in_it():
    view = ModelView(build("gemma4 with shared keys"))
    executor = Executor(view)
    stream = executor.embed(ragged())
    for index, block in enumerate(view.blocks):
        target = stream.like()
        executor.run(index, block, stream, target)
        trained = TrainedWindow(executor, [index], [copy.deepcopy(block)], [{}], torch.bfloat16)
        assert relative_error(trained, [(stream, target)]) < 1e-3
        executor.run(index, block, stream, stream)


@pytest.mark.parametrize("name", MODELS)
def test_masks_are_those_of_the_whole_model(name):
    model, ids = build(name), tiny.ids(12, 12)
    masks = hooked.wanda_masks(model, hooked.run_whole(model, list(ids))[1])
    for batch_size in (1, 5):
        result = pyprune.prune(
            model,
            method="wanda",
            inputs="dense",
            calibration=ids,
            batch_size=batch_size,
            evaluation=NONE,
            progress=False,
        )
        assert hooked.disagreement(result.model, masks) < 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        dict(method="sparsegpt"),
        dict(method="wanda", reconstruct="block"),
        dict(method="wanda", reconstruct="layer", global_propagation=True),
        dict(method="wanda", reconstruct="cross_block", global_propagation=True),
    ],
    ids=["sparsegpt", "BR", "layer GP", "CR GP"],
)
@pytest.mark.parametrize("name", ["gemma4", "gemma4 with shared keys", "synthetic"])
def test_reported_errors_are_those_of_the_whole_pruned_model(name, fields):
    model, ids = build(name), tiny.ids(8, 12)
    if "block" in fields.get("reconstruct", ""):
        fields = {**fields, "reconstruction": Reconstruction(epochs=1, lr=1e-4, batch_size=4)}
    result = pyprune.prune(
        model, calibration=ids, probe_samples=8, batch_size=3, evaluation=NONE, progress=False, **fields
    )
    dense, pruned = (hooked.run_whole(m, list(ids))[0] for m in (model, result.model))
    for row, want, got in zip(result.report["blocks"], dense, pruned):
        lost = sum((a - b).square().sum() for a, b in zip(want, got))
        assert row["error"] == pytest.approx((lost / sum(a.square().sum() for a in want)).item(), rel=1e-3)


def test_zamba2_is_reported_as_the_whole_pruned_model_is():
    """Its shared transformer is changed again by later blocks, so the last block is compared alone."""
    model, ids = build("zamba2"), tiny.ids(8, 12)
    result = pyprune.prune(
        model, method="wanda", calibration=ids, probe_samples=8, batch_size=3, evaluation=NONE, progress=False
    )
    dense, pruned = (hooked.run_whole(m, list(ids))[0] for m in (model, result.model))
    lost = sum((a - b).square().sum() for a, b in zip(dense[-1], pruned[-1]))
    total = sum(a.square().sum() for a in dense[-1])
    assert result.report["blocks"][-1]["error"] == pytest.approx((lost / total).item(), rel=1e-3)


@pytest.mark.parametrize("reconstruct", ["none", "liar"])
@pytest.mark.parametrize("name", ["gemma4", "synthetic"])
def test_structured_pruning_reports_the_errors_of_the_whole_pruned_model(name, reconstruct):
    model, ids = build(name), tiny.ids(12, 12)
    result = pyprune.prune(
        model,
        pattern="neurons",
        sparsity=0.25,
        criterion="wifv",
        reconstruct=reconstruct,
        calibration=ids,
        probe_samples=12,
        batch_size=5,
        evaluation=NONE,
        progress=False,
        structured=dict(nonstandard="save"),
        ignore=["*per_layer*"] if name == "gemma4" else [],
    )
    dense, pruned = (hooked.run_whole(m, list(ids))[0] for m in (model, result.model))
    for row, want, got in zip(result.report["blocks"], dense, pruned):
        lost = sum((a - b).square().sum() for a, b in zip(want, got))
        assert row["error"] == pytest.approx((lost / sum(a.square().sum() for a in want)).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["gemma4", "gemma4 with shared keys", "zamba2"])
def test_perplexity_block_by_block_is_that_of_the_whole_model(name):
    model = build(name)
    windows = [Text("text", list(tiny.ids(5, 12))), Text("other", list(tiny.ids(3, 20, seed=1)))]
    evaluation = Evaluation(dtype="float32", batch_size=2)
    whole = measure(model, windows, evaluation)
    apart = measure_streamed(Blockwise(ModelView(model), Resident()), windows, evaluation)
    for a, b in zip(whole, apart):
        assert b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-5)


def test_a_streamed_run_gives_the_model_of_a_run_in_memory(tmp_path):
    build("gemma4 with shared keys").save_pretrained(tmp_path / "dense")
    fields = dict(
        method="wanda",
        reconstruct="block",
        global_propagation=True,
        calibration=tiny.ids(8, 12),
        reconstruction=Reconstruction(epochs=1, lr=1e-3, batch_size=4),
        progress=False,
        evaluation=Evaluation(text=tiny.ids(3, 12, seed=1), dtype="float32"),
    )
    one, other = (
        pyprune.prune(str(tmp_path / "dense"), output=str(tmp_path / stream), stream=stream, **fields)
        for stream in ("never", "always")
    )
    assert all(torch.equal(p, q) for p, q in zip(one.model.state_dict().values(), other.model.state_dict().values()))
    for a, b in zip(one.report["evaluation"], other.report["evaluation"]):
        assert a["pruned"] == pytest.approx(b["pruned"], rel=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    fields = dict(
        method="wanda",
        reconstruct="cross_block",
        global_propagation=True,
        calibration=tiny.ids(8, 12),
        reconstruction=Reconstruction(epochs=1, lr=1e-3, batch_size=4),
        evaluation=NONE,
        progress=False,
    )
    whole = pyprune.prune(build("gemma4 with shared keys"), **fields).model
    point = Journal.safe_point

    def stopping(self):
        self._stopping = len(self.entries) == 3
        point(self)

    monkeypatch.setattr(Journal, "safe_point", stopping)
    with pytest.raises(Interrupted, match="3 of 4 blocks done"):
        pyprune.prune(build("gemma4 with shared keys"), output=str(tmp_path / "out"), **fields)
    monkeypatch.undo()
    resumed = pyprune.prune(build("gemma4 with shared keys"), output=str(tmp_path / "out"), resume=True, **fields).model
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_what_cannot_be_right_is_refused_before_any_work():
    cases = {"states of shape .* between its blocks": gemma3n()}
    for kind, sentence in (
        ("earlier blocks", r"extra\['tokens'\] of block 1 of Synthetic is computed from the output"),
        ("whole batch", r"extra\['tokens'\] of block 0 of Synthetic depends on the tokens of the"),
    ):
        cases[sentence] = Synthetic()
        cases[sentence].kind = kind
    for sentence, model in cases.items():
        with pytest.raises(ConfigError, match=sentence):
            pyprune.prune(model, method="wanda", calibration=tiny.ids(4, 12), evaluation=NONE, progress=False)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError, match=sentence):
            pyprune.refine(model, copy.deepcopy(model), tiny.ids(4, 12))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_plan_says_what_the_run_would(tmp_path):
    build("gemma4 with shared keys").save_pretrained(tmp_path / "shared")
    assert pyprune.plan({"model": str(tmp_path / "shared"), "evaluation": {"enabled": False}})["seconds"]["forward"] > 0
    gemma3n().save_pretrained(tmp_path / "gemma3n")
    with pytest.raises(ConfigError, match="states of shape .* between its blocks"):
        pyprune.plan({"model": str(tmp_path / "gemma3n"), "evaluation": {"enabled": False}})


def test_structured_pruning_of_shared_keys_is_refused():
    with pytest.raises(ConfigError, match="reads 'sliding_attention' from what earlier blocks left .* unstructured"):
        pyprune.prune(
            build("gemma4 with shared keys"),
            pattern="neurons",
            sparsity=0.25,
            calibration=tiny.ids(4, 12),
            evaluation=NONE,
            progress=False,
        )


def test_weights_of_the_per_layer_inputs_are_among_the_pruned():
    names = {ref.path for ref in weights_of(ModelView(build("gemma4")).blocks[0])}
    assert {"per_layer_input_gate.weight", "per_layer_projection.weight"} <= names
