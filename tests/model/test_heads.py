"""Causality and caching on heads of every kind: no cache is ever made, and text is cut as the model reads it."""

from __future__ import annotations

import hooked
import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import pyprune
from pyprune.config import ConfigError, Evaluation, Reconstruction
from pyprune.data.self_generated import generate
from pyprune.evaluation.latency import latency
from pyprune.evaluation.single import evaluate
from pyprune.execution.executor import Executor
from pyprune.model.blocks import ModelView, predicts_next_token
from pyprune.structured.groups import find_groups
from pyprune.structured.taps import mask_gradients

NONE = Evaluation(enabled=False)


class Reward(hf.LlamaPreTrainedModel):
    """A reward model as libraries write it: a backbone and a value per token; nothing says whether it caches."""

    def __init__(self, config):
        super().__init__(config)
        self.model = hf.LlamaModel(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return self.value(self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state)


def bert(**changes):
    return hf.BertConfig(**tiny._COMMON, **changes)


def recurrent_gemma():
    return hf.RecurrentGemmaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        lru_width=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        attention_window_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def mamba():
    return hf.MambaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


LANGUAGE = {
    "LlamaForCausalLM": lambda: hf.LlamaForCausalLM(tiny.CONFIGS["llama"]()),
    "GPT2LMHeadModel": lambda: hf.GPT2LMHeadModel(tiny.CONFIGS["gpt2"]()),
    "BertLMHeadModel as decoder": lambda: hf.BertLMHeadModel(bert(is_decoder=True)),
    "MambaForCausalLM": lambda: hf.MambaForCausalLM(mamba()),
    "RecurrentGemmaForCausalLM": lambda: hf.RecurrentGemmaForCausalLM(recurrent_gemma()),
}
READING = {
    "LlamaForSequenceClassification": lambda: hf.LlamaForSequenceClassification(tiny.CONFIGS["llama"]()),
    "GPT2ForSequenceClassification": lambda: hf.GPT2ForSequenceClassification(tiny.CONFIGS["gpt2"]()),
    "Qwen2ForSequenceClassification of a reward": lambda: hf.Qwen2ForSequenceClassification(
        hf.Qwen2Config(**tiny._GROUPED, num_labels=1, architectures=["Qwen2ForCausalLM"])
    ),
    "MistralForTokenClassification": lambda: hf.MistralForTokenClassification(tiny.CONFIGS["mistral"]()),
    "LlamaForQuestionAnswering": lambda: hf.LlamaForQuestionAnswering(tiny.CONFIGS["llama"]()),
    "MistralModel": lambda: hf.MistralModel(tiny.CONFIGS["mistral"]()),
    "LlamaModel of a causal checkpoint": lambda: hf.LlamaModel(
        hf.LlamaConfig(**tiny._GROUPED, architectures=["LlamaForCausalLM"])
    ),
    "a reward head of its own": lambda: Reward(tiny.CONFIGS["llama"]()),
    "BertModel as decoder": lambda: hf.BertModel(bert(is_decoder=True)),
    "BertForMaskedLM": lambda: hf.BertForMaskedLM(bert()),
    "FlaubertWithLMHeadModel": lambda: hf.FlaubertWithLMHeadModel(
        hf.FlaubertConfig(vocab_size=tiny.VOCABULARY, emb_dim=32, n_layers=2, n_heads=4)
    ),
    "BertForSequenceClassification": lambda: hf.BertForSequenceClassification(bert()),
    "a Llama made bidirectional": lambda: _bidirectional(),
}
ALL = {**LANGUAGE, **READING}
APART = [name for name in ALL if name != "FlaubertWithLMHeadModel"]  # it has no list of whole blocks


def _bidirectional():
    config = tiny.CONFIGS["llama"]()
    config.is_causal = False
    return hf.LlamaForCausalLM(config)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ALL[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("name", APART)
def test_blocks_run_again_and_again_as_the_whole_model_runs_them(name):
    """A live cache in the recorded arguments would grow with every pass."""
    model = build(name)
    sequences = [*tiny.ids(3, 12), *tiny.ids(2, 7, seed=1)]
    truth, _ = hooked.run_whole(model, sequences)
    view = ModelView(model)
    _, arguments = view.record(tiny.ids(2, 12))
    held = [*arguments[0].args, *arguments[0].kwargs.values()]
    assert not [value for value in held if type(value).__name__.endswith("Cache")]
    executor = Executor(view, batch_size=2)
    for _ in range(2):
        stream = executor.embed(sequences)
        for index, block in enumerate(view.blocks):
            executor.run(index, block, stream)
            executor.run(index, block, stream, stream)
            for length, rows in stream.rows.items():
                for place, row in enumerate(rows):
                    want = truth[index][row]
                    assert (stream.data[length][place] - want).norm() < 1e-4 * want.norm()
    assert getattr(model.config, "use_cache", True), "the model's own setting was not put back"


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForSequenceClassification",
        "MistralForTokenClassification",
        "MistralModel",
        "a reward head of its own",
        "BertModel as decoder",
        "BertLMHeadModel as decoder",
    ],
)
def test_masks_are_those_of_the_whole_model(name):
    model = build(name)
    sequences = list(tiny.ids(12, 16))
    masks = hooked.wanda_masks(model, hooked.run_whole(model, sequences)[1])
    result = pyprune.prune(
        model,
        method="wanda",
        inputs="dense",
        calibration=tiny.ids(12, 16),
        batch_size=5,
        evaluation=NONE,
        progress=False,
    )
    assert hooked.disagreement(result.model, masks) < 1e-3


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "MistralModel", "BertModel as decoder"])
@pytest.mark.parametrize(
    "fields", [dict(reconstruct="block"), dict(reconstruct="cross_block", global_propagation=True)]
)
def test_reconstruction_trains_behind_any_head(name, fields):
    result = pyprune.prune(
        build(name),
        method="wanda",
        calibration=tiny.ids(12, 16),
        evaluation=NONE,
        progress=False,
        reconstruction=Reconstruction(epochs=2, lr=1e-3, batch_size=4),
        **fields,
    )
    for row in result.report["blocks"]:
        assert all(loss > 0 and loss == loss for trace in row["training"] for loss in trace["loss"])
        first, last = row["steps"][0]["calibration"], row["steps"][-1]["calibration"]
        assert 0 < last < first < 1


