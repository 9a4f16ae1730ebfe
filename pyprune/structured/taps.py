"""What structured pruning reads from a running block: consumers' inputs, and the sums their outputs land in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.execution.executor import Activations
from pyprune.model.blocks import ModelView
from pyprune.model.expert_products import Experts
from pyprune.model.recording import Stop, uncached
from pyprune.structured.groups import Coupled

MAX_GRADIENT_TOKENS = 16384
MAX_GRADIENT_SEQUENCES = 512


class Taps(TorchFunctionMode):
    """Keeps, for one forward pass, ``inputs[i]`` ``[tokens, c]`` and ``sums[i]`` ``[tokens, r]`` of each group.

    ``sums`` is the tensor in the residual stream that the consumer's output is part of (``Coupled.target``), or the
    output itself where it is not simply added. ``powers[i]`` ``[tokens]`` is the squared norm of its own output.
    Experts have inputs only. With ``stop`` the pass ends when all is seen.
    """

    def __init__(self, block: nn.Module, groups: list[Coupled], *, sums: bool = True, powers: bool = False,
                 stop: bool = False):
        super().__init__()
        self.groups, self.stop = groups, stop
        self.inputs: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.powers: dict[int, Tensor] = {}
        self._handles = []
        self._places = {group.consumer: i for i, group in enumerate(groups)}
        self._experts = Experts(block, self._places)
        self._wanted = 0
        for i, group in enumerate(groups):
            ref = group.consumer
            if ref.expert is not None:
                continue
            module = block.get_submodule(ref.module_path)
            self._handles.append(module.register_forward_pre_hook(self._on_input(i)))
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
        self.stop = self.stop and not self._experts
        if self._experts:
            # entered by the block itself, hence inside whatever mode the pass runs under: that one may not pass on what
            # it computes by other means
            self._handles += [
                block.register_forward_pre_hook(lambda *_: self.__enter__() and None, prepend=True),
                block.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)]

    def _on_input(self, i: int):
        def hook(module, args):
            self.inputs[i] = args[0].reshape(-1, args[0].shape[-1])
            self._check()
        return hook

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

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for ref, x in self._experts.products(func, args, kwargs):
            self.inputs[self._places[ref]] = x
        return func(*args, **(kwargs or {}))

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
        for handle in self._handles:
            handle.remove()


def mask_gradients(view: ModelView, groups: list[list[Coupled]], sequences: list[Tensor], first: int = 0, *,
                   dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[list[Tensor]]:
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

    def start(module, args, kwargs):
        """Gradients begin at the first block's input."""
        first = args[0] if args else kwargs["hidden_states"]
        if first.requires_grad:
            return None
        first = first.detach().requires_grad_()
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    handles = [view.blocks[0].register_forward_pre_hook(start, with_kwargs=True)]

    def watch(store: list[Tensor], group: Coupled):
        def hook(module, args):
            x = args[0]

            def backward(gradient):
                columns = (gradient.float() * x.detach().float()).reshape(size, -1, x.shape[-1]).sum(1)
                store.append(columns[:, group.columns.to(columns.device)].sum(2).cpu())
            x.register_hook(backward)
        return hook

    for index, block in enumerate(groups):
        for i, group in enumerate(block):
            module = view.blocks[index].get_submodule(group.consumer.module_path)
            handles.append(module.register_forward_pre_hook(watch(out[index][i], group)))
    # classifiers look for the last token that is no padding, and take one sequence at a time without a padding id
    alone = view.is_encoder and getattr(model.config.get_text_config(), "pad_token_id", None) is None
    try:
        for batch in shell.batches(None):
            for start in range(batch.start, batch.stop, step := 1 if alone else max(1, 2048 // batch.length)):
                ids = shell.ids[batch.length][start:min(start + step, batch.stop)].to(device)
                size = len(ids)
                places = [first + row for row in shell.rows[batch.length][start:start + size]]
                with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32), \
                        uncached(model) as options:
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
    hidden = getattr(result, "last_hidden_state", None)
    hidden = result[0] if hidden is None else hidden
    pooled = hidden.float().mean(1) if hidden.ndim == 3 else hidden.float()
    if pooled.shape[1] > 1:  # one number, a reward, has a size and no direction
        pooled = nn.functional.normalize(pooled, dim=-1)
    directions = [torch.randn(pooled.shape[1], generator=torch.Generator().manual_seed((seed << 20) + place))
                  for place in places]
    return (pooled * torch.stack(directions).to(pooled)).sum()
