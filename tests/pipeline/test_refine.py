"""``pyprune.refine`` and ``pyprune refine``: models that are pruned already, with zeros or smaller."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from fast import FAST, equal, run, state

import pyprune
from pyprune.cli import commands
from pyprune.config import Calibration, ConfigError, Evaluation, Reconstruction
from pyprune.data.calibration import load
from pyprune.execution.executor import Executor
from pyprune.model.blocks import ModelView
from pyprune.pipeline.prune import prune
from pyprune.reconstruction.training import Trace


@pytest.mark.parametrize("cross, propagate", [(False, True), (True, True), (True, False), (False, False)])
def test_a_pruned_model_is_refined_with_its_zeros_in_place(cross, propagate):
    pruned = run(method="magnitude", reconstruct="none", pattern="2:4").model
    zeros = {name: p == 0 for name, p in pruned.named_parameters() if p.ndim == 2}
    rows = pyprune.refine(
        pruned,
        tiny.model("llama"),
        Calibration(source=tiny.ids(24, 24), num_samples=16, seq_len=24, held_out=8),
        cross_block=cross,
        global_propagation=propagate,
        settings=FAST,
    )
    assert [r["blocks"] for r in rows] == ([[0], [0, 1], [1, 2], [2]] if cross else [[0], [1], [2]])
    assert all(r["after_calibration"] < r["before_calibration"] for r in rows)
    assert all(torch.equal(p == 0, zeros[name]) for name, p in pruned.named_parameters() if p.ndim == 2)


def test_refining_after_the_run_is_refining_in_the_run():
    """Magnitude masks do not depend on data, so the orchestrator and the function do the same work."""
    calibration = Calibration(source=tiny.ids(20, 24), num_samples=12, seq_len=24, held_out=8)
    inside = run(method="magnitude", global_propagation=True, reconstruct="block")
    outside = run(method="magnitude", reconstruct="layer", global_propagation=False).model
    with torch.no_grad():  # block 0 of both starts from the same layer-wise solution
        rows = pyprune.refine(outside, tiny.model("llama"), calibration, settings=FAST)
    first = {k: v for k, v in state(inside).items() if "layers.0." in k}
    assert equal(first, outside.state_dict())
    assert rows[0]["after_calibration"] < rows[0]["before_calibration"]


def by_definition(model, dense, rows) -> list[float]:
    """‖dense − model‖² / ‖dense‖² behind each block, in float64, from hooks on transformers' own forward pass."""
    found: list[dict[int, torch.Tensor]] = []
    for one in (model, dense):
        outputs: dict[int, torch.Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda _, args, out, i=i, outputs=outputs: outputs.__setitem__(
                    i, (out[0] if isinstance(out, tuple) else out).double()
                )
            )
            for i, block in enumerate(one.model.layers)
        ]
        with torch.no_grad():
            one(rows)
        for handle in handles:
            handle.remove()
        found.append(outputs)
    return [float((found[1][i] - found[0][i]).square().sum() / found[1][i].square().sum()) for i in found[0]]


@pytest.mark.parametrize("cross, propagate", [(False, True), (True, True), (False, False)])
def test_errors_before_and_after_are_those_of_a_pruning_run_on_the_same_sequences(cross, propagate):
    dense = tiny.model("llama")
    calibration = Calibration(source=tiny.ids(16, 24), num_samples=12, seq_len=24, held_out=4)
    result = prune(
        dense,
        method="magnitude",
        reconstruct="none",
        calibration=calibration,
        evaluation=Evaluation(enabled=False),
        progress=False,
    )
    pyprune.refine(result, dense, calibration, cross_block=cross, global_propagation=propagate, settings=FAST)
    found = result.report["refinement"]["blocks"]
    assert [row["block"] for row in found] == [0, 1, 2]
    for row, errors in zip(result.report["blocks"], found):
        assert errors["before"]["error"] == pytest.approx(row["error"], rel=1e-5)
        assert errors["before"]["error_held_out"] == pytest.approx(row["error_held_out"], rel=1e-5)
    fit = torch.stack(load(calibration, None, encoder=False, vocab_size=tiny.VOCABULARY).sequences)
    after = by_definition(result.model, dense, fit[:2])
    assert [errors["after"]["error"] for errors in found] == pytest.approx(after, rel=1e-4)
    if propagate:
        assert found[-1]["after"]["error"] < found[-1]["before"]["error"]


