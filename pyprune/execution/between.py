"""Norms, rotary embeddings and gated layers of a block through ``ops``, for passes without gradients.

A norm, a gated layer or an attention of torch or transformers is known by what it does: the op's result on random
numbers is that of the part's own code, in the type it computes in, up to the order of a sum. Then, for the duration,
the part is of a class that calls the op where it can and its own code elsewhere; what a part does otherwise stays as it
is, whatever its name. Random numbers do not show what other people's code does with other numbers, or beside its
result: classes from elsewhere stay as they are, and so does a gate whose activation has hooks. A class rather than a
function of the instance: a copy of the part computes with the copy's weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.ops import guards

DIFFERENT = 0.02
"""Share of 16-bit numbers that may be rounded to a neighbour."""
KNOWN = ("torch", "transformers")
"""Packages whose parts are looked at."""


class Between:
    """Recognises the parts of a model's blocks; one that is like an earlier one is not tried again."""

    def __init__(self, verdicts: Callable[[], guards.Verdicts | None] = lambda: None) -> None:
        """verdicts: what takes the guards of the ops' results now, if anything does."""
        self._classes: dict[Hashable, type | None] = {}
        self._verdicts = verdicts

    @contextlib.contextmanager
    def through_ops(self, block: nn.Module) -> Iterator[None]:
        """Inside the ``with`` block the parts that are recognised run through the ops that are not the reference's."""
        changed = []
        try:
            for part in list(block.modules()):
                own = type(part)
                if (faster := self._class_of(part)) is not None:
                    part.__class__ = faster
                    changed.append((part, own))
            yield
        finally:
            for part, own in changed:
                part.__class__ = own

    def judge(self, op: str, guard: Callable[[], Tensor]) -> None:
        """Note what the guard of an op says of its result, where somebody wants to know."""
        if (verdicts := self._verdicts()) is not None:
            verdicts.add(op, guard())

    def _class_of(self, part: nn.Module) -> type | None:
        for op, describe, recognise in (
            ("rms_norm", _described_norm, _norm),
            ("swiglu", _described_gate, _gate),
            ("rotary", _described_attention, _attention),
        ):
            weight = describe(part)
            if weight is None or weight.dtype not in ops.FLOATS or "forward" in vars(part):
                continue
            if ops.taken_for(op, weight) == "reference" or type(part).__module__.partition(".")[0] not in KNOWN:
                continue
            if op == "swiglu" and any(map(_hooked, part.children())):
                continue
            numbers = [(name, value) for name, value in vars(part).items() if isinstance(value, float)]
            key = (op, type(part), weight.dtype, weight.device, *map(type, part.children()), *numbers)
            if key not in self._classes:
                with torch.no_grad():
                    self._classes[key] = recognise(part, weight, self.judge)
            if self._classes[key] is not None:
                return self._classes[key]
        return None


Judge = Callable[[str, Callable[[], Tensor]], None]


def _class_with(own: type, forward: Callable) -> type:
    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _tried(call: Callable[[], object]) -> object:
    """What foreign code makes of inputs that it may not be meant for; None if it raises."""
    try:
        return call()
    except Exception:  # whatever it raises, it is not the code that is looked for
        return None


def _equal(got: object, want: object) -> bool:
    """Whether two results differ by the order of a sum at most."""
    if (
        not isinstance(got, Tensor)
        or not isinstance(want, Tensor)
        or got.shape != want.shape
        or got.dtype != want.dtype
    ):
        return False
    eps = torch.finfo(want.dtype).eps
    wide, size = want.float(), want.float().abs()
    near = ((got.float() - wide).abs() <= 8 * eps * (size + size.square().mean().sqrt() * (eps < 1e-5))).all()
    return bool(near & ((got != want).float().mean() <= (1.0 if eps < 1e-5 else DIFFERENT)))


def _free(x: Tensor, weight: Tensor) -> bool:
    return not torch.is_grad_enabled() and x.dtype == weight.dtype and x.device == weight.device


def _described_norm(part: nn.Module) -> Tensor | None:
    """Its weight, if it has nothing else."""
    tensors = [*part.parameters(), *part.buffers()]
    return tensors[0] if len(tensors) == 1 and tensors[0].ndim == 1 and not list(part.children()) else None


def _norm(part: nn.Module, weight: Tensor, judge: Judge) -> type | None:
    """RMSNorm with one of the part's own numbers as its eps."""
    [name] = [name for name, _ in part.named_parameters()] or [""]
    if not name:
        return None
    generator = torch.Generator().manual_seed(0)
    scratch = copy.deepcopy(part)
    getattr(scratch, name).copy_(0.5 + torch.rand(weight.shape, generator=generator))
    x = torch.randn(6, len(weight), generator=generator) * torch.tensor([1e-4, 1e-3, 1e-2, 1.0, 10.0, 100.0])[:, None]
    x, own = x.to(weight), type(part)
    want, changed = _tried(lambda: scratch(x)), getattr(scratch, name)
    for place, eps in vars(part).items():
        for form in ops.NORM_FORMS if isinstance(eps, float) and 0 <= eps < 1e-2 else ():
            if not _equal(ops.rms_norm(x, changed, eps, form=form), want):
                continue
            return _norm_class(own, name, place, form, judge)
    return None


def _norm_class(own: type[nn.Module], name: str, place: str, form: str, judge: Judge) -> type:
    def forward(self, x: Tensor, *rest, **options) -> Tensor:
        weight = getattr(self, name)
        if rest or options or not _free(x, weight):
            return own.forward(self, x, *rest, **options)
        eps = getattr(self, place)
        out = ops.rms_norm(x, weight, eps, form=form)
        judge("rms_norm", lambda: guards.normed(out, x, weight, eps, form))
        return out

    return _class_with(own, forward)


