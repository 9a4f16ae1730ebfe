"""Tiny models of every supported architecture, built in code with fixed weights."""

from __future__ import annotations

import string

import torch
import transformers as hf

VOCABULARY = 96
CHARACTERS = 104
"""Size of the vocabulary of :func:`tokenizer`."""
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED = dict(_COMMON, num_key_value_heads=2)

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "mistral": lambda: hf.MistralConfig(**_GROUPED, sliding_window=8, head_dim=8),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: hf.Phi3Config(**_GROUPED),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{**_COMMON, "eos_token_id": 2}),
    "bert": lambda: hf.BertConfig(**_COMMON),
    "roberta": lambda: hf.RobertaConfig(**_COMMON),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
ENCODERS = ("bert", "roberta")


def model(architecture: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A float32 model in eval mode, weights larger than the usual initialisation so that blocks matter; ``changes``
    are set on its configuration first."""
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    auto = hf.AutoModel if architecture in ENCODERS else hf.AutoModelForCausalLM
    return spread(auto.from_config(config).eval())


@torch.no_grad()
def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Make fixed random weights large enough that blocks matter, and norms and biases differ from ones and zeros."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(6)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def zeroed(model: torch.nn.Module, sparsity: float, seed: int = 0) -> torch.nn.Module:
    """The model with that share of zeros at random places in every row of its blocks' matrices."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not any(part in name for part in ("embed", "wte", "wpe", "head", "pooler")):
            scores = torch.rand(parameter.shape, generator=generator)
            count = round(sparsity * parameter.shape[-1])
            parameter.scatter_(-1, scores.topk(count, dim=-1).indices, 0.0)
    return model


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``[rows, length]`` without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(bos: bool = False, encoder: bool = False):
    """A tokenizer built in code: one token a character, and a token for a character it does not know.

    bos: starts every text with BOS, as LLaMA's does. encoder: puts a text between BOS and EOS, as BERT's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built.decoder = decoders.Fuse()
    if bos or encoder:
        built.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if encoder else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )
