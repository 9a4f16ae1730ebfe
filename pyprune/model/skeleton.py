"""The model of a Hugging Face configuration without memory: parameters on the meta device, real buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pyprune.model.architecture import model_class
from pyprune.model.origin import Origin


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory but real buffers: rotary tables are computed, not stored."""
    plain = nn.Module.register_parameter

    def register(self, name, parameter):
        plain(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]  # there is no other way in
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]  # as it was


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty``, from which modules make their matrices, takes no memory either, not even for a moment."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: Any, dtype: torch.dtype | None = None, origin: Origin | None = None) -> nn.Module:
    """The model of a Hugging Face config with parameters on the meta device, ties in place, in eval mode.

    origin: whose tensors decide where the config names no class.
    """
    cls = model_class(config, origin=origin)
    build = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    with parameters_on_meta():
        model = build(config, **({"dtype": dtype} if dtype else {}))
    model.tie_weights()
    return model.eval()