class _Stand(nn.Module):
    """Stands for a linear layer: gives a tensor for the one it expects, and another as it is."""

    def __init__(self, expects: Tensor | None = None, gives: Tensor | None = None):
        super().__init__()
        self.expects, self.gives = expects, gives

    def forward(self, x: Tensor) -> Tensor:
        if self.gives is None:
            return x
        if x is not self.expects:
            raise ValueError("its input is not the part's own")
        return self.gives


def _described_gate(part: nn.Module) -> Tensor | None:
    """The first of its three linear layers' weights, if it has three and no other parameters."""
    layers = [child for child in part.children() if isinstance(child, nn.Linear)]
    tensors = [tensor for child in layers for tensor in child.parameters()]
    return layers[0].weight if len(layers) == 3 and len(tensors) == len([*part.parameters()]) else None


def _gate(part: nn.Module, weight: Tensor, judge: Judge) -> type | None:
    """``down(silu(gate(x)) · up(x))``, its layers told by what they are given and what becomes of it."""
    own, generator = type(part), torch.Generator().manual_seed(0)
    x, a, b = ((3 * torch.randn(2, 5, 67, generator=generator)).to(weight) for _ in range(3))
    names = [name for name, child in part.named_children() if isinstance(child, nn.Linear)]
    for gate in names:
        for up in names:
            if gate == up:
                continue
            [down] = set(names) - {gate, up}
            shell = copy.copy(part)
            stands = {gate: _Stand(x, a), up: _Stand(x, b), down: _Stand()}
            shell._modules = {**part._modules, **stands}
            if not _equal(ops.swiglu(a, b), _tried(functools.partial(shell, x))):
                continue
            return _gate_class(own, gate, up, down, judge)
    return None


def _gate_class(own: type[nn.Module], gate: str, up: str, down: str, judge: Judge) -> type:
    def forward(self, x: Tensor, *rest, **options) -> Tensor:
        if rest or options or torch.is_grad_enabled():
            return own.forward(self, x, *rest, **options)
        return getattr(self, down)(gated(getattr(self, gate)(x), getattr(self, up)(x)))

    def gated(a: Tensor, b: Tensor) -> Tensor:  # neither lives on while the next product waits
        product = ops.swiglu(a, b)
        judge("swiglu", lambda: guards.gated(product, a, b))
        return product

    return _class_with(own, forward)


def _hooked(part: nn.Module) -> bool:
    """Whether somebody wants to see what goes through a part that the op stands for."""
    return not isinstance(part, nn.Linear) and bool(part._forward_hooks or part._forward_pre_hooks)


def _rotary_name(forward: Callable) -> str | None:
    """The function among those its code calls that is handed queries, keys and their angles."""
    code = inspect.unwrap(forward)
    if not isinstance(code, types.FunctionType):
        return None
    for name in code.__code__.co_names:
        called = code.__globals__.get(name)
        known = list(inspect.signature(called).parameters)[:4] if isinstance(called, types.FunctionType) else []
        if known == ["q", "k", "cos", "sin"]:
            return name
    return None


def _described_attention(part: nn.Module) -> Tensor | None:
    """The weight of its first linear layer, if its code turns queries and keys."""
    if _rotary_name(type(part).forward) is None:
        return None
    return next((child.weight for child in part.children() if isinstance(child, nn.Linear)), None)


def _attention(part: nn.Module, weight: Tensor, judge: Judge) -> type | None:
    """A class whose forward pass is the part's own code, with another function for queries and keys."""
    own, name, generator = type(part), _rotary_name(type(part).forward), torch.Generator().manual_seed(0)
    if name is None:
        return None
    function = inspect.unwrap(own.forward).__globals__[name]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    q, k, cos, sin = random(2, 3, 5, 32), random(2, 1, 5, 32), random(2, 5, 32), random(2, 5, 32)
    want = _tried(lambda: function(q, k, cos, sin))
    if not isinstance(want, tuple) or len(want) != 2:
        return None
    if not all(_equal(ops.rotary(x, cos, sin), y) for x, y in zip((q, k), want)):
        return None

    @functools.wraps(function)
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest, **options):
        plain = not rest and not options and q.ndim == 4 and cos.ndim == 3 and len(cos) in (1, len(q))
        shapes = [(x.shape[0], *x.shape[2:]) for x in (q, k)] + [(len(q), *x.shape[1:]) for x in (cos, sin)]
        if not plain or len({*shapes}) > 1 or not all(_free(x, q) for x in (k, cos, sin)):
            return function(q, k, cos, sin, *rest, **options)
        return one(q, cos, sin), one(k, cos, sin)

    def one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = ops.rotary(x, cos, sin)
        judge("rotary", lambda: guards.turned(out, x, cos, sin))
        return out

    forward = _with_global(own.forward, name, turned)
    return None if forward is None else _class_with(own, forward)


def _with_global(function: Callable, name: str, value: Callable) -> Callable | None:
    """A copy of a function, and of the functions that wrap it, whose code finds ``value`` under a global name."""
    if not isinstance(function, types.FunctionType):
        return None
    inner, cells, space = getattr(function, "__wrapped__", None), function.__closure__, function.__globals__
    if inner is None:
        space = {**space, name: value}
    else:
        changed = _with_global(inner, name, value)
        if changed is None or not any(cell.cell_contents is inner for cell in cells or ()):
            return None
        cells = tuple(types.CellType(changed) if cell.cell_contents is inner else cell for cell in cells or ())
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
