"""The passes of all batches in step: all come to a place before any leaves it, and what stops them is put back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch

from pyprune.config import PruneConfig
from pyprune.data.calibration import CalibrationData, fingerprint
from pyprune.execution.executor import Executor
from pyprune.execution.lanes import Declined, Lanes, TooLarge, carried_through, changed_attribute
from pyprune.execution.run import Findings, Run
from pyprune.model.blocks import ModelView


@dataclass(frozen=True)
class Before:
    name: str
    place: int


class Noted(Lanes):
    """Stops before the attention and before the FFN, and notes who comes when."""

    def __init__(self, *given):
        super().__init__(*given)
        self.seen: list[tuple[str, int]] = []
        self.fails: BaseException | None = None

    def arrived(self, lane):
        self.seen.append((lane.at.name, lane.batch.start))
        if self.fails is not None and lane.batch.start and lane.at.place:
            raise self.fails

    def __call__(self):
        parts = [self.module.self_attn, self.module.mlp]
        handles = [
            part.register_forward_pre_hook(lambda *_, at=Before(name, place): self.halt(at))
            for place, (name, part) in enumerate(zip(("attention", "ffn"), parts))
        ]
        try:
            self.each(self.lanes)
            while (place := self.next_place()) is not None:
                self.seen.append(("place", place))
                self.each([lane for lane in self.lanes if lane.at is not None and lane.at.place == place])
        finally:
            self.abandon()
            for handle in handles:
                handle.remove()
        self.send()
        return self.seen


@pytest.fixture
def run():
    model = tiny.model("llama")
    ids = list(tiny.ids(6, 8))
    executor = Executor(ModelView(model), batch_size=2)
    data = CalibrationData(sequences=ids, fingerprint=fingerprint(ids), description="")
    return Run(PruneConfig(), ModelView(model), executor, [[] for _ in model.model.layers], data)


def lanes(run, stream, kind=Noted):
    going = kind(run, Findings(), 0, run.view.blocks[0])
    going.add(stream, stream, fit=True)
    return going


def test_all_batches_come_to_a_place_before_any_leaves_it_and_leave_the_block_s_outputs(run):
    stream = run.executor.embed(run.data.sequences)
    want = stream.like()
    run.executor.run(0, run.view.blocks[0], want, want)
    seen = lanes(run, stream)()
    first, second = ([(name, start) for start in (0, 2, 4)] for name in ("attention", "ffn"))
    assert seen == [*first, ("place", 0), *second, ("place", 1)]
    assert torch.equal(stream.data[8], want.data[8])


@pytest.mark.parametrize("error", [Declined("no"), TooLarge()], ids=["declined", "too large"])
def test_what_goes_wrong_halfway_leaves_the_stream_as_it_was(run, error):
    stream = run.executor.embed(run.data.sequences)
    before, going = stream.like(), lanes(run, stream)
    going.fails = error
    with pytest.raises(type(error)):
        going()
    assert torch.equal(stream.data[8], before.data[8])
    assert all(lane.going.done or not lane.going._thread.is_alive() for lane in going.lanes)


def test_batches_spill_and_are_halved_until_they_fit_and_then_declined(run):
    stream, sizes = run.executor.embed(run.data.sequences), []

    class Full(Noted):
        def __call__(self):
            sizes.append((self.batch, self.spill))
            raise TooLarge

    found = Findings()
    with pytest.raises(Declined, match="a single sequence does not fit on cpu beside the block"):
        carried_through(run.executor, found, 0, lambda: lanes(run, stream, Full))
    assert sizes == [(2, False), (2, True), (1, True)]
    assert run.executor.batch_size == 2, "those who run the block otherwise find what was asked"
    assert "batches of 2 sequences: batches of 1 from there on" in found.warnings[0]


def test_a_pass_that_leaves_its_mark_on_the_block_is_seen():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.inner = 0, torch.nn.Linear(2, 2)

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    block = Counts()
    assert "calls changes during a pass" in changed_attribute(block, lambda: block(torch.zeros(1, 2)))
    assert changed_attribute(block, lambda: block.inner(torch.zeros(1, 2))) is None
