"""What a run reads: its calibration sequences and its evaluation windows."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pyprune.config import Calibration, PruneConfig
from pyprune.data import calibration
from pyprune.data.calibration import CalibrationData
from pyprune.data.self_generated import generate
from pyprune.effects import needs_sequences, reads_sequences, watches
from pyprune.evaluation import domains
from pyprune.evaluation.perplexity import Text, windows_of
from pyprune.model.attributes import begin_text, vocabulary_size
from pyprune.model.blocks import ModelView
from pyprune.model.positions import Positions
from pyprune.pipeline.session import Session


def sequences_of(
    session: Session, view: ModelView, tokenizer, positions: Positions | None
) -> tuple[CalibrationData, list[Text]]:
    """Calibration sequences of a run, those still to be generated apart, and its evaluation windows."""
    config, found, shared = session.config, session.found, session.shared
    with found.clock("calibration"), session.doing("reading calibration text", said=False):
        data = shared.once(shared.sequences(config), lambda: calibration_data(config, view, tokenizer))
    with found.clock("evaluation"), session.doing("reading evaluation text", said=False):
        windows = windows_of(
            domains.of_run(config.evaluation, config.calibration),
            config.evaluation,
            tokenizer,
            view.is_encoder,
            unseen=data.unseen,
            vocab_size=vocabulary_size(view.model),
            positions=positions,
            warn=found.warn,
        )
    check_lengths(config, data, windows, positions)
    return data, windows


def check_lengths(
    config: PruneConfig,
    data: CalibrationData,
    windows: list[Text],
    positions: Positions | None,
    warn: Callable[[str], None] = lambda message: None,
) -> None:
    """Refuse sequences and windows that a model's table of positions does not hold, warn of what exceeds others."""
    if not positions:
        return
    if data.sequences:
        lengths = lengths_of(data, calibration.coerce(config.calibration))
        positions.check(lengths, "calibration sequences", "seq_len", warn)
    positions.check({len(row) for text in windows for row in text.windows}, "evaluation windows", "window", warn)


def calibration_data(
    config: PruneConfig,
    view: ModelView,
    tokenizer,
) -> CalibrationData:
    """The sequences of a run; none where the weights alone decide and nothing could be read to measure errors on."""
    settings, decides, model = config.calibration, needs_sequences(config), view.model
    if not reads_sequences(config) or (not decides and settings.source is None and tokenizer is None):
        data = CalibrationData(
            sequences=[], fingerprint=calibration.fingerprint([]), description="none: masks come from the weights alone"
        )
        if reads_sequences(config):
            data.warnings.append(
                "block errors were not measured: the text that they are measured on by default needs "
                "a tokenizer; pass tokenizer=, or give token ids as calibration"
            )
        return data
    return calibration.load(
        settings,
        tokenizer,
        encoder=view.is_encoder,
        model_config=model.config,
        vocab_size=vocabulary_size(model),
        measures=watches(config),
    )


def lengths_of(data: CalibrationData, settings: Calibration) -> list[int]:
    """Tokens of all sequences, those still to be generated too."""
    return [len(row) for row in data.sequences + data.held_out] + [settings.tokens] * bool(settings.self_generated)


def add_generated(
    data: CalibrationData,
    settings: Calibration,
    model: nn.Module,
    tokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sequences sampled from the dense model join the corpus samples, or wait for the reconstruction."""
    calibration.need_tokenizer(tokenizer, "self-generated calibration")
    settings = calibration.coerce(settings)
    sequences = generate(
        model,
        tokenizer,
        settings.self_generated,
        seq_len=settings.tokens,
        seed=settings.seed or 0,
        language=settings.language,
        path=settings.self_generated_path,
        progress=progress,
    )
    data.description += f"; {len(sequences)} self-generated sequences of {settings.seq_len} tokens"
    if len(calibration.bos_prefix(tokenizer)):
        data.warnings.append(
            f"the self-generated sequences do not begin with {begin_text(tokenizer)!r}, with which "
            "the tokenizer starts every text: they are drawn from a random first token"
        )
    data.sampled = sequences
    if settings.self_generated_for == "all":
        data.sequences = data.sequences + sequences
        data.fingerprint = calibration.fingerprint(data.sequences)
    else:
        data.generated = sequences
        data.description += " for the reconstruction"
