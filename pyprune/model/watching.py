"""Sees what the weights of a running block are multiplied with, whether they belong to a module or to fused experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.model.blocks import WeightRef
from pyprune.model.expert_products import Experts

See = Callable[[WeightRef, Tensor], None]
Replace = Callable[[WeightRef, Tensor, Tensor], Tensor]


class Watch:
    """Watches the products of some weights of one block, in every forward pass until it is closed::

        with Watch(block, refs, see):
            executor.run(index, block, activations)

    ``see(ref, x)`` is called before each product of a watched weight. ``x`` is the very tensor that a linear layer is
    called with, ``[..., in]``, so that weights which read the same input can be told by its identity; of a fused expert
    it is ``[tokens, in]``, the tokens routed to this expert, possibly none. A weight is seen once for each product with
    it. ``see`` may raise :class:`~pyprune.model.recording.Stop` to end the pass.

    ``replace(ref, x, output)`` is called after each product, and what it returns takes the place of the output. A
    product of all experts at once cannot be replaced expert by expert and stays as it is.

    Fused experts are seen in plain products only: run the pass under :func:`expert_loop`, as ``Executor.compute`` does.
    What is watched is this very module; a copy of it on another device needs a watch of its own.
    """

    def __init__(
        self, block: nn.Module, refs: Iterable[WeightRef], see: See | None = None, *, replace: Replace | None = None
    ):
        refs = list(refs)
        self.shared: set[WeightRef] = set()
        """Weights that several modules of the block multiply with."""
        self._handles = []
        owners: dict[int, list[nn.Module]] = {}
        for part in block.modules():
            if isinstance(weight := getattr(part, "weight", None), Tensor):
                owners.setdefault(id(weight), []).append(part)
        for ref in refs:
            parts = owners[id(ref.parameter(block))] if ref.expert is None else []
            if len(parts) > 1:
                self.shared.add(ref)
            for part in parts:
                if see is not None:
                    self._handles.append(part.register_forward_pre_hook(_before(ref, see), with_kwargs=True))
                if replace is not None:
                    self._handles.append(part.register_forward_hook(_after(ref, replace), with_kwargs=True))
        experts = Experts(block, refs)
        self.has_experts = bool(experts)
        """Whether fused experts are among the weights: how often each is seen depends on the tokens."""
        if self.has_experts:
            # entered by the block itself, hence inside whatever modes the pass runs under: the innermost sees a product
            # first, and one of those outside may well not pass it on
            mode = _ExpertMode(experts, see, replace)
            self._handles += [
                block.register_forward_pre_hook(lambda *_: mode.__enter__() and None, prepend=True),
                block.register_forward_hook(lambda *_: mode.__exit__(None, None, None), always_call=True),
            ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]


def _before(ref: WeightRef, see: See):
    def hook(module, args, kwargs):
        see(ref, _input(args, kwargs))

    return hook


def _after(ref: WeightRef, replace: Replace):
    def hook(module, args, kwargs, output):
        return replace(ref, _input(args, kwargs), output)

    return hook


class _ExpertMode(TorchFunctionMode):
    """Sees the products with experts that are no modules of their own."""

    def __init__(self, experts: Experts, see: See | None, replace: Replace | None):
        super().__init__()
        self.experts, self.see, self.replace = experts, see, replace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = self.experts.products(func, args, kwargs)
        if self.see is not None:
            for ref, x in found:
                self.see(ref, x)
        out = func(*args, **(kwargs or {}))
        if self.replace is not None and len(found) == 1:
            out = self.replace(*found[0], out)
        return out


@contextlib.contextmanager
def expert_loop(config) -> Iterator[None]:
    """Run fused experts one by one for the duration, so that each expert's inputs can be seen."""
    name = "_experts_implementation"
    before = getattr(config, name, None)
    if before is None or before == "eager":
        yield
        return
    setattr(config, name, "eager")
    try:
        yield
    finally:
        setattr(config, name, before)


def begin_gradients(block: nn.Module):
    """Gradients begin at the hidden states that a block is called with; returns the handle that ends it."""

    def hook(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            return None
        hidden = hidden.detach().requires_grad_()
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return block.register_forward_pre_hook(hook, with_kwargs=True)
