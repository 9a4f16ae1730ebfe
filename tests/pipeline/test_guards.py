"""Guards of a run: a kernel that goes wrong in the middle is found, its block done again, its place taken, and said."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyprune import ops
from pyprune.config import Evaluation
from pyprune.masks.refit import damped, exact_refit
from pyprune.masks.solvers import Factor, obs_prune
from pyprune.ops import choice, guards, native, reference
from pyprune.pipeline.prune import prune

needs_native = pytest.mark.skipif(native._C is None, reason="no native module, so no kernel that could break")


def run(**fields):
    return prune(
        tiny.model("llama"),
        calibration=tiny.ids(12, 24),
        evaluation=Evaluation(enabled=False),
        progress=False,
        **fields,
    )


def spoiled_gram(monkeypatch):
    right = native.gram_update_cpu

    def gram_update_cpu(gram, x, **options):
        right(gram, x, **options)
        gram[1, 2] += 0.1 * (gram[1, 1] * gram[2, 2]).sqrt()  # one entry, a tenth of what it could be

    monkeypatch.setattr(native, "gram_update_cpu", gram_update_cpu)


def spoiled_moments(monkeypatch):
    right = native.column_moments_cpu
    monkeypatch.setattr(native, "column_moments_cpu", lambda x, **options: right(x[:-1], **options))


def spoiled_sweep(monkeypatch):
    right = native.obs_sweep_cpu

    def obs_sweep_cpu(w, r, **choice):
        keep, error, loss = right(w, r, **choice)
        w[0] += 0.01 * keep[0] * w[0].abs().mean()  # hardly more than rounding, in one row
        return keep, error, loss

    monkeypatch.setattr(native, "obs_sweep_cpu", obs_sweep_cpu)


def spoiled_zeros(monkeypatch):
    right = native.obs_sweep_cpu

    def obs_sweep_cpu(w, r, **choice):
        keep, error, loss = right(w, r, **choice)
        w[-1, (~keep[-1]).nonzero()[0]] = 1e-3  # one dropped weight of the last row
        return keep, error, loss

    monkeypatch.setattr(native, "obs_sweep_cpu", obs_sweep_cpu)


def spoiled_count(monkeypatch):
    right = native.select_mask_cpu
    monkeypatch.setattr(native, "select_mask_cpu", lambda w, k, **options: right(w, max(k - 1, 0), **options))


def spoiled_choice(monkeypatch):
    right = native.nm_mask_cpu
    monkeypatch.setattr(native, "nm_mask_cpu", lambda w, n, m, **options: right(-1 / w, n, m, **options))


def spoiled_cross(monkeypatch):
    right = native.cross_gram_update_cpu

    def cross_gram_update_cpu(cross, y, x, **options):
        right(cross, y, x, **options)
        cross[1, 2] += 0.1 * y[:, 1].float().norm() * x[:, 2].float().norm()

    monkeypatch.setattr(native, "cross_gram_update_cpu", cross_gram_update_cpu)


def spoiled_product(monkeypatch):
    right = native.linear_cpu

    def linear_cpu(x, w, bias=None):
        out = right(x, w, bias)
        out[..., 3] *= 1.02
        return out

    monkeypatch.setattr(native, "linear_cpu", linear_cpu)


def spoiled_attention(monkeypatch):
    right = native.attention_cpu

    def attention_cpu(q, k, v, **options):
        out = right(q, k, v, **options)
        out[:, 1, -1] *= 1.02  # one head, where it sees most
        return out

    monkeypatch.setattr(native, "attention_cpu", attention_cpu)


def spoiled_norm(monkeypatch):
    """Right on the few tokens by which a part is recognised, as all three are."""
    right = native.rms_norm_cpu

    def rms_norm_cpu(x, weight, eps, **form):
        return right(x, weight, eps, **form) * (1 if x.shape[-2] < 10 else 1.02)

    monkeypatch.setattr(native, "rms_norm_cpu", rms_norm_cpu)


def spoiled_rotary(monkeypatch):
    right = native.rotary_cpu
    monkeypatch.setattr(native, "rotary_cpu", lambda x, cos, sin: right(x, cos, sin.roll(x.shape[2] // 10, 1)))


def spoiled_gate(monkeypatch):
    right = native.swiglu_cpu

    def swiglu_cpu(gate, up):
        return right(gate, up) if gate.shape[1] < 10 else right(up, gate)

    monkeypatch.setattr(native, "swiglu_cpu", swiglu_cpu)


PASSING = ("linear", "attention", "rms_norm", "rotary", "swiglu")
BROKEN = {
    "gram": (spoiled_gram, "gram_update", {}),
    "gram, dense inputs": (spoiled_gram, "gram_update", {"inputs": "dense"}),
    "gram, sequential": (spoiled_gram, "gram_update", {"inputs": "sequential"}),
    "cross": (spoiled_cross, "cross_gram_update", {"global_propagation": True}),
    "cross, sequential": (spoiled_cross, "cross_gram_update", {"global_propagation": True, "inputs": "sequential"}),
    "products": (spoiled_product, "linear", {}),
    "products, dense inputs": (spoiled_product, "linear", {"inputs": "dense", "method": "wanda"}),
    "products, sequential": (
        spoiled_product,
        "linear",
        {"inputs": "sequential", "method": "wanda", "probe_samples": 0},
    ),
    "attention": (spoiled_attention, "attention", {"method": "wanda"}),
    "attention, sequential": (spoiled_attention, "attention", {"inputs": "sequential", "global_propagation": True}),
    "attention, dense inputs": (spoiled_attention, "attention", {"inputs": "dense", "method": "wanda"}),
    "norms, sequential": (spoiled_norm, "rms_norm", {"inputs": "sequential", "method": "wanda"}),
    "rotary": (spoiled_rotary, "rotary", {"method": "wanda", "compute_dtype": "bfloat16"}),
    "gates": (spoiled_gate, "swiglu", {"method": "wanda"}),
    "sweep, sequential": (spoiled_sweep, "obs_sweep", {"inputs": "sequential"}),
    "moments, sequential": (spoiled_moments, "column_moments", {"method": "wanda", "inputs": "sequential"}),
    "moments": (spoiled_moments, "column_moments", {"method": "wanda"}),
    "sweep": (spoiled_sweep, "obs_sweep", {}),
    "zeros": (spoiled_zeros, "obs_sweep", {"pattern": "2:4"}),
    "count": (spoiled_count, "select_mask", {"method": "magnitude"}),
    "count in rows": (spoiled_count, "select_mask", {"method": "wanda"}),
    "choice": (spoiled_choice, "nm_mask", {"method": "wanda", "pattern": "2:4"}),
}


@needs_native
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_found_and_the_result_is_the_references(name, monkeypatch):
    spoil, op, fields = BROKEN[name]
    # the solve of a block is done again as a whole; a statistics pass only where the op at fault took part
    pure = op not in ("gram_update", "column_moments", "cross_gram_update", *PASSING)
    others = "reference" if pure else f"auto,{op}=reference"
    want = run(backend=others, **fields)
    with monkeypatch.context() as broken:
        spoil(broken)
        broken.setattr(choice, "_loaded", {})
        broken.setattr(choice, "_settled", {})
        found = run(**fields)
    [warning] = [text for text in found.report["warnings"] if "wrong result" in text]
    assert warning.startswith(f"{op} by the cpu back-end gave a wrong result in block 0: the block was done again")
    assert {name for key, name in found.report["backends"]["cpu"].items() if key.split("/")[0] == op} == {"reference"}
    if pure:
        block, same = found.model.model.layers[0], want.model.model.layers[0]
        for (path, one), (_, other) in zip(block.named_parameters(), same.named_parameters()):
            torch.testing.assert_close(one, other, msg=path)
    else:
        for (path, one), (_, other) in zip(found.model.named_parameters(), want.model.named_parameters()):
            assert torch.equal(one, other), path
    if op in PASSING:  # the streams that errors are measured on are right from the first block on
        for row, right in zip(found.report["blocks"], want.report["blocks"]):
            assert row["error"] is None or row["error"] == pytest.approx(right["error"], rel=1e-6)


@needs_native
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern": "2:4"},
        {"method": "wanda"},
        {"method": "magnitude"},
        {"method": "wanda", "pattern": "4:8", "reconstruct": "refit"},
        {"inputs": "dense", "compute_dtype": "bfloat16"},
        {"global_propagation": True},
        {"global_propagation": True, "inputs": "sequential", "compute_dtype": "bfloat16"},
        {"reconstruct": "refit"},
        {"sparsity": 0.999},
        {"sparsity": 0.0},
    ],
    ids=str,
)
def test_right_kernels_pass_their_guards(fields):
    assert not [text for text in run(**fields).report["warnings"] if "wrong result" in text]


def spoiled_sums(monkeypatch):
    right = native.gram_update_cpu

    def gram_update_cpu(gram, x, **options):
        right(gram, x, **options)
        if options.get("sums") is not None:
            options["sums"][3] += 0.1 * len(x) ** 0.5 * x[:, 3].float().norm()

    monkeypatch.setattr(native, "gram_update_cpu", gram_update_cpu)


def spoiled_solve(monkeypatch):
    right = native.cholesky_solve_cpu

    def cholesky_solve_cpu(a, b, **options):
        solution, info = right(a, b, **options)
        solution[:, :, -1] = 0  # the last column was not reached
        return solution, info

    monkeypatch.setattr(native, "cholesky_solve_cpu", cholesky_solve_cpu)


def failed_solve(monkeypatch):
    right = native.cholesky_solve_cpu
    monkeypatch.setattr(
        native, "cholesky_solve_cpu", lambda a, b, **options: (right(a, b, **options)[0], torch.ones(len(a)).int())
    )


def endless_solve(monkeypatch):
    right = native.cholesky_solve_cpu

    def cholesky_solve_cpu(a, b, **options):
        solution, info = right(a, b, **options)
        solution[:, 0, 1] = torch.inf
        return solution, info

    monkeypatch.setattr(native, "cholesky_solve_cpu", cholesky_solve_cpu)


def spoiled_update(monkeypatch):
    right = native.liar_update_cpu

    def liar_update_cpu(weight, keep, drop, q, **options):
        updated, bias = right(weight, keep, drop, q, **options)
        updated[0, 0] += 0.01 * updated[0].abs().mean()
        return updated, bias

    monkeypatch.setattr(native, "liar_update_cpu", liar_update_cpu)


REPAIRED = {"pattern": "structured", "sparsity": 0.5}
NEURONS = {"pattern": "neurons", "sparsity": 0.5}
BROKEN_STRUCTURED = {
    "products, propagated": (spoiled_product, "linear", {**REPAIRED, "inputs": "propagated"}),
    "products, sequential": (spoiled_product, "linear", {**REPAIRED, "inputs": "sequential", "probe_samples": 0}),
    "attention, sequential": (spoiled_attention, "attention", {**REPAIRED, "inputs": "sequential"}),
    "attention, dense inputs": (spoiled_attention, "attention", {**REPAIRED, "inputs": "dense"}),
    "gram, propagated": (spoiled_gram, "gram_update", {**REPAIRED, "inputs": "propagated"}),
    "gram, sequential": (spoiled_gram, "gram_update", {**REPAIRED, "inputs": "sequential"}),
    "gram, dense inputs": (spoiled_gram, "gram_update", {**REPAIRED, "inputs": "dense"}),
    "sums": (spoiled_sums, "gram_update", {**NEURONS, "reconstruct": "bias"}),
    "cross, propagated": (spoiled_cross, "cross_gram_update", {**REPAIRED, "inputs": "propagated"}),
    "cross, sequential": (spoiled_cross, "cross_gram_update", {**REPAIRED, "inputs": "sequential"}),
    "a column not solved": (spoiled_solve, "cholesky_solve", {**REPAIRED, "inputs": "sequential"}),
    "a system that fails": (failed_solve, "cholesky_solve", REPAIRED),
    "a solution that is not finite": (endless_solve, "cholesky_solve", NEURONS),
    "mask tuning": (spoiled_solve, "cholesky_solve", {**NEURONS, "reconstruct": "mask_tuning"}),
    "update": (spoiled_update, "liar_update", {**NEURONS, "sparsity": 0.25, "structured": {"nonstandard": "save"}}),
}


@needs_native
@pytest.mark.parametrize("name", BROKEN_STRUCTURED)
def test_a_broken_kernel_is_found_when_heads_and_neurons_go(name, monkeypatch):
    spoil, op, fields = BROKEN_STRUCTURED[name]
    want = run(backend=f"auto,{op}=reference", **fields)
    with monkeypatch.context() as broken:
        spoil(broken)
        broken.setattr(choice, "_loaded", {})
        broken.setattr(choice, "_settled", {})
        found = run(**fields)
    [warning] = [text for text in found.report["warnings"] if "wrong result" in text]
    assert warning.startswith(
        f"{op} by the cpu back-end gave a wrong result in block 0: the block was done again by the"
    )
    assert {name for key, name in found.report["backends"]["cpu"].items() if key.split("/")[0] == op} == {"reference"}
    for (path, one), (_, other) in zip(found.model.named_parameters(), want.model.named_parameters()):
        torch.testing.assert_close(one, other, msg=path)  # the first repair is by the reference in all it does
    assert [row["method"] for row in found.report["weights"]] == [row["method"] for row in want.report["weights"]]


@needs_native
@pytest.mark.parametrize(
    "fields",
    [
        REPAIRED,
        {**REPAIRED, "inputs": "sequential", "compute_dtype": "bfloat16"},
        {**REPAIRED, "inputs": "dense", "structured": {"token_weights": "relative"}},
        {**NEURONS, "structured": {"damping": 1e-7}},
        {**NEURONS, "reconstruct": "mask_tuning", "sparsity": 0.9},
        {**NEURONS, "criterion": "random", "sparsity": 0.1},
        {**REPAIRED, "structured": {"interpolate_weights": True}},
    ],
    ids=str,
)
def test_right_kernels_pass_their_guards_when_heads_and_neurons_go(fields):
    assert not [text for text in run(**fields).report["warnings"] if "wrong result" in text]


def test_units_that_were_not_counted_right_end_the_run(monkeypatch):
    from pyprune.structured import block

    choose = block.choose
    monkeypatch.setattr(block, "choose", lambda group, scores, count: choose(group, scores, count)[1:])
    with pytest.raises(RuntimeError, match=r"31 units of model.layers.0.mlp.down_proj.weight were chosen where 32 are"):
        run(pattern="neurons", sparsity=0.5)


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-6])
def test_the_guard_of_a_solve_holds_on_ill_conditioned_systems(damping):
    x = loud(2000, 256).double()
    a = (x.T @ x / len(x)).float()
    scale = damping * a.diagonal().mean().double()
    b = a @ torch.randn(256, 40, generator=torch.Generator().manual_seed(1))
    solution, info = reference.cholesky_solve(a[None], b[None], damping=scale.float()[None])
    good = torch.tensor(True)
    assert int(info) == 0 and not guards.solved(a, b, scale, solution[0], good)
    other = solution[0].clone()
    other[:, 7] *= 1.5
    if damping < 1e-5:  # rounding alone could have done that
        assert not guards.solved(a, b, scale, other, good)
        return
    assert guards.solved(a, b, scale, other, good)
    assert guards.solved(a, b, scale, torch.where(other == other[3, 3], torch.nan, other), good)
    assert guards.solved(a, b, scale, solution[0], ~good)
    assert not guards.solved(torch.full_like(a, torch.nan), b, scale, other, good), "the data's fault"


def loud(tokens, columns, seed=0):
    """Inputs as a language model has them: a few columns, and the first token, hundreds of times the others' size."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, :3] *= 300
    x[0] *= 100
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guards_of_statistics_stay_far_from_what_is_right_and_see_what_is_wrong(dtype):
    x = loud(500, 96).to(dtype)
    gram, count = torch.zeros(96, 96), torch.tensor(0)
    ops.gram_update(gram, x, count=count)
    assert not guards.gram(gram, x, count)
    assert guards.gram(gram, x, count - 1)
    for i, j in ((0, 1), (50, 60), (7, 7)):
        off = gram.clone()
        off[i, j] += 0.1 * (gram[i, i] * gram[j, j]).sqrt()
        assert guards.gram(off, x, count), (i, j)
    unwritten = gram.clone()
    unwritten[64:, :32] = 0
    assert guards.gram(unwritten, x, count)
    assert guards.gram(torch.where(gram == gram[5, 5], torch.nan, gram), x, count)
    x[3, 4] = torch.inf
    assert not guards.gram(gram, x, count), "what is not finite is the data's fault"
    exact = ops.column_moments(x[4:])
    assert not guards.moments(x[4:], *exact) and guards.moments(x[5:], *exact)


