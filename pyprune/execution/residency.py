"""Where the weights of a model in host memory are while a GPU works on its blocks.

A model that fits stays on the GPU for the whole run. Of any other, the next block is copied there while the present one
is at work: by a thread, through pinned memory, on a stream of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

SHARE = 0.5
"""Of a GPU's free memory, what weights that stay there may take; activations and solves need the rest."""


def stays(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes of weights stay on a GPU for a whole run."""
    return device.type == "cuda" and size <= SHARE * torch.cuda.mem_get_info(device)[0]


def weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def resident(model: nn.Module, device: torch.device, copies: int = 1) -> Iterator[None]:
    """A model in host memory on a GPU for the duration, if it and the ``copies`` of it that a run makes fit there."""
    tensors = [*model.parameters(), *model.buffers()]
    if not stays(copies * weight_bytes(model), device) or any(t.device.type != "cpu" for t in tensors):
        yield
        return
    try:
        model.to(device)
    except torch.OutOfMemoryError:  # what did fit comes back, and blocks go there one by one
        model.to("cpu")
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to("cpu")
        torch.cuda.empty_cache()


ALIGNED = 128
"""Numbers after which a tensor may begin, in one copy of several."""


def sent(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies on a GPU of those tensors that are in host memory, by one copy per type, which the host does not wait for;
    floating ones in ``dtype``. Empty where the device is no GPU."""
    found: dict[str, Tensor] = {}
    here = {name: t.detach() for name, t in tensors.items() if device.type == "cuda" and not t.is_cuda}
    for kind in dict.fromkeys(t.dtype for t in here.values()):
        places, size = {}, 0
        for name, tensor in here.items():
            if tensor.dtype == kind:
                places[name] = slice(size, size + tensor.numel())
                size += -(-tensor.numel() // ALIGNED) * ALIGNED
        host = torch.empty(size, dtype=kind, pin_memory=True)
        for name, place in places.items():
            host[place].view(here[name].shape).copy_(here[name])
        there = host.to(device, non_blocking=True)
        for name, place in places.items():
            own = (dtype or kind) if kind.is_floating_point else kind
            found[name] = there[place].view(here[name].shape).to(own, copy=True)
    return found


class Arrivals:
    """Blocks on their way to a GPU."""

    def __init__(self, device: torch.device, api=torch.cuda):
        """api: what provides streams and events; ``torch.cuda`` but in tests."""
        self.device, self.api = device, api
        self.stream = api.Stream(device)
        self._courier = ThreadPoolExecutor(1, thread_name_prefix="pyprune-arrivals")
        self._coming: dict[int, Future] = {}

    def send(self, index: int, read: Callable[[], dict[str, Tensor]], dtype: torch.dtype) -> None:
        """Start to copy a block's tensors, which ``read`` gives and nothing changes until :meth:`take`; floating ones
        arrive in ``dtype``."""
        self._coming = {index: self._courier.submit(self._copy, read, dtype)}

    def _copy(self, read: Callable[[], dict[str, Tensor]], dtype: torch.dtype):
        arrived = {}
        try:
            with self.api.stream(self.stream):
                for name, tensor in read().items():
                    host = tensor.detach()
                    host = host if self._pinned(host) else self._pin(host)
                    copied = host.to(self.device, non_blocking=True)
                    arrived[name] = copied.to(dtype) if copied.is_floating_point() else copied
        except torch.OutOfMemoryError:
            return None
        event = self.api.Event()
        event.record(self.stream)
        return arrived, event

    def take(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by name, for the current stream; empty if it was not sent, or had no room."""
        future = self._coming.pop(index, None)
        found = None if future is None else future.result()
        if found is None:
            return {}
        arrived, event = found
        current = self.api.current_stream(self.device)
        current.wait_event(event)
        for tensor in arrived.values():
            self._keep(tensor, current)
        return arrived

    # one line each, so that a test can stand in for the device
    def _pinned(self, host: Tensor) -> bool:
        return host.is_pinned()

    def _pin(self, host: Tensor) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)

    def _keep(self, tensor: Tensor, stream) -> None:
        tensor.record_stream(stream)
