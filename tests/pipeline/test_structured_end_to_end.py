"""``pyprune.prune`` for neurons and heads: every choice runs, the result is smaller, saved, reloaded, and honest."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers as hf

import pyprune
from pyprune.config import CRITERIA, ConfigError
from pyprune.model.watching import expert_loop
from pyprune.structured.criteria import NEEDS_MOMENTS

ALL = list(tiny.CONFIGS)
STOCK_HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")
IDS = tiny.ids(20, 24, seed=5)


def run(model, pattern="structured", sparsity=0.5, calibration=IDS, structured=None, **fields):
    return pyprune.prune(
        model,
        pattern=pattern,
        sparsity=sparsity,
        calibration=calibration,
        progress=False,
        evaluation={"enabled": False},
        structured=structured or {},
        **fields,
    )


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.ids(2, 20) if ids is None else ids)[0]


def size(model):
    return sum(p.numel() for p in model.parameters())


def drift(model, dense, ids=None):
    want = logits(dense, ids)
    return float((logits(model, ids) - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("architecture", ALL)
def test_uniform_result_is_a_plain_checkpoint(architecture, tmp_path):
    """Plain transformers loads it: same class, smaller config, nothing missing, equal logits."""
    dense = tiny.model(architecture)
    pattern = "structured" if architecture in STOCK_HEADS else "neurons"
    result = run(dense, pattern)
    assert size(result.model) < size(dense) and result.report["structured"]["standard"]
    result.save(tmp_path / "out")
    again, info = type(dense).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again), logits(result.model))
    assert torch.equal(logits(pyprune.load(tmp_path / "out").model), logits(result.model))
    if architecture in STOCK_HEADS:
        assert again.config.num_attention_heads == 2 and again.config.num_key_value_heads == 1


def test_llama_gets_biases_with_explicit_zeros(tmp_path):
    """The reconstruction's bias sits at the consumers; those that the flags add elsewhere are zeros in the file."""
    from safetensors.torch import load_file

    run(tiny.model("llama"), calibration=tiny.ids(100, 24), inputs="dense").save(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] and config["attention_bias"]
    assert (config["intermediate_size"], config["num_attention_heads"], config["head_dim"]) == (32, 2, 8)
    for layer in range(3):
        for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            assert not tensors[f"model.layers.{layer}.{name}.bias"].any()
        assert tensors[f"model.layers.{layer}.mlp.down_proj.bias"].any()


