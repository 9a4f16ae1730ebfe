"""An independent reference: the whole model runs on one sequence at a time and hooks see what its layers see."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyprune.model.blocks import ModelView, WeightRef, weights_of


@torch.no_grad()
def run_whole(model: nn.Module, sequences: list[torch.Tensor]):
    """Per block the output of every sequence, and per weight the squared column norms of its inputs, in float64."""
    model = copy.deepcopy(model).double().eval()
    view = ModelView(model)
    outputs: list[list[torch.Tensor]] = [[] for _ in view.blocks]
    norms: dict[tuple[int, WeightRef], torch.Tensor] = {}

    def on_block(index):
        def hook(module, args, out):
            outputs[index].append((out[0] if isinstance(out, tuple) else out)[0])

        return hook

    def on_layer(key):
        def hook(module, args):
            norms[key] = norms.get(key, 0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        return hook

    for index, block in enumerate(view.blocks):
        block.register_forward_hook(on_block(index))
        for ref in weights_of(block):
            block.get_submodule(ref.module_path).register_forward_pre_hook(on_layer((index, ref)))
    for ids in sequences:
        model(ids[None])
    return outputs, norms


def wanda_masks(model: nn.Module, norms: dict) -> dict[tuple[int, WeightRef], torch.Tensor]:
    """Keep masks of Wanda at half sparsity in every row (arXiv 2306.11695)."""
    view, out = ModelView(model), {}
    for (index, ref), squares in norms.items():
        score = ref.view(view.blocks[index]).double().abs() * squares.sqrt()
        place = score.argsort(1, descending=True).argsort(1)
        out[index, ref] = place < score.shape[1] // 2
    return out


def disagreement(pruned: nn.Module, masks: dict) -> float:
    """Share of the weights that are kept in one and pruned in the other."""
    view = ModelView(pruned)
    wrong = sum(((ref.view(view.blocks[index]) != 0) != mask).sum().item() for (index, ref), mask in masks.items())
    return wrong / sum(mask.numel() for mask in masks.values())


def linear_inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64 inputs of every linear layer over one plain forward pass a sequence, by parameter name."""
    found: dict[str, list] = {}
    handles = [
        m.register_forward_pre_hook(
            lambda m, a, n=n: found.setdefault(f"{n}.weight", []).append(
                a[0].detach().reshape(-1, a[0].shape[-1]).double()
            )
        )
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def wanda_mask(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Half of each row kept, by the size of a weight times the norm of its input."""
    score = weight.double().abs() * x.square().sum(0).sqrt()
    keep = torch.zeros_like(weight, dtype=torch.bool)
    return keep.scatter_(1, score.topk(weight.shape[1] - round(weight.shape[1] / 2), dim=1).indices, True)
