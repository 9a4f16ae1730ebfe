"""What a run with reconstruction makes of its blocks: the fewest passes, GP's second Gram, memory that runs out."""

from __future__ import annotations

import pytest
import tiny
import torch
from fast import FAST, equal, run, state

from pyprune.config import Calibration, ConfigError, Evaluation, Reconstruction
from pyprune.execution.executor import Executor
from pyprune.masks.solvers import dense_target_start, inverse_factor
from pyprune.masks.statistics import Statistics
from pyprune.pipeline import mask_work
from pyprune.pipeline.prune import prune
from pyprune.reconstruction.trained_window import TrainedWindow

LOCAL, GLOBAL = {"global_propagation": False}, {"global_propagation": True}


@pytest.mark.parametrize(
    "fields, passes, visits",
    [
        ({"reconstruct": "layer"}, [2, 2, 1], [0, 0, 0]),  # statistics, on to the next block
        ({"reconstruct": "layer", **GLOBAL}, [3, 3, 2], [0, 0, 0]),  # and the dense stream, beside the statistics
        ({"reconstruct": "block", **LOCAL}, [2, 2, 1], [1, 1, 1]),  # the statistics pass leaves the targets
        ({"reconstruct": "block", **GLOBAL}, [3, 3, 2], [1, 1, 1]),  # and the dense stream
        ({"reconstruct": "cross_block", **GLOBAL}, [4, 4, 2], [2, 2, 2]),  # and on from the first and the second visit
        ({"reconstruct": "cross_block", **LOCAL}, [4, 5, 3], [2, 2, 2]),  # targets behind two different prefixes
    ],
)
def test_blocks_run_no_more_often_than_the_method_needs(fields, passes, visits, monkeypatch):
    counts, trained = [0] * 3, [0] * 3
    forward, train = Executor.forward, TrainedWindow.__call__

    def counting(self, index, module, hidden, beside):
        counts[index] += len(hidden)
        return forward(self, index, module, hidden, beside)

    def training(self, hidden, beside):
        for index in self.indices:
            trained[index] += len(hidden)
        return train(self, hidden, beside)

    monkeypatch.setattr(Executor, "forward", counting)
    monkeypatch.setattr(TrainedWindow, "__call__", training)
    prune(
        tiny.model("llama"),
        calibration=Calibration(source=tiny.ids(12, 24), num_samples=12, seq_len=24, held_out=0),
        evaluation=Evaluation(enabled=False),
        progress=False,
        probe_samples=0,
        batch_size=4,
        **(fields | ({"reconstruction": FAST} if any(visits) else {})),
    )
    assert [count / 12 for count in counts] == passes
    assert [count / 12 for count in trained] == [FAST.epochs * n for n in visits]


def test_dense_blocks_cost_no_targets(monkeypatch):
    """Nothing is pruned in the first two blocks: they only pass the stream on."""
    counts, forward = [0] * 3, Executor.forward
    monkeypatch.setattr(
        Executor,
        "forward",
        lambda self, index, *a: (counts.__setitem__(index, counts[index] + len(a[1])), forward(self, index, *a))[1],
    )
    prune(
        tiny.model("llama"),
        calibration=tiny.ids(12, 24),
        evaluation=Evaluation(enabled=False),
        reconstruction=FAST,
        progress=False,
        probe_samples=0,
        reconstruct="block",
        targets=["layers.2."],
    )
    assert [count / 12 for count in counts] == [1, 1, 1]


def test_dense_target_start_is_least_squares_between_two_streams():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    dense = x + 0.3 * torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    statistics = Statistics(12, torch.device("cpu"))
    statistics.update(x)
    statistics.cross = dense.T @ x
    factor = inverse_factor(statistics.gram, statistics.count, 1e-7)
    got = dense_target_start(weight, statistics, factor)
    want = torch.linalg.lstsq(x.double(), (dense @ weight.T).double()).solution.T
    assert torch.allclose(got.double(), want, atol=1e-4)
    statistics.cross = statistics.gram.clone()
    assert torch.equal(dense_target_start(weight, statistics, factor), weight)


