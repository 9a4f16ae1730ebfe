"""Configuration: what it refuses, that it survives YAML, and that the command line has every field of it."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import keywords
from pyprune.cli import commands, options
from pyprune.config import (
    CRITERIA,
    METHODS,
    STRUCTURED_PATTERNS,
    Calibration,
    ConfigError,
    Evaluation,
    PruneConfig,
    Reconstruction,
    Structured,
    choices,
    from_dict,
    from_yaml,
    override,
    to_dict,
    to_yaml,
)

NOT_DEFAULT = {
    "model": "org/name",
    "output": "out dir",
    "method": "wanda",
    "pattern": "4:8",
    "sparsity": 0.5,
    "reconstruct": "block",
    "global_propagation": True,
    "targets": ["mlp", "layers.1?."],
    "ignore": ["v_proj"],
    "damping": 0.1,
    "seed": 3,
    "batch_size": 4,
    "dtype": "bfloat16",
    "memory_budget_gb": 1.5,
    "calibration": {
        "source": "x.npy",
        "num_samples": 8,
        "seq_len": 64,
        "seed": 5,
        "self_generated": 3,
        "language": "en",
    },
    "evaluation": {"text": ["a.txt", "b.npy"], "window": 128, "max_windows": None, "bos": False},
    "reconstruction": {"epochs": 2, "lr": 1e-3, "betas": (0.8, 0.9), "select": "validation"},
}
STRUCTURED = {
    "pattern": "structured",
    "sparsity": [0.1, 0.2],
    "structured": {"allocation": "global", "damping": 0.5, "nonstandard": "pad"},
}


@pytest.mark.parametrize("fields", [{}, NOT_DEFAULT, STRUCTURED, {"evaluation": {"enabled": False}}])
def test_yaml_round_trip(fields, tmp_path):
    config = from_dict(PruneConfig, fields)
    assert from_yaml(to_yaml(config)) == config
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "run.yaml") == config
    assert from_dict(PruneConfig, to_dict(config)) == config


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "method": st.sampled_from(METHODS),
            "sparsity": st.floats(0, 0.999),
            "seed": st.integers(0, 2**31),
            "damping": st.floats(1e-9, 1e3),
            "model": st.text(),
            "reconstruct": st.just("layer"),
            "targets": st.lists(st.text(), max_size=3),
            "batch_size": st.none() | st.integers(1, 99),
        },
    ).filter(
        lambda fields: (
            "damping" not in fields or fields.get("method", "sparsegpt") == "sparsegpt" or "reconstruct" in fields
        )
    )
    | st.fixed_dictionaries({"pattern": st.sampled_from(STRUCTURED_PATTERNS), "criterion": st.sampled_from(CRITERIA)})
)
def test_any_valid_configuration_survives_yaml(fields):
    config = PruneConfig(**fields)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    "cls, allowed",
    [
        (PruneConfig, {"method": METHODS, "criterion": CRITERIA}),
        (Calibration, {"self_generated_for": ("reconstruction", "all")}),
        (Evaluation, {"dtype": ("auto", "float32", "bfloat16", "float16")}),
        (Reconstruction, {"select": ("last", "validation")}),
        (Structured, {"nonstandard": ("refuse", "save", "pad")}),
    ],
)
def test_choices_come_from_the_types_and_anything_else_is_refused(cls, allowed):
    assert allowed.items() <= choices(cls).items()
    for name, values in choices(cls).items():
        assert getattr(cls(), name) in values
        for wrong in ("nothing", 3, [values[0]]):
            sentence = f"{name}.* must be one of .*{values[1]}, .*got {re.escape(repr(wrong))}"
            with pytest.raises(ConfigError, match=sentence):
                cls(**{name: wrong})


def test_betas_are_two():
    for betas in ((0.9,), (0.9, 0.95, 0.99)):
        with pytest.raises(ConfigError, match=re.escape(f"betas must be two numbers, got {betas!r}")):
            Reconstruction(betas=betas)


def test_what_follows_from_what():
    assert PruneConfig(pattern="2:4").sparsity == 0.5 and PruneConfig(pattern="1:4").sparsity == 0.75
    assert PruneConfig().sparsity == 0.5
    assert [PruneConfig(method=m).reconstruct for m in METHODS] == ["none", "none", "layer"]
    assert PruneConfig(pattern="neurons").reconstruct == "liar"
    assert PruneConfig(pattern="2:4").nm == (2, 4) and PruneConfig().nm is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\).* got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": 50}, "got 50; did you mean 0.5"),
        ({"sparsity": 1.5}, "got 1.5"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": True}, "got True"),
        ({"sparsity": "half"}, "got 'half'"),
        ({"sparsity": [], "pattern": "heads"}, "sparsity is an empty list"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "sparsity 0.3 contradicts pattern '2:4', which is sparsity 0.5"),
        ({"pattern": "4:2"}, "needs 0 < N < M.*did you mean '2:4'"),
        ({"pattern": "4:4"}, "needs 0 < N < M"),
        ({"pattern": "0:4"}, "needs 0 < N < M"),
        ({"pattern": "2:64"}, "M ≤ 16"),
        ({"pattern": "two to four"}, "pattern must be unstructured, N:M"),
        ({"pattern": "2-4"}, "got '2-4'; did you mean '2:4'"),
        ({"pattern": "neuron"}, "got 'neuron'; did you mean 'neurons'"),
        ({"method": "sparsgpt"}, "method must be one of .*did you mean 'sparsegpt'"),
        (
            {"reconstruct": "liar"},
            "for heads and neurons: set pattern='neurons', .*='unstructured' takes none, layer",
        ),
        ({"reconstruct": "layer", "pattern": "heads"}, "reconstruct for pattern 'heads' must be one of none, bias"),
        ({"criterion": "size", "pattern": "heads"}, "criterion must be one of"),
        ({"global_propagation": True, "inputs": "dense"}, "global_propagation needs inputs='propagated'"),
        ({"damping": 0.0}, "damping must be above 0, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"calibration": {"num_samples": -1}}, "num_samples must be at least 0, got -1"),
        ({"calibration": {"num_samples": 0}}, "there is nothing to calibrate on"),
        ({"calibration": {"seq_len": 1}}, "seq_len must be at least 2, got 1"),
        ({"calibration": ["x"]}, "calibration must be a Calibration or a mapping, got list"),
        ({"evaluation": {"window": 1}}, "window must be at least 2"),
        ({"evaluation": {"dtype": "int8"}}, "evaluation dtype must be one of"),
        ({"reconstruction": {"lr": 0.0}}, "lr must be above 0"),
        ({"sparsty": 0.5}, "unknown field 'sparsty' in config; did you mean 'sparsity'"),
        ({"calibration": {"samples": 3}}, "unknown field 'samples' in calibration.*num_samples"),
        ({"seed": "7"}, r"^seed must be int, got '7' \(str\)"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"backend": "cuda:0"}, "backend must be one of"),
        ({"backend": "obs_swep=cuda"}, "op in backend 'obs_swep=cuda' must be one of .*did you mean 'obs_sweep'"),
        ({"backend": "cuda,linear=fast"}, "backend of linear must be one of auto, cuda"),
        ({"backend": "linear=cpu,linear=cuda"}, "names two back-ends for linear"),
        ({"backends": "reference"}, "backends must map .*got 'reference'"),
        ({"backends": {"cpu": {"linear": 2}}}, "backends must map"),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        from_dict(PruneConfig, fields)
    assert "\n" not in str(refusal.value)


def test_a_pattern_by_itself_is_a_list_of_one():
    config = PruneConfig(targets="mlp", ignore="down_proj")
    assert (config.targets, config.ignore) == (["mlp"], ["down_proj"])
    assert from_yaml(to_yaml(config)) == config and "targets:\n- mlp\n" in to_yaml(config)
    assert override(None, {"targets": "mlp"}).targets == ["mlp"]


def test_yaml_that_is_not_a_configuration(tmp_path):
    for text, sentence in [
        ("a: [\n", "not valid YAML"),
        ("- 1\n- 2\n", "config must hold settings as lines of 'name: value', got list"),
        ("sparsty: 0.5\nseed: 1\n", "did you mean 'sparsity'"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            from_yaml(text)
    with pytest.raises(ConfigError, match="no such configuration file: nowhere.yaml"):
        from_yaml("nowhere.yaml")
    with pytest.raises(ConfigError, match="a Tensor cannot be written to YAML; give a path"):
        import torch

        to_yaml(PruneConfig(calibration=Calibration(source=torch.ones(2, 2))))


def test_override_changes_what_is_named_and_nothing_else():
    base = from_dict(PruneConfig, NOT_DEFAULT)
    changed = override(base, {"damping": 0.2, "calibration": {"seq_len": 32}})
    expected = {**to_dict(base), "damping": 0.2, "calibration": {**to_dict(base.calibration), "seq_len": 32}}
    assert to_dict(changed) == expected
    assert override(None, {"seed": 4}) == PruneConfig(seed=4)


def test_the_command_line_has_every_field_once_and_documents_it():
    signature = inspect.signature(commands.prune).parameters
    fields = keywords.configuration_fields()
    assert (
        len(fields)
        == sum(len(dataclasses.fields(c)) for c in (PruneConfig, Calibration, Evaluation, Reconstruction, Structured))
        - 4  # the sections
        - len(keywords.RECORDED)  # what a run writes down
    )
    own = {"model", "config", "plan", "resume", "track", "as_json"}
    assert len(signature) - len(own) == len(fields) - 1  # ``model`` is the argument
    group = typer.main.get_command(commands.app)
    flags = [flag for p in group.commands["prune"].params for flag in (*p.opts, *p.secondary_opts)]
    assert len(flags) == len(set(flags)), "two options share a flag"
    assert all(p.help for p in group.commands["prune"].params)
    evaluation = {flag for p in group.commands["eval"].params for flag in p.opts}
    assert {"--text", "--window", "--max-windows", "--dtype", "--device", "--json"} <= evaluation
    assert {
        "--method",
        "--sparsity",
        "--pattern",
        "--calibration",
        "--num-samples",
        "--seq-len",
        "--seed",
        "--config",
        "--plan",
        "--json",
        "--resume",
        "--text",
        "--window",
        "--max-windows",
        "--damping",
        "--criterion",
        "--reconstruct",
        "--self-generated",
        "--select",
        "--compute-dtype",
        "--dtype",
        "--device",
        "--backend",
        "--inputs",
        "--targets",
        "--ignore",
        "--memory-budget-gb",
        "-o",
    } <= set(flags)


def test_number_types_go_by_their_short_names_too():
    import torch

    config = PruneConfig(dtype="fp16", compute_dtype="bf16", evaluation={"dtype": "fp32"})
    assert (config.dtype, config.compute_dtype, config.evaluation.dtype) == ("float16", "bfloat16", "float32")
    assert PruneConfig(dtype=torch.float16) == PruneConfig(dtype="half")
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        PruneConfig(dtype="int8")


def test_options_become_the_configuration_they_name():
    given = {
        "sparsity": "0.1,0.3",
        "pattern": "neurons",
        "calibration.source": "x.txt",
        "evaluation.text": ["a.npy"],
        "global_propagation": False,
    }
    config = override(None, options.nested(given))
    assert (config.sparsity, config.calibration.source, config.evaluation.text) == ((0.1, 0.3), "x.txt", "a.npy")
    trained = override(None, options.nested({"reconstruct": "block", "reconstruction.betas": (0.5, 0.6)}))
    assert trained.reconstruction.betas == (0.5, 0.6)
    with pytest.raises(ConfigError, match="sparsity must be a number.* got 'half'"):
        options.nested({"sparsity": "half"})


def test_usual_inputs_follow_the_kind_of_run_and_new_fields():
    assert PruneConfig().inputs == PruneConfig(method="magnitude").inputs == "propagated"
    neurons = PruneConfig(pattern="neurons")
    assert neurons.inputs == "sequential"
    assert override(neurons, {"sparsity": [0.25, 0.5]}).inputs == "dense"
    assert override(PruneConfig(pattern="neurons", inputs="propagated"), {"sparsity": 0.25}).inputs == "propagated"
    assert from_yaml(to_yaml(neurons)) == neurons and from_yaml(to_yaml(PruneConfig(method="magnitude"))).inputs
