"""BR, GP and CR in whole runs: exact zeros on every architecture, resume, choice by held-out error, command line."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from fast import FAST, equal, run, state

from pyprune.cli import commands
from pyprune.config import Calibration, ConfigError, Evaluation, Reconstruction
from pyprune.execution.journal import Interrupted, Journal
from pyprune.model.blocks import ModelView, weights_of
from pyprune.pipeline.prune import prune
from pyprune.reconstruction.windows import WindowTrainer


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_zeros_stay_exact_on_every_architecture(architecture, tmp_path):
    cross = architecture not in ("bert", "gpt2")
    result = run(
        tiny.model(architecture),
        pattern="2:4",
        reconstruct="cross_block" if cross else "block",
        global_propagation=True,
        method="magnitude",
        reconstruction=Reconstruction(epochs=2, batch_size=5),
    )
    dense, view = ModelView(tiny.model(architecture)), ModelView(result.model)
    for before, block in zip(dense.blocks, view.blocks):
        for ref in weights_of(block):
            weight = ref.view(block)
            assert (weight.reshape(len(weight), -1, 4) != 0).sum(-1).eq(2).all(), ref.name
            assert not torch.equal(weight, torch.where(weight != 0, ref.view(before), 0)), f"{ref.name} was trained"
    assert all(
        step["calibration"] < row["steps"][0]["calibration"]
        for row in result.report["blocks"]
        for step in row["steps"][-1:]
    )
    result.save(str(tmp_path / "out"))
    again = type(result.model).from_pretrained(tmp_path / "out")
    assert equal(state(result), again.state_dict())


def test_zero_epochs_are_the_layer_wise_step():
    layer, untrained = run(reconstruct="layer"), run(reconstruction=Reconstruction(epochs=0))
    assert equal(state(layer), state(untrained))
    assert any("epochs=0 trains nothing" in text for text in untrained.report["warnings"])


def test_the_mask_of_the_layer_wise_step_is_the_final_pattern():
    layer, block = run(reconstruct="layer"), run()
    first = [key for key in state(layer) if "layers.0." in key]
    assert all(torch.equal(state(layer)[key] != 0, state(block)[key] != 0) for key in first)
    assert not equal({key: state(layer)[key] for key in first}, state(block))
    assert block.report["sparsity"] == layer.report["sparsity"]


def test_global_propagation_equals_block_reconstruction_behind_a_dense_prefix():
    only_last = dict(targets=["layers.2."])
    local, globally = run(**only_last), run(global_propagation=True, **only_last)
    assert equal(state(local), state(globally))
    original = tiny.model("llama").state_dict()
    assert all(torch.equal(original[k], v) for k, v in state(local).items() if "layers.2." not in k)
    assert not equal(state(run()), state(run(global_propagation=True))), "behind a pruned prefix they differ"


def test_every_block_is_visited_twice_by_cross_block_windows():
    report = run(reconstruct="cross_block", global_propagation=True).report
    assert [t["blocks"] for row in report["blocks"] for t in row["training"]] == [[0], [0, 1], [1, 2], [2]]
    for row in report["blocks"]:
        assert [s["step"] for s in row["steps"]] == ["mask", "layer", "cross_block 1", "cross_block 2"]
        assert row["steps"][-1]["calibration"] == pytest.approx(row["error"], rel=1e-6)
        assert row["steps"][-1]["held_out"] == pytest.approx(row["error_held_out"], rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"global_propagation": True},
        {"reconstruct": "cross_block"},
        {"reconstruct": "cross_block", "global_propagation": True},
    ],
)
def test_reconstruction_lowers_the_final_error_and_repeats_to_the_bit(fields):
    layer = run(method="magnitude", reconstruct="layer", samples=32)
    first, second = (run(method="magnitude", samples=32, **fields) for _ in range(2))
    assert first.report["blocks"][-1]["error"] < 0.8 * layer.report["blocks"][-1]["error"]
    assert equal(state(first), state(second))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reconstruct": "cross_block"},
        {"compute_dtype": "bfloat16", "reconstruct": "cross_block", "global_propagation": True},
        {"targets": ["layers.0."], "global_propagation": True},
    ],
)
def test_resume_after_any_block_is_bit_identical(fields, tmp_path, monkeypatch):
    fields = {"method": "wanda", "reconstruction": Reconstruction(epochs=1, batch_size=4), **fields}
    whole = run(output=str(tmp_path / "whole"), **fields)
    for blocks in (1, 2):
        output = str(tmp_path / f"after{blocks}")
        monkeypatch.setattr(Journal, "stopping", property(lambda self, n=blocks: len(self.entries) == n))
        with pytest.raises(Interrupted):
            run(output=output, **fields)
        monkeypatch.setattr(Journal, "stopping", False)
        resumed = run(output=output, resume=True, **fields)
        assert equal(state(whole), state(resumed))
        for a, b in zip(whole.report["blocks"], resumed.report["blocks"]):
            assert a["steps"] == b["steps"] and a["error"] == b["error"]


@pytest.mark.parametrize("fields", [{}, {"reconstruct": "cross_block", "global_propagation": True}])
def test_streamed_weights_give_the_same_bits(fields, folder, tmp_path):
    from safetensors.torch import load_file

    written = []
    for stream in ("never", "always"):
        output = tmp_path / stream
        prune(
            str(folder),
            reconstruct=fields.get("reconstruct", "block"),
            output=str(output),
            stream=stream,
            global_propagation=fields.get("global_propagation", False),
            calibration=tiny.ids(8, 24),
            evaluation=Evaluation(enabled=False),
            progress=False,
            reconstruction=FAST,
        )
        written.append({name: t for path in output.glob("*.safetensors") for name, t in load_file(path).items()})
    assert written[0].keys() == written[1].keys() and equal(*written)


def test_selection_by_validation_never_raises_held_out_error():
    greedy = Reconstruction(epochs=6, batch_size=2, lr=2e-2)
    trained = run(samples=4, reconstruction=greedy, method="wanda")
    steps = [row["steps"] for row in trained.report["blocks"]]
    assert any(s[-1]["held_out"] > s[1]["held_out"] for s in steps), "the case must overfit"
    greedy.select = "validation"
    chosen = run(samples=4, reconstruction=greedy, method="wanda")
    for row in chosen.report["blocks"]:
        mask, layer, *rest = row["steps"]
        assert rest[-1]["held_out"] <= min(mask["held_out"], layer["held_out"]) * (1 + 1e-5)
    assert any("overfits" in text for text in trained.report["warnings"])
    assert not any("overfits" in text for text in chosen.report["warnings"])


@pytest.mark.parametrize("reconstruct", ["block", "cross_block"])
def test_selection_by_validation_judges_the_weights_written(reconstruct, monkeypatch):
    """Whatever training claims: what ends up worse than before it is taken back, norms included."""

    def spoil(self, window, module):
        with torch.no_grad():
            for i in window:
                for parameter in self.run.view.blocks[i].parameters():
                    parameter.mul_(1.5)
        self._sync(module, self.run.view.blocks[window[-1]])

    monkeypatch.setattr(WindowTrainer, "_train", spoil)
    settings = dict(method="wanda", samples=64, reconstruction=Reconstruction(select="validation"))
    chosen, layer = run(reconstruct=reconstruct, **settings), run(reconstruct="layer", **settings)
    for row, wanted in zip(chosen.report["blocks"], layer.report["blocks"]):
        assert row["error_held_out"] == pytest.approx(wanted["error_held_out"], rel=1e-5)
    assert equal(state(chosen), state(layer))
    monkeypatch.setattr(WindowTrainer, "_train", spoil)
    spoiled = run(reconstruct=reconstruct, method="wanda", samples=64)
    assert spoiled.report["blocks"][-1]["error_held_out"] > 1.5 * layer.report["blocks"][-1]["error_held_out"]


def test_validation_chooses_between_mask_and_layer_without_training():
    few = dict(samples=1, method="magnitude", reconstruct="layer")
    chosen = run(reconstruction=Reconstruction(select="validation"), **few)
    rows = [row["steps"] for row in chosen.report["blocks"]]
    assert any(s[1]["held_out"] > s[0]["held_out"] for s in rows), "one sequence must be too little for some block"
    for steps, row in zip(rows, chosen.report["blocks"]):
        assert row["error_held_out"] == pytest.approx(min(s["held_out"] for s in steps), rel=1e-5)


def test_early_stop_ends_when_held_out_error_has_not_fallen():
    settings = Reconstruction(epochs=12, batch_size=2, lr=2e-2, early_stop=True)
    for row in run(samples=4, reconstruction=settings).report["blocks"]:
        (training,) = row["training"]
        seen = training["held_out"]
        assert training["steps"] == 2 * (len(seen) - 1)
        assert len(seen) == 13 or seen[-1] >= min(seen[:-1])
        assert all(b < a for a, b in zip(seen, seen[1:-1]))


def test_validation_without_held_out_text_is_refused():
    with pytest.raises(ConfigError, match="need held-out sequences"):
        prune(
            tiny.model("llama"),
            calibration=tiny.ids(4, 24),
            evaluation=Evaluation(enabled=False),
            progress=False,
            reconstruct="block",
            reconstruction=Reconstruction(select="validation"),
        )


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="needs inputs='propagated'"):
        run(inputs="dense")
    with pytest.raises(ConfigError, match="needs global_propagation"):
        run(reconstruction=Reconstruction(layerwise_target="dense"))
    with pytest.raises(ConfigError, match="nothing would use the 3 self-generated"):
        run(reconstruct="layer", calibration={"self_generated": 3})
    with pytest.raises(ConfigError, match="num_samples is 0"):
        run(samples=0, calibration={"self_generated": 3})


def test_self_generated_sequences_train_but_do_not_choose_masks(tokenizer):
    def made(**calibration):
        return run(
            tiny.model("llama", vocab_size=tiny.CHARACTERS),
            tokenizer=tokenizer,
            method="wanda",
            calibration=calibration,
        )

    corpus, added, everywhere = made(), made(self_generated=6), made(self_generated=6, self_generated_for="all")
    first = [key for key in state(corpus) if "layers.0." in key and key.endswith("proj.weight")]

    def same_masks(a, b):
        return all(torch.equal(state(a)[key] != 0, state(b)[key] != 0) for key in first)

    assert same_masks(corpus, added) and not equal({key: state(corpus)[key] for key in first}, state(added))
    assert not same_masks(corpus, everywhere)
    steps = [r.report["blocks"][0]["training"][0]["steps"] for r in (corpus, added, everywhere)]
    assert steps == [9, 15, 15]
    assert added.report["calibration"]["samples"] == 12 and everywhere.report["calibration"]["samples"] == 18
    assert "6 self-generated sequences" in added.report["calibration"]["description"]
    alone = prune(
        tiny.model("llama", vocab_size=tiny.CHARACTERS),
        tokenizer=tokenizer,
        reconstruct="block",
        calibration=Calibration(num_samples=0, seq_len=24, self_generated=6, self_generated_for="all"),
        evaluation=Evaluation(enabled=False),
        progress=False,
        reconstruction=FAST,
    )
    assert alone.report["calibration"]["samples"] == 6 and alone.report["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_training_gives_the_cpus_result():
    """float32 throughout: prefetched batches, masks and steps are the same, rounding differs."""
    settings = Reconstruction(epochs=3, batch_size=4, lr=2e-3, autocast="float32")
    cpu, gpu = (
        run(
            method="magnitude",
            reconstruct="cross_block",
            global_propagation=True,
            reconstruction=settings,
            device=device,
        )
        for device in ("cpu", "cuda")
    )
    for (name, a), b in zip(state(cpu).items(), state(gpu).values()):
        assert torch.equal(a == 0, b.cpu() == 0), name
    for a, b in zip(cpu.report["blocks"], gpu.report["blocks"]):
        assert a["error"] == pytest.approx(b["error"], rel=2e-2)


def test_command_line_reconstructs_generates_and_compares(folder, tmp_path, capsys):
    def main(arguments):
        with pytest.raises(SystemExit) as ended:
            commands.main(arguments)
        assert ended.value.code == 0

    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    generated = str(tmp_path / "generated.jsonl")
    main(["generate", str(folder), "-o", generated, "-n", "4", "--seq-len", "32"])
    common = ["--calibration", str(text), "--num-samples", "8", "--seq-len", "32", "--no-evaluation"]
    outputs = [str(tmp_path / name) for name in ("layer", "cross")]
    main(["prune", str(folder), "-o", outputs[0], *common])
    main(
        [
            "prune",
            str(folder),
            "-o",
            outputs[1],
            *common,
            "--reconstruct",
            "cross_block",
            "--global-propagation",
            "--epochs",
            "2",
            "--lr",
            "2e-3",
            "--self-generated",
            "4",
            "--self-generated-path",
            generated,
            "--select",
            "validation",
        ]
    )
    capsys.readouterr()
    main(["compare", *outputs, "--json"])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(r["reconstruct"], r["global_propagation"]) for r in rows] == [("layer", False), ("cross_block", True)]
    assert rows[1]["block_error"] < rows[0]["block_error"]
    main(["compare", *outputs])
    assert " GP " in capsys.readouterr().out, "the table says which run propagated"
