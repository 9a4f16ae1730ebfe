"""Load a packed checkpoint (docs/formats.md) without pyprune: this file needs torch and safetensors, and transformers
for the model. Weights are unpacked while they are read, so the model is a plain dense one.

    from load_packed import load
    model = load("packed")
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

FORMAT, VERSION = "pyprune-packed", "1"
INDEX = "packed.safetensors.index.json"
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def unpack(mask: torch.Tensor, values: torch.Tensor, shape: list[int], name: str) -> torch.Tensor:
    """The dense tensor: bit k of byte j of a row of ``mask`` is column 8j + k, values follow row by row."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    bits = (mask.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    kept = bits.reshape(rows, -1)
    if kept[:, columns:].any() or int(kept.sum()) != len(values):
        raise ValueError(f"{name} is damaged: its mask does not fit its {len(values)} values")
    dense = torch.zeros(rows, columns, dtype=values.dtype)
    return dense.masked_scatter_(kept[:, :columns].bool(), values).reshape(shape)


def tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and dense tensor of everything in a packed checkpoint, one at a time."""
    index = json.loads((Path(folder) / INDEX).read_text())
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(Path(folder) / file, framework="pt") as packed:
            metadata = packed.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"{file} is no packed file of version {VERSION}")
            stored = set(packed.keys())
            for name, entry in json.loads(metadata["dense_header"]).items():
                if index["weight_map"].get(name) != file:
                    continue  # the metadata of the dense file, and tensors that it has beside the model's
                if name in stored:
                    yield name, packed.get_tensor(name)
                    continue
                mask, values = (packed.get_tensor(f"{name}.{part}") for part in ("mask", "values"))
                if values.dtype != TYPES.get(entry["dtype"]) or len(mask) != math.prod(entry["shape"][:-1]):
                    raise ValueError(f"{name} in {file} is damaged: mask and values are not those of {entry}")
                yield name, unpack(mask, values, entry["shape"], name)


def load(folder: str | Path, cls: str = "AutoModelForCausalLM"):
    """A dense model of transformers with the weights of a packed checkpoint."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    known = getattr(transformers, (config.architectures or [cls])[0])
    model, info = known.from_pretrained(
        None, config=config, state_dict=dict(tensors(folder)), dtype=config.dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {sorted(info['missing_keys'])[0]}")
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


if __name__ == "__main__":
    print(load(sys.argv[1]))
