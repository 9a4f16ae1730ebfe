"""Models whose blocks take arguments that depend on the tokens, or on what earlier blocks left."""

from __future__ import annotations

import tiny
import torch
import transformers as hf
from torch import nn

KINDS = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"])
LAYERED = {
    **tiny._GROUPED,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    **KINDS,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "sliding_window": 8,
}


class Gate(nn.Module):
    """A block that needs the embedded tokens of its own sequence, and an argument of every sequence."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden, table, *, extra):
        mixed = torch.cat([hidden, extra["tokens"] + table], -1)
        return (hidden + self.down(torch.nn.functional.gelu(self.up(mixed))),)


class Synthetic(nn.Module):
    """A causal model of its own whose blocks take a token-dependent argument in a dict."""

    kind = "tokens"

    def __init__(self, config=None, width=16, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.config = config or hf.PretrainedConfig(vocab_size=tiny.VOCABULARY)
        self.embedding, self.second = (nn.Embedding(tiny.VOCABULARY, width) for _ in range(2))
        self.layers = nn.ModuleList(Gate(width) for _ in range(blocks))
        self.head = nn.Linear(width, tiny.VOCABULARY)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        table = torch.arange(input_ids.shape[1], device=hidden.device, dtype=hidden.dtype)[None, :, None] / 10
        tokens = self.second(input_ids)
        for layer in self.layers:
            if self.kind == "earlier blocks":
                tokens = tokens + hidden.detach()
            elif self.kind == "whole batch":
                tokens = self.second(input_ids).mean(0, keepdim=True).expand(len(hidden), -1, -1)
            hidden = layer(hidden, table, extra={"tokens": tokens})[0]
        return self.head(hidden)


def gemma4(shared):
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**LAYERED, global_head_dim=8, num_kv_shared_layers=shared))


def gemma3n():
    return hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(**LAYERED, num_kv_shared_layers=2, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)
    )


def zamba2():
    return hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=8,
            mamba_headdim=8,
            n_mamba_heads=8,
            mamba_ngroups=1,
            chunk_size=8,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
            adapter_rank=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gemma4_with_images():
    text = hf.Gemma4TextConfig(**LAYERED, global_head_dim=8, num_kv_shared_layers=2)
    vision = hf.Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return hf.Gemma4ForConditionalGeneration(
        hf.Gemma4Config(
            text_config=text,
            vision_config=vision,
            audio_config=None,
            image_token_id=90,
            video_token_id=91,
            audio_token_id=92,
            boi_token_id=93,
            eoi_token_id=94,
        )
    )


MODELS = {
    "gemma4": lambda: gemma4(0),
    "gemma4 with shared keys": lambda: gemma4(2),
    "zamba2": zamba2,
    "gemma4 with images": gemma4_with_images,
    "synthetic": Synthetic,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and name != "synthetic":
                parameter.mul_(6)
    return model