@needs_native
def test_products_of_the_solve_have_a_guard_of_their_own(monkeypatch):
    """Forward passes by torch: only the errors' products, and a refit's, are the package's own."""
    right = ops.taken
    monkeypatch.setattr(ops, "taken", lambda key, device: "torch" if "forward" in key else right(key, device))
    want = run(backend="auto,linear=reference")
    with monkeypatch.context() as broken:
        spoiled_product(broken)
        broken.setattr(choice, "_loaded", {})
        broken.setattr(choice, "_settled", {})
        found = run()
    [warning] = [text for text in found.report["warnings"] if "wrong result" in text]
    assert warning.startswith("linear by the cpu back-end gave a wrong result in block 0")
    for row, right_row in zip(found.report["weights"], want.report["weights"]):
        assert row["error"] == pytest.approx(right_row["error"], rel=1e-4)


def test_the_guards_of_products_and_of_a_refit_see_what_is_wrong():
    x, w, bias = loud(50, 96), loud(30, 96, seed=1), torch.randn(30)
    out = ops.linear(x, w, bias)
    assert not guards.product(out, x, w, bias)
    assert guards.product(out, x, w) and guards.product(out.clone().index_fill_(1, torch.tensor([7]), 0), x, w, bias)
    assert guards.product(torch.full_like(out, torch.nan), x, w, bias)
    assert not guards.product(out, torch.full_like(x, torch.inf), w, bias), "the data's fault"

    x = loud(900, 200)
    h = damped(x.T @ x, len(x), 0.01)
    dense = torch.randn(12, 200, generator=torch.Generator().manual_seed(3))
    mask = reference.nm_mask(dense, 2, 4)
    assert not exact_refit(dense, mask, h, dense * mask).wrong["linear"]
    tilted = h.clone()
    tilted[:, 100] *= 1.05  # the products of the search are of another matrix than the guard's
    products = iter([h, *[tilted] * 1000])
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(ops, "linear", lambda a, b: a @ next(products))
        assert exact_refit(dense, mask, h, dense * mask).wrong["linear"]


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
def test_the_sweeps_guard_holds_on_ill_conditioned_factors(damping):
    x = loud(2000, 256).double()
    h = x.T @ x / len(x)
    h += damping * h.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    r = torch.linalg.cholesky(h.inverse(), upper=True).float()
    start = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    weight = start.clone()
    keep = obs_prune(weight, Factor(r, torch.zeros(256, dtype=torch.bool), damping), sparsity=0.5)
    assert not guards.swept(start, weight, keep, r)
    other = weight.clone()
    other[0] += 0.05 * (start[0] - weight[0]) * keep[0]
    assert guards.swept(start, other, keep, r)
    assert guards.swept(start, weight, ~keep, r)


