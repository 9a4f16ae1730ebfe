"""Sizes of heads and neurons: the names under which modules and configs keep them, and models whose sizes their config
cannot say, whose parameters and attributes are set after the class has built itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
HEADS_PER_GROUP = "num_key_value_groups"
WIDTHS = ("all_head_size", "split_size")
NEURONS = (
    "intermediate_size",
    "intermediate_dim",
    "ffn_dim",
    "moe_intermediate_size",
    "n_inner",
    "ffn_hidden_size",
    "d_ff",
)
EXPERT_NEURONS = "moe_intermediate_size"
BIAS_FLAGS = ("mlp_bias", "attention_bias", "use_bias", "enable_bias")
"""Names of config fields that give linear layers biases."""


@dataclass(frozen=True)
class Heads:
    """An attention's query heads, the groups in which they share keys and values, and the size of one head."""

    count: int
    groups: int
    size: int


def neuron_attributes(module: nn.Module, before: int, after: int) -> dict:
    """New values of the attributes in which a module keeps its number of neurons."""
    return {name: after for name in NEURONS if getattr(module, name, None) == before}


def head_attributes(module: nn.Module, before: Heads, after: Heads) -> dict:
    """New values of the attributes in which a module keeps its heads, and under ``config`` of those in its config."""
    values: dict = {name: after.count for name in HEADS if getattr(module, name, None) == before.count}
    values |= {name: after.groups for name in GROUPS if getattr(module, name, None) == before.groups}
    values |= {
        name: after.count * after.size for name in WIDTHS if getattr(module, name, None) == before.count * before.size
    }
    if getattr(module, HEADS_PER_GROUP, None) == before.count // before.groups:
        values[HEADS_PER_GROUP] = after.count // after.groups
    if hasattr(module, "config"):
        values["config"] = head_fields(module.config, after)
    return values


def head_fields(config, heads: Heads) -> dict:
    """Fields of a config that say an attention's heads, with their values."""
    fields = {"num_attention_heads": heads.count}
    if _settable(config, "head_dim"):
        fields["head_dim"] = heads.size
    if hasattr(config, "num_key_value_heads"):
        fields["num_key_value_heads"] = heads.groups
    return fields


def neuron_fields(config, size: int, experts: bool) -> list[str]:
    """Fields of a config that may say the number of neurons, which is ``size``, the likeliest first; experts: they are
    those of experts."""
    fields = [name for name in NEURONS if hasattr(config, name) and getattr(config, name) in (size, None)]
    if experts:
        fields.sort(key=lambda name: name != EXPERT_NEURONS)
    return fields


def _settable(config, name: str) -> bool:
    """Whether a config takes a value for a name: some compute it from others (Falcon's ``head_dim``)."""
    found = getattr(type(config), name, None)
    return not isinstance(found, property) or found.fset is not None


def share_config(model: Any, edits: dict) -> None:
    """Edit the config all modules share; a copy that a module got for sizes of its own gives way to it."""
    shared = model.config
    for key, value in edits.items():
        setattr(shared, key, value)
    for module in model.modules():
        own = module.__dict__.get("config")
        if own is None or own is shared or type(own) is not type(shared):
            continue
        for key, value in edits.items():
            setattr(own, key, value)
        if own.to_dict() == shared.to_dict():  # an encoder's may have flags of its own (UMT5)
            module.config = shared


def set_parameter(block: nn.Module, path: str, value: Tensor) -> None:
    owner, _, key = path.rpartition(".")
    module = block.get_submodule(owner)
    old = getattr(module, key)
    setattr(module, key, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
    if key != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = value.shape
    elif hasattr(module, "nf"):
        conv: Any = module
        conv.nx, conv.nf = value.shape


def apply_attributes(module: nn.Module, values: dict) -> None:
    """Write sizes to a module; those of its config go to a copy that only this module sees."""
    for name, value in values.items():
        if name == "config":
            own = copy.copy(module.config)
            for key, size in value.items():
                setattr(own, key, size)
            module.config = own
        else:
            setattr(module, name, value)


def sized_class(cls: Any, sizes: dict) -> Any:
    """A subclass of a Hugging Face model class whose instances have the shapes of ``sizes``: what
    :func:`pyprune.structured.config_edits.layout` returned."""

    def init(self, config, *args, **kwargs):
        cls.__init__(self, config, *args, **kwargs)
        _resize(self, sizes)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def _resize(model: nn.Module, sizes: dict) -> None:
    for name, shape in sizes["shapes"].items():
        owner, _, key = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        like = getattr(module, key, None)
        value = torch.empty(shape, dtype=(module.weight if like is None else like).dtype)
        if like is None:
            setattr(module, key, nn.Parameter(value))
        else:
            set_parameter(module, key, value)
    for path, values in sizes["attributes"].items():
        apply_attributes(model.get_submodule(path), values)
