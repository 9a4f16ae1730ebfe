"""Patterns of weights' names: whole components, wildcards, regular expressions."""

from __future__ import annotations

import pytest
import tiny

import pyprune
from pyprune.cli import commands
from pyprune.config import ConfigError, PruneConfig
from pyprune.model.blocks import ModelView, select_weights
from pyprune.model.names import matches


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("layers.1", "model.layers.1.mlp.up_proj.weight", True),
        ("layers.1", "model.layers.10.mlp.up_proj.weight", False),
        ("layers.1.", "model.layers.11.mlp.up_proj.weight", False),
        ("layers.1.", "model.layers.1.mlp.up_proj.weight", True),
        ("mlp", "model.layers.1.mlp.up_proj.weight", True),
        ("ml", "model.layers.1.mlp.up_proj.weight", False),
        ("proj", "model.layers.1.mlp.up_proj.weight", False),
        ("mlp.weight", "model.layers.1.mlp.up_proj.weight", False),
        ("*_proj", "model.layers.1.mlp.up_proj.weight", True),
        ("layers.1?", "model.layers.1.mlp.up_proj.weight", False),
        ("layers.1?", "model.layers.17.mlp.up_proj.weight", True),
        ("*.1.*", "model.layers.1.mlp.up_proj.weight", True),
        ("*.1.*", "model.layers.11.mlp.up_proj.weight", False),
        ("layers.[12].mlp", "model.layers.2.mlp.up_proj.weight", True),
        ("re:layers\\.[0-3]\\.", "model.layers.2.mlp.up_proj.weight", True),
        ("re:layers\\.[0-3]\\.", "model.layers.12.mlp.up_proj.weight", False),
        ("re:up_proj.weight$", "model.layers.12.mlp.up_proj.weight", True),
        ("experts.down_proj[3]", "model.layers.0.mlp.experts.down_proj[3]", True),
        ("experts.down_proj[3]", "model.layers.0.mlp.experts.down_proj[13]", False),
        ("down_proj[3]", "model.layers.0.mlp.experts.down_proj[3]", True),
        ("experts.*[3]", "model.layers.0.mlp.experts.down_proj[3]", True),
        ("experts.*[3]", "model.layers.0.mlp.experts.down_proj[13]", False),
        ("experts.*[3]", "model.layers.0.mlp.experts.13.w1.weight", False),
        ("experts.down_proj[*]", "model.layers.0.mlp.experts.down_proj[13]", True),
        ("experts.down_proj[*]", "model.layers.0.mlp.experts.gate_up_proj[13]", False),
        ("experts.down_proj", "model.layers.0.mlp.experts.down_proj[3]", True),
        ("", "model.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_a_pattern_is_a_run_of_whole_components(pattern, name, found):
    assert matches(name, [pattern]) == found


def test_the_first_block_is_not_the_tenth():
    view = ModelView(tiny.model("llama", num_hidden_layers=12))
    chosen = select_weights(view, [], ["layers.1"])
    assert [i for i, refs in enumerate(chosen) if not refs] == [1]


def test_one_expert_can_be_named():
    view = ModelView(tiny.model("mixtral"))
    chosen = select_weights(view, [], ["layers.1.mlp.experts.down_proj[3]"])
    every = select_weights(view, [], [])
    left = {view.name(i, ref) for i, refs in enumerate(every) for ref in refs} - {
        view.name(i, ref) for i, refs in enumerate(chosen) for ref in refs
    }
    assert left == {"model.layers.1.mlp.experts.down_proj[3]"}


def test_a_part_of_a_component_is_an_error_with_the_way_out():
    with pytest.raises(ConfigError, match=r"'proj' selects no prunable weight: it matches nothing.*'\*proj\*'"):
        select_weights(ModelView(tiny.model("llama")), ["proj"], [])
    with pytest.raises(ConfigError, match=r"'re:\(' is no regular expression"):
        select_weights(ModelView(tiny.model("llama")), ["re:("], [])


def test_the_plan_says_what_each_pattern_matched(folder, tmp_path, capsys):
    found = pyprune.plan(PruneConfig(model=str(folder), targets=["mlp", "q_proj"], ignore=["layers.1", "lm_head"]))
    rows = {(row["field"], row["pattern"]): row for row in found["patterns"]}
    assert {key: row["weights"] for key, row in rows.items()} == {
        ("targets", "mlp"): 9,
        ("targets", "q_proj"): 3,
        ("ignore", "layers.1"): 7,
        ("ignore", "lm_head"): 0,
    }
    assert rows["ignore", "layers.1"]["examples"][0] == "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(SystemExit):
        commands.main(["prune", str(folder), "--plan", "--ignore", "layers.1", "--ignore", "lm_head"])
    out = " ".join(capsys.readouterr().out.split())
    assert "ignore 'layers.1': 7 weights, model.layers.1.self_attn.q_proj.weight" in out
    assert "ignore 'lm_head': no weight of the blocks" in out
