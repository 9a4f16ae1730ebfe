"""What is refused, or warned of, before a run begins its work: models, weights and texts that it cannot do."""

from __future__ import annotations

from typing import Any

from pyprune.config import ConfigError, PruneConfig
from pyprune.data import calibration
from pyprune.effects import needs_sequences, reads_sequences
from pyprune.evaluation.windows import refuse_text
from pyprune.execution.run import Run
from pyprune.execution.unopened import Unopened
from pyprune.model import checkpoint
from pyprune.model.attributes import positions_named, token_embedding
from pyprune.model.blocks import ModelView, refuse_shared, select_weights
from pyprune.model.positions import Positions
from pyprune.pipeline.sparsities import Rules, Selected, check_patterns, check_removes


def outlined(config: PruneConfig, tokenizer: Any) -> tuple[ModelView | None, Any]:
    """A named model without its weights, checked as far as it can be, and its tokenizer; None where they take about as
    long to read as the weights do.

    Raises ConfigError before any weight is read.
    """
    if config.model is None:
        raise ConfigError("no model: give a Hub id, a local folder, a .gguf file or a live nn.Module")
    source = checkpoint.resolve(config.model)
    if checkpoint.structured_sizes(source):
        return None, None
    view = Unopened(config.model, config.dtype).view
    selected = select_weights(view, config.targets, config.ignore)
    check_patterns(view, selected, config)
    check_weights(view, selected, config)
    refuse_text(config.evaluation, view)
    if source.gguf_file:
        if reads_sequences(config):
            calibration.check_size(config.calibration)
        return None, None
    with checkpoint.loading(config.model):
        return view, tokenizer or checkpoint.load_tokenizer(source)


def named_positions(view: ModelView) -> Positions | None:
    """Positions of a model without weights, as its configuration names them."""
    count = positions_named(view.model.config)
    if count is None:
        return None
    words = token_embedding(view.model).weight
    outside = [
        p for name, p in view.model.named_parameters() if not name.startswith(f"{view.path}.") and p is not words
    ]
    table = any(p.ndim == 2 and count <= p.shape[0] <= count + 2 for p in outside)
    return Positions(type(view.model).__name__, count, table)


def check_weights(view: ModelView, selected: Selected, config: PruneConfig, rules: Rules | None = None) -> None:
    """Refuse what cannot be done to these blocks, before any work. rules: where there are sparsities by name, the key
    of each weight; None if they are not resolved yet."""
    if not config.is_structured and not any(selected) and (config.targets or config.ignore):
        raise ConfigError(
            f"targets {config.targets} and ignore {config.ignore} leave no weight to prune: name others, or fewer"
        )
    if config.is_structured:
        refuse_shared(view, config.pattern)
    elif config.nm is None and (rules or not config.sparsity_by_name):
        check_removes(view, selected, config, rules)
    if config.nm is None:
        return
    group = config.nm[1]
    for i, (block, refs) in enumerate(zip(view.blocks, selected)):
        known: set[str] = set()
        for ref in refs:
            if ref.path in known:
                continue  # experts of one tensor are alike
            known.add(ref.path)
            columns = ref.view(block).shape[1]
            if columns % group:
                raise ConfigError(
                    f"pattern {config.pattern} does not divide the {columns} inputs of "
                    f"{view.name(i, ref)}; choose another pattern or ignore that weight"
                )


def thin_statistics(run: Run) -> list[str]:
    """A sentence if there are fewer calibration tokens than a matrix has inputs: their Gram has not full rank."""
    if run.config.is_structured or not needs_sequences(run.config):
        return []  # structured repair weighs tokens against columns itself
    tokens, found = sum(map(len, run.data.sequences)), []
    for i, (block, refs) in enumerate(zip(run.view.blocks, run.selected)):
        widths = {ref.path: (ref.view(block).shape[1], ref) for ref in refs}
        found += [(width, run.view.name(i, ref)) for width, ref in widths.values() if width > tokens]
    if not found:
        return []
    width, name = max(found, key=lambda item: item[0])
    more = f" and of {len(found) - 1} more matrices" if len(found) > 1 else ""
    return [
        f"{tokens} calibration tokens are fewer than the {width} inputs of {name}{more}: what is chosen there "
        "rests on too little data; give more or longer sequences"
    ]


def unmeasured(config: PruneConfig, view: ModelView, texts: list) -> list[str]:
    """A sentence if perplexity was to be measured and cannot be."""
    if not config.evaluation.enabled or texts or view.is_encoder:
        return []
    return [
        "no perplexity: the text that it is measured on by default needs a tokenizer, and there is none beside the "
        "model; give token ids as evaluation text, or add the tokenizer's files (in Python: tokenizer=)"
    ]
