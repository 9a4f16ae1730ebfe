"""What a run reads: its calibration sequences and its evaluation windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from pyprune.config import Calibration, ConfigError, PruneConfig, check_effects
from pyprune.data import calibration
from pyprune.data.calibration import CalibrationData
from pyprune.data.self_generated import generate
from pyprune.effects import needs_sequences, reads_sequences, watches
from pyprune.evaluation import domains
from pyprune.evaluation.windows import Text, windows_of
from pyprune.model.attributes import begin_text, embedding_width, vocabulary_size
from pyprune.model.blocks import ModelView, check_apart
from pyprune.model.positions import Positions, positions_of
from pyprune.pipeline.refine_request import Refinement
from pyprune.pipeline.session import Session

UNUSED_IN_REFINEMENT = (lambda _: False, "refining solves no layers, it trains; only pyprune prune uses it")


def sequences_of(
    session: Session, view: ModelView, tokenizer, positions: Positions | None
) -> tuple[CalibrationData, list[Text]]:
    """Calibration sequences of a run, those still to be generated apart, and its evaluation windows."""
    config, found, shared = session.config, session.found, session.shared
    with found.clock("calibration"), session.doing("reading calibration text", said=False):
        data = shared.once(shared.sequences(config), lambda: calibration_data(config, view, tokenizer, positions))
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
        lengths = lengths_of(data, calibration.coerce(calibration.within(config.calibration, positions.count)))
        positions.check(lengths, "calibration sequences", "seq_len", warn)
    positions.check({len(row) for text in windows for row in text.windows}, "evaluation windows", "window", warn)


def calibration_data(
    config: PruneConfig,
    view: ModelView,
    tokenizer,
    positions: Positions | None = None,
) -> CalibrationData:
    """The sequences of a run; none where the weights alone decide and nothing could be read to measure errors on."""
    settings = calibration.within(config.calibration, positions.count if positions else None)
    decides, model = needs_sequences(config), view.model
    if not reads_sequences(config) or (not decides and settings.source is None and tokenizer is None):
        data = CalibrationData(
            sequences=[], fingerprint=calibration.fingerprint([]), description="none: masks come from the weights alone"
        )
        if reads_sequences(config):
            data.warnings.append(
                "block errors were not measured: the text that they are measured on by default needs a tokenizer, and "
                "there is none beside the model; give token ids as calibration, or add the tokenizer's files (in "
                "Python: tokenizer=)"
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


def sequences_of_pair(
    pruned: ModelView,
    dense: ModelView,
    request: Refinement,
    tokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationData:
    """Calibration and held-out sequences of a refinement; ConfigError where anything does not fit the two models.

    progress: called with the generated sequences done and all there are.
    """
    settings = request.reconstruction
    sizes = [(len(view.blocks), vocabulary_size(view.model), embedding_width(view.model)) for view in (pruned, dense)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            "the pruned and the dense model must have the same blocks, vocabulary and hidden size, got "
            f"{sizes[0]} and {sizes[1]}"
        )
    check_apart(pruned, dense)
    positions = positions_of(pruned)
    chosen = calibration.coerce(calibration.within(request.calibration, positions.count if positions else None))
    if chosen.seed is None:
        chosen = dataclasses.replace(chosen, seed=request.seed)
    check_effects(chosen, {"self_generated_for": UNUSED_IN_REFINEMENT}, "calibration")
    check_effects(settings, {"layerwise_target": UNUSED_IN_REFINEMENT}, "reconstruction")
    data = calibration.load(
        chosen, tokenizer, encoder=pruned.is_encoder, vocab_size=sizes[0][1], model_config=pruned.model.config
    )
    if positions:
        positions.check(lengths_of(data, chosen), "calibration sequences", "seq_len", data.warnings.append)
    if chosen.self_generated:
        add_generated(data, chosen, dense.model, tokenizer, progress)
    if (settings.select == "validation" or settings.early_stop) and not data.held_out:
        raise ConfigError(
            "select='validation' and early_stop need held-out sequences: set held_out above 0, or give "
            "more calibration text"
        )
    return data


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
    data.description += f"; {len(sequences)} self-generated sequences of {settings.tokens} tokens"
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
