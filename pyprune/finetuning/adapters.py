"""Adapters of peft merged into a pruned model without filling its zeros: ``pyprune.merge_lora``."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from pyprune.config import ConfigError
from pyprune.finetuning.masks import SPARSE


class Merged(NamedTuple):
    """What :func:`merge_lora` returns."""

    model: nn.Module
    """The base model, without adapters."""
    lost: float
    """Share of the norm of all updates that fell on zeros and was dropped: √(Σ lost² / Σ update²)."""
    layers: list[dict]
    """Per layer: ``name``, ``sparsity`` and ``lost``."""


@torch.no_grad()
def merge_lora(model: Any) -> Merged:
    """Merge the active adapters of a peft model into its weights; zeros of pruned weights stay zeros.

    An adapter's update is dense: added to a pruned weight it would fill it. Here it is added to the kept weights alone.
    What that costs is measured: an update that is alike everywhere loses about √sparsity of its norm. So evaluate the
    result, or train with :func:`pyprune.keep_sparse` instead, which loses nothing.
    model: what ``peft.get_peft_model`` made of a pruned model, or ``PeftModel.from_pretrained`` read; it is used up.
    Raises ConfigError, before anything is merged, for any other model, for adapters that are merged already (zeros are
    filled) or hold NaN, and ImportError's sentence where peft is not installed (``pip install 'pyprune[finetune]'``).
    """
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ConfigError("merge_lora needs peft: pip install 'pyprune[finetune]'") from error
    if not isinstance(model, PeftModel):
        raise ConfigError(f"merge_lora takes a model with adapters of peft, got {type(model).__name__}")
    inner: Any = model.base_model.model
    tuned: dict[str, Any] = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), nn.Module)
    }
    for name, module in tuned.items():
        if module.merged:
            raise ConfigError(
                f"the adapters of {name} are merged already, so its zeros are filled; load the pruned model and "
                "its adapters again"
            )
        for key, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ConfigError(f"{name}.{key} holds NaN or infinity; nothing was merged")
    rows, lost, total = [], 0.0, 0.0
    for name, module in tuned.items():
        weight = module.get_base_layer().weight
        before = weight.detach().clone()
        dropped = before == 0
        module.merge()
        sparsity = dropped.float().mean().item()
        if sparsity < SPARSE:
            continue
        update = weight.detach().double() - before.double()
        whole, fell = (float(part.square().sum()) for part in (update, update[dropped]))
        weight.masked_fill_(dropped, 0)
        rows.append({"name": name, "sparsity": sparsity, "lost": math.sqrt(fell / whole) if whole else 0.0})
        lost, total = lost + fell, total + whole
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        used_up: Any = model
        base = used_up.merge_and_unload()  # not unload(): modules that were trained whole are taken too
    return Merged(base, math.sqrt(lost / total) if total else 0.0, rows)
