"""Masks on a model in memory: prune, read the report, save, load.

    python examples/prune_live_model.py [--model smollm2-135m]

Without ``--model`` a small LLaMA with random weights is made, so that nothing has to be there.
"""

import argparse
import tempfile

import torch
import transformers

import pyprune


def random_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hub id, a folder or a packaged model")
    options = parser.parse_args()
    model = options.model or random_model()
    calibration = None if options.model else torch.randint(0, 256, (16, 64))

    result = pyprune.prune(model, method="sparsegpt", pattern="2:4", calibration=calibration, progress=False)

    print(f"{result.report['sparsity']:.1%} of the selected weights are zero")
    worst = max(result.report["weights"], key=lambda row: row["error"])
    print(f"largest relative error of a layer's outputs: {worst['error']:.3f}, {worst['name']}")
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        found = pyprune.inspect(folder)
        print(f"read back: {found['sparsity']:.1%} zeros")


if __name__ == "__main__":
    main()
