"""Choice of launch configurations: a fixed default, a timed choice that is remembered, and the import guard."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyprune.triton_kernels as kernels
from pyprune import ops
from pyprune.ops import choice
from pyprune.triton_kernels import tuning

CUDA = torch.device("cuda", 0)
LIST = (tuning.config(4, BC=1), tuning.config(4, BC=2), tuning.config(8, big=True, BC=3))
SECONDS = {1: 3.0, 2: 2.0, 3: 1.0}


@pytest.fixture
def chip(monkeypatch, tmp_path):
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    found = SimpleNamespace(name="chip", shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(tuning, "_properties", lambda index: found)
    return found


def test_timings_lie_where_all_that_is_kept_does(monkeypatch, tmp_path):
    monkeypatch.delenv("PYPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert tuning.cache_file() == tmp_path / "caches" / "pyprune" / "kernels.json"
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "own"))
    assert tuning.cache_file() == tmp_path / "own" / "kernels.json"


def pick(tried):
    def trial(cfg):
        tried.append(cfg["BC"])
        trial.last = cfg["BC"]

    def timer(run):
        run()
        return SECONDS[trial.last]

    return tuning.pick("op", (8, 8), LIST, CUDA, trial, timer)["BC"]


def test_the_first_of_the_list_when_tuning_is_off(chip, monkeypatch, tmp_path):
    monkeypatch.delenv("PYPRUNE_AUTOTUNE", raising=False)
    tried = []
    assert pick(tried) == 1 and tried == [] and not list(tmp_path.iterdir())


def test_the_fastest_is_timed_once_and_kept_on_disk(chip, monkeypatch, tmp_path):
    monkeypatch.setenv("PYPRUNE_AUTOTUNE", "1")
    tried = []
    assert pick(tried) == 3 and tried == [1, 2, 3]
    monkeypatch.setattr(tuning, "_chosen", {})
    assert pick(tried) == 3 and tried == [1, 2, 3]
    (key,) = json.loads((tmp_path / "kernels.json").read_text())
    assert key.startswith("chip | triton ") and key.endswith("op | (8, 8)")


def test_chips_with_little_shared_memory_never_see_the_big_ones(chip, monkeypatch):
    monkeypatch.setenv("PYPRUNE_AUTOTUNE", "1")
    chip.shared_memory_per_block_optin = 99 * 1024
    assert pick([]) == 2


def test_a_damaged_or_outdated_cache_is_tuned_again(chip, monkeypatch, tmp_path):
    monkeypatch.setenv("PYPRUNE_AUTOTUNE", "1")
    for content in ("{", json.dumps({"other": "x"})):
        (tmp_path / "kernels.json").write_text(content)
        monkeypatch.setattr(tuning, "_chosen", {})
        tried = []
        assert pick(tried) == 3 and tried == [1, 2, 3]


def test_every_op_of_the_contract_has_a_triton_function():
    assert set(ops.OPS) <= set(kernels.__all__)


def test_ops_launch_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current device and its stream, so every op makes its tensors' device current before anything."""

    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device("cuda:1"))

    class Current:
        def __init__(self, device):
            assert device == torch.device("cuda:1")

        def __enter__(self):
            raise InterruptedError

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "device", Current)
    for name in kernels.__all__:
        if name not in ("attention", "linear", "trailing_update"):  # torch's own
            with pytest.raises(InterruptedError):
                getattr(kernels, name)(torch.empty(4, 4).as_subclass(Elsewhere))


def test_the_top_level_name_is_refused():
    source = Path(kernels.__file__)
    with pytest.raises(ImportError, match="pyprune.triton_kernels"):
        runpy.run_path(str(source), run_name="triton_kernels")


def test_triton_on_cpu_tensors_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "_loaded", {})
    with ops.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        ops.nm_mask(torch.ones(2, 4), 2, 4)