def test_no_bias_slot_is_said_and_left_out():
    result = run(tiny.model("mistral"), "neurons")
    assert result.model.model.layers[0].mlp.down_proj.bias is None
    assert any("no bias slot" in note for note in result.report["structured"]["notes"])


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_heads_without_a_stock_config(architecture, tmp_path):
    """Refused with the reason before any work; saved for pyprune.load; or padded with zeros for stock tools."""
    dense = tiny.model(architecture)
    with pytest.raises(ConfigError, match="num_attention_heads.*nonstandard='save'"):
        run(dense, "heads")
    saved = run(dense, "heads", structured={"nonstandard": "save"})
    assert not saved.report["structured"]["standard"] and size(saved.model) < size(dense)
    saved.save(tmp_path / "saved")
    assert torch.equal(logits(pyprune.load(tmp_path / "saved").model), logits(saved.model))
    with pytest.raises(RuntimeError):  # stock transformers says so, instead of dropping weights silently
        type(dense).from_pretrained(tmp_path / "saved")
    padded = run(dense, "heads", structured={"nonstandard": "pad"})
    padded.save(tmp_path / "padded")
    again = type(dense).from_pretrained(tmp_path / "padded")
    assert torch.equal(logits(again), logits(padded.model)) and size(again) == size(dense)
    torch.testing.assert_close(logits(again), logits(saved.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["save", "pad"])
def test_global_allocation_reloads(mode, tmp_path):
    dense = tiny.model("llama", seed=3)
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight[:, :48] *= 1e-3  # a block with much to drop
    with pytest.raises(ConfigError, match="a stock configuration has one for all"):
        run(dense, "neurons", sparsity=0.4, structured={"allocation": "global"})
    result = run(dense, "neurons", sparsity=0.4, structured={"allocation": "global", "nonstandard": mode})
    kept = [r["kept"] for r in result.report["weights"]]
    assert len(set(kept)) > 1 and sum(64 - k for k in kept) == round(0.4 * 3 * 64)
    result.save(tmp_path / "out")
    again = pyprune.load(tmp_path / "out").model
    assert torch.equal(logits(again), logits(result.model))
    widths = [layer.mlp.down_proj.in_features for layer in again.model.layers]
    assert widths == (kept if mode == "save" else [max(kept)] * 3)
    assert again.generate(tiny.ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_illegal_head_count_is_refused_with_the_way_out():
    dense = tiny.model("llama", num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ConfigError, match="not a multiple"):
        run(dense, "heads", sparsity=0.25)


def test_one_key_value_group():
    dense = tiny.model("llama", num_key_value_heads=1)
    with pytest.raises(ConfigError, match="head_scope='queries'"):
        run(dense, "heads")
    result = run(dense, "heads", structured={"head_scope": "queries"})
    assert (result.model.config.num_attention_heads, result.model.config.num_key_value_heads) == (2, 1)


def test_query_heads_leave_keys_and_values_alone():
    dense = tiny.model("qwen3")
    result = run(dense, "heads", structured={"head_scope": "queries"})
    attention = result.model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 32)
    assert torch.equal(attention.k_proj.weight, dense.model.layers[0].self_attn.k_proj.weight)


@pytest.mark.parametrize("inputs", ["propagated", "dense"])
@pytest.mark.parametrize("reconstruct", ["none", "bias", "mask_tuning", "liar"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_with_every_reconstruction(criterion, reconstruct, inputs):
    dense = tiny.model("llama")
    if inputs == "dense" and reconstruct == "none" and criterion not in NEEDS_MOMENTS:
        with pytest.raises(ConfigError, match="inputs='dense' would do nothing"):
            run(dense, criterion=criterion, reconstruct=reconstruct, inputs=inputs)
        return
    result = run(dense, criterion=criterion, reconstruct=reconstruct, inputs=inputs)
    assert [r["kept"] for r in result.report["weights"]] == [1, 32] * 3
    assert {r["method"] for r in result.report["weights"]} <= {reconstruct, "none", "bias"}
    assert bool(torch.isfinite(logits(result.model)).all())
    torch.testing.assert_close(logits(dense), logits(tiny.model("llama")))  # the model given is left alone


def test_nothing_dropped_changes_nothing_on_the_dense_stream():
    dense = tiny.model("llama")
    result = run(dense, sparsity=0.0, inputs="dense", reconstruct="none")
    assert torch.equal(logits(result.model), logits(dense))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("inputs", ["propagated", "dense"])
def test_liar_beats_bias_beats_nothing(architecture, inputs):
    """Output error against the dense model on text that nothing was fitted on."""
    dense = tiny.model(architecture)
    ids, calibration = tiny.ids(16, 24, seed=99), tiny.ids(200, 24, seed=5)
    none, bias, liar = (
        drift(run(dense, "neurons", 0.25, calibration, reconstruct=m, inputs=inputs).model, dense, ids)
        for m in ("none", "bias", "liar")
    )
    assert liar < bias < none


def test_held_out_error_never_exceeds_bias_compensation():
    for row in run(tiny.model("gpt2"), "neurons", criterion="random").report["weights"]:
        assert row["error_held_out"] <= row["errors"]["bias"] and row["error_held_out"] <= row["errors"]["none"]


def test_propagated_target_corrects_earlier_blocks():
    """A third block whose first two were pruned: repairing towards the dense stream brings the output nearer to it
    than repairing each block on its own."""
    dense = tiny.model("llama")
    calibration = tiny.ids(200, 24, seed=5)
    ids = tiny.ids(16, 24, seed=99)
    own = drift(run(dense, "neurons", 0.5, calibration, inputs="dense", criterion="random").model, dense, ids)
    through = drift(run(dense, "neurons", 0.5, calibration, criterion="random").model, dense, ids)
    assert through < own


def test_bfloat16_forward_agrees():
    dense = tiny.model("llama")
    ids, calibration = tiny.ids(16, 24, seed=99), tiny.ids(100, 24, seed=5)
    wide = drift(run(dense, "neurons", 0.5, calibration).model, dense, ids)
    narrow = run(dense, "neurons", 0.5, calibration, compute_dtype="bfloat16").model
    assert next(narrow.parameters()).dtype == torch.float32
    assert drift(narrow, dense, ids) < 1.1 * wide


def test_curve_from_one_pass_equals_single_runs(tmp_path):
    dense = tiny.model("llama")
    many = run(dense, "neurons", [0.25, 0.5, 0.75], inputs="dense")
    assert list(many.models) == [0.25, 0.5, 0.75] and many.model is many.models[0.75]
    for sparsity, model in many.models.items():
        single = run(dense, "neurons", sparsity, inputs="dense")
        assert torch.equal(logits(model), logits(single.model))
    assert [e["parameters"] for e in many.report["structured"]["curve"]] == [size(m) for m in many.models.values()]
    shared = {id(m.model.embed_tokens.weight) for m in many.models.values()}
    assert len(shared) == 1  # nothing outside the blocks is copied
    many.save(tmp_path / "out")
    again = pyprune.load(tmp_path / "out" / "sparsity-0.25").model
    assert torch.equal(logits(again), logits(many.models[0.25]))
    record = json.loads((tmp_path / "out" / "sparsity-0.5" / "pruning.json").read_text())
    assert record["sparsity"] == 0.5 and record["structured"]["edits"]["intermediate_size"] == 32


def test_list_says_that_it_uses_the_dense_stream():
    asked = run(tiny.model("llama"), "neurons", [0.5], inputs="propagated")
    assert any("dense stream" in w for w in asked.report["warnings"])
    usual = run(tiny.model("llama"), "neurons", [0.5])
    assert usual.report["structured"]["inputs"] == usual.config.inputs == "dense"


def test_one_pass_behind_pruned_blocks_is_usual_for_heads_and_neurons():
    result = run(tiny.model("llama"))
    assert result.config.inputs == "sequential" == result.report["config"]["inputs"]
    assert [row["inputs"] for row in result.report["blocks"]] == ["sequential"] * 3


def test_same_seed_same_bits():
    a, b = (run(tiny.model("llama"), criterion="random").model for _ in range(2))
    assert torch.equal(logits(a), logits(b))
    assert not torch.equal(logits(run(tiny.model("llama"), criterion="random", seed=1).model), logits(a))


def test_few_tokens_work_and_warn():
    result = run(tiny.model("llama"), "neurons", calibration=tiny.ids(2, 8))
    assert bool(torch.isfinite(logits(result.model)).all())
    assert any(
        "calibration tokens for 32 kept columns" in w or "LIAR was not used" in w for w in result.report["warnings"]
    )


def test_ignored_block_stays_dense(tmp_path):
    dense = tiny.model("llama")
    with pytest.raises(ConfigError, match="others dense"):
        run(dense, "neurons", ignore=["layers.1."])
    result = run(dense, "neurons", ignore=["layers.1."], structured={"nonstandard": "save"})
    assert [layer.mlp.down_proj.in_features for layer in result.model.model.layers] == [32, 64, 32]
    result.save(tmp_path / "out")
    assert torch.equal(logits(pyprune.load(tmp_path / "out").model), logits(result.model))
    with pytest.raises(ConfigError, match="leave no whole neurons"):
        run(dense, "neurons", targets=["gate_proj"])


def test_report_names_what_was_done():
    report = run(tiny.model("llama")).report
    row = report["weights"][1]
    assert row["kind"] == "neurons" and row["sparsity"] == 0.5 and row["tokens"] == IDS.numel()
    assert set(row["errors"]) == {"liar", "bias", "none"} and row["damping"] is not None or row["method"] != "liar"
    assert report["sparsity"] == pytest.approx(0.5)
    assert {"groups", "forward", "statistics", "solve", "slice"} <= set(report["seconds"])
    assert len(report["blocks"]) == 3 and report["blocks"][2]["error"] > report["blocks"][0]["error"] > 0


def test_non_finite_activations_are_an_error():
    dense = tiny.model("llama")
    spoilt = lambda module, args, out: out.index_fill(-1, torch.tensor([7]), torch.nan)  # noqa: E731  finite weights
    dense.model.layers[0].post_attention_layernorm.register_forward_hook(spoilt)
    with pytest.raises(ConfigError, match="not finite"):
        run(dense, "neurons")


def test_experts_that_no_token_reached():
    """Too few tokens for every expert: those without any are sliced by magnitude and named."""
    result = run(tiny.model("mixtral"), "neurons", calibration=tiny.ids(1, 2))
    with expert_loop(result.model.config):
        assert bool(torch.isfinite(logits(result.model)).all())
    assert any("saw no calibration token" in w for w in result.report["warnings"])


def test_first_order_criteria_refuse_fused_experts():
    with pytest.raises(ConfigError, match="fused experts"):
        run(tiny.model("mixtral"), "neurons", criterion="fisher")


def test_hub_names_of_the_classes_are_kept(tmp_path):
    result = run(tiny.model("llama"), "neurons")
    result.save(tmp_path / "out")
    assert isinstance(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), hf.LlamaForCausalLM)


def first_units(layer):
    """The first units are kept; looks at what a function may look at."""
    units = layer.group.units
    assert layer.known().second(True).shape == (layer.weight.shape[1],) * 2 and layer.gradients is None
    return -torch.arange(units)


def test_a_criterion_of_the_users_chooses(tmp_path):
    """The units it scores highest stay, in their order; ``run.yaml`` and card name it, and take it again."""
    dense = tiny.model("llama")
    result = run(dense, "neurons", criterion=first_units, reconstruct="none")
    for block, whole in zip(result.model.model.layers, dense.model.layers):
        half = whole.mlp.up_proj.out_features // 2
        assert torch.equal(block.mlp.up_proj.weight, whole.mlp.up_proj.weight[:half])
        assert torch.equal(block.mlp.down_proj.weight, whole.mlp.down_proj.weight[:, :half])
    result.save(tmp_path / "out")
    written = (tmp_path / "out" / "run.yaml").read_text()
    assert "criterion: <first_units in memory, sha256 " in written and "calibration=…, criterion=…)" in written
    card = (tmp_path / "out" / "README.md").read_text()
    assert "function first_units neurons" in card and "<first_units" not in card
    fields = {"calibration": IDS, "progress": False}
    with pytest.raises(ConfigError, match="criterion <first_units .* was a function in memory .*pass it again"):
        pyprune.prune(dense, config=tmp_path / "out" / "run.yaml", **fields)
    again = pyprune.prune(dense, config=tmp_path / "out" / "run.yaml", criterion=first_units, **fields)
    assert torch.equal(logits(again.model), logits(result.model))


@pytest.mark.parametrize("pattern,allocation", [("structured", "uniform"), ("neurons", "global")])
def test_a_function_may_look_at_mask_gradients(pattern, allocation):
    """One that says what ``taylor`` says makes the same model."""

    def mine(layer):
        return layer.derivatives().abs().mean(0)

    mine.needs_gradients = True
    dense, structured = tiny.model("llama"), {"allocation": allocation, "nonstandard": "save"}
    own = run(dense, pattern, criterion=mine, inputs="propagated", structured=structured)
    taylor = run(dense, pattern, criterion="taylor", inputs="propagated", structured=structured)
    assert torch.equal(logits(own.model), logits(taylor.model))


def test_a_criterion_that_returns_nonsense_is_told_where():
    with pytest.raises(ConfigError, match=r"criterion <lambda> returned .* \[3\] for model\.layers\.0\.mlp"):
        run(tiny.model("llama"), "neurons", criterion=lambda layer: torch.ones(3))
    with pytest.raises(ConfigError, match="criterion=<function in memory> would do nothing: only structured"):
        run(tiny.model("llama"), "2:4", criterion=first_units)
