"""What structured pruning reads from a running block: consumers' inputs, and the sums their outputs land in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyprune.execution.executor import Activations
from pyprune.model.attributes import last_hidden, pad_token, text_config
from pyprune.model.blocks import ModelView, WeightRef
from pyprune.model.recording import Stop, uncached
from pyprune.model.watching import Watch, begin_gradients
from pyprune.structured.groups import Coupled

MAX_GRADIENT_TOKENS = 16384
MAX_GRADIENT_SEQUENCES = 512
GRADIENT_BATCH = 512
"""Tokens of one forward and backward pass, which keeps the activations of every block."""


class Taps:
    """Keeps, for one forward pass, ``inputs[i]`` ``[tokens, c]`` and ``sums[i]`` ``[tokens, r]`` of each group.

    ``sums`` is the tensor in the residual stream that the consumer's output is part of (``Coupled.target``), or the
    output itself where it is not simply added. ``powers[i]`` ``[tokens]`` is the squared norm of its own output.
    Experts have inputs only. With ``stop`` the pass ends when all is seen.
    """

    def __init__(
        self, block: nn.Module, groups: list[Coupled], *, sums: bool = True, powers: bool = False, stop: bool = False
    ):
        self.groups, self.stop = groups, stop
        self.inputs: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.powers: dict[int, Tensor] = {}
        self._handles = []
        self._places = {group.consumer: i for i, group in enumerate(groups)}
        self._watch = Watch(block, self._places, self._see)
        self._wanted = 0
        for i, group in enumerate(groups):
            ref = group.consumer
            if ref.expert is not None:
                continue
            module = block.get_submodule(ref.module_path)
            self._wanted += 1
            if powers:
                self._handles.append(module.register_forward_hook(self._on_power(i)))
                self._wanted += 1
            if not sums or group.target == "":
                self.stop = self.stop and not sums
            elif group.target is None:
                self._handles.append(module.register_forward_hook(self._on_output(i)))
                self._wanted += 1
            else:
                target = block.get_submodule(group.target)
                self._handles.append(target.register_forward_pre_hook(self._on_sum(i)))
                self._wanted += 1
        self.stop = self.stop and not self._watch.has_experts

    def _see(self, ref: WeightRef, x: Tensor) -> None:
        self.inputs[self._places[ref]] = x.reshape(-1, x.shape[-1])
        self._check()

    def _on_output(self, i: int):
        def hook(module, args, output):
            self.sums[i] = output.reshape(-1, output.shape[-1])
            self._check()

        return hook

    def _on_power(self, i: int):
        def hook(module, args, output):
            self.powers[i] = output.reshape(-1, output.shape[-1]).float().square().sum(1)
            self._check()

        return hook

    def _on_sum(self, i: int):
        def hook(module, args):
            self.sums[i] = args[0].reshape(-1, args[0].shape[-1])
            self._check()

        return hook

    def _check(self) -> None:
        if self.stop and len(self.inputs) + len(self.sums) + len(self.powers) == self._wanted:
            raise Stop

    def run(self, forward: Callable[[], Tensor]) -> Tensor | None:
        """One forward pass; returns the output, or None where it ended early."""
        self.inputs, self.sums, self.powers = {}, {}, {}
        try:
            out = forward()
        except Stop:
            return None
        for i, group in enumerate(self.groups):
            if group.target == "" and group.consumer.expert is None:
                self.sums[i] = out.reshape(-1, out.shape[-1])
        return out

    def close(self) -> None:
        self._watch.close()
        for handle in self._handles:
            handle.remove()


def mask_gradients(
    view: ModelView,
    groups: list[list[Coupled]],
    sequences: list[Tensor],
    first: int = 0,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> list[list[Tensor]]:
    """Derivative of each sequence's loss by each unit's mask, float32 ``[sequences, units]`` per block and group.

    Decoders: mean next-token loss. Encoders have no loss of their own: the sum of the mean-pooled, normalised sentence
    vector along a random direction per sequence, whose mean squared gradient is the Fisher information of that vector
    under Gaussian noise; ``first``, the place of the first sequence in its data, and ``seed`` decide the directions.
    Gradients of weights are never formed.
    """
    model = view.model
    shell = Activations(sequences, 0, torch.float32)
    out: list[list[list[Tensor]]] = [[[] for _ in block] for block in groups]
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    size = 1

    handles = [begin_gradients(view.blocks[0])]

    def watch(store: list[Tensor], group: Coupled):
        def hook(module, args):
            x = args[0].detach()  # a hook that holds its own tensor would hold the whole graph behind it

            def backward(gradient):
                columns = (gradient.float() * x.float()).reshape(size, -1, x.shape[-1]).sum(1)
                store.append(columns[:, group.columns.to(columns.device)].sum(2).cpu())

            args[0].register_hook(backward)

        return hook

    for index, block in enumerate(groups):
        for i, group in enumerate(block):
            module = view.blocks[index].get_submodule(group.consumer.module_path)
            handles.append(module.register_forward_pre_hook(watch(out[index][i], group)))
    # classifiers look for the last token that is no padding, and take one sequence at a time without a padding id
    alone = view.is_encoder and pad_token(text_config(model.config)) is None
    try:
        for batch in shell.batches(None):
            for begin in range(batch.start, batch.stop, step := 1 if alone else max(1, GRADIENT_BATCH // batch.length)):
                ids = shell.ids[batch.length][begin : min(begin + step, batch.stop)].to(device)
                size = len(ids)
                places = [first + row for row in shell.rows[batch.length][begin : begin + size]]
                with (
                    torch.enable_grad(),
                    torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
                    uncached(model) as options,
                ):
                    result = model(ids, **options)
                    loss = _probe_loss(result, places, seed) if view.is_encoder else _token_loss(result.logits, ids)
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return [[torch.cat(parts) for parts in block] for block in out]


def gradient_sequences(sequences: list[Tensor]) -> list[Tensor]:
    """The first sequences, as many as gradients are worth: ``MAX_GRADIENT_TOKENS`` tokens."""
    chosen, tokens = [], 0
    for ids in sequences[:MAX_GRADIENT_SEQUENCES]:
        chosen.append(ids)
        tokens += len(ids)
        if tokens >= MAX_GRADIENT_TOKENS:
            break
    return chosen


def _token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum over sequences of their mean next-token loss."""
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
    return losses / (ids.shape[1] - 1)


def _probe_loss(result, places: list[int], seed: int) -> Tensor:
    hidden = last_hidden(result)
    pooled = hidden.float().mean(1) if hidden.ndim == 3 else hidden.float()
    if pooled.shape[1] > 1:  # one number, a reward, has a size and no direction
        pooled = nn.functional.normalize(pooled, dim=-1)
    directions = [
        torch.randn(pooled.shape[1], generator=torch.Generator().manual_seed((seed << 20) + place)) for place in places
    ]
    return (pooled * torch.stack(directions).to(pooled)).sum()
