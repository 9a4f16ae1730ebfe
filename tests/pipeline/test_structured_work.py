"""Structured runs stream, resume and share their work as mask runs do: the same bytes, whatever way they went."""

from __future__ import annotations

import json
import threading

import pytest
import tiny
import torch
import transformers
from same_bytes import assert_same, source

import pyprune
from pyprune.config import ConfigError, Evaluation
from pyprune.evaluation.block_by_block import Meter
from pyprune.execution.journal import Interrupted, Journal
from pyprune.pipeline.prune import prune
from pyprune.structured.moments import Split


def run(model, output, **fields):
    settings = {
        "pattern": "structured",
        "sparsity": 0.5,
        "reconstruct": "liar",
        "calibration": tiny.ids(15, 24),
        "evaluation": Evaluation(text=tiny.ids(3, 24)),
        **fields,
    }
    return prune(str(model), output=str(output), progress=False, **settings)


FIELDS = {
    "propagated": dict(inputs="propagated"),
    "sequential": dict(inputs="sequential", criterion="obs_greedy"),
    "dense": dict(inputs="dense", criterion="obs_greedy"),
    "neurons": dict(pattern="neurons", criterion="random", reconstruct="bias"),
    "global": dict(pattern="neurons", inputs="dense", structured={"allocation": "global", "nonstandard": "save"}),
    "padded": dict(pattern="neurons", inputs="propagated", structured={"allocation": "global", "nonstandard": "pad"}),
    "sequential, padded": dict(inputs="sequential", structured={"allocation": "global", "nonstandard": "pad"}),
    "bfloat16": dict(dtype="bfloat16", compute_dtype="float32"),
    "magnitude": dict(criterion="magnitude", reconstruct="none"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_streamed_gives_the_bytes_of_a_model_in_memory(tmp_path, name):
    path = source(tmp_path / "dense")
    whole = run(path, tmp_path / "whole", stream="never", **FIELDS[name])
    streamed = run(path, tmp_path / "streamed", stream="always", **FIELDS[name])
    assert_same(tmp_path / "whole", tmp_path / "streamed")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) == 4  # a shard per block, one for the rest
    for a, b in zip(whole.report["evaluation"], streamed.report["evaluation"]):
        assert a["dense"] == b["dense"] and a["pruned"] == b["pruned"]
    assert whole.report["structured"] == streamed.report["structured"]
    assert whole.report["warnings"] == streamed.report["warnings"]
    ids = tiny.ids(2, 16)
    assert torch.equal(pyprune.load(tmp_path / "streamed").model(ids).logits, whole.model(ids).logits)
    if streamed.report["structured"]["standard"]:
        plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(plain(ids).logits, whole.model(ids).logits)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "phi3", "gemma2", "bert"])
def test_other_architectures_stream(tmp_path, architecture):
    path = source(tmp_path / "dense", architecture)
    fields = dict(pattern="neurons", evaluation=Evaluation(enabled=False))
    run(path, tmp_path / "whole", stream="never", **fields)
    run(path, tmp_path / "streamed", stream="always", **fields)
    assert_same(tmp_path / "whole", tmp_path / "streamed")


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("name", FIELDS)
def test_every_way_resumes_to_the_same_bytes_and_report(tmp_path, stop_after, name, stream):
    path = source(tmp_path / "dense")
    whole = run(path, tmp_path / "whole", stream=stream, **FIELDS[name])
    for count in (1, 2):
        stop_after(count)
        with pytest.raises(Interrupted, match=f"{count} of 3 blocks done"):
            run(path, tmp_path / "parts", stream=stream, resume=count > 1, **FIELDS[name])
    stop_after(-1)
    ended = run(path, tmp_path / "parts", stream=stream, resume=True, **FIELDS[name])
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / ".pyprune").exists()
    assert ended.report["structured"] == json.loads(json.dumps(whole.report["structured"]))
    assert [row["error"] for row in ended.report["blocks"]] == [row["error"] for row in whole.report["blocks"]]


