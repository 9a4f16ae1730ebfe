"""Training of a window of blocks: known answers on linear toys, what is not finite, memory that runs out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyprune.config import ConfigError, Reconstruction
from pyprune.execution.activation_store import transfers
from pyprune.execution.distributed import World
from pyprune.execution.executor import Activations, Executor
from pyprune.model.arguments import Arguments
from pyprune.reconstruction import trained_window as trained_window_module
from pyprune.reconstruction.trained_window import TrainedWindow
from pyprune.reconstruction.training import relative_error, schedule, train


class Bench(Executor):
    """An executor without a model: blocks are given, and take nothing but hidden states."""

    def __init__(self):
        self.device, self.dtype, self.batch_size, self.world = torch.device("cpu"), torch.float32, None, World()
        self.transfers, self.warnings = transfers(self.device, self.dtype), []
        self.warn = self.warnings.append

    def arguments(self, index, length, size):
        return Arguments((), {})


class Block(nn.Module):
    def __init__(self, width, seed, bias=False):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(width, width, bias=bias)

    def forward(self, hidden):
        return self.linear(hidden)


def stream(values):
    """``[sequences, tokens, hidden]`` as stored activations."""
    out = Activations([torch.zeros(values.shape[1], dtype=torch.long)] * len(values), values.shape[2], values.dtype)
    out.data = {values.shape[1]: values}
    return out


def half_mask(width, seed):
    return torch.rand(width, width, generator=torch.Generator().manual_seed(seed)) < 0.5


def problem(width=8, sequences=16, tokens=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * 0.4 + torch.eye(width)
    x = torch.randn(sequences, tokens, width, generator=generator) @ mixing
    target = x @ torch.randn(width, width, generator=generator) + torch.randn(x.shape, generator=generator) * 0.3
    return x, target


def fit(blocks, masks, x, target, dtype=torch.float32, **settings):
    window = TrainedWindow(Bench(), list(range(len(blocks))), blocks, masks, dtype)
    trace = train(window, [(stream(x), stream(target))], Reconstruction(**{"batch_size": 4, **settings}))
    window.commit()
    return window, trace


def test_block_reconstruction_of_a_linear_block_is_masked_least_squares():
    x, target = problem()
    block, mask = Block(8, 1, bias=True), half_mask(8, 2)
    fit([block], [{"linear.weight": mask}], x, target, epochs=300, lr=2e-2)
    rows, wanted = x.reshape(-1, 8).double(), target.reshape(-1, 8).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    got = torch.cat([block.linear.weight, block.linear.bias[:, None]], 1).detach().double()
    best = 0.0
    for r in range(8):
        support = torch.cat([mask[r], torch.tensor([True])])
        solution = torch.linalg.lstsq(rows[:, support], wanted[:, r : r + 1]).solution[:, 0]
        best += (rows[:, support] @ solution - wanted[:, r]).square().sum()
        assert torch.allclose(got[r, support], solution, atol=2e-2)
    assert (rows @ got.T - wanted).square().sum() <= best * 1.002
    assert not got[:, :8][~mask].any()


def test_cross_block_window_reaches_joint_least_squares_where_blocks_alone_cannot():
    """The second block is diagonal, so alone it cannot mix columns; the first, full, can do it for both."""
    x, target = problem()
    rows, wanted = x.reshape(-1, 8).double(), target.reshape(-1, 8).double()
    bound = (rows @ torch.linalg.lstsq(rows, wanted).solution - wanted).square().mean().item()
    blocks = [Block(8, 1), Block(8, 2)]
    masks = [{}, {"linear.weight": torch.eye(8, dtype=torch.bool)}]
    with torch.no_grad():
        blocks[1].linear.weight.copy_(torch.eye(8))
    window, _ = fit(blocks, masks, x, target, epochs=1500, batch_size=16, lr=2e-2)
    joint = (window(x) - target).square().mean().item()
    assert bound <= joint <= 1.005 * bound
    alone = [Block(8, 1), Block(8, 2)]
    h = alone[0](x).detach()
    window, _ = fit(alone[1:], masks[1:], h, target, epochs=400, batch_size=16, lr=2e-2)
    assert (window(h) - target).square().mean().item() > 2 * bound


def test_zero_steps_change_nothing():
    x, target = problem()
    block = Block(8, 1)
    before = block.linear.weight.detach().clone()
    _, trace = fit([block], [{}], x, target, epochs=0)
    assert trace.steps == 0 and torch.equal(block.linear.weight, before)


def test_accumulated_gradients_equal_whole_batches():
    """Micro-batches and mixed lengths: the loss is the mean over the step's tokens, however they are cut."""
    torch.manual_seed(0)
    x = [torch.randn(t, 6) for t in (5, 3, 5, 3, 5, 7, 3, 5)]
    results = []
    for micro in (None, 1, 3):
        block = Block(6, 3)
        inputs = Activations([torch.zeros(len(v), dtype=torch.long) for v in x], 6, torch.float32)
        for length, rows in inputs.rows.items():
            inputs.data[length] = torch.stack([x[r] for r in rows])
        target = inputs.like()
        target.data = {length: data.flip(-1) for length, data in inputs.data.items()}
        window = TrainedWindow(Bench(), [0], [block], [{"linear.weight": half_mask(6, 0)}], torch.float32)
        trace = train(window, [(inputs, target)], Reconstruction(epochs=4, batch_size=4, micro_batch_size=micro))
        results.append((window.modules[0].linear.weight.detach(), trace.loss))
    for weight, loss in results[1:]:
        assert torch.allclose(weight, results[0][0], atol=1e-6)
        assert torch.allclose(torch.tensor(loss), torch.tensor(results[0][1]), rtol=1e-5)


