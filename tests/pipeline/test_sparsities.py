"""Sparsities by name: what counts for each weight, that it is achieved exactly, refusals, round trips."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
import torch
import zoo

import pyprune
from pyprune.cli.commands import main
from pyprune.config import ConfigError, Evaluation, PruneConfig
from pyprune.execution.executor import Resident
from pyprune.execution.journal import Interrupted
from pyprune.model import checkpoint
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.kinds import kinds_of
from pyprune.model.sparsities import rules

NO_EVALUATION = Evaluation(enabled=False)
MIXED = {"layers.0": 0.3, "*.down_proj": 0.5, "attention": 0.4, "*": 0.625}


def run(model, **fields):
    return pyprune.prune(model, calibration=tiny.ids(8, 24), evaluation=NO_EVALUATION, progress=False, **fields)


def asked_of(name: str) -> float:
    """What ``MIXED`` asks of a weight of a LLaMA."""
    if ".layers.0." in name:
        return 0.3
    return 0.5 if "down_proj" in name else 0.4 if "self_attn" in name else 0.625


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    "family",
    ["opt", "gpt2", "bert", "albert", "mixtral", "deepseek_v3", "mpt", "olmo2", "gemma3", "modernbert", "deberta_v2"],
)
def test_attention_is_what_lets_tokens_see_each_other(family):
    if family not in zoo.HERE:
        pytest.skip("not in the installed transformers")
    for block, kinds in zip((view := ModelView(zoo.build(family))).blocks, kinds_of(view, Resident())):
        truth = {
            ref.path: "attention" if re.search("att", ref.path) else "mlp" for ref in weights_of(block, routers=True)
        }
        assert kinds == truth


@pytest.mark.parametrize("inputs", ["propagated", "sequential"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_weight_gets_exactly_the_zeros_that_its_key_asks_for(method, inputs):
    if method == "magnitude" and inputs == "sequential":
        pytest.skip("magnitude looks at no inputs")
    more = {} if method == "magnitude" else {"inputs": inputs}
    result = run(tiny.model("llama"), method=method, sparsity=MIXED, **more)
    view = ModelView(result.model)
    for i, block in enumerate(view.blocks):
        for ref in weights_of(block):
            weight, asked = ref.view(block), asked_of(view.name(i, ref))
            size = weight.shape[1] if method == "wanda" else weight.numel()
            expected = round(asked * size) * (len(weight) if method == "wanda" else 1)
            assert int((weight == 0).sum()) == expected, view.name(i, ref)
    rows = {row["name"]: row for row in result.report["weights"]}
    assert all(row["asked"] == asked_of(name) for name, row in rows.items())
    achieved = {row["key"]: (row["asked"], row["achieved"], row["weights"]) for row in result.report["sparsity_by_key"]}
    assert {key: found[0] for key, found in achieved.items()} == MIXED
    assert [achieved[key][2] for key in MIXED] == [7, 2, 8, 4]
    assert all(found[1] == pytest.approx(found[0], abs=0.02) for found in achieved.values())


@pytest.mark.parametrize(
    ("fields", "key"), [({}, "*"), ({"method": "wanda"}, "default"), ({"pattern": "structured"}, "*")], ids=str
)
def test_one_key_for_everything_is_the_plain_number_bit_for_bit(fields, key):
    plain, named = (run(tiny.model("llama"), sparsity=s, **fields) for s in (0.5, {key: 0.5}))
    assert same(plain.model, named.model)


def test_what_no_key_names_stays_dense_and_the_report_says_so():
    dense, result = tiny.model("llama"), run(tiny.model("llama"), sparsity={"mlp": 0.5})
    pairs = zip(dense.named_parameters(), result.model.parameters())
    changed = {name for (name, p), q in pairs if not torch.equal(p, q)}
    assert changed == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down")}
    assert any("were left dense" in text for text in result.report["warnings"])
    assert 0 < result.report["coverage"]["fraction"] < 1


def test_a_pattern_comes_before_a_kind_and_a_kind_before_the_rest_and_the_first_pattern_counts():
    kinds = {"a.0.attn.q": "attention", "a.0.mlp.up": "mlp", "a.1.attn.q": "attention", "a.1.mlp.up": "mlp"}
    found = rules({"*": 0.1, "attention": 0.2, "a.1": 0.3, "*.up": 0.4}, kinds)
    assert found == {"a.0.attn.q": "attention", "a.0.mlp.up": "*.up", "a.1.attn.q": "a.1", "a.1.mlp.up": "a.1"}
    assert rules({"*": 0.1, "mlp": 0.2}, kinds)["a.0.attn.q"] == "*"
    assert rules({"a.1": 0.3, "mlp": 0.2}, kinds) == {"a.0.mlp.up": "mlp", "a.1.attn.q": "a.1", "a.1.mlp.up": "a.1"}


@pytest.mark.parametrize(
    ("sparsity", "sentence"),
    [
        ({"*.dwn_proj": 0.5}, "names no weight that this run prunes; did you mean '*.down_proj'"),
        ({"mpl": 0.5}, "did you mean 'mlp'"),
        ({"layers.7": 0.5, "*": 0.2}, "layers.7=0.5 names no weight that this run prunes; did you mean 'layers.2'"),
        ({"layers.1": 0.5, "layers.1.mlp": 0.2}, "layers.1 before it name all that it names; put it first"),
        ({"*.mlp.*": 0.5, "mlp": 0.2}, "decides nothing: other keys name all of the mlp"),
        ({"mlp": 1.5}, r"sparsity of mlp must be in \[0, 1\)"),
        ({"mlp": 60}, "did you mean 0.6"),
        ({"mlp": True}, r"sparsity of mlp must be in \[0, 1\)"),
        ({}, "empty mapping"),
        ({3: 0.5}, "a key of sparsity must be a name or a pattern, got 3"),
        ({"*": 0.5, "default": 0.4}, "names the rest twice"),
        ({"mlp": 1e-9}, "mlp=1e-09 would remove nothing"),
    ],
    ids=str,
)
def test_keys_that_decide_nothing_are_refused_before_any_pass(sparsity, sentence):
    model = tiny.model("llama")
    before = tiny.model("llama")
    with pytest.raises(ConfigError, match=sentence.replace("*", r"\*")):
        run(model, sparsity=sparsity, in_place=True)
    assert same(model, before)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": "2:4"}, "contradicts pattern '2:4', which is sparsity 0.5 wherever it is applied"),
        ({"pattern": "heads"}, "pattern='heads' leaves the mlp alone; pattern='structured'"),
        ({"pattern": "structured", "structured": {"allocation": "global"}}, "shares out one sparsity over all blocks"),
    ],
    ids=str,
)
def test_what_cannot_have_sparsities_by_name_says_what_can(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PruneConfig(sparsity={"mlp": 0.5}, **fields)


def test_a_block_that_is_one_mixer_has_no_kinds_but_patterns():
    with pytest.raises(ConfigError, match="attention and mlp cannot be told apart"):
        rules({"mlp": 0.5}, {"layers.0.mixer.in_proj.weight": None})


def test_structured_patterns_take_a_sparsity_per_kind():
    result = run(tiny.model("llama"), pattern="structured", sparsity={"mlp": 0.25, "attention": 0.5})
    config = result.model.config
    assert (config.intermediate_size, config.num_key_value_heads) == (48, 1)
    assert result.report["structured"]["removed"] == {"heads": 0.5, "neurons": 0.25}
    assert {(row["kind"], row["asked"], row["sparsity"]) for row in result.report["weights"]} == {
        ("heads", 0.5, 0.5),
        ("neurons", 0.25, 0.25),
    }
    alone = run(tiny.model("llama"), pattern="structured", sparsity={"mlp": 0.25})
    assert same(alone.model, run(tiny.model("llama"), pattern="neurons", sparsity=0.25).model)


def test_structured_sparsities_by_block_are_saved_or_refused_with_the_way_out(tmp_path):
    asked = {"layers.0": 0.25, "*": 0.5}
    with pytest.raises(ConfigError, match=r"layers\.0=0\.25,\*=0\.5 makes a model that stock tools cannot load"):
        run(tiny.model("llama"), pattern="neurons", sparsity=asked)
    result = run(tiny.model("llama"), pattern="neurons", sparsity=asked, nonstandard="save", output=tmp_path / "m")
    widths = [len(block.mlp.up_proj.weight) for block in pyprune.load(tmp_path / "m").model.model.layers]
    assert widths == [48, 32, 32]
    assert [row["asked"] for row in result.report["weights"]] == [0.25, 0.5, 0.5]


def test_a_structured_key_that_could_remove_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"sparsity 0\.1 would remove nothing: heads go in steps of one in 2"):
        run(tiny.model("llama"), pattern="structured", sparsity={"attention": 0.1, "mlp": 0.5})


def folder_of(tmp_path):
    checkpoint.save_model(tiny.model("llama"), tmp_path / "dense")
    np.save(tmp_path / "ids.npy", tiny.ids(8, 24).numpy())
    return tmp_path / "dense", tmp_path / "ids.npy"


def test_command_line_yaml_plan_and_card_say_the_same(tmp_path, capsys):
    dense, ids = folder_of(tmp_path)
    text = ",".join(f"{key}={value}" for key, value in MIXED.items())
    options = ["--calibration", str(ids), "--no-evaluation", "--sparsity", text]
    plan = pyprune.plan(dense, calibration=str(ids), evaluation=False, sparsity=MIXED)
    [achieved] = plan["achieved"]
    assert {row["key"]: row["asked"] for row in achieved["by_key"]} == MIXED
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(dense), *options, "-o", str(tmp_path / "one")])
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert re.search(r"layers\.0 0\.3 → 0\.\d{4}, .*attention 0\.4 → 0\.\d{4}", shown)
    card, report = (tmp_path / "one" / "README.md").read_text(), json.loads((tmp_path / "one/report.json").read_text())
    assert re.search(r"Asked for and achieved: layers\.0 0\.3 → 0\.\d{4}", card)
    assert report["sparsity_asked"] == MIXED and list(report["sparsity_asked"]) == list(MIXED)
    assert "Sparsity of attention" in (tmp_path / "one" / "report.html").read_text()
    again = pyprune.prune(config=tmp_path / "one" / "run.yaml", output=tmp_path / "two", progress=False)
    assert again.config.sparsity == MIXED
    first, second = (pyprune.load(tmp_path / name).model for name in ("one", "two"))
    assert same(first, second) and same(first, run(tiny.model("llama"), sparsity=MIXED).model)


def test_streamed_weights_give_the_same_bytes(tmp_path):
    dense, ids = folder_of(tmp_path)
    for stream in ("always", "never"):
        pyprune.prune(
            str(dense),
            calibration=str(ids),
            evaluation=False,
            progress=False,
            sparsity=MIXED,
            stream=stream,
            output=tmp_path / stream,
        )
    streamed, whole = (pyprune.load(tmp_path / stream).model for stream in ("always", "never"))
    assert same(streamed, whole) and not same(whole, tiny.model("llama"))


def test_resume_goes_on_with_the_same_mapping_only(tmp_path, monkeypatch):
    dense, ids = folder_of(tmp_path)
    settings = dict(calibration=str(ids), evaluation=False, output=tmp_path / "out", progress=False, sparsity=MIXED)

    def stop(step, values):
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        pyprune.prune(dense, track=stop, **settings)
    other = dict(reversed(MIXED.items()))  # the same keys, but another one comes first
    with pytest.raises(ConfigError, match="sparsity"):
        pyprune.prune(dense, resume=True, **{**settings, "sparsity": other})
    result = pyprune.prune(dense, resume=True, **settings)
    assert same(result.model, run(tiny.model("llama"), sparsity=MIXED).model)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mlp=0.5,0.4", "parts with and without a name"),
        ("mlp=half", "must be a number, several with commas between them, or names with theirs"),
        ("mlp=0.5,mlp=0.4", "names mlp twice"),
    ],
)
def test_a_sparsity_that_cannot_be_read_says_how_to_write_it(text, sentence, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "nowhere", "--sparsity", text, "-o", "out"])
    assert sentence in capsys.readouterr().err
