"""What on a GPU would wait for it: told by counting the numbers that are read."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.config import Evaluation
from pyprune.ops import guards, reference
from pyprune.pipeline.prune import prune
from pyprune.structured.moments import Split

aten = torch.ops.aten


class Seen(TorchDispatchMode):
    """Operators that ran, and those of them that read a number from the device."""

    READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default)

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(self.calls[func] for func in self.READS)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_16_bit_statistics_run_on_tensor_cores_and_wait_for_nothing(dtype, masked, monkeypatch):
    """As far as a machine without one can tell: which product is asked for, and that no number is read."""
    products = []

    def addmm(total, y, x, *, out_dtype):
        products.append((y.dtype, x.dtype, out_dtype))
        return total + y.float() @ x.float()

    monkeypatch.setattr(reference, "_tensor_cores", lambda x: x.dtype != torch.float32)
    monkeypatch.setattr(torch, "addmm", addmm)
    x, y = (torch.randn(300, c).to(dtype) for c in (64, 32))
    gram, cross, sums = (torch.zeros(shape) for shape in ((64, 64), (32, 64), 64))
    count, mask = torch.tensor(0), torch.arange(300) % 3 > 0 if masked else None
    with Seen() as seen:
        reference.gram_update(gram, x, sums=sums, count=count, mask=mask)
        reference.cross_gram_update(cross, y, x, mask=mask)
        moments = reference.column_moments(x, mask=mask)
        guards.gram(gram, x, count)
        guards.moments(x, *moments)
    assert products == [(dtype, dtype, torch.float32)] * 2 and not seen.reads
    wide, other = (t.double() if mask is None else t[mask].double() for t in (x, y))
    assert int(count) == len(wide) == int(moments[0])
    torch.testing.assert_close(gram.double(), wide.T @ wide, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cross.double(), other.T @ wide, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments[2].double(), (wide - wide.mean(0)).square().sum(0), rtol=1e-4, atol=1e-4)


def test_liars_moments_wait_for_nothing():
    with Seen() as seen:
        real = Split.make(64, 32)
        real.update(torch.randn(300, 64), torch.arange(300) % 5 == 4, torch.randn(300, 32), torch.rand(300))
        real.fit.flush()
    assert seen.calls[aten.nonzero.default] == 2, "of the marks in host memory alone"
    assert seen.reads == 2 and real.count == 300 and real.held.count == 60


def test_reads_of_a_run_depend_on_blocks_alone():
    """Not on batches: a pass over the calibration data asks the device for nothing."""

    def reads(batch_size: int, blocks: int) -> int:
        model = tiny.model("llama", num_hidden_layers=blocks)
        with Seen() as seen:
            prune(
                model,
                calibration=tiny.ids(12, 24),
                evaluation=Evaluation(enabled=False),
                progress=False,
                batch_size=batch_size,
                in_place=True,
            )
        return seen.reads

    block = reads(12, 3) - reads(12, 2)
    once = 18 + 9  # least and greatest of each weight, to know that all are finite, and its fingerprint
    assert reads(2, 3) - reads(2, 2) == block == once + 6
