"""A field that would do nothing is refused, with the setting that would use it; what has an effect is not."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

import pyprune
from pyprune import effects
from pyprune.cli import commands
from pyprune.config import (
    Calibration,
    ConfigError,
    Evaluation,
    PruneConfig,
    Reconstruction,
    Structured,
    from_dict,
    from_yaml,
    override,
    to_yaml,
)
from pyprune.structured.criteria import NEEDS_GRADIENTS, NEEDS_MOMENTS

NOTHING = [
    ({"method": "wanda", "global_propagation": True}, "global_propagation=True", "reconstruct='layer'"),
    ({"method": "wanda", "damping": 0.1}, "damping=0.1", "method='sparsegpt'"),
    ({"method": "magnitude", "column_block": 64}, "column_block=64", "method='sparsegpt'"),
    ({"method": "magnitude", "inputs": "dense"}, "inputs='dense'", "method='wanda'"),
    ({"method": "wanda", "criterion": "obs"}, "criterion='obs'", "pattern='neurons'"),
    ({"pattern": "neurons", "method": "wanda"}, "method='wanda'", "pattern='unstructured'"),
    ({"pattern": "neurons", "damping": 0.1}, "damping=0.1", "structured.damping"),
    ({"pattern": "neurons", "global_propagation": True}, "global_propagation=True", "reconstruct='layer'"),
    (
        {"pattern": "heads", "criterion": "magnitude", "reconstruct": "none", "inputs": "dense"},
        "inputs='dense'",
        "reconstruct",
    ),
    ({"pattern": "heads", "sparsity": [0.1, 0.2], "probe_samples": 4}, "probe_samples=4", "one sparsity"),
    (
        {"method": "magnitude", "probe_samples": 0, "calibration": {"num_samples": 8}},
        "calibration.num_samples=8",
        "probe_samples",
    ),
    ({"method": "magnitude", "probe_samples": 0, "batch_size": 8}, "batch_size=8", "probe_samples"),
    ({"method": "magnitude", "probe_samples": 0, "compute_dtype": "bfloat16"}, "compute_dtype='bfloat16'", "probe"),
    ({"probe_samples": 0, "calibration": {"held_out": 9}}, "calibration.held_out=9", "probe_samples"),
    (
        {"method": "magnitude", "calibration": {"self_generated": 8, "self_generated_for": "all"}},
        "calibration.self_generated=8",
        "method='wanda'",
    ),
    ({"calibration": {"language": "en"}}, "calibration.language='en'", "self_generated"),
    (
        {"calibration": {"self_generated_path": "x.jsonl"}},
        "calibration.self_generated_path='x.jsonl'",
        "self_generated",
    ),
    ({"calibration": {"self_generated_for": "all"}}, "calibration.self_generated_for='all'", "self_generated"),
    ({"calibration": {"split": "test"}}, "calibration.split='test'", "data set"),
    ({"calibration": {"source": "x.npy", "subset": "en"}}, "calibration.subset='en'", "data set"),
    ({"calibration": {"source": "x.txt", "text_column": "body"}}, "calibration.text_column='body'", "jsonl"),
    ({"calibration": {"source": "x.jsonl", "split": "test"}}, "calibration.split='test'", "data set"),
    (
        {
            "reconstruct": "block",
            "calibration": {"num_samples": 0, "self_generated": 4, "self_generated_for": "all", "source": "x.txt"},
        },
        "calibration.source='x.txt'",
        "num_samples",
    ),
    ({"evaluation": {"enabled": False, "text": "x.txt"}}, "evaluation.text='x.txt'", "evaluation.enabled"),
    ({"evaluation": {"enabled": False, "window": 64}}, "evaluation.window=64", "evaluation.enabled"),
    ({"evaluation": {"split": "train"}}, "evaluation.split='train'", "data set"),
    ({"evaluation": {"text": "x.npy", "bos": False}}, "evaluation.bos=False", "text"),
    *[
        ({"reconstruction": {name: value}}, f"reconstruction.{name}={value!r}", "reconstruct='block'")
        for name, value in (
            ("epochs", 2),
            ("lr", 1e-3),
            ("betas", (0.8, 0.9)),
            ("weight_decay", 0.1),
            ("batch_size", 2),
            ("micro_batch_size", 2),
            ("autocast", "float32"),
            ("early_stop", True),
        )
    ],
    (
        {"method": "wanda", "reconstruction": {"select": "validation"}},
        "reconstruction.select='validation'",
        "reconstruct='layer'",
    ),
    (
        {"pattern": "neurons", "reconstruction": {"select": "validation"}},
        "reconstruction.select='validation'",
        "reconstruct='layer'",
    ),
    *[
        ({"structured": {name: value}}, f"structured.{name}={value!r}", "pattern='neurons'")
        for name, value in (
            ("allocation", "global"),
            ("damping", 0.5),
            ("interpolate", "bias"),
            ("interpolate_weights", True),
            ("token_weights", "uniform"),
            ("head_scope", "queries"),
            ("nonstandard", "pad"),
        )
    ],
    (
        {"pattern": "neurons", "structured": {"head_scope": "queries"}},
        "structured.head_scope='queries'",
        "pattern='heads'",
    ),
    (
        {"pattern": "neurons", "reconstruct": "bias", "structured": {"damping": 0.5}},
        "structured.damping=0.5",
        "reconstruct='liar'",
    ),
    (
        {"pattern": "neurons", "reconstruct": "mask_tuning", "structured": {"interpolate": "weight"}},
        "structured.interpolate='weight'",
        "reconstruct='liar'",
    ),
    (
        {"pattern": "neurons", "structured": {"interpolate": "bias", "interpolate_weights": True}},
        "structured.interpolate_weights=True",
        "interpolate",
    ),
    (
        {
            "pattern": "neurons",
            "reconstruct": "none",
            "criterion": "random",
            "structured": {"token_weights": "uniform"},
        },
        "structured.token_weights='uniform'",
        "reconstruct",
    ),
]


@pytest.mark.parametrize(("fields", "named", "way_out"), NOTHING)
def test_what_does_nothing_is_refused(fields, named, way_out):
    with pytest.raises(ConfigError) as refusal:
        from_dict(PruneConfig, fields)
    said = str(refusal.value)
    assert said.startswith(f"{named} would do nothing: ") and way_out in said and "\n" not in said, said


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "wanda", "reconstruct": "layer", "damping": 0.1, "column_block": 64, "global_propagation": True},
        {"method": "sparsegpt", "reconstruct": "none", "damping": 0.1},
        {"reconstruct": "layer", "reconstruction": {"select": "validation"}},
        {
            "reconstruct": "block",
            "probe_samples": 0,
            "calibration": {"held_out": 9},
            "reconstruction": {"early_stop": True, "epochs": 1},
        },
        {"method": "magnitude", "calibration": {"source": "x.jsonl", "text_column": "body", "num_samples": 3}},
        {"calibration": {"source": "org/name", "split": "test", "subset": "en", "text_column": "body", "held_out": 0}},
        {"evaluation": {"text": ["org/name", "x.npy"], "subset": "en", "split": "train", "bos": False, "window": 9}},
        {"pattern": "heads", "criterion": "taylor", "reconstruct": "none", "structured": {"head_scope": "queries"}},
        {
            "pattern": "neurons",
            "reconstruct": "mask_tuning",
            "structured": {"damping": 0.5, "token_weights": "relative"},
        },
        {"pattern": "neurons", "structured": {"interpolate": "weight", "interpolate_weights": True}},
        {"calibration": {"num_samples": 0, "self_generated": 4, "self_generated_for": "all", "language": "en"}},
    ],
)
def test_what_has_an_effect_is_not_refused(fields):
    config = from_dict(PruneConfig, fields)
    assert from_yaml(to_yaml(config)) == config, "a file of ours holds every field and loads"


def test_the_table_names_fields_that_exist():
    known = {f.name for f in dataclasses.fields(PruneConfig)} | {
        f"{section}.{f.name}"
        for section, cls in (
            ("calibration", Calibration),
            ("evaluation", Evaluation),
            ("reconstruction", Reconstruction),
            ("structured", Structured),
        )
        for f in dataclasses.fields(cls)
    }
    tables = [
        *effects.RUN,
        *(f"calibration.{n}" for n in effects.CALIBRATION),
        *(f"evaluation.{n}" for n in effects.EVALUATION),
    ]
    assert set(tables) <= known
    always = {
        "model",
        "output",
        "pattern",
        "sparsity",
        "reconstruct",
        "targets",
        "ignore",
        "dtype",
        "device",
        "backend",
        "backends",
        "seed",
        "memory_budget_gb",
        "stream",
        "calibration",
        "evaluation",
        "reconstruction",
        "structured",
        "calibration.seed",
        "evaluation.enabled",
        "reconstruction.layerwise_target",
        "structured.allocation",
        "structured.nonstandard",
    }
    assert known - set(tables) <= always, "every field is in the table or always has an effect"


def test_criteria_that_look_at_weights_alone_are_the_others():
    assert set(effects.WEIGHTS_ALONE) == set(pyprune.config.CRITERIA) - {*NEEDS_MOMENTS, *NEEDS_GRADIENTS}


def test_the_command_line_and_the_python_api_refuse_alike(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["prune", str(folder), "-o", str(tmp_path / "out"), "--method", "wanda", "--damping", "0.1"])
    assert stop.value.code == 2 and "--damping 0.1 would do nothing" in capsys.readouterr().err
    model = tiny.model("llama")
    with pytest.raises(ConfigError, match="damping=0.1 would do nothing"):
        pyprune.prune(model, method="wanda", damping=0.1, calibration=tiny.ids(4, 16))
    (tmp_path / "run.yaml").write_text("method: wanda\ndamping: 0.1\n")
    with pytest.raises(ConfigError, match="damping=0.1 would do nothing"):
        pyprune.plan(from_yaml(tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match="evaluation.bos=False would do nothing"):
        pyprune.evaluate(model, tiny.ids(2, 9), bos=False)


@pytest.mark.parametrize(
    "options",
    [["--criterion", "wifv"], ["--damping", "0.01"], ["--epochs", "5"]],
)
def test_an_option_that_names_the_default_is_refused_as_well(folder, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        commands.main(["prune", str(folder), "-o", str(tmp_path / "out"), "--method", "wanda", *options])
    assert stop.value.code == 2 and f"{' '.join(options)} would do nothing" in capsys.readouterr().err


def test_options_make_fields_of_the_file_idle_but_not_one_another():
    base = from_dict(
        PruneConfig,
        {
            "damping": 0.1,
            "calibration": {"source": "org/name", "subset": "en"},
            "evaluation": {"text": "a.txt", "window": 64},
        },
    )
    changed = override(
        base,
        {
            "method": "wanda",
            "reconstruct": "none",
            "calibration": {"source": "x.txt"},
            "evaluation": {"enabled": False},
        },
    )
    assert changed.damping == PruneConfig().damping and changed.calibration.subset is None
    assert changed.evaluation == Evaluation(enabled=False)
    with pytest.raises(ConfigError, match="damping=0.2 would do nothing"):
        override(base, {"method": "wanda", "reconstruct": "none", "damping": 0.2})
    with pytest.raises(ConfigError, match="calibration.subset='de' would do nothing"):
        override(base, {"calibration": {"source": "x.txt", "subset": "de"}})


def test_a_source_in_memory_is_named_by_its_kind():
    with pytest.raises(ConfigError, match="calibration.source=<Tensor in memory> would do nothing"):
        PruneConfig(method="magnitude", probe_samples=0, calibration=Calibration(source=torch.ones(2, 2)))


def test_commands_refuse_their_own_options_that_do_nothing(folder, tmp_path, capsys):
    for arguments, sentence in [
        (["prune", str(folder), "--plan", "--resume"], "--resume would do nothing"),
        (["eval", str(folder), "--against", str(folder)], "--against would do nothing"),
        (["eval", str(folder), "--plot", "x.png"], "--plot would do nothing"),
        (["eval", str(folder), "--latency", "--text", "x.txt"], "--text would do nothing"),
        (["eval", str(folder), "--latency", "--device", "cpu"], "--device would do nothing"),
    ]:
        with pytest.raises(SystemExit) as stop:
            commands.main(arguments)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and sentence in err, err


def test_arguments_of_prune_and_refine_that_do_nothing(folder):
    with pytest.raises(ConfigError, match="in_place=True would do nothing"):
        pyprune.prune(str(folder), in_place=True, method="magnitude")
    with pytest.raises(ConfigError, match="resume=True would do nothing"):
        pyprune.prune(tiny.model("llama"), resume=True, method="magnitude")
    for settings in (
        {"settings": Reconstruction(layerwise_target="dense")},
        {"calibration": Calibration(source=tiny.ids(8, 16), num_samples=4, self_generated=2, self_generated_for="all")},
    ):
        with pytest.raises(ConfigError, match="would do nothing"):
            pyprune.refine(tiny.model("llama"), tiny.model("llama"), **{"calibration": tiny.ids(4, 16), **settings})


def test_a_text_for_a_model_without_perplexity(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    evaluation = Evaluation(text=tiny.ids(2, 9))
    for attempt in (
        lambda: pyprune.prune(tiny.model("bert"), calibration=tiny.ids(4, 16), evaluation=evaluation),
        lambda: pyprune.plan(PruneConfig(model=str(tmp_path), evaluation=evaluation)),
    ):
        with pytest.raises(ConfigError, match="evaluation.text=<Tensor in memory> would do nothing: BertModel"):
            attempt()
