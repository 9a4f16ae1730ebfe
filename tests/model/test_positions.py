"""How many positions a model has: found by what it looks up; longer sequences are refused or warned of."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf

import pyprune
from pyprune.config import ConfigError, PruneConfig
from pyprune.model.blocks import ModelView
from pyprune.model.positions import Positions, of_any, positions_of

PROSE = "It is a truth universally acknowledged, that a single man needs a wife. " * 40
TABLES = {"gpt2": 128, "opt": 128, "bert": 128, "roberta": 127}
"""RoBERTa's first position is the one behind its padding id."""


def small(name: str) -> torch.nn.Module:
    sizes = dict(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    made = {
        "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**sizes, n_positions=64, rotary_dim=8)),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
        ),
        "deberta": lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(
                vocab_size=tiny.VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                relative_attention=True,
                position_biased_input=False,
            )
        ),
    }
    torch.manual_seed(0)
    return made[name]().eval()


@pytest.mark.parametrize("name", TABLES)
def test_the_table_ends_exactly_there(name):
    model = tiny.model(name)
    found = positions_of(ModelView(model))
    assert found == Positions(type(model).__name__, TABLES[name], True)
    model(tiny.ids(1, found.count))
    with pytest.raises((IndexError, RuntimeError)):
        model(tiny.ids(1, found.count + 1))


def test_no_table_and_no_limit():
    assert positions_of(ModelView(tiny.model("llama"))) == Positions("LlamaForCausalLM", 128, False)
    assert positions_of(ModelView(small("deberta"))) == Positions("DebertaV2Model", 64, False)
    assert positions_of(ModelView(small("gptj"))) == Positions("GPTJForCausalLM", 64, True)  # sines, to a length
    assert positions_of(ModelView(small("bloom"))) is None
    assert of_any(torch.nn.Linear(2, 2)) is None
    small("deberta")(tiny.ids(1, 80))
    with pytest.raises((IndexError, RuntimeError)):
        small("gptj")(tiny.ids(1, 65))


@pytest.mark.parametrize("name", TABLES)
def test_longer_calibration_is_refused_before_any_work(name):
    rows = tiny.ids(6, TABLES[name] + 1)
    with pytest.raises(
        ConfigError,
        match=f"calibration sequences have up to {TABLES[name] + 1} tokens, but .* has "
        f"{TABLES[name]} positions; set seq_len to at most {TABLES[name]}",
    ):
        pyprune.prune(tiny.model(name), calibration=rows, progress=False)


def test_longer_text_and_generated_sequences_are_refused(tokenizer):
    model = tiny.model("gpt2", vocab_size=tiny.CHARACTERS)
    for calibration in (
        {"source": [PROSE], "num_samples": 3, "seq_len": 200},
        {"num_samples": 0, "seq_len": 200, "self_generated": 2, "self_generated_for": "all"},
    ):
        with pytest.raises(ConfigError, match="200 .*128 positions"):
            pyprune.prune(model, tokenizer=tokenizer, calibration=calibration, progress=False)


def test_refinement_refuses_them_too():
    dense = tiny.model("gpt2")
    with pytest.raises(ConfigError, match="calibration sequences have up to 130 tokens"):
        pyprune.refine(tiny.model("gpt2"), dense, tiny.ids(4, 130))


