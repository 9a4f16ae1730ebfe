"""The calibration data of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyprune import effects
from pyprune.config.checks import ConfigError, check_at_least, check_choices, check_effects
from pyprune.config.values import SAMPLES, TOKENS


@dataclass(kw_only=True)
class Calibration:
    """Token sequences that the statistics and the reconstruction are computed from."""

    source: Any = None
    """Text that shows what the model is used for: the id of a Hub data set, a local ``.txt``, ``.jsonl``, ``.json``,
    ``.csv`` or ``.parquet`` file, or token ids in a ``.npy`` file; or several of these, of which equal shares are
    taken. In Python also text or token ids in memory, in any usual form. Without one, a mixture that comes with
    pyprune: Python's documentation and essays (``builtin:documentation``, ``builtin:essays``)."""
    num_samples: int | None = None
    """How many sequences to use. It is an error if there are fewer, never a silent shortfall. The default is 64; of
    token ids all rows are used."""
    seq_len: int | None = None
    """Tokens per sequence; for encoders, the most tokens that a sentence keeps. The default is 512, or fewer if the
    model has fewer positions; token ids keep whole rows. Rows of token ids may be cut to fewer tokens, but asking for
    more than they have is an error."""
    seed: int | None = None
    """Seed of the choice of sequences and of sampling them from the model. The default is the run's seed."""
    split: str = "train"
    """Split of the data set."""
    subset: str | None = None
    """Configuration name of a Hub data set, for example ``en`` of ``allenai/c4``."""
    text_column: str | None = None
    """Column that holds the text, or several with commas between them. By default it is found from the data."""
    self_generated: int = 0
    """Number of sequences that the dense model itself samples, which are used beside those of the corpus (arXiv
    2406.15524)."""
    self_generated_path: str | None = None
    """A jsonl file of ``pyprune generate`` whose sequences are reused, and to which missing ones are added. Without
    one, they stay in memory."""
    self_generated_for: Literal["reconstruction", "all"] = "reconstruction"
    """Who uses the self-generated sequences: ``reconstruction`` (only block-wise and cross-block training) or ``all``
    (masks and layer-wise statistics too)."""
    language: str | None = None
    """Keep only generated text that a language detector says is in this language (an ISO code). By default all text is
    kept."""
    held_out: int = 4
    """Number of sequences set aside from the same source to measure generalisation. They are never used to fit
    anything."""

    def __post_init__(self):
        if self.num_samples == 0 and not self.self_generated:
            raise ConfigError("num_samples is 0 and self_generated is 0: there is nothing to calibrate on")
        check_at_least(self, "num_samples", "self_generated", "held_out", minimum=0)
        check_at_least(self, "seq_len", minimum=2)
        check_choices(self)
        check_effects(self, effects.CALIBRATION, "calibration")

    @property
    def samples(self) -> int:
        """Sequences of text."""
        return SAMPLES if self.num_samples is None else self.num_samples

    @property
    def tokens(self) -> int:
        """Tokens of each."""
        return self.seq_len or TOKENS
