"""Which runs a study makes of its values."""

from __future__ import annotations

import pytest

from pyprune.config import Calibration, ConfigError
from pyprune.studies.grid import Axes, make_grid


def names(axes: Axes, **common) -> list[str]:
    return [cell.name for cell in make_grid(axes, {"model": "m", **common}).cells]


def test_every_combination_that_is_a_run_once():
    axes = Axes(
        methods=("magnitude", "wanda"),
        patterns=("unstructured", "2:4", "neurons"),
        sparsities=(0.3, 0.5),
        reconstruct=(None, "none", "block+gp", "liar"),
        seeds=(0, 1),
    )
    grid = make_grid(axes, {"model": "m"})
    found = [cell.name for cell in grid.cells]
    assert len(set(found)) == len(found)
    assert [name for name in found if name.startswith("magnitude-unstructured-0.3-none")] == [
        "magnitude-unstructured-0.3-none-seed0"
    ], "None is magnitude's 'none'; without calibration a seed changes nothing"
    assert sum(name.startswith("wanda-2to4-0.5-none") for name in found) == 2, "2:4 has one sparsity, and two seeds"
    assert {name for name in found if "+gp" in name} == {
        f"{method}-{pattern}-block+gp-seed{seed}"
        for method in axes.methods
        for pattern in ("unstructured-0.3", "unstructured-0.5", "2to4-0.5")
        for seed in axes.seeds
    }
    assert {name for name in found if "neurons" in name} == {
        f"wifv-neurons-{sparsity}-{repair}-seed{seed}"
        for sparsity in axes.sparsities
        for repair in ("none", "liar")
        for seed in axes.seeds
    }
    assert any(text.startswith("wanda unstructured 0.3 + liar: reconstruct") for text in grid.left_out)
    for cell in grid.cells:
        assert cell.config.calibration.seed == cell.config.seed and cell.config.model == "m"


def test_structured_runs_on_dense_inputs_share_their_statistics():
    axes = Axes(patterns=("neurons",), sparsities=(0.5, 0.25), seeds=(0,))
    assert names(axes) == ["wifv-neurons-0.5-liar-seed0", "wifv-neurons-0.25-liar-seed0"]
    assert names(axes, inputs="dense") == ["wifv-neurons-0.25_0.5-liar-seed0"]


def test_common_fields_stay_where_they_do_something():
    axes = Axes(methods=("magnitude", "sparsegpt"), seeds=(0,))
    plain, swept = make_grid(axes, {"damping": 0.5, "calibration": {"num_samples": 7}}).cells
    assert plain.config.damping == 0.01 and swept.config.damping == 0.5
    assert swept.config.calibration.num_samples == 7
    whole = make_grid(axes, {"calibration": Calibration(num_samples=7)}).cells
    assert whole[1].config.calibration.num_samples == 7
    with pytest.raises(ConfigError, match="damping=0.5 would do nothing"):
        make_grid(Axes(methods=("magnitude",), seeds=(0,)), {"damping": 0.5})


@pytest.mark.parametrize(
    ("axes", "common", "message"),
    [
        (dict(methods=("wnda",)), {}, "did you mean 'wanda'"),
        (dict(reconstruct=("block+x",)), {}, r"only \+gp can follow"),
        (dict(reconstruct=("liar",)), {}, "no combination of the study's values is a run: sparsegpt unstructured"),
        (dict(), {"sparsity": 0.5}, "sparsity is what a study varies"),
    ],
)
def test_what_is_no_study_is_refused(axes, common, message):
    with pytest.raises(ConfigError, match=message):
        make_grid(Axes(**axes), common)


@pytest.mark.parametrize(("values", "message"), [((), "sparsities is empty"), ((0.5, 0.5), "twice: 0.5, 0.5")])
def test_axes_are_sets(values, message):
    with pytest.raises(ConfigError, match=message):
        Axes(sparsities=values)