def test_counts_of_groups_are_exact():
    for n, m in ((2, 4), (4, 8), (1, 4), (3, 16)):
        keep = reference.nm_mask(torch.randn(6, 48), n, m)
        assert not guards.counted(keep, (n, m))
        keep[3, 17] ^= True
        assert guards.counted(keep, (n, m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", ["all", "causal", "mask", "bias"])
def test_the_guard_of_attention_holds_and_sees_a_head_and_the_last_token(seen, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 24, generator=generator).to(dtype) for heads in (6, 2, 2))
    k[:, :, 0] *= 30  # a key that most queries fall for, or none
    mask = None
    if seen in ("mask", "bias"):
        mask = torch.rand(2, 1, 40, 40, generator=generator) > 0.3
        mask[1, 0, -1] = False  # a query that sees nothing
        mask = mask if seen == "mask" else torch.where(mask, 0.0, -torch.inf).to(dtype)
    given = dict(mask=mask, causal=seen == "causal", scale=0.3)
    exact = reference.attention(
        q.double(),
        k.double(),
        v.double(),
        **given | dict(mask=None if mask is None else mask if seen == "mask" else mask.double()),
    )
    out = exact.nan_to_num(0.0).to(dtype)
    assert not guards.attended(out, q, k, v, **given)
    for place in ((slice(None), 4), (slice(None), slice(None), 39)):
        off = out.clone()
        off[place] *= 1.05
        assert guards.attended(off, q, k, v, **given), place
    assert guards.attended(torch.full_like(out, torch.nan), q, k, v, **given)
    assert not guards.attended(out, q, torch.full_like(k, torch.inf), v, **given), "the data's fault"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_guards_between_products_hold_and_see_what_is_wrong(dtype):
    x, weight = loud(90, 64).to(dtype).view(3, 30, 64), torch.randn(64).to(dtype)
    for form in ops.NORM_FORMS:
        exact = reference.rms_norm(x, weight, 1e-5, form=form)
        assert not guards.normed(exact, x, weight, 1e-5, form)
        assert guards.normed(exact * 1.1, x, weight, 1e-5, form) and guards.normed(0 * exact, x, weight, 1e-5, form)
    gate, up = x / 100, torch.randn(3, 30, 64).to(dtype)
    exact = (torch.nn.functional.silu(gate.double()) * up.double()).to(dtype)
    assert not guards.gated(exact, gate, up) and guards.gated(exact * 1.1, gate, up) and guards.gated(exact, up, gate)
    heads = x.view(3, 30, 4, 16).transpose(1, 2)
    cos, sin = torch.randn(1, 30, 16).to(dtype), torch.randn(3, 30, 16).to(dtype)
    exact = reference.rotary(heads.double(), cos.double(), sin.double()).to(dtype)
    assert not guards.turned(exact, heads, cos, sin)
    assert guards.turned(exact * 1.1, heads, cos, sin) and guards.turned(exact, heads, cos, -sin)
    assert guards.turned(exact, heads, cos.roll(1, 1), sin)
    x[:] = torch.inf
    assert not guards.normed(exact.reshape(3, 30, 64), x, weight, 1e-5, "wide"), "the data's fault"
