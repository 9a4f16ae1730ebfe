"""What a run measures before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyprune import effects
from pyprune.config.checks import ConfigError, check_at_least, check_choices, check_effects
from pyprune.config.values import SHORT_WINDOW, SHORT_WINDOWS, WINDOW, Dtype


@dataclass(kw_only=True)
class Evaluation:
    """What the dense and the pruned model are measured on at the end of a run."""

    text: Any = None
    """Text to measure perplexity on, from the same kinds of sources as the calibration text; several are given as a
    list in Python, by repeating the option on a command line. Without one, text of the calibration's own source that it
    does not see."""
    off_domain: Any = None
    """Text of another kind than the calibration text, measured beside it to show how far the result carries: sources as
    for text, or ``none``. Without one, a novel that comes with pyprune (``builtin:novel``); with the default
    calibration every text that is named is of another kind already."""
    window: int | None = None
    """Tokens per window. The default is 1,024 for a text that is named and 512 for others, or
    fewer if the model has fewer positions; token ids keep whole rows. Longer rows of token ids are cut into windows one
    after the other; a window that no row is as long as is an error."""
    stride: int | None = None
    """Tokens from the beginning of a window to the beginning of the next. Where they overlap, only the tokens are
    scored that the window before did not have, each with more context before it. By default windows do not overlap."""
    max_windows: int | None = 24
    """The most windows that are measured per text; of a text that is not named 8, unless another number is set. ``all``
    takes all of them (None in Python, ``null`` in a configuration file)."""
    dtype: Dtype = "auto"
    """Number type of the forward passes of the evaluation. ``auto`` is the model's own type on a GPU, and bfloat16 on a
    CPU that multiplies it in hardware."""
    batch_size: int = 1
    """Windows per forward pass."""
    bos: bool = True
    """Start every window with the tokenizer's BOS token if the tokenizer starts texts with one. The papers do not do
    this; switch it off to compare with them."""
    split: str = "test"
    """Split of the data set."""
    subset: str | None = None
    """Configuration name of a Hub data set, for example ``wikitext-2-raw-v1`` of ``Salesforce/wikitext``."""
    text_column: str | None = None
    """Column that holds the text, or several with commas between them. By default it is found from the data."""
    enabled: bool = True
    """Measure perplexity before and after pruning."""

    def __post_init__(self):
        check_at_least(self, "window", minimum=2)
        check_at_least(self, "max_windows", "batch_size", "stride")
        self.check_stride(self.tokens)
        check_choices(self, "evaluation")
        check_effects(self, effects.EVALUATION, "evaluation")

    @property
    def tokens(self) -> int:
        """Tokens a window of text."""
        return self.window or (WINDOW if self.text is not None else SHORT_WINDOW)

    def check_stride(self, tokens: int) -> None:
        """Raise ConfigError for a stride that is longer than a window of ``tokens``."""
        if self.stride is not None and self.stride > tokens:
            raise ConfigError(
                f"evaluation.stride={self.stride} is longer than the window of {tokens} tokens: the tokens between two "
                "windows would not be measured; give a larger window or a smaller stride"
            )

    @property
    def other_windows(self) -> int | None:
        """The most windows of a text that is not named."""
        return SHORT_WINDOWS if self.max_windows == effects.default(type(self), "max_windows") else self.max_windows
