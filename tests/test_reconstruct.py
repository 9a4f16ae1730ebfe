"""BR, GP and CR: known answers on linear toys, exact zeros on every architecture, resume, choice by held-out error."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from torch import nn

import pyprune
from pyprune import cli
from pyprune.autograd import TrainingMode, _Attention
from pyprune.config import Calibration, ConfigError, Evaluation, Reconstruction
from pyprune.distributed import World
from pyprune.journal import Interrupted, Journal
from pyprune.model import Arguments, ModelView, weights_of
from pyprune.prune import prune
from pyprune.reconstruct import relative_error, schedule, train
from pyprune.solvers import dense_target_start, inverse_factor
from pyprune.statistics import Statistics
from pyprune.store import transfers
from pyprune.stream import Activations, Executor
from pyprune.student import Student

FAST = Reconstruction(epochs=3, batch_size=4, lr=2e-3)


def run(model=None, samples=12, **fields):
    fields = {"evaluation": Evaluation(enabled=False), "reconstruction": FAST, "reconstruct": "block", **fields}
    calibration = fields.pop("calibration", {})
    source = Calibration(source=tiny.ids(samples + 8, 24), num_samples=samples, seq_len=24, held_out=8, **calibration)
    return prune(model or tiny.model("llama"), calibration=source, progress=False, **fields)


def state(result):
    return result.model.state_dict()


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


# ---- toys of linear blocks -----------------------------------------------------------------------------------------

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
    student = Student(Bench(), list(range(len(blocks))), blocks, masks, dtype)
    trace = train(student, [(stream(x), stream(target))], Reconstruction(**{"batch_size": 4, **settings}))
    student.commit()
    return student, trace


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
        solution = torch.linalg.lstsq(rows[:, support], wanted[:, r:r + 1]).solution[:, 0]
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
    student, _ = fit(blocks, masks, x, target, epochs=1500, batch_size=16, lr=2e-2)
    joint = (student(x) - target).square().mean().item()
    assert bound <= joint <= 1.005 * bound
    alone = [Block(8, 1), Block(8, 2)]
    h = alone[0](x).detach()
    student, _ = fit(alone[1:], masks[1:], h, target, epochs=400, batch_size=16, lr=2e-2)
    assert (student(h) - target).square().mean().item() > 2 * bound


def test_zero_steps_change_nothing():
    x, target = problem()
    block = Block(8, 1)
    before = block.linear.weight.detach().clone()
    _, trace = fit([block], [{}], x, target, epochs=0)
    assert trace.steps == 0 and torch.equal(block.linear.weight, before)
    layer, untrained = run(reconstruct="layer"), run(reconstruction=Reconstruction(epochs=0))
    assert equal(state(layer), state(untrained))


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
        student = Student(Bench(), [0], [block], [{"linear.weight": half_mask(6, 0)}], torch.float32)
        trace = train(student, [(inputs, target)], Reconstruction(epochs=4, batch_size=4, micro_batch_size=micro))
        results.append((student.modules[0].linear.weight.detach(), trace.loss))
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
    streams = [Activations([torch.zeros(n, dtype=torch.long) for n in lengths], 1, torch.float32),
               Activations([torch.zeros(4, dtype=torch.long)] * 3, 1, torch.float32)]
    batches = schedule(streams, 4, torch.Generator().manual_seed(0))
    seen = sorted((s, length, row) for batch in batches for s, length, rows in batch for row in rows)
    assert seen == sorted((s, length, row) for s, a in enumerate(streams) for length, rows in a.rows.items()
                          for row in range(len(rows)))
    sizes = [sum(len(rows) for _, _, rows in batch) for batch in batches]
    assert sorted(sizes) == [3, 4, 4, 4, 4] and len({len({g[1] for g in b}) for b in batches if b}) >= 1
    other = schedule(streams, 4, torch.Generator().manual_seed(1))
    assert batches != other and batches == schedule(streams, 4, torch.Generator().manual_seed(0))


# ---- products and attention ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients_equal_float64(bias):
    torch.manual_seed(0)
    x, w, dy = torch.randn(3, 50, 24, requires_grad=True), nn.Parameter(torch.randn(40, 24)), torch.randn(3, 50, 40)
    b = nn.Parameter(torch.randn(40)) if bias else None
    buffer = torch.zeros(40, 24)
    with TrainingMode({id(w): buffer}):
        nn.functional.linear(x, w, b).backward(dy)
    wide = [t.detach().double().requires_grad_() if t is not None else None for t in (x, w, b)]
    nn.functional.linear(*wide).backward(dy.double())
    assert w.grad is None, "the weight's gradient belongs in the buffer"
    for got, want in [(x.grad, wide[0].grad), (buffer, wide[1].grad), *([(b.grad, wide[2].grad)] if bias else [])]:
        assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, keys, tokens", [(4, 4, 40), (6, 2, 300)])
def test_attention_and_gradients_equal_float64(causal, heads, keys, tokens):
    torch.manual_seed(0)
    parts = [torch.randn(2, h, tokens, 16, dtype=torch.float64, requires_grad=True) for h in (heads, keys, keys)]
    dy = torch.randn(2, heads, tokens, 16, dtype=torch.float64)
    want = nn.functional.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
    wanted = torch.autograd.grad(want, parts, dy)
    got = _Attention.apply(*parts, causal, 0.25)
    assert torch.allclose(got, want, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, parts, dy), wanted):
        assert torch.allclose(a, b, atol=1e-5)  # key and value gradients are summed in float32
    half = [p.detach().bfloat16().requires_grad_() for p in parts]
    with TrainingMode({}):
        out = nn.functional.scaled_dot_product_attention(*half, is_causal=causal, enable_gqa=True)
    assert type(out.grad_fn).__name__ == "_AttentionBackward"
    for a, b in zip([out, *torch.autograd.grad(out, half, dy.bfloat16())], [want, *wanted]):
        assert (a.double() - b).norm() / b.norm() < 0.02


# ---- GP for the layer-wise solver ----------------------------------------------------------------------------------

def test_dense_target_start_is_least_squares_between_two_streams():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    dense = x + 0.3 * torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    statistics = Statistics(12, torch.device("cpu"))
    statistics.update(x)
    statistics.cross = dense.T @ x
    factor = inverse_factor(statistics.gram, statistics.count, 1e-7)
    got = dense_target_start(weight, statistics, factor)
    want = torch.linalg.lstsq(x.double(), (dense @ weight.T).double()).solution.T
    assert torch.allclose(got.double(), want, atol=1e-4)
    statistics.cross = statistics.gram.clone()
    assert torch.equal(dense_target_start(weight, statistics, factor), weight)


def test_layer_wise_dense_targets_lower_the_error_against_the_dense_stream():
    local = run(samples=64, method="sparsegpt", reconstruct="layer")
    dense = run(samples=64, method="sparsegpt", reconstruct="layer", global_propagation=True)
    assert equal({k: v for k, v in state(local).items() if "layers.0." in k}, state(dense))
    assert dense.report["blocks"][-1]["error"] < local.report["blocks"][-1]["error"]


# ---- whole runs ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_zeros_stay_exact_on_every_architecture(architecture, tmp_path):
    cross = architecture not in ("bert", "gpt2")
    result = run(tiny.model(architecture), pattern="2:4", reconstruct="cross_block" if cross else "block",
                 global_propagation=True, method="magnitude", reconstruction=Reconstruction(epochs=2, batch_size=5))
    dense, view = ModelView(tiny.model(architecture)), ModelView(result.model)
    for before, block in zip(dense.blocks, view.blocks):
        for ref in weights_of(block):
            weight = ref.view(block)
            assert (weight.reshape(len(weight), -1, 4) != 0).sum(-1).eq(2).all(), ref.name
            assert not torch.equal(weight, torch.where(weight != 0, ref.view(before), 0)), f"{ref.name} was trained"
    assert all(step["calibration"] < row["steps"][0]["calibration"] for row in result.report["blocks"]
               for step in row["steps"][-1:])
    result.save(str(tmp_path / "out"))
    again = type(result.model).from_pretrained(tmp_path / "out")
    assert equal(state(result), again.state_dict())


def test_the_mask_of_the_layer_wise_step_is_the_final_pattern():
    layer, block = run(reconstruct="layer"), run()
    first = [key for key in state(layer) if "layers.0." in key]
    assert all(torch.equal(state(layer)[key] != 0, state(block)[key] != 0) for key in first)
    assert not equal({key: state(layer)[key] for key in first}, state(block))
    assert block.report["sparsity"] == layer.report["sparsity"]


def test_global_propagation_equals_block_reconstruction_behind_a_dense_prefix():
    only_last = dict(targets=["layers.2."])
    local, globally = run(**only_last), run(global_propagation=True, **only_last)
    assert equal(state(local), state(globally))
    original = tiny.model("llama").state_dict()
    assert all(torch.equal(original[k], v) for k, v in state(local).items() if "layers.2." not in k)
    assert not equal(state(run()), state(run(global_propagation=True))), "behind a pruned prefix they differ"


def test_every_block_is_visited_twice_by_cross_block_windows():
    report = run(reconstruct="cross_block", global_propagation=True).report
    assert [t["blocks"] for row in report["blocks"] for t in row["training"]] == [[0], [0, 1], [1, 2], [2]]
    for row in report["blocks"]:
        assert [s["step"] for s in row["steps"]] == ["mask", "layer", "cross_block 1", "cross_block 2"]
        assert row["steps"][-1]["calibration"] == pytest.approx(row["error"], rel=1e-6)
        assert row["steps"][-1]["held_out"] == pytest.approx(row["error_held_out"], rel=1e-6)


@pytest.mark.parametrize("fields", [{}, {"global_propagation": True}, {"reconstruct": "cross_block"},
                                    {"reconstruct": "cross_block", "global_propagation": True}])
def test_reconstruction_lowers_the_final_error_and_repeats_to_the_bit(fields):
    layer = run(method="magnitude", reconstruct="layer", samples=32)
    first, second = (run(method="magnitude", samples=32, **fields) for _ in range(2))
    assert first.report["blocks"][-1]["error"] < 0.8 * layer.report["blocks"][-1]["error"]
    assert equal(state(first), state(second))


@pytest.mark.parametrize("fields", [{}, {"reconstruct": "cross_block"}, {"compute_dtype": "bfloat16",
                                    "reconstruct": "cross_block", "global_propagation": True},
                                    {"targets": ["layers.0."], "global_propagation": True}])
def test_resume_after_any_block_is_bit_identical(fields, tmp_path, monkeypatch):
    fields = {"method": "wanda", "reconstruction": Reconstruction(epochs=1, batch_size=4), **fields}
    whole = run(output=str(tmp_path / "whole"), **fields)
    for blocks in (1, 2):
        output = str(tmp_path / f"after{blocks}")
        monkeypatch.setattr(Journal, "stopping", property(lambda self, n=blocks: len(self.entries) == n))
        with pytest.raises(Interrupted):
            run(output=output, **fields)
        monkeypatch.setattr(Journal, "stopping", False)
        resumed = run(output=output, resume=True, **fields)
        assert equal(state(whole), state(resumed))
        for a, b in zip(whole.report["blocks"], resumed.report["blocks"]):
            assert a["steps"] == b["steps"] and a["error"] == b["error"]


@pytest.mark.parametrize("fields", [{}, {"reconstruct": "cross_block", "global_propagation": True}])
def test_streamed_weights_give_the_same_bits(fields, folder, tmp_path):
    from safetensors.torch import load_file

    written = []
    for stream in ("never", "always"):
        output = tmp_path / stream
        prune(str(folder), reconstruct=fields.get("reconstruct", "block"), output=str(output), stream=stream,
              global_propagation=fields.get("global_propagation", False), calibration=tiny.ids(8, 24),
              evaluation=Evaluation(enabled=False), progress=False, reconstruction=FAST)
        written.append({name: t for path in output.glob("*.safetensors") for name, t in load_file(path).items()})
    assert written[0].keys() == written[1].keys() and equal(*written)


def test_selection_by_validation_never_raises_held_out_error():
    greedy = Reconstruction(epochs=6, batch_size=2, lr=2e-2)
    trained = run(samples=4, reconstruction=greedy, method="wanda")
    steps = [row["steps"] for row in trained.report["blocks"]]
    assert any(s[-1]["held_out"] > s[1]["held_out"] for s in steps), "the case must overfit"
    greedy.select = "validation"
    chosen = run(samples=4, reconstruction=greedy, method="wanda")
    for row in chosen.report["blocks"]:
        mask, layer, *rest = row["steps"]
        assert rest[-1]["held_out"] <= min(mask["held_out"], layer["held_out"]) * (1 + 1e-5)
    assert any("overfits" in text for text in trained.report["warnings"])
    assert not any("overfits" in text for text in chosen.report["warnings"])


def test_validation_chooses_between_mask_and_layer_without_training():
    few = dict(samples=1, method="magnitude", reconstruct="layer")
    chosen = run(reconstruction=Reconstruction(select="validation"), **few)
    rows = [row["steps"] for row in chosen.report["blocks"]]
    assert any(s[1]["held_out"] > s[0]["held_out"] for s in rows), "one sequence must be too little for some block"
    for steps, row in zip(rows, chosen.report["blocks"]):
        assert row["error_held_out"] == pytest.approx(min(s["held_out"] for s in steps), rel=1e-5)


def test_early_stop_ends_when_held_out_error_has_not_fallen():
    settings = Reconstruction(epochs=12, batch_size=2, lr=2e-2, early_stop=True)
    for row in run(samples=4, reconstruction=settings).report["blocks"]:
        (training,) = row["training"]
        seen = training["held_out"]
        assert training["steps"] == 2 * (len(seen) - 1)
        assert len(seen) == 13 or seen[-1] >= min(seen[:-1])
        assert all(b < a for a, b in zip(seen, seen[1:-1]))


def test_validation_without_held_out_text_is_refused():
    with pytest.raises(ConfigError, match="need held-out sequences"):
        prune(tiny.model("llama"), calibration=tiny.ids(4, 24), evaluation=Evaluation(enabled=False), progress=False,
              reconstruct="block", reconstruction=Reconstruction(select="validation"))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="needs inputs='propagated'"):
        run(inputs="dense")
    with pytest.raises(ConfigError, match="needs global_propagation"):
        run(reconstruction=Reconstruction(layerwise_target="dense"))
    with pytest.raises(ConfigError, match="nothing would use the 3 self-generated"):
        run(reconstruct="layer", calibration={"self_generated": 3})
    with pytest.raises(ConfigError, match="num_samples is 0"):
        run(samples=0, calibration={"self_generated": 3})


def test_self_generated_sequences_train_but_do_not_choose_masks(tokenizer):
    def made(**calibration):
        return run(tiny.model("llama", vocab_size=tiny.CHARACTERS), tokenizer=tokenizer, method="wanda",
                   calibration=calibration)

    corpus, added, everywhere = made(), made(self_generated=6), made(self_generated=6, self_generated_for="all")
    first = [key for key in state(corpus) if "layers.0." in key and key.endswith("proj.weight")]

    def same_masks(a, b):
        return all(torch.equal(state(a)[key] != 0, state(b)[key] != 0) for key in first)

    assert same_masks(corpus, added) and not equal({key: state(corpus)[key] for key in first}, state(added))
    assert not same_masks(corpus, everywhere)
    steps = [r.report["blocks"][0]["training"][0]["steps"] for r in (corpus, added, everywhere)]
    assert steps == [9, 15, 15]
    assert added.report["calibration"]["samples"] == 12 and everywhere.report["calibration"]["samples"] == 18
    assert "6 self-generated sequences" in added.report["calibration"]["description"]
    alone = prune(tiny.model("llama", vocab_size=tiny.CHARACTERS), tokenizer=tokenizer, reconstruct="block",
                  calibration=Calibration(num_samples=0, seq_len=24, self_generated=6, self_generated_for="all"),
                  evaluation=Evaluation(enabled=False), progress=False, reconstruction=FAST)
    assert alone.report["calibration"]["samples"] == 6 and alone.report["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_held_out_error_of_a_student_is_the_probe_error():
    x, target = problem()
    student = Student(Bench(), [0], [Block(8, 1)], [{}], torch.float32)
    with torch.no_grad():
        expected = ((student(x) - target).square().sum() / target.square().sum()).item()
    assert relative_error(student, [(stream(x), stream(target))]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_training_gives_the_cpus_result():
    """float32 throughout: prefetched batches, masks and steps are the same, rounding differs."""
    settings = Reconstruction(epochs=3, batch_size=4, lr=2e-3, autocast="float32")
    cpu, gpu = (run(method="magnitude", reconstruct="cross_block", global_propagation=True, reconstruction=settings,
                    device=device) for device in ("cpu", "cuda"))
    for (name, a), b in zip(state(cpu).items(), state(gpu).values()):
        assert torch.equal(a == 0, b.cpu() == 0), name
    for a, b in zip(cpu.report["blocks"], gpu.report["blocks"]):
        assert a["error"] == pytest.approx(b["error"], rel=2e-2)


# ---- models pruned before ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cross, propagate", [(False, True), (True, True), (True, False), (False, False)])
def test_a_pruned_model_is_refined_with_its_zeros_in_place(cross, propagate):
    pruned = run(method="magnitude", reconstruct="none", pattern="2:4").model
    zeros = {name: p == 0 for name, p in pruned.named_parameters() if p.ndim == 2}
    rows = pyprune.refine(pruned, tiny.model("llama"), Calibration(source=tiny.ids(24, 24), num_samples=16, seq_len=24,
                          held_out=8), cross_block=cross, global_propagation=propagate, settings=FAST)
    assert [r["blocks"] for r in rows] == ([[0], [0, 1], [1, 2], [2]] if cross else [[0], [1], [2]])
    assert all(r["after_calibration"] < r["before_calibration"] for r in rows)
    assert all(torch.equal(p == 0, zeros[name]) for name, p in pruned.named_parameters() if p.ndim == 2)


def test_refining_after_the_run_is_refining_in_the_run():
    """Magnitude masks do not depend on data, so the orchestrator and the function do the same work."""
    calibration = Calibration(source=tiny.ids(20, 24), num_samples=12, seq_len=24, held_out=8)
    inside = run(method="magnitude", global_propagation=True, reconstruct="block")
    outside = run(method="magnitude", reconstruct="layer", global_propagation=False).model
    with torch.no_grad():  # block 0 of both starts from the same layer-wise solution
        rows = pyprune.refine(outside, tiny.model("llama"), calibration, settings=FAST)
    first = {k: v for k, v in state(inside).items() if "layers.0." in k}
    assert equal(first, outside.state_dict())
    assert rows[0]["after_calibration"] < rows[0]["before_calibration"]


def test_a_structured_model_is_refined():
    dense = tiny.model("llama")
    pruned = prune(tiny.model("llama"), pattern="neurons", sparsity=0.5, calibration=tiny.ids(12, 24),
                   evaluation=Evaluation(enabled=False), progress=False).model
    assert pruned.model.layers[0].mlp.up_proj.weight.shape[0] == dense.model.layers[0].mlp.up_proj.weight.shape[0] // 2
    rows = pyprune.refine(pruned, dense, tiny.ids(12, 24), settings=Reconstruction(epochs=8, batch_size=4, lr=2e-3))
    assert rows[-1]["after_calibration"] < 0.8 * rows[-1]["before_calibration"]


def test_models_that_do_not_match_are_refused():
    with pytest.raises(ConfigError, match="same blocks"):
        pyprune.refine(tiny.model("llama"), tiny.model("llama", num_hidden_layers=2), tiny.ids(4, 8))


def test_command_line_reconstructs_generates_and_compares(folder, tmp_path, capsys):
    def main(arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0

    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    generated = str(tmp_path / "generated.jsonl")
    main(["generate", str(folder), "-o", generated, "-n", "4", "--seq-len", "32"])
    common = ["--calibration", str(text), "--num-samples", "8", "--seq-len", "32", "--no-evaluation", "--epochs", "2",
              "--lr", "2e-3"]
    outputs = [str(tmp_path / name) for name in ("layer", "cross")]
    main(["prune", str(folder), "-o", outputs[0], *common])
    main(["prune", str(folder), "-o", outputs[1], *common, "--reconstruct", "cross_block", "--global-propagation",
          "--self-generated", "4", "--self-generated-path", generated, "--select", "validation"])
    capsys.readouterr()
    main(["compare", *outputs, "--json"])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(r["reconstruct"], r["global_propagation"]) for r in rows] == [("layer", False), ("cross_block", True)]
    assert rows[1]["block_error"] < rows[0]["block_error"]
    main(["compare", *outputs])
    assert " GP " in capsys.readouterr().out, "the table says which run propagated"
