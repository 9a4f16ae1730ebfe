"""A live model to packed linear layers and back: ``pyprune.sparse`` and ``pyprune.dense``."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import torch
from torch import nn

from pyprune.config import ConfigError
from pyprune.model.blocks import is_conv1d
from pyprune.packed.files import packed_if_it_pays, save_packed
from pyprune.packed.modules import SparseLinear


def sparse(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """A model whose linear layers hold their weights packed, where that saves a tenth or more of their bytes.

    model: a live model with zeros in its weights; it stays as it is, and shares all other tensors with the one that is
    returned. in_place: change it instead, layer by layer, so that never more than one weight is there twice.
    Embeddings, experts in one tensor, and weights that several modules share stay dense. The result is for inference;
    :func:`dense` is the way back. Raises ConfigError for a model without a weight that is worth packing.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"sparse takes a model, got {model!r}; pyprune.load gives the one of a folder")
    if not any(packed_if_it_pays(module.weight.detach()) is not None for module in replaceable(model).values()):
        raise ConfigError(
            f"{type(model).__name__} has no linear layer with zeros enough for packing to pay (at 16 bits, "
            "17 %): prune it first"
        )
    return pack_layers(model if in_place else with_same_tensors(model))


def pack_layers(model: nn.Module) -> nn.Module:
    """Pack the linear layers of a model where they are, as far as that pays; returns the model."""
    found, places = replaceable(model), places_of(model)
    for path in list(found):
        module: Any = model.get_submodule(path)
        del found[path]
        packed = packed_if_it_pays(matrix_of(module))
        if packed is not None:
            put(model, places[id(module)], SparseLinear(packed, module.bias, is_conv1d(module)))
    saves_packed(model)
    return model.eval()


def dense(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """The model with plain linear layers again, their weights to the bit what :func:`sparse` packed.

    model: what :func:`sparse` or :func:`pyprune.load` returned; it stays as it is unless ``in_place``.
    """
    model = model if in_place else with_same_tensors(model)
    places = places_of(model)
    for module in list(model.modules()):
        if isinstance(module, SparseLinear):
            put(model, places[id(module)], dense_layer(module))
    vars(model).pop("save_pretrained", None)
    return model


def dense_layer(module: SparseLinear) -> nn.Module:
    """The linear layer that a packed one stands for."""
    outputs, inputs = module.out_features, module.in_features
    layer: Any
    with torch.device("meta"):
        if module.transposed:
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(outputs, inputs)
        else:
            layer = nn.Linear(inputs, outputs, bias=module.bias is not None)
    weight = module.weight.T.contiguous() if module.transposed else module.weight
    layer.weight = nn.Parameter(weight)
    layer.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
    return layer.train(module.training)


def replaceable(model: nn.Module) -> dict[str, Any]:
    """Path → linear layer of every one whose weight is its own: stock layers, not what is derived from them."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {
        path: module
        for path, module in model.named_modules()
        if path and (type(module) is nn.Linear or is_conv1d(module)) and owners[id(module.weight)] == 1
    }


def matrix_of(layer: Any) -> torch.Tensor:
    """The weight of a linear layer as ``[out, in]``."""
    weight = layer.weight.detach()
    return weight.T.contiguous() if is_conv1d(layer) else weight


def places_of(model: nn.Module) -> dict[int, list[str]]:
    """Identity of every module → all paths at which it stands."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def put(model: nn.Module, paths: list[str], new: nn.Module) -> None:
    """Put a module into these places."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def with_same_tensors(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that holds the same parameters and buffers."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def saves_packed(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with packed layers write a packed checkpoint: in a plain one a stock loader
    would find none of its names, and fill the weights at random."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = functools.partial(save_packed, model)  # type: ignore[assignment]