def test_a_list_of_sparsities_resumes(tmp_path, stop_after):
    path, fields = source(tmp_path / "dense"), dict(sparsity=[0.25, 0.5], inputs="dense")
    whole = run(path, tmp_path / "whole", **fields)
    stop_after(2)
    with pytest.raises(Interrupted):
        run(path, tmp_path / "parts", **fields)
    stop_after(-1)
    ended = run(path, tmp_path / "parts", resume=True, **fields)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert list(ended.models) == [0.25, 0.5]
    for a, b in zip(whole.report["structured"]["curve"], ended.report["structured"]["curve"]):
        assert a["evaluation"][0]["pruned"] == b["evaluation"][0]["pruned"] and a["parameters"] == b["parameters"]


def test_a_list_whose_checkpoints_were_only_left_to_move_is_completed(tmp_path, monkeypatch):
    path, fields = source(tmp_path / "dense"), dict(sparsity=[0.25, 0.5], inputs="dense")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "publish", lambda self: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            run(path, tmp_path / "parts", **fields)
    ended = run(path, tmp_path / "parts", resume=True, **fields)
    assert list(ended.models) == [0.25, 0.5]
    sizes = [sum(p.numel() for p in model.parameters()) for model in ended.models.values()]
    assert sizes[0] > sizes[1]


def test_what_looks_at_the_whole_model_says_so(tmp_path):
    path = source(tmp_path / "dense")
    with pytest.raises(ConfigError, match="cannot be streamed: criterion 'fisher' differentiates the whole model"):
        run(path, tmp_path / "out", stream="always", criterion="fisher")
    with pytest.raises(ConfigError, match="cannot be streamed: several sparsities of heads and neurons make several"):
        run(path, tmp_path / "out", stream="always", sparsity=[0.25, 0.5], inputs="dense")


class Threads:
    """A world of two threads."""

    size = 2

    def __init__(self):
        self.barrier, self.boxes = threading.Barrier(2, timeout=60), []

    def sum_(self, *tensors):
        for tensor in tensors:
            if tensor is not None:
                self.boxes.append(tensor.clone())
                self.barrier.wait()
                tensor.copy_(self.boxes[0] + self.boxes[1])
                self.barrier.wait()
                self.boxes.clear()
                self.barrier.wait()


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_two_processes_are_those_of_all_tokens(weighted):
    """Each has shifts of its own; products about a common one are exact in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 7, generator=generator) * torch.arange(1, 8) + 5
    e = torch.randn(90, 3, generator=generator) - 2
    held = torch.arange(90) % 5 == 4
    w = torch.rand(90, generator=generator) + 0.1 if weighted else None

    def part(rows):
        split = Split.make(7, 3)
        split.update(x[rows], held[rows], e[rows], None if w is None else w[rows])
        return split

    parts, whole, world = [part(slice(0, 40)), part(slice(40, 90))], part(slice(0, 90)), Threads()
    threads = [threading.Thread(target=one.sum_over, args=(world,)) for one in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in parts:
        assert one.count == whole.count == 90
        for centred in (True, False):
            a, b = one.view(centred), whole.view(centred)
            for mine, want in ((a.fit, b.fit), (a.held, b.held)):
                torch.testing.assert_close(mine.second, want.second, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(mine.cross, want.cross, rtol=1e-5, atol=1e-5)
                assert float(mine.square) == pytest.approx(float(want.square), rel=1e-5)
            torch.testing.assert_close(a.point, b.point, rtol=1e-6, atol=1e-6)
        aweights = None if w is None else w.double()
        covariance = torch.cov(x.double().T, correction=0, aweights=aweights)
        torch.testing.assert_close(one.second(True), covariance, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.variance, x.double().var(0, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(pattern="heads", sparsity=0.2), r"sparsity 0\.2 would remove nothing: heads go in steps of one in 2"),
        (dict(targets=["layers.1"]), "makes a model that stock tools cannot load.*nonstandard='save'"),
        (dict(targets=["down_proj"], pattern="neurons"), "leave no whole neurons to prune"),
    ],
    ids=["nothing goes", "not a stock model", "no group"],
)
def test_what_the_sizes_forbid_is_refused_before_anything_is_measured(tmp_path, monkeypatch, fields, said):
    measured = []
    monkeypatch.setattr(Meter, "__call__", lambda self, *a, **o: measured.append(a) or [])
    with pytest.raises(ConfigError, match=said):
        run(source(tmp_path / "dense"), tmp_path / "out", **fields)
    assert measured == [] and not (tmp_path / "out").exists()
