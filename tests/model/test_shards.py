"""Weight files: read back to the bit, and what is damaged is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pyprune.config import ConfigError
from pyprune.model import shards


def test_shards_are_safetensors_files_and_read_back_to_the_bit(tmp_path):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
        "half": torch.randn(2, 2, 2).half(),
        "flag": torch.tensor([True, False]),
    }
    digest = shards.write_shard(tmp_path / "x.safetensors", tensors)
    assert digest == shards.checksum(tmp_path / "x.safetensors")
    shard, theirs = shards.Shard(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(shard.read(name), tensor) and torch.equal(theirs[name], tensor)
        assert shard.read(name).dtype == tensor.dtype


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: d[:-1], "truncated: its tensors end at byte"),
        (lambda d: d[:5], "truncated or no safetensors"),
        (lambda d: b"\xff" * 8 + d[8:], "truncated or no safetensors"),
        (lambda d: d[:8] + b"}" + d[9:], "not valid JSON"),
        (lambda d: b"", "truncated or no safetensors"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(tmp_path, damage, message):
    path = tmp_path / "x.safetensors"
    shards.write_shard(path, {"a": torch.randn(5, 3)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=message) as caught:
        shards.Shard(path)
    assert str(path) in str(caught.value)


def test_an_index_that_promises_what_a_file_lacks_is_refused(tmp_path):
    shards.write_shard(tmp_path / "x.safetensors", {"a": torch.randn(5, 3)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(ConfigError, match="lacks b"):
        shards.Files(tmp_path)
