"""What derivatives and small changes tell of a running block: which rows an input column depends on, and where an
output is added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyprune.model.arguments import Arguments
from pyprune.model.blocks import WeightRef
from pyprune.model.recording import call_block
from pyprune.model.watching import Watch


class DependencyTracer:
    """Replaces every linear product by noise that can be differentiated, and keeps the inputs."""

    def __init__(self, block: nn.Module, refs: list[WeightRef], generator: torch.Generator):
        self.inputs: dict[WeightRef, Tensor] = {}
        self.leaves: dict[WeightRef, Tensor] = {}
        self.generator = generator
        self._watch = Watch(block, refs, replace=self._replace)

    def _replace(self, ref: WeightRef, x: Tensor, output: Tensor) -> Tensor:
        leaf = torch.randn(output.shape, generator=self.generator).to(output).requires_grad_()
        if ref not in self.inputs and x.numel():
            self.inputs[ref], self.leaves[ref] = x, leaf
        return leaf.clone()  # what follows may write into it, which a leaf does not allow

    def first_expert(self, ref: WeightRef) -> int | None:
        return min((r.expert for r in self.inputs if r.path == ref.path and r.expert is not None), default=None)

    def __enter__(self) -> DependencyTracer:
        return self

    def __exit__(self, *exc) -> None:
        self._watch.close()

    def touched(self, x: Tensor, columns: Tensor | slice) -> dict[WeightRef, Tensor]:
        """Per producer, the rows (bool ``[rows]``) that the given columns of an input depend on."""
        part = x.reshape(-1, x.shape[-1])[:, columns]
        if not part.requires_grad:
            return {}
        cotangent = torch.randn(part.shape, generator=self.generator).to(part)
        refs = list(self.leaves)
        grads = torch.autograd.grad(
            part, [self.leaves[r] for r in refs], cotangent, retain_graph=True, allow_unused=True
        )
        rows = {r: g.reshape(-1, g.shape[-1]).abs().sum(0) > 0 for r, g in zip(refs, grads) if g is not None}
        return {r: v for r, v in rows.items() if bool(v.any())}


@torch.no_grad()
def landing(block: nn.Module, hidden: Tensor, arguments: Arguments, consumer: WeightRef) -> str | None:
    """Where the consumer's output is added: the place that moves by exactly δ when the output moves by δ."""
    module = block.get_submodule(consumer.module_path)
    runs: list[dict[str, Tensor]] = []
    delta: Tensor | None = None
    for moved in (False, True):
        seen: dict[str, Tensor] = {}
        handles = []

        def note(name, seen=seen):
            def hook(_, args):
                if args and isinstance(args[0], Tensor):
                    seen.setdefault(name, args[0])

            return hook

        def move(_, args, output, moved=moved, seen=seen):
            nonlocal delta
            seen["<own>"] = output
            if delta is None:
                generator = torch.Generator().manual_seed(1)
                delta = torch.randn(output.shape, generator=generator).to(output) * output.std().clamp(min=1e-3)
            return output + delta if moved else output

        handles = [m.register_forward_pre_hook(note(n)) for n, m in block.named_modules() if n]
        handles.append(module.register_forward_hook(move))
        try:
            seen[""] = call_block(block, hidden, arguments)
        finally:
            for handle in handles:
                handle.remove()
        runs.append(seen)
    own = runs[0].pop("<own>")
    for name in ("", *(n for n in runs[0] if n)):
        before, after = runs[0][name], runs[1].get(name)
        if after is None or delta is None or before.numel() != delta.numel() or name == consumer.module_path:
            continue
        step = (after - before).reshape(delta.shape)
        scale = delta.abs().max()
        if float((step - delta).abs().max()) <= 1e-3 * float(scale) and float(
            (before.reshape(own.shape) - own).abs().max()
        ) > 1e-3 * float(scale):
            return name
    return None


def normed(block: nn.Module, hidden: Tensor, arguments: Arguments, target: str | None, consumer: str) -> bool:
    """Whether all that layer ``consumer`` does goes through module ``target``, which takes away a factor of four.

    With the module's output held fast, a consumer four times as loud must not move the block's output.
    """
    if not target:
        return False
    norm, loud = block.get_submodule(target), block.get_submodule(consumer)
    kept: dict[str, Tensor] = {}

    def run(*handles) -> Tensor:
        try:
            return call_block(block, hidden, arguments).detach()
        finally:
            for handle in handles:
                handle.remove()

    plain = run(norm.register_forward_hook(lambda _, args, out: kept.update(out=out)))
    held = run(
        norm.register_forward_hook(lambda *_: kept["out"]), loud.register_forward_hook(lambda _, args, out: 4 * out)
    )
    scaled = run(norm.register_forward_pre_hook(lambda _, args: (4 * args[0], *args[1:])))
    return all(float((other - plain).norm()) <= 1e-2 * float(plain.norm()) for other in (held, scaled))
