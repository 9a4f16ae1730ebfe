"""The table of a model's token ids, which ``nn.Module`` knows nothing of."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_embedding(model: Any) -> nn.Embedding:
    """The module that a Hugging Face model looks token ids up in; of whatever class, it has an embedding's weight."""
    return model.get_input_embeddings()
