"""A model whose weights are streamed, as lm-eval sees one: all requests of a task pass its blocks together, once.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from pyprune.config import ConfigError
from pyprune.evaluation.block_by_block import Blockwise
from pyprune.evaluation.choices import encode_pair, loglikelihoods


class StreamedModel(LM):
    """Log-likelihoods of continuations behind their contexts; a task that needs anything else is refused."""

    def __init__(self, model: Blockwise, tokenizer: Any, batch_size: int, progress: Any = None):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.progress = model, tokenizer, batch_size, progress

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        found = loglikelihoods(self.model, pairs, batch_size=self.batch_size, progress=self.progress)
        return [(one.logp, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        raise ConfigError("it scores whole texts, which needs the model in memory: set stream='never'")

    def generate_until(self, requests, disable_tqdm: bool = False):
        raise ConfigError("it samples text, which needs the model in memory: set stream='never'")
