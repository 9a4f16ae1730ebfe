"""Smaller files from zeros: a pruned model as a packed checkpoint, its size, and the same answers from it.

python examples/pack_a_model.py
"""

import tempfile
from pathlib import Path

import torch
from prune_live_model import random_model

import pyprune


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    result = pyprune.prune(random_model().bfloat16(), method="magnitude", sparsity=0.7, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "packed")
        result.save(plain)
        pyprune.pack(str(plain), str(packed))
        print(f"{size(plain)} bytes plain, {size(packed)} packed: {size(packed) / size(plain):.2f}")
        model, _ = pyprune.load(str(packed))
        with torch.no_grad():
            want, found = result.model(ids).logits, model(ids).logits
        print(f"largest difference of a logit: {(want - found).abs().max():.3g} of {want.abs().max():.3g}")


if __name__ == "__main__":
    main()
