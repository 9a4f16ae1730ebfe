"""Token ids that cannot meet what was asked, runs without text, and data too thin to trust: refused, or said."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import pyprune
from pyprune.config import Calibration, ConfigError, Evaluation, from_yaml
from pyprune.data.calibration import coerce, load
from pyprune.evaluation.windows import windows
from pyprune.reporting import summary, words
from pyprune.reporting.card import model_card

OFF = Evaluation(enabled=False)


def run(model=None, **fields):
    return pyprune.prune(model or tiny.model("llama"), progress=False, **{"evaluation": OFF, **fields})


@pytest.fixture
def array(tmp_path):
    np.save(tmp_path / "ids.npy", tiny.ids(12, 24).numpy())
    return str(tmp_path / "ids.npy")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"seq_len": 100_000}, "seq_len is 100000, but .* has rows of 24 tokens; leave seq_len out or set seq_len=24"),
        ({"num_samples": 13}, "13 calibration samples were asked for, but .* has 12 rows"),
    ],
)
def test_every_way_in_refuses_what_an_array_cannot_meet(array, folder, tmp_path, asked, sentence):
    settings = Calibration(source=array, **asked)
    small = tiny.model("llama")
    for attempt in (
        lambda: pyprune.prune(small, calibration=settings, evaluation=OFF),
        lambda: pyprune.refine(small, small, settings),
        lambda: pyprune.plan({"model": str(folder), "calibration": {"source": array, **asked}}),
    ):
        with pytest.raises(ConfigError, match=sentence):
            attempt()
    with pytest.raises(ConfigError, match="window is 100000, but .* has rows of 24 tokens"):
        pyprune.evaluate(small, array, window=100_000)


def test_a_shorter_seq_len_cuts_every_row_and_it_is_said(array):
    ids = tiny.ids(12, 24)
    data = load(Calibration(source=array, num_samples=8, seq_len=10, held_out=4))
    assert torch.equal(torch.stack(data.sequences), ids[:8, :10])
    assert torch.equal(torch.stack(data.held_out), ids[8:, :10])
    assert "the first 10 of their 24 tokens" in data.description
    cut = windows(Evaluation(text=ids, window=10))
    assert torch.equal(torch.stack(cut), ids[:, :20].reshape(24, 10)), "each row is cut into whole windows"
    assert torch.equal(torch.stack(windows(Evaluation(text=ids))), ids)


def test_a_source_means_the_same_wherever_it_is_given(array):
    ids = tiny.ids(12, 24)
    for source in (array, ids, ids.numpy(), list(ids), {"input_ids": ids}, Calibration(source=ids), {"source": array}):
        found = coerce(source)
        assert (found.num_samples, found.seq_len) == (12, 24), source
    assert (coerce(None).num_samples, coerce(None).seq_len) == (64, 512)
    assert (coerce("a.txt").num_samples, coerce(["a b"]).seq_len) == (64, 512)
    result = run(calibration=list(ids), method="wanda")
    assert result.report["calibration"]["samples"] == 12 and result.report["calibration"]["tokens"] == 12 * 24
    same = run(calibration={"source": array}, method="wanda")
    assert same.report["calibration"]["fingerprint"] == result.report["calibration"]["fingerprint"]


def test_the_plan_counts_the_rows_of_an_array(array, folder):
    found = pyprune.plan({"model": str(folder), "calibration": {"source": array}})
    assert found["calibration"] == {"sequences": 12, "tokens": 12 * 24, "at_most": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "magnitude", "pattern": "2:4"},
        {"pattern": "neurons", "criterion": "magnitude", "reconstruct": "none"},
        {"pattern": "neurons", "criterion": "random", "reconstruct": "none"},
    ],
)
def test_weights_alone_need_no_text(fields):
    result = run(tiny.model("llama"), evaluation=Evaluation(), **fields)
    found = result.report
    assert found["sparsity"] == pytest.approx(0.5)
    assert all(row["error"] is None and row["error_held_out"] is None for row in found["blocks"])
    assert found["evaluation"] == [] and found["calibration"]["samples"] == 0
    said = " ".join(found["warnings"])
    assert "no perplexity: " in said and "tokenizer" in said
    assert "block errors were not measured" in said
    labels = [label for label, _ in summary.summary_rows(found)]
    assert "block error" not in labels and "perplexity" not in labels


def test_the_same_weights_go_with_and_without_text():
    one = run(method="magnitude").model.state_dict()
    other = run(method="magnitude", calibration=tiny.ids(4, 16)).model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_folder_without_a_tokenizer_is_pruned_by_magnitude(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "dense")
    found = pyprune.prune(str(tmp_path / "dense"), method="magnitude", output=str(tmp_path / "out"), progress=False)
    assert found.report["sparsity"] == pytest.approx(0.5) and (tmp_path / "out" / "README.md").is_file()
    again = pyprune.prune(
        config=from_yaml(tmp_path / "out" / "run.yaml"), output=str(tmp_path / "again"), progress=False
    )
    assert again.report["weights"] == found.report["weights"]


def test_no_probes_and_magnitude_read_nothing(monkeypatch, tokenizer):
    monkeypatch.setattr("pyprune.data.calibration.load", lambda *_, **__: pytest.fail("the text was read"))
    run(method="magnitude", probe_samples=0, tokenizer=tokenizer)


def test_text_that_was_named_still_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="calibration text needs a tokenizer"):
        run(method="magnitude", calibration=["some text"])
    with pytest.raises(ConfigError, match="calibration text needs a tokenizer"):
        run(method="wanda")


def warned(**fields) -> str:
    result = run(**fields)
    shown = " ".join(text for label, text in summary.summary_rows(result.report) if label == "warning")
    card = model_card(result.report, "pruned")
    for text in words.distinct(result.report["warnings"]):
        assert text in shown and text in card
    return " ".join(result.report["warnings"])


def test_fewer_tokens_than_columns():
    said = warned(calibration=tiny.ids(3, 16))  # 48 tokens; mlp.down_proj has 64 inputs, the others 32
    assert (
        "48 calibration tokens are fewer than the 64 inputs of model.layers.0.mlp.down_proj.weight and of 2 more"
        in said
    )
    assert "calibration tokens are fewer" not in warned(calibration=tiny.ids(4, 16))


def test_an_expert_that_saw_fewer_tokens_than_it_has_columns():
    model = tiny.model("mixtral")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight[0] = -1e4 * layer.mlp.gate.weight[0].sign()
    tokens = warned(model=model, calibration=tiny.ids(8, 16))
    assert "experts." in tokens and "fewer than its 64 inputs" in tokens


def test_constant_and_repeated_sequences():
    ids = tiny.ids(8, 16)
    ids[3] = 7
    ids[5:] = ids[4]
    data = load(Calibration(source=ids, held_out=0))
    said = " ".join(data.warnings)
    assert "1 of 8 calibration sequences repeats one token throughout" in said
    assert "3 of 8 calibration sequences repeat another one" in said
    assert not load(Calibration(source=tiny.ids(8, 16), held_out=0)).warnings
    assert said in warned(calibration=Calibration(source=ids, held_out=0))


def test_held_out_rows_are_never_fitted_ones():
    ids = tiny.ids(8, 16)
    ids[4:6] = ids[:2]
    data = load(Calibration(source=ids, num_samples=4, held_out=3))
    assert torch.equal(torch.stack(data.held_out), ids[6:]), "rows 4 and 5 are fitted on, 6 and 7 are not"
    alike = ids[:1].repeat(8, 1)
    data = load(Calibration(source=alike, num_samples=4, held_out=3))
    assert data.held_out == [] and "no held-out measure" in " ".join(data.warnings)


def test_held_out_text_is_never_fitted_text(tokenizer):
    data = load(Calibration(source=["abcdefgh" * 200], num_samples=6, seq_len=16, held_out=4), tokenizer)
    assert data.held_out == [] and "no held-out measure" in " ".join(data.warnings)
    data = load(Calibration(source=["abcdefgh" * 200], num_samples=3, seq_len=15, held_out=4), tokenizer)
    fitted = {tuple(row.tolist()) for row in data.sequences}
    assert data.held_out and not fitted & {tuple(row.tolist()) for row in data.held_out}
    assert "share most of their text with fitted ones" in " ".join(data.warnings)


def test_with_every_row_fitted_there_is_no_held_out_measure_and_it_is_said():
    assert "no held-out measure" in " ".join(load(Calibration(source=tiny.ids(6, 24))).warnings)
    assert not load(Calibration(source=tiny.ids(6, 24), held_out=0)).warnings


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask(side):
    ids, pad = tiny.ids(6, 16), 0
    mask = torch.ones_like(ids)
    rows = slice(0, 3) if side == "left" else slice(12, 16)
    ids[2:4, rows], mask[2:4, rows] = pad, 0
    said = warned(calibration=Calibration(source=ids, held_out=0))  # the model's config names the padding id
    assert "2 of 6 rows" in said and "attention_mask" in said
    assert "attention_mask" not in warned(
        calibration=Calibration(source={"input_ids": ids, "attention_mask": mask}, held_out=0)
    )


def test_self_generated_text_without_bos():
    calibration = Calibration(source=tiny.ids(6, 16), held_out=0, self_generated=2, self_generated_for="all")
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    said = warned(model=model, tokenizer=tiny.tokenizer(bos=True), calibration=calibration)
    assert "self-generated sequences do not begin with" in said and "'<s>'" in said
    model = tiny.model("llama", vocab_size=tiny.CHARACTERS)
    assert "do not begin" not in warned(model=model, tokenizer=tiny.tokenizer(), calibration=calibration)


def test_refine_says_it_too():
    told: list[str] = []
    pyprune.refine(
        tiny.model("llama"),
        tiny.model("llama"),
        tiny.ids(4, 16)[:1].repeat(4, 1),
        warn=told.append,
        settings=pyprune.Reconstruction(epochs=0),
    )
    assert "repeat another one" in " ".join(told)
