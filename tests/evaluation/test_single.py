"""One model by itself, in memory or block by block."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import pyprune
from pyprune.cli.commands import main
from pyprune.config import ConfigError
from pyprune.evaluation.single import ready
from pyprune.execution import unopened
from pyprune.execution.weight_streaming import Opened

TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds it.\n" * 30


def test_streamed_and_whole_have_the_same_losses(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    fields = {"window": 64, "stride": 32, "batch_size": 3, "dtype": "float32", "max_windows": 7}
    texts = [str(tmp_path / "text.txt"), [TEXT[7:]]]
    whole = pyprune.evaluate(str(folder), texts, stream="never", **fields)
    told = []
    apart = pyprune.evaluate(
        str(folder), texts, stream="always", progress=lambda done, blocks: told.append((done, blocks)), **fields
    )
    assert [row["losses"] for row in apart["texts"]] == [pytest.approx(row["losses"]) for row in whole["texts"]]
    without = ("losses", "perplexity", "seconds")
    for one, other in zip(apart["texts"], whole["texts"]):
        assert {k: v for k, v in one.items() if k not in without} == {
            k: v for k, v in other.items() if k not in without
        }
    assert told == [(k, told[-1][1]) for k in range(1, len(told) + 1)] and told[-1][0] == told[-1][1], (
        "every block once"
    )
    with pytest.raises(SystemExit) as end:
        main(["eval", str(folder), "--stream", "always", "--text", texts[0], "--window", "64", "--json"])
    assert not end.value.code
    alone = pyprune.evaluate(str(folder), texts[0], window=64)
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-3)


def test_auto_streams_what_does_not_fit(folder, tmp_path, monkeypatch):
    assert not isinstance(ready(str(folder)), Opened)
    settings = {"method": "magnitude", "sparsity": 0.7, "packed": True, "probe_samples": 0, "evaluation": False}
    pyprune.prune(str(folder), output=str(tmp_path / "packed"), progress=False, **settings)
    monkeypatch.setattr(unopened, "available_memory", lambda: 1000)
    for place in (folder, tmp_path / "packed"):
        found = ready(str(place))
        assert isinstance(found, Opened) and found.tokenizer is not None
        assert all(p.is_meta for p in found.view.blocks[0].parameters())
    assert not isinstance(ready(str(folder), stream="never"), Opened)
    ids, packed = tiny.ids(3, 20), str(tmp_path / "packed")
    streamed, whole = (pyprune.evaluate(packed, ids, stream=way, dtype="float32") for way in ("auto", "never"))
    assert streamed["losses"] == pytest.approx(whole["losses"])
    tiny.model("bert").save_pretrained(tmp_path / "encoder")
    assert not isinstance(ready(str(tmp_path / "encoder")), Opened), "it is measured by itself, and needs to be whole"
    assert not any(p.is_meta for p in ready(str(tmp_path / "encoder")).model.parameters())


def test_what_cannot_be_streamed_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="this model is in memory"):
        pyprune.evaluate(pyprune.load(folder), tiny.ids(2, 9), stream="always")
    model = tiny.model("llama")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only a local folder of safetensors files"):
        pyprune.evaluate(str(tmp_path / "pickled"), tiny.ids(2, 9), stream="always")