def test_a_live_refinement_says_how_to_repeat_it(folder, tmp_path):
    np.save(tmp_path / "ids.npy", tiny.ids(20, 24).numpy())
    texts = dict(calibration=str(tmp_path / "ids.npy"), num_samples=8)
    result = pyprune.prune(
        str(folder), output=tmp_path / "pruned", evaluation=False, progress=False, method="magnitude", **texts
    )
    told = []
    pyprune.refine(result, epochs=2, seed=3, track=lambda block, values: told.append(block), **texts)
    assert told == [0, 1, 2]
    result.save(tmp_path / "refined")
    recipe = tmp_path / "refined" / "refine.yaml"
    assert "name the folder of one that run.yaml makes" in recipe.read_text()
    assert "`pyprune refine FOLDER --config refine.yaml -o DIR`" in (tmp_path / "refined" / "README.md").read_text()
    rows = pyprune.refine(tmp_path / "pruned", output=tmp_path / "again", config=recipe, evaluation=False)
    assert rows[-1]["after_calibration"] == result.report["refinement"]["windows"][-1]["after_calibration"]
    assert equal(result.model.state_dict(), pyprune.load(tmp_path / "again").model.state_dict())
    live = pyprune.load(tmp_path / "pruned")
    pyprune.refine(live, config=recipe)
    assert equal(result.model.state_dict(), live.model.state_dict()), "a live model takes the record, too"
    own = {"dense": str(folder), "calibration": {"source": texts["calibration"]}, "reconstruction": {"epochs": 1}}
    rows = pyprune.refine(pyprune.load(tmp_path / "pruned"), config=own, epochs=0)
    assert rows[0]["steps"] == 0, "keywords come before the record"
    with pytest.raises(ConfigError, match="unknown field 'epoch' in refine.yaml"):
        pyprune.refine(live, str(folder), config={"epoch": 3})
    before, after = pyprune.compare([tmp_path / "pruned", tmp_path / "again"])
    assert after["block_error_before"] == pytest.approx(before["block_error"], rel=1e-5)
    assert after["block_error"] < after["block_error_before"]


def test_a_structured_model_is_refined():
    dense = tiny.model("llama")
    pruned = prune(
        tiny.model("llama"),
        pattern="neurons",
        sparsity=0.5,
        calibration=tiny.ids(12, 24),
        evaluation=Evaluation(enabled=False),
        progress=False,
    ).model
    assert pruned.model.layers[0].mlp.up_proj.weight.shape[0] == dense.model.layers[0].mlp.up_proj.weight.shape[0] // 2
    rows = pyprune.refine(pruned, dense, tiny.ids(12, 24), settings=Reconstruction(epochs=8, batch_size=4, lr=2e-3))
    assert rows[-1]["after_calibration"] < 0.8 * rows[-1]["before_calibration"]


def test_models_that_do_not_match_are_refused():
    with pytest.raises(ConfigError, match="same blocks"):
        pyprune.refine(tiny.model("llama"), tiny.model("llama", num_hidden_layers=2), tiny.ids(4, 8))


@pytest.mark.parametrize("cross, passes", [(False, [2.5, 2.5, 1.5]), (True, [2.5, 2.5, 1.5])])
def test_refining_runs_each_block_no_more_often_than_it_needs(cross, passes, monkeypatch):
    """Once for the dense targets and once to go on; training apart. Errors are measured on two of the twelve sequences
    in three models: the dense one, the pruned one and the refined one."""
    pruned = run(method="magnitude", reconstruct="none").model
    counts, forward = [0] * 3, Executor.forward
    monkeypatch.setattr(
        Executor,
        "forward",
        lambda self, index, *a: (counts.__setitem__(index, counts[index] + len(a[1])), forward(self, index, *a))[1],
    )
    pyprune.refine(pruned, tiny.model("llama"), tiny.ids(12, 24), cross_block=cross, settings=FAST)
    assert [count / 12 for count in counts] == passes


