"""Which weights of a block are its attention and which its feed-forward part, seen without knowing the architecture.

A part of a block whose output for a token depends on other tokens is attention, whatever it is called; the rest works
on each token by itself and is the feed-forward part (``mlp``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ATTENTION, MLP
from pyprune.model.arguments import Arguments
from pyprune.model.attributes import embedding_device, pad_token, vocabulary_size
from pyprune.model.blocks import ModelView, is_linear, weights_of
from pyprune.model.recording import call_block
from pyprune.model.watching import expert_loop

TOKENS = 12
TOLERANCE = 1e-4
"""Relative to the output; experts round differently with other tokens beside them."""


@torch.no_grad()
def kinds_of(view: ModelView, weights: Any) -> list[dict[str, str]]:
    """Per block, ``attention`` or ``mlp`` for the path of each prunable parameter; empty for a block in which the two
    cannot be told apart.

    weights: ``acquire`` and ``release`` make a block's weights real. Blocks of equal structure are run once.
    """
    ids = torch.arange(TOKENS)[None] * 7 + 1 + (pad_token(view.model.config) or 0)
    hidden, arguments = view.record((ids % vocabulary_size(view.model)).to(embedding_device(view.model)))
    known: dict[tuple, dict[str, str]] = {}
    found = []
    for index, block in enumerate(view.blocks):
        key = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
        if key not in known:
            weights.acquire(index)
            with expert_loop(view.model.config):
                known[key] = kinds_in(block, hidden, arguments[index])
            weights.release(index)
        found.append(known[key])
    return found


@torch.no_grad()
def kinds_in(block: nn.Module, hidden: Tensor, arguments: Arguments) -> dict[str, str]:
    """The same of one block. hidden: ``[sequences, tokens, hidden]``, its input."""
    paths = [ref.path for ref in weights_of(block, routers=True)]
    probe = copy.deepcopy(block).to(hidden.device).float()
    calls: dict[str, tuple[tuple, dict]] = {}
    handles = [
        module.register_forward_pre_hook(_keep(calls, name), with_kwargs=True)
        for name, module in probe.named_modules()
        if name
    ]
    call_block(probe, hidden.float(), arguments.to(hidden.device, torch.float32, {}))
    for handle in handles:
        handle.remove()
    found: dict[str, str] = {}

    def look(path: str) -> None:
        for name, child in probe.get_submodule(path).named_children():
            full = f"{path}.{name}" if path else name
            inside = [p for p in paths if p.startswith(f"{full}.")]
            if not inside:
                continue
            if not is_linear(child) and (full not in calls or len(inside) == len(paths)):
                look(full)  # a list of modules, or a shell around the whole block
            else:
                mixing = not is_linear(child) and mixes_tokens(child, *calls[full])
                found.update(dict.fromkeys(inside, ATTENTION if mixing else MLP))

    look("")
    return found if "attention" in found.values() else {}


def _keep(calls: dict[str, tuple[tuple, dict]], name: str):
    def hook(module, args, kwargs):
        calls.setdefault(name, (args, kwargs))

    return hook


def mixes_tokens(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the output for the last token depends on the tokens before it. The first tensor of the arguments is the
    module's input, ``[…, tokens, width]``."""
    x = next((value for value in (*args, *kwargs.values()) if _is_input(value)), None)
    if x is None:
        return False
    other = x.clone()
    noise = torch.randn(other[..., :-1, :].shape, generator=torch.Generator().manual_seed(0)).to(x)
    other[..., :-1, :] = noise * x.std()

    def last(value: Tensor) -> Tensor:
        out = module(
            *(value if one is x else one for one in args),
            **{name: value if one is x else one for name, one in kwargs.items()},
        )
        return (out if isinstance(out, Tensor) else out[0])[..., -1, :]

    before, after = last(x), last(other)
    return bool((before - after).norm() > TOLERANCE * before.norm())


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