def test_loss_in_the_trace_is_the_mean_squared_error_met():
    x, target = problem(sequences=4)
    block = Block(8, 1)
    expected = (block(x) - target).square().mean().item()
    _, trace = fit([block], [{}], x, target, epochs=1, batch_size=4)
    assert trace.steps == 1 and abs(trace.loss[0] - expected) < 1e-5 * expected


def test_bfloat16_training_keeps_float32_masters():
    """Steps far below a bfloat16 weight's resolution still add up."""
    x, target = problem()
    block = Block(8, 1)
    with torch.no_grad():
        block.linear.weight.fill_(1.0)
    _, trace = fit([block], [{"linear.weight": half_mask(8, 0)}], x, target, torch.bfloat16, epochs=10, lr=1e-4)
    moved = (block.linear.weight - 1).abs()[half_mask(8, 0)]
    assert trace.steps == 40 and 5e-4 < moved.max() < 2**-8
    assert not block.linear.weight[~half_mask(8, 0)].any()


def test_a_loss_that_is_not_finite_is_undone_and_said():
    x, target = problem()
    block = Block(8, 1)
    before = block.linear.weight.detach().clone()
    target[3, 2, 1] = torch.nan
    _, trace = fit([block], [{}], x, target, epochs=3)
    assert trace.diverged and torch.equal(block.linear.weight, before)


def test_an_epoch_visits_every_sequence_once_equal_lengths_together():
    lengths = [4] * 9 + [6] * 5 + [3] * 2
    streams = [
        Activations([torch.zeros(n, dtype=torch.long) for n in lengths], 1, torch.float32),
        Activations([torch.zeros(4, dtype=torch.long)] * 3, 1, torch.float32),
    ]
    batches = schedule(streams, 4, torch.Generator().manual_seed(0))
    seen = sorted((s, length, row) for batch in batches for s, length, rows in batch for row in rows)
    assert seen == sorted(
        (s, length, row) for s, a in enumerate(streams) for length, rows in a.rows.items() for row in range(len(rows))
    )
    sizes = [sum(len(rows) for _, _, rows in batch) for batch in batches]
    assert sorted(sizes) == [3, 4, 4, 4, 4] and len({len({g[1] for g in b}) for b in batches if b}) >= 1
    other = schedule(streams, 4, torch.Generator().manual_seed(1))
    assert batches != other and batches == schedule(streams, 4, torch.Generator().manual_seed(0))


