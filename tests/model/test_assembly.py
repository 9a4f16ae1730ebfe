"""Checkpoints made of the shards that a run has written: the same model for transformers, no weight written twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from same_bytes import stored

from pyprune.config import Calibration, Evaluation, Reconstruction
from pyprune.execution.journal import Interrupted, Journal
from pyprune.model import assembly, checkpoint
from pyprune.model.blocks import ModelView
from pyprune.pipeline.prune import prune
from pyprune.pipeline.refine_checkpoint import refine_checkpoint


def run(model, output, **fields):
    fields = {"calibration": tiny.ids(6, 16), "evaluation": Evaluation(enabled=False), **fields}
    return prune(model, output=str(output), progress=False, **fields)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).rglob("*.safetensors"))


def assert_same(one, other):
    one, other = stored(one), stored(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def logits(folder) -> torch.Tensor:
    """Of plain transformers, which must find every weight."""
    import transformers

    auto = (
        transformers.AutoModel
        if "roberta" in json.loads((Path(folder) / "config.json").read_text())["model_type"]
        else transformers.AutoModelForCausalLM
    )
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(tiny.ids(2, 12))[0]


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """The checkpoint of a run by its fields, written by transformers as one file."""

    def write(model, **fields):
        with monkeypatch.context() as patch:
            patch.setattr(assembly, "stores_as_held", lambda model, path: False)
            run(model, tmp_path / "plain", **fields)
        assert names(tmp_path / "plain") == ["model.safetensors"]
        return tmp_path / "plain"

    return write


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "roberta", "phi3"])
@pytest.mark.parametrize("live", [True, False])
def test_linked_blocks_are_the_model_that_transformers_would_write(tmp_path, plain, monkeypatch, architecture, live):
    model = tiny.model(architecture)
    if not live:
        model.save_pretrained(tmp_path / "dense")
        model = str(tmp_path / "dense")
    whole = plain(model)
    result = run(model, tmp_path / "out")
    assert names(tmp_path / "out") == [f"model-{k:05}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    assert_same(whole, tmp_path / "out")
    assert torch.equal(logits(whole), logits(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {path.stat().st_mode & 0o777 for path in whole.iterdir()}
    result.save(str(tmp_path / "again"))
    assert names(tmp_path / "again") == ["model.safetensors"], "nothing to link: one plain folder"
    assert_same(whole, tmp_path / "again")


@pytest.mark.parametrize(
    "fields",
    [
        dict(reconstruct="cross_block", reconstruction=Reconstruction(epochs=1)),
        dict(compute_dtype="bfloat16"),
        dict(dtype="bfloat16"),
        dict(pattern="structured", criterion="wifv", reconstruct="liar", sparsity=0.5),
        dict(
            pattern="neurons",
            criterion="wifv",
            reconstruct="liar",
            sparsity=0.5,
            structured={"nonstandard": "pad", "allocation": "global"},
        ),
    ],
)
def test_every_kind_of_run_links_what_it_would_have_written(tmp_path, plain, monkeypatch, fields):
    tiny.model("llama").save_pretrained(tmp_path / "dense")
    whole = plain(str(tmp_path / "dense"), **fields)
    run(str(tmp_path / "dense"), tmp_path / "out", **fields)
    assert len(names(tmp_path / "out")) == 4
    assert_same(whole, tmp_path / "out")
    assert torch.equal(logits(whole), logits(tmp_path / "out"))


def test_a_refinement_links_its_blocks_too(tmp_path, monkeypatch):
    tiny.model("llama").save_pretrained(tmp_path / "dense")
    run(str(tmp_path / "dense"), tmp_path / "pruned", method="wanda")
    assert len(names(tmp_path / "pruned")) == 4
    fields = dict(
        calibration=Calibration(source=tiny.ids(6, 16)),
        evaluation=Evaluation(enabled=False),
        progress=False,
        dense=str(tmp_path / "dense"),
        reconstruction=Reconstruction(epochs=1),
    )
    refine_checkpoint(tmp_path / "pruned", tmp_path / "linked", **fields)
    monkeypatch.setattr(assembly, "stores_as_held", lambda model, path: False)
    refine_checkpoint(tmp_path / "pruned", tmp_path / "plain", **fields)
    assert len(names(tmp_path / "linked")) == 4 and names(tmp_path / "plain") == ["model.safetensors"]
    assert_same(tmp_path / "linked", tmp_path / "plain")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_that_transformers_takes_apart_are_written_by_it(tmp_path, architecture):
    model = tiny.model(architecture)
    assert not assembly.stores_as_held(model, ModelView(model).path)
    run(model, tmp_path / "out", method="magnitude")
    assert names(tmp_path / "out") == ["model.safetensors"]
    assert any("experts.0." in name for name in stored(tmp_path / "out"))
    logits(tmp_path / "out")


def test_what_is_not_the_model_s_own_is_not_linked(tmp_path):
    """Several sparsities share a shard; one module at two places of the list is stored once."""
    run(
        tiny.model("llama"),
        tmp_path / "curve",
        pattern="neurons",
        criterion="wifv",
        sparsity=[0.25, 0.5],
        reconstruct="none",
    )
    assert names(tmp_path / "curve") == ["model.safetensors"] * 2
    model = tiny.model("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    assert not assembly.stores_as_held(model, "model.layers")
    own = tiny.model("llama")
    type_of = type(own)
    own.__class__ = type("Own", (type_of,), {"save_pretrained": lambda self, *a, **k: None})
    assert not assembly.stores_as_held(own, "model.layers")


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_weight_is_written_once(tmp_path, stream):
    """By the system's own count of what this process writes."""
    model = tiny.model("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "dense")
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def written() -> int:
        rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(rows["wchar"])

    before = written()
    run(str(tmp_path / "dense"), tmp_path / "out", method="magnitude", probe_samples=0, calibration={}, stream=stream)
    rest = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert size <= written() - before < size + 3 * rest + 100_000 < 1.1 * size


def test_kept_tensors_and_side_files_are_beside_linked_blocks(tmp_path):
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    from safetensors.torch import save_file

    save_file({**load_file(path), "drafter.weight": torch.randn(4, 4)}, path, metadata={"format": "pt"})
    (tmp_path / "dense" / "LICENSE").write_text("as it is")
    run(str(tmp_path / "dense"), tmp_path / "out")
    assert len(names(tmp_path / "out")) == 5 and (tmp_path / "out" / "LICENSE").read_text() == "as it is"
    assert torch.equal(stored(tmp_path / "out")["drafter.weight"], load_file(path)["drafter.weight"])
    checkpoint.load_model(str(tmp_path / "out"))


def test_a_run_that_was_stopped_links_what_both_its_parts_wrote(tmp_path, monkeypatch):
    model = tiny.model("llama")
    run(model, tmp_path / "whole")
    point = Journal.safe_point

    def stopping(self):
        self._stopping = len(self.entries) == 2
        point(self)

    monkeypatch.setattr(Journal, "safe_point", stopping)
    with pytest.raises(Interrupted):
        run(model, tmp_path / "parts")
    monkeypatch.setattr(Journal, "safe_point", point)
    run(model, tmp_path / "parts", resume=True)
    assert len(names(tmp_path / "parts")) == 4
    assert [p.read_bytes() for p in sorted((tmp_path / "parts").glob("*.safetensors"))] == [
        p.read_bytes() for p in sorted((tmp_path / "whole").glob("*.safetensors"))
    ]
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "parts").iterdir()), "the journal's own names are gone"
