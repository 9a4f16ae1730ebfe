"""The orchestrator: determinism, what it touches, the fewest passes, warnings, patterns, and the published result."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig
from pyprune.model.blocks import ModelView, weights_of
from pyprune.ops import choice
from pyprune.pipeline.prune import prune

NO_EVALUATION = Evaluation(enabled=False)


def run(model, ids=None, **fields):
    ids = tiny.ids(12, 24) if ids is None else ids
    return prune(model, calibration=ids, evaluation=NO_EVALUATION, progress=False, **fields)


def state(result):
    return result.model.state_dict()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_same_seed_same_result_to_the_bit(method):
    first, second = (state(run(tiny.model("llama"), method=method)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_batching_changes_only_rounding():
    one, many = (run(tiny.model("llama"), batch_size=b) for b in (1, 12))
    agree = [(a == 0) == (b == 0) for a, b in zip(state(one).values(), state(many).values())]
    assert sum(x.sum().item() for x in agree) / sum(x.numel() for x in agree) > 0.99


def test_reference_and_native_agree():
    with_reference = run(tiny.model("llama"), backend="reference")
    native = run(tiny.model("llama"))
    agree = [(a == 0) == (b == 0) for a, b in zip(state(with_reference).values(), state(native).values())]
    assert sum(x.sum().item() for x in agree) / sum(x.numel() for x in agree) >= 0.99
    assert choice._forced.get() is None, "a run leaves no choice behind"


def test_bfloat16_model_stays_bfloat16_and_solves_in_float32():
    result = run(tiny.model("llama").bfloat16())
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert abs(result.report["sparsity"] - 0.5) < 0.01


def test_bfloat16_forward_of_a_float32_model_keeps_float32_weights():
    result = run(tiny.model("llama"), compute_dtype="bfloat16", method="wanda")
    original = tiny.model("llama")
    for (name, p), q in zip(result.model.named_parameters(), original.parameters()):
        assert p.dtype == torch.float32
        kept = p != 0
        assert torch.equal(p[kept], q[kept]), f"{name}: kept Wanda weights are the original float32 ones"


def test_in_place_prunes_the_very_model():
    model = tiny.model("opt")
    assert run(model, in_place=True).model is model


def test_a_failed_run_leaves_the_model_untouched():
    model = tiny.model("llama")
    before = copy.deepcopy(state_of(model))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at \[3, 5\]"):
        run(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = before["model.layers.1.mlp.up_proj.weight"][3, 5]
    assert all(torch.equal(before[key], value) for key, value in state_of(model).items())


def state_of(model):
    return model.state_dict()


def test_nan_activations_name_weight_sequence_and_token():
    model = tiny.model("llama")
    ids = tiny.ids(12, 24)
    ids[ids == 77] = 78
    ids[7, 11] = 77
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[77] = torch.eye(32)[0]  # √32 there once it is normalised, all others 0
        model.model.layers[0].input_layernorm.weight[0] = 1e38
    with pytest.raises(ConfigError, match=r"q_proj.*calibration sequence 7, token 11"):
        run(model, ids=ids, probe_samples=0)


def test_targets_and_ignore_choose_weights():
    result = run(tiny.model("llama"), ignore=["down_proj", "layers.0."], targets=["mlp", "q_proj"])
    for i, block in enumerate(ModelView(result.model).blocks):
        for ref in weights_of(block):
            chosen = i > 0 and ("mlp" in ref.name or "q_proj" in ref.name) and "down_proj" not in ref.name
            assert ((ref.view(block) == 0).float().mean() > 0.4) == chosen, (i, ref.name)
    assert any("left dense" in warning for warning in result.report["warnings"])


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error(field):
    with pytest.raises(ConfigError, match="'q_prok'.*matches nothing"):
        run(tiny.model("llama"), **{field: ["q_prok"]})


def test_head_and_embedding_stay_dense_even_when_tied():
    result = run(tiny.model("gpt2"))
    assert (result.model.lm_head.weight == 0).sum() == 0
    assert result.model.lm_head.weight is result.model.transformer.wte.weight


def test_width_that_the_pattern_does_not_divide():
    model = tiny.model("llama", intermediate_size=66)
    with pytest.raises(ConfigError, match="2:4 does not divide the 66 inputs of model.layers.0.mlp.down_proj"):
        run(model, pattern="2:4")
    assert run(model, pattern="2:4", ignore=["down_proj"]).report["sparsity"] == pytest.approx(0.5)


def count_block_runs(monkeypatch):
    from pyprune.execution.executor import Executor

    calls = []
    forward = Executor.forward
    monkeypatch.setattr(Executor, "forward", lambda self, i, *a, **k: (calls.append(i), forward(self, i, *a, **k))[1])
    return calls


@pytest.mark.parametrize(
    "fields,passes",
    [
        (dict(method="magnitude"), [0, 0, 0]),
        (dict(method="wanda"), [2, 2, 1]),
        (dict(method="sparsegpt"), [2, 2, 1]),
        (dict(method="wanda", inputs="dense"), [1, 1, 1]),
    ],
)
def test_the_fewest_forward_passes(monkeypatch, fields, passes):
    """Two per block (statistics, propagation), one for the last and for dense inputs, none for magnitude."""
    calls = count_block_runs(monkeypatch)
    reads = {"calibration": tiny.ids(12, 24), "batch_size": 12} if any(passes) else {}
    prune(tiny.model("llama"), evaluation=NO_EVALUATION, progress=False, probe_samples=0, **reads, **fields)
    assert [calls.count(i) for i in range(3)] == passes


def test_expert_without_tokens_is_said():
    model = tiny.model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[3, :] = -1e3 * model.model.layers[0].mlp.gate.weight[0].sign()
    result = run(model, ids=tiny.ids(2, 3))
    seen = [w for w in result.report["warnings"] if "saw no calibration token" in w]
    unseen = {row["name"] for row in result.report["weights"] if row["damping"] is None}
    assert {w.split(" saw")[0] for w in seen} == unseen and unseen
    assert abs(result.report["sparsity"] - 0.5) < 0.02


def test_report_errors_are_those_of_the_outputs():
    """The reported error of a weight equals ‖X(W − W')ᵀ‖²/‖XWᵀ‖² computed by hand in float64 for the first block."""
    model, ids = tiny.model("llama"), tiny.ids(12, 24)
    result = run(model, ids=ids, method="magnitude", probe_samples=4)
    inputs = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        model(ids[:4])
    handle.remove()
    x = inputs[0].reshape(-1, 32).double()
    w, pruned = (m.model.layers[0].self_attn.q_proj.weight.double() for m in (model, result.model))
    truth = ((x @ (w - pruned).T).square().sum() / (x @ w.T).square().sum()).item()
    row = next(r for r in result.report["weights"] if r["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert row["error"] == pytest.approx(truth, rel=1e-4)


def test_block_error_is_pruned_stream_against_dense_stream():
    model, ids = tiny.model("llama"), tiny.ids(12, 24)
    result = run(model, ids=ids, method="magnitude", probe_samples=4)
    outputs = []
    for m in (model, result.model):
        handle = m.model.layers[-1].register_forward_hook(lambda m, a, out: outputs.append(out.double()))
        with torch.no_grad():
            m(ids[:4])
        handle.remove()
    dense, pruned = outputs
    truth = ((dense - pruned).square().sum() / dense.square().sum()).item()
    assert result.report["blocks"][-1]["error"] == pytest.approx(truth, rel=1e-4)


def test_ragged_and_masked_calibration_counts_no_padding():
    """A padded batch with its attention mask gives the result of the same sequences without padding."""
    ids = tiny.ids(10, 24)
    mask = torch.ones_like(ids)
    lengths = [24, 24, 24, 24, 24, 16, 16, 16, 16, 16]
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    padded = run(
        tiny.model("llama"),
        ids=Calibration(source={"input_ids": ids, "attention_mask": mask}, num_samples=10, held_out=0),
    )
    plain = run(
        tiny.model("llama"),
        ids=Calibration(source=[ids[r, :n] for r, n in enumerate(lengths)], num_samples=10, held_out=0),
    )
    assert all(torch.equal(a, b) for a, b in zip(state(padded).values(), state(plain).values()))


def test_config_object_mapping_and_fields_mean_the_same():
    config = PruneConfig(
        method="wanda", sparsity=0.25, calibration=Calibration(num_samples=12, seq_len=24), evaluation=NO_EVALUATION
    )
    ids = tiny.ids(12, 24)
    by_object = prune(tiny.model("llama"), config, calibration=ids, progress=False)
    by_fields = run(tiny.model("llama"), ids=ids, method="wanda", sparsity=0.25)
    assert all(torch.equal(a, b) for a, b in zip(state(by_object).values(), state(by_fields).values()))


def test_a_run_on_a_live_model_is_repeated_on_the_same_weights_or_says_so(tmp_path):
    def again(model, output=None):
        return prune(
            model, config=tmp_path / "run" / "run.yaml", calibration=tiny.ids(12, 24), output=output, progress=False
        )

    def warned(result):
        return any("are not those of the run that is repeated" in text for text in result.report["warnings"])

    first = run(tiny.model("llama"), output=tmp_path / "run")
    same, other = again(tiny.model("llama")), again(tiny.model("llama", seed=1))
    assert all(torch.equal(a, b) for a, b in zip(state(first).values(), state(same).values()))
    assert (warned(first), warned(same), warned(other)) == (False, False, True)
    tiny.model("llama").save_pretrained(tmp_path / "named")
    named = again(str(tmp_path / "named"), tmp_path / "again")
    assert named.config.weights is None and "weights" not in named.report["model"], "a name is enough"
