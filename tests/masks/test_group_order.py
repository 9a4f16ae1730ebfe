"""The order in which groups of layers are reached, learnt from one sequence, and the bytes of a token at a pause."""

from __future__ import annotations

import pytest
import tiny
import torch
import zoo

from pyprune.config import Calibration, PruneConfig
from pyprune.execution.executor import Executor
from pyprune.masks.group_order import record
from pyprune.model.blocks import ModelView, weights_of
from pyprune.planning.costs import paused_bytes


def order(model, *lengths: int, index: int = 0):
    executor = Executor(ModelView(model))
    stream = executor.embed([tiny.ids(1, length, seed=length)[0] for length in lengths])
    with executor.compute(index) as module:
        return record(executor, index, module, weights_of(module), stream)


def names(found) -> list[list[str]]:
    return [[ref.name.removesuffix(".weight").rpartition(".")[2] for ref in group.refs] for group in found.groups]


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt_neox", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
        ("falcon", [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]),  # both read one norm's output
        ("bert", [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]),
    ],
)
def test_groups_come_in_the_order_of_their_use(family, expected):
    assert names(order(zoo.build(family), 16)) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_the_recorded_sequence_does_not_reach_have_the_places_of_the_others(family):
    model = zoo.build(family)
    index = len(ModelView(model).blocks) - 1
    short, long = order(model, 1, index=index), order(model, 40, index=index)
    assert [group.refs for group in short.groups] == [group.refs for group in long.groups]
    experts = [ref for group in short.groups for ref in group.refs if ref.expert is not None]
    assert len(experts) == 8
    for number in range(4):  # an expert's second product needs its first
        first, second = (
            next(k for k, ref in enumerate(experts) if ref.expert == number and kind in ref.path)
            for kind in ("gate_up", "down")
        )
        assert first < second


def test_weights_that_are_multiplied_by_twice_are_found():
    assert "multiplied by several times" in order(zoo.build("albert"), 16).trouble


def test_the_longest_sequence_tells_the_bytes_of_a_token():
    found = order(tiny.model("llama"), 8, 24)
    # before down: the residual after attention and the product of gate and up (widths 32 and 64), float32
    assert found.token_bytes >= 4 * (32 + 64) and found.token_bytes < 4 * (32 + 64 + 6 * 32)


@pytest.mark.parametrize("family, widest", [("llama", 64), ("opt", 64), ("gpt2", 128)])
def test_the_plan_s_estimate_is_near_what_a_run_measures(family, widest):
    config = PruneConfig(inputs="sequential", probe_samples=0, calibration=Calibration(num_samples=10, seq_len=24))
    planned = paused_bytes(config, 32, widest, torch.float32) / 240
    assert 0.5 < planned / order(tiny.model(family), 24).token_bytes < 2
