"""The ops by pytest-benchmark: ``pytest benchmarks --benchmark-only``.

One test per case and contender, at the sizes that the trials are timed on; a contender that its trial finds wrong fails
instead of being timed.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import ops_group
from pyprune.ops import classes, trials

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WANTED = ops_group.Wanted(DEVICE, "quick")
CASES = [
    pytest.param(key, size, name, id=f"{key}-{ops_group.label(key, size)}-{name}".replace(" ", "-").replace("×", "x"))
    for key, size in ops_group.cases(WANTED)
    for name in ops_group.contenders(key, WANTED)
]


@pytest.mark.parametrize(("key", "size", "name"), CASES)
def test_op(benchmark, key, size, name):
    implementation = ops_group.contenders(key, WANTED)[name]
    assert ops_group.correctness(key, name, implementation, DEVICE) == "green"
    case = trials.CASES[key][0](DEVICE, *size)
    benchmark.group = f"{classes.op_of(key)} {ops_group.label(key, size)}"
    inputs: list = []
    case.call(lambda *arguments, **options: inputs.append((arguments, options)) or case_results(case))
    arguments, options = inputs[0]

    def call():
        implementation(*arguments, **options)
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def case_results(case: trials.Case) -> tuple:
    """What a trial unpacks; the caller looks at the inputs alone."""
    want = case.want()
    return want if len(want) > 1 else want[0]
