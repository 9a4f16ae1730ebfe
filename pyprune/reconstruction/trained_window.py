"""A window of blocks under training: compute copies, float32 masters, masks, gradients, optimiser.

The blocks compute in one type throughout, weights included, so nothing is cast per product; float32 masters beside
them take the optimiser's steps. Masked weights start at zero and their gradients are zeroed, so their AdamW moments and
therefore their updates are exactly zero: no masked copy of a weight is ever made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError, Reconstruction
from pyprune.execution.cpu_forward import TrainingMode
from pyprune.execution.executor import Executor, moved, named_tensors
from pyprune.execution.residency import sent
from pyprune.model.arguments import Arguments, Beside
from pyprune.model.recording import call_block


class TrainedWindow:
    """A window of blocks under training: compute copies in ``dtype``, float32 masters, masks as multipliers."""

    def __init__(
        self,
        executor: Executor,
        indices: list[int],
        blocks: list[nn.Module],
        masks: list[dict[str, Tensor]],
        dtype: torch.dtype,
    ):
        """masks: per block, parameter path → bool tensor of the parameter's shape, True where kept.

        Raises ConfigError if all this does not fit the device.
        """
        self.executor, self.indices, self.dtype = executor, indices, dtype
        self.bytes = sum(p.numel() for block in blocks for p in block.parameters() if p.is_floating_point()) * (
            16 if dtype == torch.float32 else 16 + dtype.itemsize
        )
        """Weights, masters, gradients and optimiser state."""
        with self.fits():
            self._copy(blocks, masks)

    def _copy(self, blocks: list[nn.Module], masks: list[dict[str, Tensor]]) -> None:
        executor, dtype = self.executor, self.dtype
        arrived = [sent(named_tensors(block), executor.device) for block in blocks]
        self.modules = [_compute_copy(block, executor.device, dtype, there) for block, there in zip(blocks, arrived)]
        self.params: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        self.buffers: list[Tensor | None] = []
        self._homes: list[nn.Parameter] = []
        on_cpu = executor.device.type == "cpu"
        for block, module, keep, there in zip(blocks, self.modules, masks, arrived):
            for (path, home), param in zip(block.named_parameters(), module.parameters()):
                if not param.is_floating_point():
                    continue
                as_it_is = there.get(path, home.detach())
                master = param if dtype == torch.float32 else as_it_is.to(param.device, torch.float32, copy=True)
                mask = keep.get(path)
                # a float factor is twice as fast on a CPU; a GPU saves the memory instead
                scale = None if mask is None else mask.to(param.device, torch.float32 if on_cpu else torch.bool)
                with torch.no_grad():
                    if scale is not None:
                        master.mul_(scale)
                    param.copy_(master)
                self.params.append(param.requires_grad_(True))
                self.masters.append(master)
                self.scales.append(scale)
                # the CPU's linear layers add their gradients to float32 buffers, see pyprune.execution.cpu_forward
                self.buffers.append(
                    torch.zeros_like(param, dtype=torch.float32) if on_cpu and param.ndim == 2 else None
                )
                self._homes.append(home)
        by_weight = {id(p): b for p, b in zip(self.params, self.buffers) if b is not None}
        self._mode = TrainingMode(by_weight) if on_cpu else contextlib.nullcontext()
        self._arguments: dict[tuple[int, int, int], Arguments] = {}

    def arguments(self, index: int, length: int, size: int) -> Arguments:
        found = self.executor.arguments(index, length, size)
        if self.dtype == self.executor.dtype:
            return found
        if (index, length, size) not in self._arguments:
            self._arguments[index, length, size] = found.to(self.executor.device, self.dtype, {})
        return self._arguments[index, length, size]

    def __call__(self, hidden: Tensor, beside: Beside | None = None) -> Tensor:
        """Output of the window for ``[batch, tokens, hidden]`` and what belongs to its sequences."""
        hidden = hidden.to(self.executor.device, self.dtype, non_blocking=True)
        beside = (beside or Beside()).map(lambda t: t.to(self.dtype) if t.is_floating_point() else t)
        for index, module in zip(self.indices, self.modules):
            arguments = beside.fill(self.arguments(index, hidden.shape[1], hidden.shape[0]))
            with self._mode:
                hidden = call_block(module, hidden, arguments)
        return hidden

    def optimizer(self, settings: Reconstruction) -> torch.optim.Optimizer:
        """AdamW over the masters, its state made at once: what does not fit shows before anything is trained."""
        optimizer = torch.optim.AdamW(
            self.masters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        with self.fits():
            for master in self.masters:
                step = torch.zeros((), dtype=torch.float32, device=master.device)
                moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[master] = {"step": step, **moments}
        return optimizer

    def accumulate(self, parts: Iterator[tuple]) -> Tensor:
        """Forward and backward over the micro-batches of one step; returns the step's loss, on the device.

        parts: ``(x, target, beside, share, last)``, share being the part of the step's tokens. Nothing is read back.
        """
        total = torch.zeros((), device=self.executor.device)
        for x, target, beside, share, last in parts:
            if x is not None:  # else the step's sequences are with other processes
                with torch.enable_grad():
                    loss = (self(x, beside).float() - target.float()).square().mean() * share
                    loss.backward()
                total += loss.detach()
                self.collect_gradients()
            if last:
                break
        return total

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After a backward pass: add what it left on low-precision parameters to the float32 sums."""
        for param, master, buffer in zip(self.params, self.masters, self.buffers):
            if param.grad is None or (buffer is None and master is param):
                continue
            if buffer is not None:
                buffer.add_(param.grad)
            elif master.grad is None:
                master.grad = param.grad.to(torch.float32)
            else:
                master.grad.add_(param.grad)
            param.grad = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the collected gradients, take one step, copy the masters to the compute copies."""
        for master, scale, buffer in zip(self.masters, self.scales, self.buffers):
            if buffer is not None:
                master.grad = buffer
            elif master.grad is None:  # an expert that no token of this batch reached
                master.grad = torch.zeros_like(master)
            self.executor.world.sum_(master.grad)
            if scale is not None:
                master.grad.mul_(scale)
        optimizer.step()
        self.publish()
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Drop whatever gradients a step has collected."""
        for param, master, buffer in zip(self.params, self.masters, self.buffers):
            param.grad = master.grad = None
            if buffer is not None:
                buffer.zero_()

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every master is: one number read from the device."""
        return math.isfinite(torch.stack(torch._foreach_norm(self.masters)).sum().item())

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the compute copies, after an optimiser step."""
        if self.dtype != torch.float32:
            torch._foreach_copy_(self.params, self.masters)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def restore(self, values: list[Tensor] | None = None) -> None:
        """Back to a snapshot, or to the model's own blocks as they were."""
        if values is not None:
            torch._foreach_copy_([m.data for m in self.masters], values)
        else:
            homes: dict[str, Tensor] = {str(i): home for i, home in enumerate(self._homes)}
            homes |= sent(homes, self.executor.device)
            for home, master, scale in zip(homes.values(), self.masters, self.scales):
                master.copy_(home)
                if scale is not None:
                    master.mul_(scale)
        self.publish()

    @torch.no_grad()
    def commit(self) -> None:
        """Write the masters to the model's own blocks, in their type; masked weights stay exact zeros."""
        for home, master in zip(self._homes, self.masters):
            self.executor.put(home, master)
        if any(home.device != self.executor.device for home in self._homes):
            self.executor.drain()

    @contextlib.contextmanager
    def fits(self) -> Iterator[None]:
        """What the window needs whatever the batch: running out of memory for it is a ConfigError."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"training blocks {self.indices} takes {self.bytes / 1e9:.2f} GB on "
                f"{self.executor.device} for weights, gradients and optimiser state, and that does not "
                f"fit; use {' or '.join(self._instead())}"
            ) from error

    def too_long(self, length: int) -> ConfigError:
        """The error for a single sequence that does not fit."""
        instead = [f"a shorter seq_len (about {length // 2})", *self._instead()]
        return ConfigError(
            f"one sequence of {length} tokens does not fit on {self.executor.device} in the training of "
            f"blocks {self.indices}, beside {self.bytes / 1e9:.2f} GB of weights, gradients and "
            f"optimiser state; use {', '.join(instead[:-1])}, or {instead[-1]}"
        )

    def _instead(self) -> list[str]:
        return [
            *(["reconstruct='block' (one block at a time)"] if len(self.indices) > 1 else []),
            *(["autocast='bfloat16'"] if self.dtype == torch.float32 else []),
            "device='cpu'",
        ]


def _compute_copy(block: nn.Module, device: torch.device, dtype: torch.dtype, arrived: dict[str, Tensor]) -> nn.Module:
    """arrived: copies of its tensors that are on the device already."""
    typed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in arrived.items()}
    module = moved(block, device, dtype, typed).eval()
    for part in module.modules():
        part.__dict__.pop("forward", None)  # an executor's replacement for passes without gradients
    return module
