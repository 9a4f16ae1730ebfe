"""Guards of a run: a kernel that goes wrong in the middle is found, its block done again, its place taken, and said."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyprune import ops
from pyprune.config import Evaluation
from pyprune.masks.solvers import Factor, obs_prune
from pyprune.ops import guards, native, reference
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


BROKEN = {
    "gram": (spoiled_gram, "gram_update", {}),
    "gram, dense inputs": (spoiled_gram, "gram_update", {"inputs": "dense"}),
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
    pure = op not in ("gram_update", "column_moments")
    others = "reference" if pure else f"auto,{op}=reference"
    want = run(backend=others, **fields)
    with monkeypatch.context() as broken:
        spoil(broken)
        broken.setattr(ops, "_chosen", {})
        broken.setattr(ops, "_settled", {})
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
        {"sparsity": 0.999},
        {"sparsity": 0.0},
    ],
    ids=str,
)
def test_right_kernels_pass_their_guards(fields):
    assert not [text for text in run(**fields).report["warnings"] if "wrong result" in text]


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
