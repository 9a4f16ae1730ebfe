"""Sizes of a sliced model: as edits of its config, or as a layout that only pyprune reads.

A uniform result becomes a plain checkpoint: the config is edited and an empty model built from it must have exactly the
sliced shapes, else stock transformers would drop or re-initialise weights without an error. What a stock config cannot
say is described by :func:`layout`, from which :mod:`pyprune.model.sizes` makes the same model again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pyprune.config import ConfigError
from pyprune.model.blocks import WeightRef
from pyprune.model.sizes import BIAS_FLAGS, head_fields, neuron_fields, share_config
from pyprune.structured.groups import Coupled
from pyprune.structured.slicing import heads_of


def empty_like(model: nn.Module, edits: dict) -> nn.Module:
    """A weightless model of the same class from the edited config; ConfigError if the config refuses the edits."""
    config: Any = copy.deepcopy(model.config)
    for key, value in edits.items():
        setattr(config, key, value)
    try:
        config = type(config).from_dict(config.to_dict())  # as a reload would read it, checks included
        with torch.device("meta"):
            return type(model)(config)
    except Exception as error:  # each architecture has its own way to refuse sizes, all of them end here
        raise ConfigError(f"{type(config).__name__} refuses {_said(edits)}: {str(error).strip()}") from error


def bias_flags(model: nn.Module, consumers: dict[str, str]) -> dict[str, str]:
    """Config flags that give a consumer without bias one: ``{kind: flag}`` for ``{kind: full module path}``."""
    found = {}
    for kind, path in consumers.items():
        if getattr(model.get_submodule(path), "bias", None) is not None:
            continue
        for flag in BIAS_FLAGS:
            if (
                getattr(model.config, flag, None) is False
                and getattr(empty_like(model, {flag: True}).get_submodule(path), "bias", None) is not None
            ):
                found[kind] = flag
                break
    return found


def candidate_edits(model: nn.Module, dense: dict[str, Coupled], units: dict[str, int]) -> list[dict]:
    """Config edits worth trying for uniform sizes ``{kind: units}``."""
    head: dict = {}
    if "heads" in units:
        head = head_fields(model.config, heads_of(dense["heads"], units["heads"]))
    if "neurons" not in units:
        return [head]
    group = dense["neurons"]
    fields = neuron_fields(model.config, group.units, experts=group.consumer.expert is not None)
    return [{**head, f: units["neurons"]} for f in fields] or [head]


def standard_edits(model: nn.Module, dense: dict[str, Coupled], units: dict[str, int], flags: dict) -> dict:
    """Config edits under which the stock class has exactly the sliced model's shapes.

    Raises ConfigError with the reason if there are none. The model must be sliced already.
    """
    reason = ""
    for edits in candidate_edits(model, dense, units):
        edits = {**edits, **flags}
        try:
            shell = empty_like(model, edits)
        except ConfigError as error:
            reason = reason or str(error)
            continue
        want = {n: tuple(p.shape) for n, p in shell.named_parameters()}
        have = {n: tuple(p.shape) for n, p in model.named_parameters()}
        wrong = [n for n in have if want.get(n) != have[n]]
        missing = [n for n in want if n not in have and not n.endswith("bias")]
        if not wrong and not missing:
            return edits
        if wrong:
            reason = reason or (
                f"a {type(model.config).__name__} with {_said(edits)} makes {wrong[0]} "
                f"{list(want.get(wrong[0], ()))}, the pruned model has {list(have[wrong[0]])}"
            )
    raise ConfigError(reason or f"{type(model.config).__name__} has no field for these sizes")


def apply_edits(model: nn.Module, edits: dict) -> None:
    """Edit the config all modules share, and give every bias that its flags add an explicit zero."""
    share_config(model, edits)
    add_biases(model, edits)


def add_biases(model: nn.Module, edits: dict) -> None:
    """Zeros for biases that exist under the edited config and not yet in the model."""
    if not any(edits.get(flag) for flag in BIAS_FLAGS):
        return
    shell = empty_like(model, edits)
    have = dict(model.named_parameters())
    for name in [n for n, _ in shell.named_parameters() if n.endswith("bias") and n not in have]:
        module = model.get_submodule(name.rpartition(".")[0])
        weight = module.get_parameter("weight")
        module.bias = nn.Parameter(torch.zeros(weight.shape[0]).to(weight), requires_grad=False)


def _said(edits: dict) -> str:
    return ", ".join(f"{k}={v}" for k, v in edits.items())


def layout(model: nn.Module, path: str, attributes: list[dict[str, dict]], blocks: list[dict]) -> dict:
    """Plain description of a model whose blocks differ from its config, for ``pruning.json``.

    path: of the block list; attributes: per block, what :func:`pyprune.structured.slicing.slice_block` returned;
    blocks: sizes for the reader.
    """
    dense = {n: tuple(p.shape) for n, p in empty_like(model, {}).named_parameters()}
    return {
        "architecture": type(model).__name__,
        "blocks": blocks,
        "shapes": {n: list(p.shape) for n, p in model.named_parameters() if dense.get(n) != tuple(p.shape)},
        "attributes": {
            f"{path}.{i}.{m}" if m else f"{path}.{i}": values
            for i, changed in enumerate(attributes)
            for m, values in changed.items()
        },
    }


def dense_groups(groups: list[Coupled]) -> dict[str, Coupled]:
    """One representative group per kind."""
    return {g.kind: g for g in reversed(groups)}


def consumer_path(blocks_path: str, index: int, ref: WeightRef) -> str:
    return f"{blocks_path}.{index}.{ref.module_path}"