def test_held_out_error_of_a_trained_window_is_the_probe_error():
    x, target = problem()
    window = TrainedWindow(Bench(), [0], [Block(8, 1)], [{}], torch.float32)
    with torch.no_grad():
        expected = ((window(x) - target).square().sum() / target.square().sum()).item()
    assert relative_error(window, [(stream(x), stream(target))]) == pytest.approx(expected, rel=1e-6)


class Poison(torch.autograd.Function):
    """The identity; its result or its gradient is infinite."""

    @staticmethod
    def forward(ctx, x, now, backward):
        ctx.bad = now and backward
        return x * torch.inf if now and not backward else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf if ctx.bad else grad, None, None


class Spoiled(Block):
    """A block whose training goes wrong at one step."""

    def __init__(self, step, backward):
        super().__init__(8, 1)
        self.left, self.backward = step, backward

    def forward(self, hidden):
        self.left -= torch.is_grad_enabled()
        return Poison.apply(self.linear(hidden), torch.is_grad_enabled() and self.left == 0, self.backward)


def test_weights_that_the_last_step_made_infinite_are_undone():
    """The losses of all steps are finite: only the weights tell."""
    x, target = problem()
    block = Spoiled(12, backward=True)
    before = block.linear.weight.detach().clone()
    _, trace = fit([block], [{}], x, target, epochs=3)
    assert trace.diverged and all(map(torch.isfinite, torch.tensor(trace.loss)))
    assert torch.equal(block.linear.weight, before)


def test_training_that_diverges_late_keeps_the_best_epoch_under_validation():
    x, target = problem()
    block, held_out = Spoiled(11, backward=False), [(stream(x[:4]), stream(target[:4]))]
    window = TrainedWindow(Bench(), [0], [block], [{}], torch.float32)
    trace = train(
        window,
        [(stream(x), stream(target))],
        Reconstruction(epochs=4, batch_size=4, lr=1e-2, select="validation"),
        held_out=held_out,
    )
    assert trace.diverged and len(trace.held_out) == 3 and trace.kept == 2
    assert trace.held_out[2] < trace.held_out[1] < trace.held_out[0]
    assert relative_error(window, held_out) == pytest.approx(trace.held_out[2], rel=1e-6)


class Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if grad.shape[:2].numel() > ctx.most:
            raise torch.OutOfMemoryError("simulated")
        return grad, None


class Tight(Block):
    """Two linear layers; between them no more than ``most`` tokens fit, going forward or going back."""

    def __init__(self, width, most, where):
        super().__init__(width, 1, bias=True)
        self.second, self.most, self.where = nn.Linear(width, width), most, where

    def forward(self, hidden):
        hidden = self.second(hidden)
        if self.where == "forward" and hidden.shape[:2].numel() > self.most:
            raise torch.OutOfMemoryError("simulated")
        if self.where == "backward":
            hidden = Refuse.apply(hidden, self.most)
        return self.linear(hidden)


def lengths(*tokens, width=6):
    """Inputs and targets of sequences of these lengths."""
    generator = torch.Generator().manual_seed(0)
    pair = [Activations([torch.zeros(n, dtype=torch.long) for n in tokens], width, torch.float32) for _ in range(2)]
    for activations in pair:
        for data in activations.data.values():
            data.copy_(torch.randn(data.shape, generator=generator))
    return [tuple(pair)]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most, size", [(16, 4), (8, 2), (4, 1)])
