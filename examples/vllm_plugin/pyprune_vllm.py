"""vLLM with packed linear layers: a plug-in outside its tree.

    pip install ./examples/vllm_plugin
    vllm serve pruned --quantization pyprune                          # a plain pruned checkpoint
    vllm serve packed --quantization pyprune --load-format pyprune    # what `pyprune pack` wrote

Not proven beyond its interface: written after vLLM's base classes (QuantizationConfig, UnquantizedLinearMethod,
BaseModelLoader, as of early 2026) and tested against stand-ins of them; it has run in no vLLM and on no GPU.

Weights arrive dense, one at a time, through vLLM's own loaders, which merge, cut and distribute them; each layer is
packed once it is complete, if it has zeros enough. Embeddings, the head and fused experts stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.ops.packed import Packed, pack_bitmask

NAME = "pyprune"
WORTH = 0.9
"""A weight is packed if that takes at most this share of its bytes."""
READ_ELSEWHERE = ("kv_b_proj",)
"""Layers whose weight vLLM reads by itself after loading (multi-head latent attention)."""

_packed: dict[int, Packed] = {}
"""The packed weights of this process by the address of their mask; kept, so that each is checked once."""


@torch.library.custom_op("pyprune::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None
) -> Tensor:
    """One operation for torch.compile and CUDA graphs: nothing in it is traced."""
    packed = _packed.get(mask.data_ptr())
    if packed is None:
        packed = _packed[mask.data_ptr()] = Packed(mask, values, offsets, columns)
    return ops.sparse_linear(x, packed, bias)


@packed_linear.register_fake
def _(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def register() -> None:
    """Called by vLLM in each of its processes (entry point ``vllm.general_plugins``); more than once is harmless."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.linear import (
        LinearBase,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if NAME in quantization.QUANTIZATION_METHODS:
        return

    @register_weight_loader_v2_supported_method
    class PackedLinearMethod(UnquantizedLinearMethod):
        """Weights are created and loaded dense, as vLLM does it, and packed then."""

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            weight = layer.weight.detach()
            packed = pack_bitmask(weight)
            layer.packed_columns = None
            if packed.nbytes > WORTH * weight.nbytes:
                super().process_weights_after_loading(layer)
                return
            layer.packed_columns = packed.columns
            for name in ("mask", "values", "offsets"):
                layer.register_buffer(f"packed_{name}", getattr(packed, name), persistent=False)
            layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            if layer.packed_columns is None:
                return super().apply(layer, x, bias)
            return packed_linear(
                x, layer.packed_mask, layer.packed_values, layer.packed_offsets, layer.packed_columns, bias
            )

    @quantization.register_quantization_config(NAME)
    class PackedConfig(QuantizationConfig):
        """``--quantization pyprune``: nothing to configure, a checkpoint's zeros say it all."""

        def get_name(self) -> str:
            return NAME

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 70

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> PackedConfig:
            return cls()

        def get_quant_method(
            self, layer: nn.Module, prefix: str
        ) -> PackedLinearMethod | UnquantizedLinearMethod | None:
            if not isinstance(layer, LinearBase):
                return None
            kept = prefix.rpartition(".")[2] in READ_ELSEWHERE
            return UnquantizedLinearMethod() if kept else PackedLinearMethod()

    @register_model_loader(NAME)
    class PackedLoader(BaseModelLoader):
        """``--load-format pyprune``: the tensors of a local packed folder under their dense names, one at a time."""

        def download_model(self, model_config: Any) -> None:
            self._files(model_config)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            files = self._files(model_config)
            model.load_weights((name, files.read(name)) for name in files.where)

        def _files(self, model_config: Any):
            from pyprune.model.packed_shards import PackedFiles

            return PackedFiles(model_config.model)
