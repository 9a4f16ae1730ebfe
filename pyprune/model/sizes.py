"""Models whose sizes their configuration cannot say: parameters and attributes set after the class has built itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


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


def settable(config, name: str) -> bool:
    """Whether a config takes a value for a name: some compute it from others (Falcon's ``head_dim``)."""
    found = getattr(type(config), name, None)
    return not isinstance(found, property) or found.fset is not None


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
    """A subclass of a Hugging Face model class whose instances have the shapes of ``sizes`` (a :func:`layout`)."""
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
