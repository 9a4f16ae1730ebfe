"""Which class of transformers a checkpoint is a model of."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from pyprune.model.origin import Origin


def model_class(config, gguf: bool = False, origin: Origin | None = None):
    """The class a checkpoint names, if its tensors are that class's; else the one whose tensors they are, which
    ``origin`` notes; else the base model.

    origin: where the tensors lie; without it the config alone decides.
    """
    import transformers

    if gguf:
        return transformers.AutoModelForCausalLM
    classes = [cls for name in config.architectures or [] if isinstance(cls := getattr(transformers, name, None), type)]
    files = None if origin is None else origin.files
    if origin is None or not files or classes and not _names_more(classes[0], config, files.where):
        return classes[0] if classes else transformers.AutoModel
    fitting = _fitting_class(config, files)
    if fitting is not None and classes[:1] != [fitting]:
        named = ", ".join(config.architectures or []) or "no class"
        origin.notes.append(
            f"config.json names {named} in architectures; loaded as {fitting.__name__}, which uses "
            "every tensor of the checkpoint"
        )
    return fitting or (classes[0] if classes else transformers.AutoModel)


def _names_more(cls: Any, config, names: Iterable[str]) -> bool:
    """A model without a head, where the file has the names of one with a head: a base with something beside it."""
    import transformers

    prefix = f"{cls.base_model_prefix}."
    inside = [name.startswith(prefix) for name in names]
    return cls is transformers.MODEL_MAPPING.get(type(config), None) and any(inside) and not all(inside)


def _fitting_class(config, files) -> type | None:
    """The class of a config's kind whose tensors have the names and shapes of those in the files, none left over."""
    import transformers

    kinds = (
        "FOR_MASKED_LM",
        "FOR_CAUSAL_LM",
        "FOR_PRETRAINING",
        "FOR_SEQUENCE_CLASSIFICATION",
        "FOR_TOKEN_CLASSIFICATION",
        "FOR_QUESTION_ANSWERING",
        "FOR_MULTIPLE_CHOICE",
    )
    mappings = [getattr(transformers, f"MODEL_{kind}_MAPPING", {}) for kind in kinds]
    for mapping in [*mappings, transformers.MODEL_MAPPING]:
        cls = mapping.get(type(config), None)
        for candidate in cls if isinstance(cls, tuple) else [cls]:
            if candidate is not None and _fits(candidate, config, files):
                return candidate
    return None


def _fits(cls: type, config, files) -> bool:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    state, tables = model.state_dict(), dict(model.named_buffers())
    tied = {
        key
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is not model.get_parameter(key)
    } | set(getattr(model, "all_tied_weights_keys", None) or ())
    return (
        set(files.where) <= {*state, *tables}
        and set(state) - set(files.where) <= tied
        and all(tuple(files.shape(key)) == tuple(state[key].shape) for key in files.where if key in state)
    )


def assume_causal(config) -> None:
    """Name the causal language model of a config's kind where it names no class, as those of GGUF files do not."""
    import transformers

    decoders: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not config.architectures:
        config.architectures = [decoders[type(config)].__name__]


def name_class(model: Any) -> None:
    """Name a model's own class in its config, as saving it would."""
    model.config.architectures = [type(model).__name__]


def classes_of_head(model: torch.nn.Module) -> list[str]:
    """Names of the classes of a model's sequence classification head, by number; none for any other model, or for a
    head that gives one number (regression, a reward)."""
    config: Any = getattr(model, "config", None)
    if not type(model).__name__.endswith("ForSequenceClassification") or config.num_labels < 2:
        return []
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def answers_with_spans(model: torch.nn.Module) -> bool:
    """Whether a model has a head that gives the start and the end of an answer in the text."""
    return type(model).__name__.endswith("ForQuestionAnswering")
