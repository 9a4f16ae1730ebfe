"""What configurations, tokenizers and models of Hugging Face call things: the one place for those names.

A function asks one question and knows every name under which architectures answer it. Nothing outside
:mod:`pyprune.model` spells these names. Names of the sizes that structured pruning changes are in
:mod:`pyprune.model.sizes`, those of whole classes in :mod:`pyprune.model.architecture`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
EXPERTS = ("num_experts", "num_local_experts")
NARROWED = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "word_embed_proj_dim",
    "ffn_dim",
    "n_inner",
)
"""Sizes that can be halved together and still fit each other."""


def positions_named(config: Any) -> int | None:
    """Positions that a config names, None if it names none."""
    named = (getattr(config, name, None) for name in POSITIONS)
    return next((count for count in named if isinstance(count, int) and count > 0), None)


def active_share(config: Any) -> float:
    """Share of the experts that a token goes through, 1 without experts."""
    experts = next((count for name in EXPERTS if (count := getattr(config, name, None))), None)
    if not experts:
        return 1.0
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts


def attention_size(config: Any) -> int:
    """Width of all query heads together, 0 if the config does not name any."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    return heads * (getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads, 1))


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model: the config itself but for models of several kinds of input,
    None where there is none."""
    return getattr(config, "get_text_config", lambda: None)()


def pad_token(owner: Any) -> int | None:
    """Id with which a config or a tokenizer pads; None if there is none."""
    return getattr(owner, "pad_token_id", None)


def begin_token(owner: Any) -> int | None:
    """Id with which texts begin."""
    return getattr(owner, "bos_token_id", None)


def begin_text(tokenizer: Any) -> str | None:
    """What a tokenizer writes for the id with which texts begin."""
    return getattr(tokenizer, "bos_token", None)


def end_tokens(owner: Any) -> int | list[int] | None:
    """Id or ids with which texts end."""
    return getattr(owner, "eos_token_id", None)


def special_tokens(config: Any) -> set[int]:
    """Ids that a config names: of texts' begin and end, of placeholders for images and the like."""
    found: set[int] = set()
    for part in (config, text_config(config)):
        for name, value in vars(part).items() if part is not None else ():
            if "token_i" in name:
                found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    return found


def quantisation(config: Any) -> Any:
    """How a config says that its weights are quantised; None if it does not."""
    return getattr(config, "quantization_config", None)


def quantiser(config: Any) -> str:
    """Name of the method with which the weights of a config are quantised."""
    found = quantisation(config)
    return str(found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "?"))


def dtype_named(config: Any) -> torch.dtype | None:
    """Type of the weights by a config; None if it names none."""
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else None


def find_embedding(model: Any) -> nn.Embedding | None:
    """The table of a model's token ids; None for a model that has none (images, sound, modules of one's own)."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if hasattr(found, "num_embeddings") else None


def token_embedding(model: Any) -> nn.Embedding:
    """The table of a model's token ids. Raises ConfigError for a model that has none."""
    found = find_embedding(model)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no table of token ids; give a Hugging Face model that reads text"
        )
    return found


def embedding_device(model: nn.Module) -> torch.device:
    """Where a model looks its token ids up."""
    return next(token_embedding(model).parameters()).device


def vocabulary_size(model: nn.Module) -> int:
    """Token ids that a model knows."""
    return token_embedding(model).num_embeddings


def embedding_width(model: nn.Module) -> int:
    """Columns of the table of token ids."""
    return token_embedding(model).weight.shape[1]


def output_layer(model: Any) -> nn.Linear | None:
    """What makes logits over the vocabulary; None for a model that makes none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def last_hidden(output: Any) -> Tensor:
    """Last hidden states of a model's output, else the first thing in it."""
    hidden = getattr(output, "last_hidden_state", None)
    return output[0] if hidden is None else hidden


def any_token(model: nn.Module) -> int:
    """A token id that is not padding, from which some encoders derive positions."""
    return min(1 + (pad_token(model.config) or 0), vocabulary_size(model) - 1)


def shortened(config: Any, blocks: int, experts: int) -> tuple[Any, bool]:
    """A copy of a config for the first blocks alone, and whether they have fewer experts than in the original."""
    short, fewer = copy.deepcopy(config), False
    short.num_hidden_layers = blocks
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:blocks]
    if getattr(short, "num_kv_shared_layers", None):
        short.num_kv_shared_layers = 0  # the first blocks have none before them to share with
    for name in EXPERTS:
        if (getattr(short, name, None) or 0) > experts:
            setattr(short, name, experts)
            fewer = True
    return short, fewer


def halve_sizes(config: Any) -> None:
    """Make the blocks of a config half as wide, in place."""
    for name in NARROWED:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            setattr(config, name, value // 2)


def set_vocabulary(config: Any, size: int) -> None:
    """Give the model of a config another number of token ids, in place."""
    config.vocab_size = size
