"""Products with packed weights beside dense ones: one matrix, and decoding with whole models.

    python -m benchmarks.packed_products matrix [--threads 2]     # 4096×4096, from memory and from the cache
    python -m benchmarks.packed_products llama                    # the shape of LLaMA 3.2 1B, random weights
    python -m benchmarks.packed_products smollm2                  # SmolLM2-135M, and what is not its kernels
    python -m benchmarks.packed_products quality                  # its perplexity: zeros beside four and eight bits

Dense is PyTorch's ``linear`` in bfloat16 and in float32, four bits its weight-only product (``_weight_int4pack_mm``)
with a scale and a zero point for ``GROUP`` weights of a row. Large matrices lie in memory: several of each form are
used in turn, more than ``ROTATED`` bytes between two uses of one. Contenders take turns. With one thread the seconds
are those of the processor, otherwise wall time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import command_line, data, environment, read, write
from benchmarks.timing import Clock
from pyprune import ops
from pyprune.model.blocks import read_on
from pyprune.ops.packed import Packed, pack_bitmask

ROTATED = 96 << 20
"""Bytes: three times the third-level cache of the machine that the results are of."""
GROUP = 64
"""Neighbouring weights of a row that share a scale and a zero point, two bfloat16 numbers: 4.5 bits per weight."""
SPARSITIES = (0.5, 0.6, 0.7, 0.9)
TYPES = (torch.bfloat16, torch.float32, torch.float16)


def without(w: Tensor, sparsity: float) -> Tensor:
    """``w`` without the smallest weights of each row."""
    pruned = w.clone()
    ops.select_mask(pruned, int(sparsity * w.shape[1]), apply=True)
    return pruned


def in_turns(calls: dict[str, list[Callable[[], object]]], samples: int) -> dict[str, float]:
    """Least seconds of each contender, whose calls are taken in rotation."""
    clock = Clock("cpu")
    least = dict.fromkeys(calls, float("inf"))
    for turn in range(samples + 1):
        for name, rotation in calls.items():
            for call in rotation:
                seconds = clock(call)
                if turn:
                    least[name] = min(least[name], seconds)
    return least


def reading_rate() -> float:
    """Bytes per second of reading memory: a sum over 256 MB."""
    parts = torch.ones(8, 8 << 20)
    return parts[0].nbytes / in_turns({"read": [lambda x=x: x.sum() for x in parts]}, 8)["read"]


def matrix(size: int, samples: int, tokens: tuple[int, ...]) -> Iterator[dict]:
    """Rows of one square matrix, from memory (rotated) and, if it is small, from the cache."""
    rate = reading_rate()
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(size, size, generator=generator)
    copies = max(1, ROTATED // (size * size // 2)) if size * size > 1 << 22 else 1
    for count in tokens:
        x = {t: torch.randn(count, size, generator=generator).to(t) for t in TYPES}
        calls: dict[str, list[Callable[[], object]]] = {}
        packed: dict[str, list[Packed]] = {}
        for t in TYPES[:2]:
            dense = [w.to(t, copy=True) for _ in range(max(1, copies // 4))]
            calls[f"dense {name(t)}"] = [lambda d=d, v=x[t]: functional.linear(v, d) for d in dense]
        for t in TYPES if count == 1 else TYPES[:2]:
            for sparsity in SPARSITIES if count == 1 else (0.5, 0.7):
                label = f"{sparsity:.0%} {name(t)}"
                first = pack_bitmask(without(w, sparsity).to(t))
                packed[label] = [first] + [copied(first) for _ in range(max(1, copies // 2) - 1)]
                calls[label] = [lambda p=p, v=x[t]: ops.sparse_linear(v, p) for p in packed[label]]
        if not size % GROUP:
            four_bit = [four_bits(w) for _ in range(max(1, copies // 2))]
            calls["4-bit bfloat16"] = [lambda q=q, v=x[torch.bfloat16]: four_bit_product(v, *q) for q in four_bit]
        with torch.no_grad():
            least = in_turns(calls, samples if count < 64 else 3)
        fastest_dense = min(least["dense bfloat16"], least["dense float32"])
        for label, seconds in least.items():
            if label in packed:
                moved = packed[label][0].nbytes
            elif label.startswith("4-bit"):
                moved = sum(part.nbytes for part in four_bit[0])
            else:
                moved = w.numel() * (2 if "bfloat16" in label else 4)
            yield {
                "case": f"{size}×{size}, {'memory' if copies > 1 else 'cache'}",
                "tokens": count,
                "weights": label,
                "ms": round(seconds * 1e3, 4),
                "times_fastest_dense": round(fastest_dense / seconds, 2),
                "times_dense_bfloat16": round(least["dense bfloat16"] / seconds, 2),
                "bytes_of_dense_bfloat16": round(moved / (2 * w.numel()), 3),
                "share_of_reading": round(moved / seconds / rate, 2) if count == 1 and copies > 1 else None,
            }


def rounded(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """``w`` rounded to the nearest of ``2**bits`` levels between the least and the greatest weight of each group.

    Returns levels ``(rows, groups, GROUP)``, scales and least values ``(rows, groups, 1)``, both rounded to bfloat16:
    a weight is ``level * scale + least``."""
    grouped = w.float().unflatten(1, (-1, GROUP))
    least = grouped.amin(2, keepdim=True).bfloat16().float()
    scale = ((grouped.amax(2, keepdim=True) - least) / (2**bits - 1)).bfloat16().float().clamp(min=1e-12)
    levels = ((grouped - least) / scale).round().clamp(0, 2**bits - 1)
    return levels, scale, least


def four_bits(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w`` as PyTorch's four-bit product takes it: packed levels, then scale and value of level 8 for each group."""
    levels, scale, least = rounded(w, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)
    scales = torch.cat([scale, least + 8 * scale], 2).transpose(0, 1)
    return packed, scales.bfloat16().contiguous()


