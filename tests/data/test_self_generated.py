"""Self-generated calibration: reproducible, independent of batching, extended instead of rewritten."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

from pyprune.config import ConfigError
from pyprune.data.self_generated import generate, model_digest, read


class Words:
    """A tokenizer's few used methods, over ids: token 0 and 1 are special, ids from 30 on are model padding."""

    all_special_ids = [0, 1]

    def __len__(self):
        return 30

    def decode(self, ids):
        return " ".join(map(str, torch.as_tensor(ids).tolist()))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_same_seed_same_sequences_however_batched(model):
    together = generate(model, Words(), 7, seq_len=24, seed=3, batch_size=7)
    again = generate(model, Words(), 7, seq_len=24, seed=3, batch_size=7)
    apart = generate(model, Words(), 7, seq_len=24, seed=3, batch_size=2)
    other = generate(model, Words(), 7, seq_len=24, seed=4, batch_size=7)
    assert [t.shape for t in together] == [(24,)] * 7 and all(t.dtype == torch.int64 for t in together)
    assert all(torch.equal(a, b) for a, b in zip(together, again))
    assert all(torch.equal(a, b) for a, b in zip(together, apart))
    assert not any(torch.equal(a, b) for a, b in zip(together, other))


def test_starts_greedy_then_follows_the_models_own_distribution(model):
    """Tokens 1–4 are the arg max of a full forward; later ones have the frequencies of the model's probabilities."""
    sequences = torch.stack(generate(model, Words(), 400, seq_len=6, seed=0, batch_size=100))
    allowed = torch.arange(32).ge(2) & torch.arange(32).lt(30)
    assert allowed[sequences].all()
    with torch.no_grad():
        logits = model(sequences).logits.masked_fill(~allowed, -torch.inf)
    assert torch.equal(sequences[:, 1:5], logits[:, 0:4].argmax(-1))
    expected = logits[:, 4].softmax(-1).sum(0).numpy()
    counted = np.bincount(sequences[:, 5], minlength=32)
    variance = (logits[:, 4].softmax(-1) * (1 - logits[:, 4].softmax(-1))).sum(0).numpy()
    assert (np.abs(counted - expected) <= 4.5 * np.sqrt(variance) + 1e-6).all()


def test_first_tokens_cover_the_vocabulary_uniformly(model):
    first = torch.stack(generate(model, Words(), 560, seq_len=2, seed=1, batch_size=280))[:, 0]
    counts = np.bincount(first, minlength=32)
    assert counts[:2].sum() == 0 and counts[30:].sum() == 0
    assert counts[2:30].min() > 20 - 4.5 * 20**0.5 and counts.max() < 20 + 4.5 * 20**0.5


def test_file_is_reused_extended_and_survives_a_cut_line(model, tmp_path):
    path = tmp_path / "self" / "data.jsonl"
    four = generate(model, Words(), 4, seq_len=16, seed=0, path=path, batch_size=3)
    before = path.read_text()
    assert json.loads(before.splitlines()[0])["seed"] == 0 and len(read(path)[1]) == 4

    def untouchable(*args, **kwargs):
        raise AssertionError("the model must not run when the file has enough")

    forward, model.forward = model.forward, untouchable
    try:
        again = generate(model, Words(), 4, seq_len=16, seed=0, path=path)
    finally:
        model.forward = forward
    assert all(torch.equal(a, b) for a, b in zip(four, again)) and path.read_text() == before
    path.write_text(before + before.splitlines()[1][:25])  # killed while writing
    six = generate(model, Words(), 6, seq_len=16, seed=0, path=path)
    fresh = generate(model, Words(), 6, seq_len=16, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(six, fresh))
    assert path.read_text().startswith(before) and len(read(path)[1]) == 6


def test_file_of_other_settings_or_kind_is_refused_and_untouched(model, tmp_path):
    path = tmp_path / "data.jsonl"
    generate(model, Words(), 2, seq_len=8, seed=0, path=path)
    text = path.read_text()
    with pytest.raises(ConfigError, match="seed=0, not 1"):
        generate(model, Words(), 2, seq_len=8, seed=1, path=path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match="generated with model="):
        generate(model, Words(), 2, seq_len=8, seed=0, path=path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1
    assert path.read_text() == text
    other = tmp_path / "corpus.jsonl"
    other.write_text('{"text": "hello"}\n')
    with pytest.raises(ConfigError, match="not a file written by"):
        generate(model, Words(), 2, seq_len=8, seed=0, path=other)


def test_language_filter_keeps_candidates_by_their_first_five_tokens(model):
    def detect(text):
        assert len(text.split()) == 5
        return "en" if int(text.split()[0]) % 2 == 0 else "de"

    kept = generate(model, Words(), 5, seq_len=12, seed=0, batch_size=2, language="en", detect=detect)
    everything = generate(model, Words(), 40, seq_len=12, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, [s for s in everything if s[0] % 2 == 0]))
    with pytest.raises(ConfigError, match="only 0 of 2 sequences after 200 candidates"):
        generate(model, Words(), 2, seq_len=12, seed=0, language="fr", detect=detect)


def test_refusals(model):
    with pytest.raises(ConfigError, match="above the model's 64 positions"):
        generate(model, Words(), 1, seq_len=65)
    with pytest.raises(ConfigError, match="n must be at least 1"):
        generate(model, Words(), 0, seq_len=8)
    renamed = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=16, vocab_size=32))
    with pytest.raises(ConfigError, match="above the model's 16 positions"):
        generate(renamed, Words(), 1, seq_len=17)
    encoder = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=32)
    )
    with pytest.raises(ConfigError, match="encoder"):
        generate(encoder, Words(), 1, seq_len=8)


def test_training_mode_and_fingerprint_are_left_alone(model):
    model.train()
    before = model_digest(model)
    generate(model, Words(), 1, seq_len=8)
    assert model.training and model_digest(model) == before
    model.eval()