@pytest.mark.parametrize("cross", [False, True])
def test_selection_by_validation_never_raises_held_out_error(cross):
    """In bfloat16 too, where writing the masters rounds them: errors are those of the weights as written."""
    pruned = run(method="magnitude", reconstruct="none").model.bfloat16()
    rows = pyprune.refine(
        pruned,
        tiny.model("llama").bfloat16(),
        enough(),
        cross_block=cross,
        settings=Reconstruction(epochs=3, batch_size=4, lr=2e-3, select="validation"),
    )
    assert all(row["after_held_out"] <= row["before_held_out"] for row in rows)
    assert any(row["after_held_out"] < 0.9 * row["before_held_out"] for row in rows)


@pytest.mark.parametrize("cross", [False, True])
def test_selection_by_validation_judges_the_weights_written(cross, monkeypatch):
    def spoil(window, *arguments, **options):
        with torch.no_grad():
            for master in window.masters:
                master.mul_(1.5)
        return Trace(window.indices)

    monkeypatch.setattr("pyprune.pipeline.refine_work.train", spoil)
    pruned = run(method="magnitude", reconstruct="none").model
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    rows = pyprune.refine(
        pruned, tiny.model("llama"), enough(), cross_block=cross, settings=Reconstruction(select="validation")
    )
    assert all(row["after_held_out"] == row["before_held_out"] for row in rows)
    assert equal(before, state_of(pruned))


def enough():
    return Calibration(source=tiny.ids(40, 24), num_samples=32, seq_len=24, held_out=8)


def test_memory_that_runs_out_is_said_and_changes_nothing():
    results = []
    for most, micro in ((1, None), (9, 1)):
        pruned, told = run(method="magnitude", reconstruct="none").model, []

        def refuse(module, arguments, most=most):
            if torch.is_grad_enabled() and len(arguments[0]) > most:
                raise torch.OutOfMemoryError("simulated")

        pruned.model.layers[0].mlp.down_proj.register_forward_pre_hook(refuse)
        pyprune.refine(
            pruned,
            tiny.model("llama"),
            Calibration(source=tiny.ids(12, 24), held_out=0),
            warn=told.append,
            settings=Reconstruction(epochs=2, batch_size=4, lr=2e-3, micro_batch_size=micro),
        )
        results.append((state_of(pruned), told))
    assert equal(results[0][0], results[1][0]) and len(results[0][1]) == 2 and not results[1][1]


def state_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_self_generated_sequences_train(tokenizer):
    pruned, dense = (tiny.model("llama", vocab_size=tiny.CHARACTERS) for _ in range(2))
    with torch.no_grad():
        for block in pruned.model.layers:
            block.mlp.up_proj.weight[::2] = 0
    alone = Calibration(num_samples=0, seq_len=24, self_generated=6)
    (row, *_) = pyprune.refine(pruned, dense, alone, tokenizer=tokenizer, settings=FAST)
    assert row["steps"] == 3 * 2 and row["after_calibration"] < row["before_calibration"]


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, tiny.ids(24, 24).numpy())
    return str(path)


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        commands.main([str(a) for a in arguments])
    return ended.value.code or 0


