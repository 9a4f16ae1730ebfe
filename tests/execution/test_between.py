"""Parts of a block that run through ops: recognised by what they do, left as they are otherwise."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import zoo
from torch import nn
from torch.nn import functional

from pyprune import ops
from pyprune.execution import between
from pyprune.execution.between import Between
from pyprune.execution.executor import Executor
from pyprune.model.blocks import ModelView
from pyprune.ops import native

pytestmark = pytest.mark.skipif(native._C is None, reason=str(native.unusable("cpu")))


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The ops that are called inside the test."""
    seen: list[str] = []
    for op in ("rms_norm", "rotary", "swiglu"):
        own = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, op=op, own=own, **o: (seen.append(op), own(*a, **o))[1])
    return seen


NONE = "rms_norm=reference,rotary=reference,swiglu=reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, norms", [("llama", 2), ("qwen3", 4), ("gemma", 2), ("olmo2", 4), ("mistral", 2)])
def test_a_block_gives_its_own_output_through_the_ops(family, norms, dtype, called):
    torch.manual_seed(0)
    model = zoo.build(family).to(dtype)
    executor = Executor(ModelView(model), batch_size=3)
    stream = executor.embed([torch.randint(5, 60, (17,)) for _ in range(3)])
    block = executor.view.blocks[0]
    classes = [type(part) for part in block.modules()]
    [(batch, hidden)] = list(executor.stream(stream))
    with torch.no_grad(), ops.backend(NONE), executor.compute(0) as module:
        want = executor.forward(0, module, hidden)
    with executor.compute(0):
        called.clear()  # recognising them calls the ops too
        got = executor.forward(0, block, hidden)
    gates = 0 if family == "gemma" else 1  # its activation is another
    assert [called.count(op) for op in ("rms_norm", "rotary", "swiglu")] == [norms, 2, gates]
    assert [type(part) for part in block.modules()] == classes, "the model has its own classes back"
    if dtype == torch.float32:
        assert (got - want).norm() <= 3e-7 * want.norm()
    else:
        assert (got != want).float().mean() < 0.02 and (got - want).norm() < 2e-3 * want.norm()


def test_like_parts_are_tried_once_and_nothing_is_where_the_reference_is_taken(called):
    model, found = tiny.model("llama"), Between()
    first, second = ModelView(model).blocks[:2]
    with found.through_ops(first):
        pass
    called.clear()
    with found.through_ops(second):
        assert not called and type(second.mlp) is not type(second)
    with ops.backend(NONE), found.through_ops(first):
        assert type(first.mlp).forward.__module__.startswith("transformers")


def test_a_copy_made_meanwhile_computes_with_its_own_weights():
    part = tiny.model("llama").model.layers[0].mlp
    x = torch.randn(3, 7, part.hidden_size)
    with torch.no_grad(), Between().through_ops(part):
        fresh = copy.deepcopy(part)
        fresh.down_proj.weight.zero_()
        assert not fresh(x).any() and part(x).any()


def test_where_a_gradient_is_wanted_the_parts_run_their_own_code(called):
    block = tiny.model("llama").model.layers[0]
    x = torch.randn(3, 7, block.mlp.hidden_size)
    with Between().through_ops(block):
        called.clear()
        block.mlp(block.input_layernorm(x)).sum().backward()
    assert not called and all(p.grad is not None for p in block.mlp.parameters())


class Norm(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.ones(24)), 1e-6, change

    def forward(self, x):
        return self.change(functional.rms_norm(x, (24,), self.weight, self.eps), x)


class Gated(nn.Module):
    def __init__(self, combine):
        super().__init__()
        self.combine = combine
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.c(self.combine(self.a(x), self.b(x), x))


@pytest.mark.parametrize(
    "part, op",
    [
        (Norm(lambda y, x: y), "rms_norm"),
        (Norm(lambda y, x: y * 1.001), None),
        (Norm(lambda y, x: y - 1e-3 * x.mean(-1, keepdim=True)), None),
        (Norm(lambda y, x: y.clamp(-2, 2)), None),
        (Gated(lambda a, b, x: functional.silu(b) * a), "swiglu"),
        (Gated(lambda a, b, x: functional.silu(a) * b + 1e-4), None),
        (Gated(lambda a, b, x: functional.gelu(a) * b), None),
        (Gated(lambda a, b, x: functional.silu(a).clamp(max=5) * b), None),
        (Gated(lambda a, b, x: functional.silu(a) * b if len(x) > 1 else a), "swiglu"),
        (Gated(lambda a, b, x: functional.silu(a) * b * x.new_ones(())), "swiglu"),
        (Gated(lambda a, b, x: 1 / 0), None),
    ],
)
def test_what_is_almost_the_same_stays_as_it_is(part, op, called, monkeypatch):
    monkeypatch.setattr(between, "KNOWN", (Norm.__module__.partition(".")[0],))
    x, whole = torch.randn(3, 5, 24), nn.Sequential(part)
    with torch.no_grad(), Between().through_ops(whole):
        called.clear()
        if op is None:
            assert type(part) in (Norm, Gated)
        else:
            whole(x)
    assert called == [op] * (op is not None)


def test_what_others_wrote_or_look_at_runs_its_own_code(called):
    """A subclass computes the same of random numbers and more of its own; a hook wants the activation's output."""

    class Counting(type(tiny.model("llama").model.layers[0].mlp)):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = tiny.model("llama")
    own, hooked = (layer.mlp for layer in model.model.layers[:2])
    own.__class__ = Counting
    seen = []
    hooked.act_fn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = torch.randn(3, 7, own.hidden_size)
    with torch.no_grad(), Between().through_ops(model):
        called.clear()
        own(x), hooked(x)
    assert own.calls == 1 and len(seen) == 1 and not called


def test_further_arguments_reach_the_part_itself(called, monkeypatch):
    class Adapted(Gated):
        def forward(self, x, add=None):
            out = super().forward(x)
            return out if add is None else out + add

    monkeypatch.setattr(between, "KNOWN", (Norm.__module__.partition(".")[0],))
    part, x = Adapted(lambda a, b, x: functional.silu(a) * b), torch.randn(3, 5, 24)
    with torch.no_grad():
        want = part(x, 2.0)
        with Between().through_ops(part):
            called.clear()
            assert torch.equal(part(x, 2.0), want) and not called
            part(x)
    assert called == ["swiglu"]