def test_layer_wise_dense_targets_lower_the_error_against_the_dense_stream():
    local = run(samples=64, method="sparsegpt", reconstruct="layer")
    dense = run(samples=64, method="sparsegpt", reconstruct="layer", global_propagation=True)
    assert equal({k: v for k, v in state(local).items() if "layers.0." in k}, state(dense))
    assert dense.report["blocks"][-1]["error"] < local.report["blocks"][-1]["error"]


@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp.down_proj"])
def test_both_streams_count_once_where_one_of_them_does_not_fit(where, call, monkeypatch):
    """The dense stream's pass fails, or the other's behind it, in the first batch or the second."""

    def statistics(fails):
        found, model = {}, tiny.model("llama")
        gather = mask_work.gather

        def watched(run, findings, index, *args, **streams):
            calls = iter(range(100))

            def refuse(module, arguments):
                if index == 1 and fails and next(calls) == call:
                    raise torch.OutOfMemoryError("simulated")

            handle = run.view.blocks[1].get_submodule(where).register_forward_pre_hook(refuse, prepend=True)
            observer = gather(run, findings, index, *args, **streams)
            handle.remove()
            found[index] = {name: (int(s.count), s.gram.clone(), s.cross.clone()) for name, s in observer.sinks.items()}
            found[index, "dense"] = torch.cat([d.flatten() for d in streams["dense"].data.values()])
            return observer

        with monkeypatch.context() as patch:
            patch.setattr(mask_work, "gather", watched)
            result = prune(
                model,
                calibration=tiny.ids(16, 24),
                evaluation=Evaluation(enabled=False),
                progress=False,
                reconstruct="layer",
                global_propagation=True,
                probe_samples=0,
                batch_size=8,
                in_place=True,
            )
        return found, result.report["warnings"]

    (got, warned), (want, quiet) = statistics(True), statistics(False)
    assert "ran out of memory" in warned[0] and not quiet
    for name, (count, gram, cross) in want[1].items():
        assert got[1][name][0] == count == 16 * 24
        for a, b in zip(got[1][name][1:], (gram, cross)):
            assert (a - b).norm() / b.norm() < 1e-6
    assert torch.allclose(got[1, "dense"], want[1, "dense"], atol=1e-4)


def tight(most, where="model.layers.0.mlp.down_proj"):
    """A model that runs out of memory with more than ``most`` sequences where gradients are kept."""
    model = tiny.model("llama")

    def refuse(module, arguments):
        if torch.is_grad_enabled() and len(arguments[0]) > most:
            raise torch.OutOfMemoryError("simulated")

    model.get_submodule(where).register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("fields", [{}, {"reconstruct": "cross_block", "global_propagation": True}])
def test_training_that_runs_out_of_memory_takes_the_same_steps(fields):
    got = run(tight(1), method="magnitude", **fields)
    want = run(
        method="magnitude", reconstruction=Reconstruction(epochs=3, batch_size=4, lr=2e-3, micro_batch_size=1), **fields
    )
    assert equal(state(got), state(want))
    warned = [text for text in got.report["warnings"] if "ran out of memory" in text]
    assert len(warned) == 2 and "set micro_batch_size=1 " in warned[-1] and not want.report["warnings"]
    for a, b in zip(got.report["blocks"], want.report["blocks"]):
        assert [t["loss"] for t in a["training"]] == [t["loss"] for t in b["training"]]


def test_training_that_runs_out_of_memory_with_one_sequence_stops_and_resumes(tmp_path):
    """Finished blocks are safe, and go on where there is room."""
    output, fields = str(tmp_path / "out"), {"method": "magnitude"}
    with pytest.raises(ConfigError, match=r"one sequence of 24 tokens does not fit.* blocks \[1\].*\(about 12\)"):
        run(tight(0, "model.layers.1.mlp.down_proj"), output=output, **fields)
    resumed = run(output=output, resume=True, **fields)
    assert equal(state(resumed), state(run(**fields)))
