"""The published loops in plain PyTorch, as baselines: SparseGPT, Wanda, and BR, GP and CR.

Written from the descriptions of the methods (arXiv 2301.00774, 2306.11695, 2406.15524) to do the work the published
scripts do, in their order and at their granularity, on LLaMA-shaped models: one sample at a time through every block,
one float32 Gram matrix per linear layer, Cholesky → inverse → Cholesky, a Python loop over columns, full sorts for
thresholds; for reconstruction masked copies of the weights in every forward, an unfused AdamW, the loss read back every
step, the error measured over all samples before and after. It is deliberately not improved. What differs from the
scripts: today's transformers (with its fused attention, which favours the baseline), the CPU, and their known faults
(tests/pipeline/test_published_faults.py names them).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Timer:
    """Wall seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def first_inputs(model, samples: Tensor) -> tuple[Tensor, dict]:
    """Inputs of the first block, one sample at a time, and the arguments every block gets."""
    caught: list[Tensor] = []
    arguments: dict = {}

    class Caught(Exception):
        pass

    def catch(module, args, kwargs):
        caught.append(args[0] if args else kwargs["hidden_states"])
        arguments.update({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sample in samples:
        with contextlib.suppress(Caught):
            model(sample[None].to(model.device), use_cache=False)
    handle.remove()
    return torch.cat(caught), arguments


def forward(blocks: list[nn.Module], x: Tensor, arguments: dict) -> Tensor:
    for block in blocks:
        out = block(x, **arguments)
        x = out[0] if isinstance(out, tuple) else out
    return x


class Hessian:
    """Running mean of ``2 x xᵀ`` of one linear layer's inputs, in full, in float32."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.samples = layer, 0
        self.h = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).t()
        self.h *= self.samples / (self.samples + 1)
        self.samples += 1
        rows = (2 / self.samples) ** 0.5 * rows.float()
        self.h += rows @ rows.t()


class ColumnNorms:
    """Running mean over samples of the squared column norms of one linear layer's inputs."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.samples = layer, 0
        self.squares = torch.zeros(layer.in_features, device=layer.weight.device)

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).t()
        self.squares *= self.samples / (self.samples + 1)
        self.samples += 1
        self.squares += torch.norm(rows.float(), p=2, dim=1) ** 2 / self.samples


def sparsegpt(
    stat: Hessian, sparsity: float, nm: tuple[int, int] | None, block_size: int = 128, damping: float = 0.01
) -> Tensor:
    """Prune the layer in place by the column loop; returns the keep mask."""
    w, h = stat.layer.weight.data.clone().float(), stat.h
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    diagonal = torch.arange(len(h), device=h.device)
    h[diagonal, diagonal] += damping * torch.mean(torch.diag(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, keep = sweep(w, inverse, sparsity, nm, block_size)
    stat.layer.weight.data = w.to(stat.layer.weight.dtype)
    return keep


def sweep(
    w: Tensor, inverse: Tensor, sparsity: float, nm: tuple[int, int] | None, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The column loop over a matrix, in place, behind the upper factor of the inverse; the matrix and the keep mask."""
    keep = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        part, errors = w[:, start:stop].clone(), torch.zeros(w.shape[0], stop - start, device=w.device)
        done, local = torch.zeros_like(part), inverse[start:stop, start:stop]
        drop = torch.zeros_like(part, dtype=torch.bool)
        if nm is None:
            saliency = part**2 / torch.diag(local).reshape(1, -1) ** 2
            drop = saliency <= torch.sort(saliency.flatten())[0][int(saliency.numel() * sparsity)]
        for j in range(stop - start):
            if nm is not None and j % nm[1] == 0:
                group = slice(j, j + nm[1])
                saliency = part[:, group] ** 2 / torch.diag(local)[group].reshape(1, -1) ** 2
                drop.scatter_(1, j + torch.topk(saliency, nm[1] - nm[0], dim=1, largest=False)[1], True)
            column = part[:, j]
            new = column.clone()
            new[drop[:, j]] = 0
            done[:, j] = new
            error = (column - new) / local[j, j]
            part[:, j:] -= error.unsqueeze(1) @ local[j, j:].unsqueeze(0)
            errors[:, j] = error
        w[:, start:stop] = done
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
        keep[:, start:stop] = ~drop
    return w, keep


def _drop_nm(metric: Tensor, nm: tuple[int, int]) -> Tensor:
    """The lowest of every group of columns, group by group."""
    drop = torch.zeros_like(metric, dtype=torch.bool)
    for start in range(0, metric.shape[1], nm[1]):
        lowest = torch.topk(metric[:, start : start + nm[1]], nm[1] - nm[0], dim=1, largest=False)[1]
        drop.scatter_(1, start + lowest, True)
    return drop


def wanda(stat: ColumnNorms, sparsity: float, nm: tuple[int, int] | None) -> Tensor:
    """Prune the layer in place by |w|·‖x‖ per row, with full sorts; returns the keep mask."""
    w = stat.layer.weight.data
    metric = torch.abs(w) * torch.sqrt(stat.squares.reshape(1, -1))
    drop = torch.zeros_like(metric, dtype=torch.bool) if nm is None else _drop_nm(metric, nm)
    if nm is None:
        order = torch.sort(metric, dim=-1, stable=True)[1]
        drop.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)
    w[drop] = 0
    return ~drop


def magnitude(layer: nn.Linear, sparsity: float, nm: tuple[int, int] | None) -> Tensor:
    """Prune the layer in place by |w|; returns the keep mask."""
    w = layer.weight.data
    metric = torch.abs(w)
    if nm is not None:
        drop = _drop_nm(metric, nm)
    else:
        drop = metric <= torch.sort(metric.flatten())[0][int(w.numel() * sparsity)]
    w[drop] = 0
    return ~drop


STATISTICS = {"sparsegpt": Hessian, "wanda": ColumnNorms, "magnitude": None}


def prune_block(
    block: nn.Module,
    method: str,
    sparsity: float,
    nm,
    inputs: Tensor,
    outs: Tensor | None,
    arguments: dict,
    timer: Timer,
) -> dict[str, Tensor]:
    """Statistics one sample at a time (outputs to ``outs``), then every linear layer; keep masks by layer name."""
    layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    stats = {name: STATISTICS[method](layer) for name, layer in layers.items()} if STATISTICS[method] else {}
    gram = timer.seconds.get("statistics", 0.0)

    def hook(stat):
        def add(module, args, output):
            with timer("statistics"):
                stat.add(args[0].data)

        return add

    handles = [layers[name].register_forward_hook(hook(stat)) for name, stat in stats.items()]
    start = time.perf_counter()
    for j in range(len(inputs)):
        out = forward([block], inputs[j][None], arguments)
        if outs is not None:
            outs[j] = out[0]
    for handle in handles:
        handle.remove()
    spent = time.perf_counter() - start - (timer.seconds.get("statistics", 0.0) - gram)
    timer.seconds["forward"] = timer.seconds.get("forward", 0.0) + spent
    with timer("solve"):
        if method == "magnitude":
            return {name: magnitude(layer, sparsity, nm) for name, layer in layers.items()}
        solve = sparsegpt if method == "sparsegpt" else wanda
        return {name: solve(stat, sparsity, nm) for name, stat in stats.items()}


@torch.no_grad()
def prune(
    model,
    samples: Tensor,
    *,
    method: str = "sparsegpt",
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    blocks: int | None = None,
) -> Timer:
    """The published layer-wise loop over a LLaMA-shaped model, in place: two passes per block, one sample at a time."""
    timer = Timer()
    with timer("forward"):
        inputs, arguments = first_inputs(model, samples)
    outs = torch.zeros_like(inputs)
    for block in model.model.layers[:blocks]:
        prune_block(block, method, sparsity, nm, inputs, outs, arguments, timer)
        with timer("forward"):
            for j in range(len(inputs)):
                outs[j] = forward([block], inputs[j][None], arguments)[0]
        inputs, outs = outs, inputs
    return timer


class MaskedLinear(nn.Linear):
    """Multiplies its weight by its mask in every forward pass, so gradients pass through the mask."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.mask is None else self.mask * self.weight
        return nn.functional.linear(x, weight, self.bias)


def with_masks(block: nn.Module, masks: dict[str, Tensor] | None) -> None:
    """Turn a block's linear layers into masked ones (None: back to plain ones, masks applied for good)."""
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if masks is not None:
            layer.__class__ = MaskedLinear
            layer.mask = masks[name].float()
        elif isinstance(layer, MaskedLinear):
            layer.weight.data *= layer.mask
            del layer.mask
            layer.__class__ = nn.Linear


@torch.no_grad()
def error_over_samples(blocks: list[nn.Module], inputs: Tensor, targets: Tensor, arguments: dict) -> float:
    """Mean squared error, one sample at a time, read back each time."""
    total = 0.0
    for j in range(len(inputs)):
        total += ((forward(blocks, inputs[j][None], arguments) - targets[j][None]) ** 2).mean().item()
    return total / len(inputs)


def train(
    blocks: list[nn.Module],
    inputs: Tensor,
    targets: Tensor,
    arguments: dict,
    *,
    epochs: int,
    batch_size: int,
    lr: float = 2e-4,
    betas=(0.9, 0.95),
    autocast: bool = False,
    seed: int = 0,
    validate: bool = True,
) -> list[float]:
    """The published inner loop: masked copies, plain AdamW, linear decay, clipping, the loss read back every step.

    Returns the error before, each epoch's mean loss, and the error after. ``validate=False`` leaves out the passes
    before and after, to time the steps alone.
    """
    params = [p for block in blocks for p in block.parameters()]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=0.0)
    steps = max(1, len(inputs) // batch_size * epochs)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets),
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    losses = [error_over_samples(blocks, inputs, targets, arguments)] if validate else []
    for _ in range(epochs):
        seen = 0.0
        for x, target in loader:
            with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                loss = ((forward(blocks, x, arguments) - target) ** 2).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1000.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            seen += loss.detach().item() * len(x)
        losses.append(seen / len(inputs))
    return losses + ([error_over_samples(blocks, inputs, targets, arguments)] if validate else [])


@torch.no_grad()
def reconstruct(
    model,
    samples: Tensor,
    *,
    method: str = "sparsegpt",
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    propagate: bool = True,
    cross: bool = False,
    epochs: int = 3,
    batch_size: int = 4,
    lr: float = 2e-4,
    autocast: bool = False,
    seed: int = 0,
    blocks: int | None = None,
) -> tuple[Timer, list[float]]:
    """Paper R's loop over a LLaMA-shaped model, in place; returns the timer and the error of each block or window.

    ``propagate``: targets from the dense stream (GP). ``cross``: windows of two blocks slide by one (CR; needs GP).
    """
    if cross and not propagate:
        raise ValueError("cross-block windows are trained against the dense stream: propagate must be True")
    timer, errors = Timer(), []
    with timer("forward"):
        inputs, arguments = first_inputs(model, samples)
    layers = list(model.model.layers)[:blocks]
    dense_inputs, outs, masks = inputs.clone(), torch.zeros_like(inputs), {}
    windows = (
        [[0], *([i, i + 1] for i in range(len(layers) - 1)), [len(layers) - 1]]
        if cross
        else [[i] for i in range(len(layers))]
    )
    dense = {}
    for k, window in enumerate(windows):
        for i in window:
            dense.setdefault(i, copy.deepcopy(layers[i]))
        chain, new = [layers[i] for i in window], window[-1]
        with timer("forward"):
            dense_outs = torch.cat([forward([dense[i] for i in window], x[None], arguments) for x in dense_inputs])
        if new not in masks:
            ahead = inputs
            if len(window) == 2:
                with timer("forward"):
                    ahead = torch.cat([forward(chain[:1], x[None], arguments) for x in inputs])
            masks[new] = prune_block(layers[new], method, sparsity, nm, ahead, outs, arguments, timer)
        for i in window:
            with_masks(layers[i], masks[i])
        with timer("train"):
            train(
                chain,
                inputs,
                dense_outs if propagate else outs,
                arguments,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                autocast=autocast,
                seed=seed,
            )
        with timer("forward"):
            errors.append(error_over_samples(chain, inputs, dense_outs, arguments))
        for i in window:
            with_masks(layers[i], None)
        if cross and k == 0:
            continue  # the first block is trained again with the second before anything moves on
        with timer("forward"):
            for j in range(len(inputs)):
                outs[j] = forward(chain[:1], inputs[j][None], arguments)[0]
            if cross:
                dense_outs = torch.cat([forward([dense[window[0]]], x[None], arguments) for x in dense_inputs])
        inputs, outs, dense_inputs = outs, inputs, dense_outs
        del dense[window[0]]
    return timer, errors
