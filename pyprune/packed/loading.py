"""``pyprune.load``: any checkpoint as a live model; a packed one with packed linear layers.

The model is built without memory and filled one tensor at a time: a matrix that a linear layer multiplies with goes
into a :class:`pyprune.packed.modules.SparseLinear` as it is stored, all others are unpacked. Where the names in the
files are not the model's (mixtures of experts with one tensor per expert), or its sizes not those of its config, it is
loaded dense and packed then, one layer after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune.config import ConfigError, check_dtype
from pyprune.model import assembly, checkpoint
from pyprune.model.attributes import dtype_named
from pyprune.model.blocks import is_conv1d
from pyprune.model.checkpoint import Loaded, Source
from pyprune.model.origin import Origin
from pyprune.model.packed_shards import PackedFiles, is_packed
from pyprune.model.skeleton import skeleton
from pyprune.ops.packed import Packed, pack_bitmask
from pyprune.packed.conversion import pack_layers, places_of, put, replaceable, saves_packed
from pyprune.packed.modules import SparseLinear


def load(directory: str | Path, dtype: str | torch.dtype = "auto") -> Loaded:
    """Model and tokenizer of a checkpoint, pruned or not: ``model, tokenizer = pyprune.load("my-model")``.

    directory: Hub id, local folder, ``.gguf`` file or packaged name. A packed folder gives a stock model whose linear
    layers hold packed weights; :func:`pyprune.dense` unpacks them.
    dtype: ``auto`` keeps the checkpoint's own (float32 for a GGUF file, whose weights are dequantised).
    Raises :class:`ConfigError` for an unknown model, a checkpoint that lacks weights of its architecture, and, with the
    tensor's name, for packed files that are damaged.
    """
    source = checkpoint.resolve(directory)
    if source.gguf_file or source.local and not is_packed(source.path):
        return checkpoint.load_model(directory, dtype)
    origin = checkpoint.find_origin(source)  # what is on the Hub is here now
    if not isinstance(origin.files, PackedFiles):
        return checkpoint.load_model(directory, dtype)
    model = None if checkpoint.structured_sizes(source) else _filled(source, origin, dtype)
    if model is None:
        loaded = checkpoint.load_model(directory, dtype)
        return Loaded(pack_layers(loaded.model), loaded.tokenizer)
    with checkpoint.loading(directory):
        return Loaded(model, checkpoint.load_tokenizer(source))


def opened(model: Any, tokenizer: Any = None, dtype: str | torch.dtype = "auto") -> Loaded:
    """Model and tokenizer of whatever stands for a model.

    model: a live ``nn.Module``, with its ``tokenizer``; what :func:`load` takes; what it returns; or anything that has
    a ``model`` and a ``tokenizer``, as a result of :func:`pyprune.prune` has. A ``tokenizer`` given beside them counts.
    Raises :class:`ConfigError` for anything else.
    """
    if isinstance(model, nn.Module):
        return Loaded(model, tokenizer)
    if isinstance(model, (str, Path)):
        found = load(model, dtype)
    else:
        pair = model if isinstance(model, tuple) and len(model) == 2 else None
        live: Any = pair or (getattr(model, "model", None), getattr(model, "tokenizer", None))
        found = Loaded(*live)
    if not isinstance(found.model, nn.Module):
        raise ConfigError(
            "a model is an nn.Module, a folder, a Hub id, a .gguf file, a packaged name, or a result of pyprune.prune "
            f"or pyprune.load; got {type(model).__name__}"
        )
    return found if tokenizer is None else Loaded(found.model, tokenizer)


def _filled(source: Source, origin: Origin, dtype: str | torch.dtype) -> nn.Module | None:
    """The model with its weights in place; None where the names in the files are not those of the model."""
    files, folder = origin.files, origin.folder
    assert isinstance(files, PackedFiles) and folder is not None
    config = checkpoint.load_config(source.path)
    asked = check_dtype(dtype)
    if asked != "auto":
        kind = getattr(torch, asked)
    else:
        infos = (files.info(name)[0] for name in files.where)
        kind = dtype_named(config) or next((found for found in infos if found.is_floating_point), torch.float32)
    with checkpoint.loading(source.path):
        model: Any = skeleton(config, kind, origin)
        checkpoint.load_generation_config(model, folder)
    found = [(keys, next((key for key in keys if key in files), None)) for keys in assembly.names_of(model)]
    layers, places = replaceable(model), places_of(model)
    for names, key in found:
        if key is None:
            return None
        parameter, path = model.get_parameter(names[0]), names[0].rpartition(".")[0]
        if files.info(key)[1] != tuple(parameter.shape):
            raise ConfigError(
                f"{key} in {source.path} has shape {list(files.info(key)[1])}, its architecture needs "
                f"{list(parameter.shape)}"
            )
        if path in layers and key in files.packed:
            layer = layers[path]
            packed = _packed_as(files, key, parameter.dtype, is_conv1d(layer))
            put(model, places[id(layer)], SparseLinear(packed, layer.bias, is_conv1d(layer)))
            continue
        tensor = files.read(key)
        value = nn.Parameter(tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = value
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(files.read(name))
    model.tie_weights()
    saves_packed(model)
    return model.eval()


def _packed_as(files: PackedFiles, key: str, dtype: torch.dtype, transposed: bool) -> Packed:
    """A packed matrix ``[out, in]`` in the type asked for."""
    if transposed:
        return pack_bitmask(files.read(key).to(dtype).T.contiguous())
    found = files.read_packed(key)
    return Packed(found.mask, found.values.to(dtype), found.offsets, found.columns)