def test_a_step_that_does_not_fit_is_redone_in_smaller_parts(where, dtype, most, size):
    """To the bit the run that began with the smaller parts: nothing of the failed attempt is left."""
    results = []
    for limit, micro in ((most, None), (1000, size)):
        bench, pairs = Bench(), lengths(*[4] * 16)
        torch.manual_seed(3)
        window = TrainedWindow(bench, [0], [Tight(6, limit, where)], [{"second.weight": half_mask(6, 0)}], dtype)
        trace = train(window, pairs, Reconstruction(epochs=3, batch_size=8, lr=1e-2, micro_batch_size=micro))
        results.append((window.snapshot(), trace, bench.warnings))
    (got, trace, warned), (want, wanted, quiet) = results
    assert all(map(torch.equal, got, want)) and trace.loss == wanted.loss and trace.steps == wanted.steps == 6
    assert not quiet and f"set micro_batch_size={size}" in warned[-1] and trace.micro_batch_size == size
    assert len(warned) == {4: 1, 2: 2, 1: 3}[size]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_of_the_parts_that_fitted_are_not_counted_twice(where):
    """Four short sequences fit and four long ones do not: the step fails behind gradients already summed."""
    results = []
    for limit, micro in ((12, None), (1000, 2), (1000, None)):
        torch.manual_seed(3)
        window = TrainedWindow(Bench(), [0], [Tight(6, limit, where)], [{}], torch.float32)
        trace = train(
            window, lengths(*[3, 6] * 8), Reconstruction(epochs=4, batch_size=4, lr=1e-2, micro_batch_size=micro)
        )
        results.append((window.snapshot(), torch.tensor(trace.loss)))
    for other, loss in results[1:]:
        assert torch.allclose(results[0][1], loss, rtol=1e-6)
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(results[0][0], other))


def test_one_sequence_that_does_not_fit_says_what_would():
    blocks = [Tight(6, 1000, "forward"), Tight(6, 5, "backward")]
    window = TrainedWindow(Bench(), [3, 4], blocks, [{}, {}], torch.float32)
    with pytest.raises(
        ConfigError,
        match=r"one sequence of 6 tokens does not fit on cpu in the training of blocks "
        r"\[3, 4\].*seq_len \(about 3\), reconstruct='block'.*autocast='bfloat16', or",
    ):
        train(window, lengths(*[6] * 4), Reconstruction(epochs=1, batch_size=4))


@pytest.mark.parametrize("what", ["moved", "optimizer"])
def test_a_window_that_does_not_fit_is_refused_before_any_step(what, monkeypatch):
    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("simulated")

    block = Block(6, 1)
    before = block.linear.weight.detach().clone()
    if what == "moved":
        monkeypatch.setattr(trained_window_module, "moved", refuse)
    with pytest.raises(ConfigError, match=r"training blocks \[0\] takes 0.00 GB on cpu.* use autocast='bfloat16' or"):
        window = TrainedWindow(Bench(), [0], [block], [{}], torch.float32)
        monkeypatch.setattr(torch, "zeros_like", refuse)
        train(window, lengths(*[6] * 4), Reconstruction(epochs=1, batch_size=4))
    assert torch.equal(block.linear.weight, before)


def test_held_out_error_is_measured_in_halves_where_it_does_not_fit():
    pairs, bench = lengths(*[4] * 8), Bench()
    tight, roomy = (
        TrainedWindow(b, [0], [Tight(6, most, "forward")], [{}], torch.float32)
        for b, most in ((bench, 8), (Bench(), 1000))
    )
    roomy.restore(tight.snapshot())
    assert relative_error(tight, pairs) == pytest.approx(relative_error(roomy, pairs), rel=1e-6)
    assert bench.batch_size == 2 and "batches of 2 from there on" in bench.warnings[-1]


def test_the_optimizers_state_is_torchs_own():
    x, target = problem()
    window = TrainedWindow(Bench(), [0], [Block(8, 1, bias=True)], [{}], torch.float32)
    settings = Reconstruction(lr=1e-2, weight_decay=0.1)
    own, lazy = (
        window.optimizer(settings),
        torch.optim.AdamW(
            [m.detach().clone().requires_grad_() for m in window.masters],
            lr=1e-2,
            betas=settings.betas,
            weight_decay=0.1,
            fused=True,
        ),
    )
    for _ in range(3):
        grads = [torch.randn_like(m) for m in window.masters]
        for optimizer in (own, lazy):
            for p, grad in zip(optimizer.param_groups[0]["params"], grads):
                p.grad = grad
            optimizer.step()
    for a, b in zip(own.param_groups[0]["params"], lazy.param_groups[0]["params"]):
        assert torch.equal(a, b) and own.state[a].keys() == lazy.state[b].keys()
        assert all(own.state[a][k].dtype == lazy.state[b][k].dtype for k in own.state[a])
