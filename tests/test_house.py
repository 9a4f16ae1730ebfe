"""The house: every module has its tests, in the file of its name or where the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyprune

TESTS = Path(__file__).parent
PACKAGE = Path(pyprune.__file__).parent

TESTED_IN = {
    "__main__": "cli/test_commands.py",
    "devices": "execution/test_executor.py",
    "sources": "test_effects.py",
    "cli/environment": "cli/test_commands.py",
    "cli/packing": "packed/test_files.py",
    "cli/options": "test_config.py",
    "cli/studies": "studies/test_study.py",
    "cli/watching": "watching/test_check.py",
    "config/calibration": "test_config.py",
    "config/checks": "test_config.py",
    "config/evaluation": "test_config.py",
    "config/files": "test_config.py",
    "config/mappings": "test_config.py",
    "config/patterns": "test_config.py",
    "config/reconstruction": "test_config.py",
    "config/run": "test_config.py",
    "config/structured": "test_config.py",
    "config/values": "test_config.py",
    "data/texts": "data/test_calibration.py",
    "evaluation/block_by_block": "model/test_arguments.py",
    "evaluation/latency": "evaluation/test_gain.py",
    "evaluation/windows": "evaluation/test_perplexity.py",
    "execution/device": "execution/test_executor.py",
    "execution/run": "pipeline/test_prune.py",
    "execution/trust": "pipeline/test_guards.py",
    "execution/unopened": "planning/test_plan.py",
    "masks/block": "pipeline/test_prune.py",
    "model/architecture": "model/test_origin.py",
    "model/expert_products": "model/test_routing.py",
    "model/kinds": "pipeline/test_sparsities.py",
    "model/packed_shards": "packed/test_files.py",
    "model/recording": "model/test_relative_positions.py",
    "model/sizes": "structured/test_slicing.py",
    "model/skeleton": "planning/test_costs.py",
    "model/sparsities": "pipeline/test_sparsities.py",
    "ops/arguments": "ops/test_ops.py",
    "ops/backends": "ops/test_qualification.py",
    "ops/choice": "ops/test_qualification.py",
    "ops/classes": "ops/test_qualification.py",
    "ops/guards": "pipeline/test_guards.py",
    "ops/reference": "ops/test_ops.py",
    "ops/trials": "ops/test_qualification.py",
    "packed/card": "packed/test_files.py",
    "pipeline/block_loop": "execution/test_journal.py",
    "pipeline/checks": "pipeline/test_bad_input.py",
    "pipeline/mask_work": "reconstruction/test_passes.py",
    "pipeline/opening": "execution/test_weight_streaming.py",
    "pipeline/passes": "planning/test_passes.py",
    "pipeline/phases": "pipeline/test_prune.py",
    "pipeline/refine_request": "pipeline/test_refine.py",
    "pipeline/refine_work": "pipeline/test_refine_checkpoint.py",
    "pipeline/result": "pipeline/test_structured_end_to_end.py",
    "pipeline/sequences": "pipeline/test_shared.py",
    "pipeline/session": "pipeline/test_shared.py",
    "reconstruction/trained_window": "reconstruction/test_training.py",
    "reporting/comparison": "cli/test_commands.py",
    "reporting/console": "cli/test_commands.py",
    "reporting/inspection_table": "cli/test_commands.py",
    "reporting/plan_table": "planning/test_plan.py",
    "reporting/plotting": "reporting/test_quantiles.py",
    "reporting/record": "model/test_checkpoint.py",
    "reporting/summary": "pipeline/test_several.py",
    "structured/block": "pipeline/test_structured_end_to_end.py",
    "structured/block_probe": "structured/test_groups.py",
    "structured/config_edits": "structured/test_slicing.py",
    "structured/consumers": "structured/test_sequential.py",
    "structured/observation": "structured/test_liar_weights.py",
    "structured/preparation": "pipeline/test_structured_work.py",
    "structured/stop_order": "structured/test_sequential.py",
    "structured/units": "pipeline/test_structured_work.py",
}
"""Module → the test file that would see it broken, where that is not ``tests/<package>/test_<module>.py``."""


def modules() -> list[str]:
    """``package/module`` of every file of pyprune; the kernels' packages are tested through ``ops``."""
    found = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return sorted(
        path.as_posix()
        for path in found
        if path.name != "__init__" and not path.as_posix().startswith("triton_kernels/")
    )


def beside(module: str) -> Path:
    package, _, name = module.rpartition("/")
    return TESTS / package / f"test_{name}.py"


@pytest.mark.parametrize("module", modules())
def test_every_module_has_its_tests(module):
    own, listed = beside(module), module in TESTED_IN
    assert listed or own.is_file(), f"write tests/{own.relative_to(TESTS)}, or name another file in TESTED_IN"
    assert not (listed and own.is_file()), f"tests/{own.relative_to(TESTS)} exists: take {module!r} out of TESTED_IN"


@pytest.mark.parametrize("module", TESTED_IN)
def test_the_table_names_what_exists(module):
    assert module in modules(), f"pyprune has no {module}.py: take it out of TESTED_IN"
    assert (TESTS / TESTED_IN[module]).is_file(), TESTED_IN[module]


def test_folders_of_tests_are_packages_of_pyprune():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")} - {"benchmarks"}
    assert folders <= packages, folders - packages


def test_no_package_is_named_like_a_public_function():
    """``pyprune.prune`` is the function, whatever was imported before it was first used."""
    taken = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert not taken & set(pyprune.__all__)