def four_bit_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def copied(p: Packed) -> Packed:
    return Packed(p.mask.clone(), p.values.clone(), p.offsets.clone(), p.columns)


def llama(blocks: int):
    """A model of the shape of LLaMA 3.2 1B with random weights, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    noise = torch.randn(2048, 8192).mul_(0.02).bfloat16()
    for parameter in model.parameters():  # each its own memory; the numbers do not matter for the time
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise.view(-1)[: len(part)])
        if parameter.ndim == 1:
            parameter.data.fill_(1)
    rotary = model.model.rotary_emb
    fresh = type(rotary)(config)
    rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    return model.eval()


@torch.no_grad()
def decoding(model: nn.Module, tokens: int, prompt: int = 16) -> tuple[float, float]:
    """Least and median seconds of a decoding step at a short context."""
    clock, samples = Clock("cpu"), []
    ids = torch.randint(1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    logits, cache = read_on(model, ids)
    for _ in range(tokens):
        ids, holder = logits[:, -1:].argmax(-1), []
        samples.append(clock(lambda i=ids, c=cache, h=holder: h.append(read_on(model, i, c))))
        logits, cache = holder[0]
    samples = sorted(samples[2:])
    return samples[0], samples[len(samples) // 2]


@torch.no_grad()
def kernels_alone(model: nn.Module, samples: int) -> float:
    """Least seconds of all linear layers of the model for one token, one after another, without the model."""
    from pyprune.packed.modules import SparseLinear

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, SparseLinear))]
    given = [
        torch.randn(1, m.in_features).to(m.weight.dtype if isinstance(m, nn.Linear) else m.values.dtype) for m in layers
    ]

    def once() -> None:
        for layer, x in zip(layers, given):
            if isinstance(layer, SparseLinear):
                ops.sparse_linear(x, layer.packed, layer.bias)
            else:
                functional.linear(x, layer.weight, layer.bias)

    return in_turns({"layers": [once]}, samples)["layers"]


def packed(model: nn.Module, sparsity: float) -> nn.Module:
    """The model pruned by magnitude and packed."""
    import pyprune

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = without(module.weight.data, sparsity)
    return pyprune.sparse(model)


def packed_alike(model: nn.Module, sparsity: float) -> nn.Module:
    """The same for a random model: layers of one shape get copies of one packed weight."""
    from pyprune.packed.modules import SparseLinear

    first: dict[tuple, Packed] = {}
    for module in list(model.model.layers.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                shape = tuple(child.weight.shape)
                if shape not in first:
                    generator = torch.Generator().manual_seed(0)
                    first[shape] = pack_bitmask(without(torch.randn(shape, generator=generator).bfloat16(), sparsity))
                setattr(module, child_name, SparseLinear(copied(first[shape]), child.bias))
    return model


def whole(
    label: str, build: Callable[[], nn.Module], pack: Callable[[nn.Module, float], nn.Module], forms: list, tokens: int
) -> Iterator[dict]:
    """Decoding of each form (type, sparsity or None for dense); one model in memory at a time."""
    from pyprune.packed.modules import weight_bytes

    for dtype, sparsity in forms:
        model = build().to(dtype)
        if sparsity is not None:
            model = pack(model, sparsity)
        least, median = decoding(model, tokens)
        layers = kernels_alone(model, 5)
        yield {
            "case": label,
            "weights": f"{f'{sparsity:.0%}' if sparsity else 'dense'} {name(dtype)}",
            "ms_per_token": round(median * 1e3, 2),
            "ms_per_token_least": round(least * 1e3, 2),
            "tokens_per_second": round(1 / median, 1),
            "layers_alone_ms": round(layers * 1e3, 2),
            "weight_bytes": weight_bytes(model),
        }


def smollm2() -> nn.Module:
    import pyprune

    return pyprune.load("smollm2-135m", "float32")[0].eval()


def quality(windows: int) -> Iterator[dict]:
    """Perplexity of SmolLM2-135M, its blocks' matrices in fewer bits: rounded, or with zeros and packed as bfloat16."""
    import numpy as np

    import pyprune
    from pyprune.config import Calibration, Evaluation
    from pyprune.evaluation.perplexity import perplexity

    held = torch.from_numpy(np.load(data("evaluation", "wt2_test_24x1024.npy"))).long()[:windows]
    calibration = torch.from_numpy(np.load(data("calibration", "wiki_64x512.npy"))).long()

    def row(weights: str, bits: float, model: nn.Module) -> dict:
        found = perplexity(model, list(held), dtype=torch.bfloat16)
        return {"case": "SmolLM2-135M", "weights": weights, "bits": bits, "windows": windows, "perplexity": found}

    yield row("dense bfloat16", 16, smollm2())
    for bits in (8, 4):
        model = smollm2()
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                levels, scale, least = rounded(module.weight.data, bits)
                module.weight.data = (levels * scale + least).flatten(1)
        yield row(f"{bits} bits, rounded to nearest", bits + 32 / GROUP, model)
    for sparsity in (0.5, 0.7, 0.78):
        pruned = pyprune.prune(
            smollm2(),
            method="sparsegpt",
            sparsity=sparsity,
            calibration=Calibration(
                source=calibration, num_samples=len(calibration), seq_len=calibration.shape[1], held_out=0
            ),
            compute_dtype="bfloat16",
            probe_samples=0,
            evaluation=Evaluation(enabled=False),
            in_place=True,
            progress=False,
        )
        yield row(f"{sparsity:.0%} zeros by sparsegpt", round(1 + 16 * (1 - sparsity), 2), pruned.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("matrix", "llama", "smollm2", "quality"))
    parser.add_argument("--windows", type=int, default=12, help="of 1,024 tokens, for the perplexity; 12 if not set")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix; 4096 if not set")
    parser.add_argument("--samples", type=int, default=3, help="rounds, or tokens divided by eight; 3 if not set")
    parser.add_argument("--tokens", type=int, nargs="*", default=(1, 4, 16, 64, 512), help="tokens of the matrix's x")
    parser.add_argument("--blocks", type=int, default=16, help="of the LLaMA shape; 16 if not set")
    parser.add_argument("--threads", type=int, default=1, help="1 if not set")
    parser.add_argument("--name", default="packed_products_part", help="of the JSON file, whose other rows stay")
    parser.add_argument("--out", type=Path, help="its folder; default $OUT or benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = environment()
    said = {key: now[key] for key in ("cpu", "instruction_set", "threads", "torch", "commit")}
    brain, single = TYPES[:2]
    if options.study == "matrix":
        rows = matrix(options.size, options.samples, tuple(options.tokens))
    elif options.study == "llama":
        forms = [(brain, 0.5), (brain, 0.7), (brain, None), (single, None)]
        case = f"LLaMA 3.2 1B's shape, {options.blocks} blocks"
        rows = whole(case, lambda: llama(options.blocks), packed_alike, forms, 8 * options.samples)
    elif options.study == "quality":
        rows = quality(options.windows)
    else:
        forms = [(dtype, sparsity) for sparsity in (None, 0.5, 0.7) for dtype in (brain, single)]
        rows = whole("SmolLM2-135M", smollm2, packed, forms, 8 * options.samples)
    for row in rows:
        print(row, file=sys.stderr, flush=True)
        kept = [
            r
            for r in read(options.name, options.out)
            if not all(r.get(k) == row[k] for k in ("case", "weights"))
            or any(r.get(k) != said[k] for k in ("instruction_set", "threads"))
            or r.get("tokens") != row.get("tokens")
        ]
        write(options.name, [*kept, {**row, **said, "load": environment()["load"]}], options.out)


if __name__ == "__main__":
    command_line(main)