@pytest.mark.parametrize("name", ALL)
def test_one_place_says_what_predicts_the_next_token(name, tokenizer):
    """Calibration, perplexity and generation follow it."""
    model, language = build(name), name in LANGUAGE
    assert name not in APART or ModelView(model).is_encoder == (not language)
    assert predicts_next_token(model) == language
    if language:
        assert 1 < evaluate(model, list(tiny.ids(2, 12)))["perplexity"] < 1e6
        first, _ = rows = generate(model, tokenizer, 2, seq_len=8)
        assert [len(row) for row in rows] == [8, 8]
        with torch.no_grad():  # the second to fifth tokens are the greedy ones, with or without a cache
            logits = model(first[None], use_cache=False).logits[0]
        logits[:, [0, 1, 2, 3]] = -torch.inf
        assert logits[:4].argmax(1).tolist() == first[1:5].tolist()
        return
    with pytest.raises(ConfigError, match="does not predict the next token"):
        evaluate(model, list(tiny.ids(2, 12)))
    with pytest.raises(ConfigError, match="does not predict the next token"):
        generate(model, tokenizer, 1, seq_len=8)


def test_decoding_is_timed_with_a_cache_or_not_at_all():
    assert latency(build("MambaForCausalLM"), tokens=8, new_tokens=2, repeats=1)["decode_tokens_per_second"] > 0
    with pytest.raises(ConfigError, match="RecurrentGemmaForCausalLM gives no cache back"):
        latency(build("RecurrentGemmaForCausalLM"), tokens=8, new_tokens=2, repeats=1)


def test_a_classifier_is_calibrated_on_whole_texts(tokenizer):
    torch.manual_seed(0)
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**tiny._GROUPED, "vocab_size": tiny.CHARACTERS}))
    texts = ["a first text", "another", "and a third one that is longer"]
    result = pyprune.prune(
        model,
        tokenizer=tokenizer,
        method="wanda",
        progress=False,
        calibration=pyprune.Calibration(source=texts, num_samples=3, held_out=0, seq_len=64),
    )
    assert "3 sequences of 7 to 30 tokens" in result.report["calibration"]["description"]


@pytest.mark.parametrize("labels", [1, 3])
def test_gradients_of_a_classifier_without_padding_id_are_those_of_its_output(labels):
    """Against differences: a mask on one neuron moved a little, through the whole model."""
    torch.manual_seed(0)
    model = (
        hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**tiny._GROUPED, "pad_token_id": None}, num_labels=labels))
        .double()
        .eval()
    )
    view, ids = ModelView(model), list(tiny.ids(3, 12))
    groups = find_groups(view, "neurons")
    found = mask_gradients(view, groups, ids, dtype=torch.float32, device=torch.device("cpu"), seed=5)[1][0]
    down, unit, step = view.blocks[1].mlp.down_proj, 7, 0.02  # norms round to float32
    for row, sequence in enumerate(ids):
        direction = torch.randn(labels, generator=torch.Generator().manual_seed((5 << 20) + row)).double()
        values = []
        for factor in (1 + step, 1 - step):
            handle = down.register_forward_pre_hook(
                lambda m, a, f=factor: torch.cat(
                    [a[0][..., :unit], a[0][..., unit : unit + 1] * f, a[0][..., unit + 1 :]], -1
                )
            )
            with torch.no_grad():
                out = model(sequence[None]).logits[0]
            handle.remove()
            values.append((out / (out.norm() if labels > 1 else 1)) @ direction)
        want = ((values[0] - values[1]) / (2 * step)).item()
        assert abs(want) > 1e-6 and found[row, unit].item() == pytest.approx(want, rel=1e-2, abs=1e-5)


def test_a_cache_that_is_made_all_the_same_is_refused():
    class Stubborn(hf.LlamaModel):
        def forward(self, input_ids, use_cache=None, **kwargs):
            return super().forward(input_ids, use_cache=True, **kwargs)

    with pytest.raises(ConfigError, match="Stubborn hands its blocks a DynamicCache .* even with use_cache=False"):
        ModelView(Stubborn(tiny.CONFIGS["llama"]())).record(tiny.ids(1, 8))