def test_longer_calibration_of_a_rotary_model_is_warned_of():
    model = tiny.model("llama", max_position_embeddings=16)
    result = pyprune.prune(model, method="wanda", calibration=tiny.ids(4, 24), progress=False)
    assert any(
        "calibration sequences have up to 24 tokens, more than the 16 positions" in text
        for text in result.report["warnings"]
    )
    quiet = pyprune.prune(model, method="wanda", calibration=tiny.ids(4, 16), progress=False)
    assert not any("positions" in text for text in quiet.report["warnings"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequences_of_text_are_as_long_as_the_positions_unless_a_length_is_asked_for(name, tokenizer):
    model, fields = tiny.model(name, vocab_size=tiny.CHARACTERS), {"source": [PROSE], "num_samples": 3, "held_out": 0}
    result = pyprune.prune(
        model, method="wanda", tokenizer=tokenizer, calibration=fields, evaluation={"enabled": False}, progress=False
    )
    assert "3 sequences of 128 tokens" in result.report["calibration"]["description"]
    assert not any("positions" in text for text in result.report["warnings"])


def test_what_is_known_before_the_work_is_printed_before_it(capsys):
    model = tiny.model("llama", max_position_embeddings=16)
    pyprune.prune(model, method="wanda", calibration=tiny.ids(4, 24))
    lines = capsys.readouterr().err.splitlines()
    [warned] = [i for i, line in enumerate(lines) if "warning: calibration sequences have up to 24 tokens" in line]
    assert warned < next(i for i, line in enumerate(lines) if line.startswith("pruning 1/3"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_windows_are_as_long_as_the_positions_and_the_report_says_so(name, tokenizer):
    model = tiny.model(name, vocab_size=tiny.CHARACTERS)
    result = pyprune.prune(
        model, method="magnitude", tokenizer=tokenizer, calibration=tiny.ids(4, 24), progress=False, evaluation=[PROSE]
    )
    assert result.report["evaluation"][0]["window"] == 128
    assert (
        f"evaluation windows have 128 tokens, not 1024: {type(model).__name__} has no more positions"
        in result.report["warnings"]
    )
    with pytest.warns(UserWarning, match="windows have 128 tokens"):
        assert pyprune.evaluate(model, [PROSE], tokenizer=tokenizer)["window"] == 128


def test_longer_windows_that_were_asked_for(tokenizer):
    table, rotary = (tiny.model(name, vocab_size=tiny.CHARACTERS) for name in ("gpt2", "llama"))
    for source in ([PROSE], tiny.ids(2, 200)):
        with pytest.raises(ConfigError, match="evaluation windows have up to 200 tokens, but GPT2LMHeadModel has 128"):
            pyprune.evaluate(table, source, tokenizer=tokenizer, window=200)
        with pytest.raises(ConfigError, match="evaluation windows have up to 200 tokens, but GPT2LMHeadModel has 128"):
            pyprune.prune(
                table,
                method="magnitude",
                tokenizer=tokenizer,
                progress=False,
                calibration=tiny.ids(2, 9),
                evaluation={"text": source, "window": 200},
            )
    with pytest.warns(UserWarning, match="evaluation windows have up to 200 tokens, more than the 128 positions"):
        assert pyprune.evaluate(rotary, [PROSE], tokenizer=tokenizer, window=200)["window"] == 200


def test_the_plan_measures_in_the_same_windows(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    found = pyprune.plan({"model": str(tmp_path / "gpt2"), "method": "magnitude", "calibration": {"seq_len": 64}})
    assert found["seconds"]["total"] > 0
    usual = pyprune.plan({"model": str(tmp_path / "gpt2"), "method": "wanda"})
    assert usual["calibration"] == {"sequences": 64, "tokens": 64 * 128, "at_most": False}
    with pytest.raises(ConfigError, match="up to 512 tokens, but GPT2LMHeadModel has 128 positions"):
        pyprune.plan({"model": str(tmp_path / "gpt2"), "method": "wanda", "calibration": {"seq_len": 512}})


def test_latency_is_measured_within_the_positions(tmp_path):
    from pyprune.evaluation.gain import measure

    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    assert measure(str(tmp_path / "gpt2"), tokens=512, new_tokens=8, batch_size=1, dtype="auto")["tokens"] == 120


def test_column_block_is_what_a_sweep_takes():
    assert PruneConfig(column_block=1024).column_block == 1024
    with pytest.raises(ConfigError, match="column_block must be at most 1024, what a sweep takes at once, got 1025"):
        PruneConfig(column_block=1025)
