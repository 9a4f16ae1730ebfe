"""Derivatives by the units' masks: their definition, and that a batch's activations die with it."""

from __future__ import annotations

import gc
import weakref

import tiny
import torch

from pyprune.model.blocks import ModelView
from pyprune.structured import taps
from pyprune.structured.groups import find_groups
from pyprune.structured.taps import mask_gradients


def gradients_of(view, groups, ids):
    return mask_gradients(view, groups, list(ids), dtype=torch.float32, device=torch.device("cpu"))


def test_mask_gradients_are_derivatives_of_the_loss():
    """A unit's mask multiplies its columns of the consumer, so its derivative is Σ W ∘ ∂loss/∂W over them."""
    model = tiny.model("llama")
    view = ModelView(model)
    groups = find_groups(view, "structured")
    ids = tiny.ids(3, 12)
    found = gradients_of(view, groups, ids)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for row, sequence in enumerate(ids):
        model.zero_grad()
        logits = model(sequence[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:]).backward()
        for block, of_block, gradients in zip(model.model.layers, groups, found):
            for group, gradient in zip(of_block, gradients):
                weight = group.consumer.parameter(block)
                columns = (weight * weight.grad).sum(0)
                torch.testing.assert_close(gradient[row], columns[group.columns].sum(1), rtol=1e-3, atol=1e-6)


def test_a_batch_keeps_nothing_of_the_batches_before_it(monkeypatch):
    """Nor does it wait for the garbage collector to free them: the peak is that of one batch."""
    monkeypatch.setattr(taps, "GRADIENT_BATCH", 12)
    model = tiny.model("llama")
    view = ModelView(model)
    seen, alive = [], []

    def look(module, args):
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(args[0]))

    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(look)
    groups = find_groups(view, "structured")
    seen.clear()
    alive.clear()
    gc.disable()
    try:
        gradients_of(view, groups, tiny.ids(4, 12))
    finally:
        gc.enable()
        handle.remove()
    assert alive == [0, 0, 0, 0]