@pytest.mark.parametrize(
    "pattern, extra",
    [
        ("neurons", ["--reconstruct", "liar"]),
        ("structured", ["--reconstruct", "liar", "--allocation", "global", "--nonstandard", "save"]),
        ("2:4", ["--method", "wanda"]),
    ],
)
def test_a_saved_checkpoint_is_refined_on_the_command_line(pattern, extra, folder, ids, tmp_path, capsys):
    """Pruned, saved, refined, saved, loaded: sizes and zeros as they were, errors and perplexity lower, all said."""
    pruned, refined = tmp_path / "pruned", tmp_path / "refined"
    text = ["--calibration", ids, "--num-samples", 16, "--seq-len", 24, "--text", ids]
    assert command("prune", folder, "-o", pruned, "--pattern", pattern, *extra, *text) == 0
    capsys.readouterr()
    assert (
        command(
            "refine",
            pruned,
            "-o",
            refined,
            *text,
            "--epochs",
            8,
            "--lr",
            2e-3,
            "--reconstruction-batch-size",
            4,
            "--select",
            "validation",
            "--json",
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["dense"] == str(folder), "the dense model is what pruning.json names"
    last = found["windows"][-1]
    assert last["after_calibration"] < last["before_calibration"]
    assert last["after_held_out"] <= last["before_held_out"]
    row, other = found["evaluation"]
    assert (row["domain"], other["domain"]) == ("in-domain", "off-domain")
    assert found["generalisation"]["gap"] == pytest.approx(other["ratio"] / row["ratio"])
    assert row["ratio"] == pytest.approx(row["refined"] / row["dense"])
    before, after = pyprune.load(pruned).model, pyprune.load(refined).model
    assert [p.shape for p in before.parameters()] == [p.shape for p in after.parameters()]
    changed = 0
    for old, new in zip(ModelView(before).blocks, ModelView(after).blocks):
        for p, q in zip(old.parameters(), new.parameters()):
            changed += not torch.equal(p, q)
            assert p.ndim < 2 or torch.equal(p == 0, q == 0)
    assert changed > 20
    for model, name in ((before, "pruned"), (after, "refined")):
        assert pyprune.evaluate(model, ids, dtype=row["dtype"])["perplexity"] == pytest.approx(row[name], rel=1e-4)
    report = json.loads((refined / "report.json").read_text())
    assert report["evaluation"][0]["pruned"] == row["refined"] and report["refinement"]["windows"] == found["windows"]
    assert (refined / "pruning.json").read_text() == (pruned / "pruning.json").read_text()
    card = (refined / "README.md").read_text()
    assert "refined after pruning by block reconstruction with global propagation" in card
    one, other = pyprune.compare([pruned, refined])
    assert one["refined"] is None and other["refined"] == {"reconstruct": "block", "global_propagation": True}
    behind = found["blocks"][-1]
    assert other["block_error_held_out"] == behind["after"]["error_held_out"] < behind["before"]["error_held_out"]
    assert other["block_error_before"] == behind["before"]["error"] and other["seconds"] > one["seconds"]
    assert other["evaluation"][0]["pruned"] == row["refined"] and one["evaluation"][0]["pruned"] == row["pruned"]
    capsys.readouterr()
    assert command("compare", pruned, refined) == 0
    assert "refined:" in capsys.readouterr().out
    assert command("refine", pruned, "-o", refined, *text) == 2, "nothing is overwritten"
    assert "not empty" in capsys.readouterr().err


def test_a_checkpoint_by_anything_else_needs_its_dense_model_named(folder, ids, tmp_path, capsys):
    other = tmp_path / "other"
    model = pyprune.load(folder).model
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(other)
    text = ["--calibration", ids, "--num-samples", 16, "--seq-len", 24, "--no-evaluation", "--epochs", 2, "--lr", 2e-3]
    assert command("refine", other, "-o", tmp_path / "out", *text) == 2
    assert "name the dense model with --dense" in capsys.readouterr().err
    assert command("refine", other, "-o", tmp_path / "out", "--dense", folder, "--cross-block", *text) == 0
    assert "error of the last block" in capsys.readouterr().out
    assert not pyprune.load(tmp_path / "out").model.model.layers[1].mlp.up_proj.weight[:, ::2].any()
    assert len(json.loads((tmp_path / "out" / "refinement.json").read_text())["windows"]) == 4
