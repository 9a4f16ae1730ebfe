"""Fine-tune a pruned model for a few minutes without filling its zeros, then pack it.

    python examples/finetune_sparse.py -o runs/finetuned                # SmolLM2-135M, Wanda 50 %, minutes on two cores
    python examples/finetune_sparse.py -o runs/lora --lora              # adapters instead; pip install '.[finetune]'

Text is the documentation inside every Python: one part to prune and to train on, another to measure perplexity on.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import pyprune
from pyprune.data.calibration import tokenize
from pyprune.data.texts import builtin


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    result = pyprune.prune(
        options.model,
        method="wanda",
        sparsity=options.sparsity,
        calibration=pyprune.Calibration(num_samples=32, seq_len=256),
        evaluation=pyprune.Evaluation(window=512, max_windows=options.windows),
    )
    model, tokenizer = result.model.float(), result.tokenizer
    report = result.report["evaluation"][0]
    print(f"perplexity {report['dense']:.2f} dense, {report['pruned']:.2f} pruned to {options.sparsity:.0%}")

    ids = tokenize(builtin("calibration"), tokenizer)
    rows = ids[: len(ids) // options.seq_len * options.seq_len].view(-1, options.seq_len)
    start = time.perf_counter(), time.process_time()
    model = with_adapters(model, rows, options) if options.lora else trained(model, rows, options)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"{options.steps} steps of {options.batch} × {options.seq_len} tokens: {wall:.0f} s, {cpu:.0f} CPU seconds")

    found = pyprune.evaluate(model, tokenizer=tokenizer, window=512, max_windows=options.windows)
    print(f"perplexity {found['perplexity']:.2f} after training")

    plain = options.output / "plain"
    model.bfloat16().save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    print(f"sparsity of the pruned weights {pyprune.inspect(plain)['sparsity_of_pruned']:.4f}")
    print(pyprune.pack(plain, options.output / "packed").sentence())


def trained(model, rows, options):
    """All weights are trained, and those that are zero stay zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    with pyprune.keep_sparse(model, optimizer) as kept:
        train(model, optimizer, rows, options)
        kept.check()
    return model


def with_adapters(model, rows, options):
    """Adapters are trained beside the pruned weights, and merged without filling zeros."""
    import peft

    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    adapters = [p for p in tuned.parameters() if p.requires_grad]
    train(tuned, torch.optim.AdamW(adapters, lr=10 * options.lr), rows, options)
    merged = pyprune.merge_lora(tuned)
    print(f"merged into {len(merged.layers)} layers; {merged.lost:.0%} of the update's norm fell on zeros")
    return merged.model


def train(model, optimizer, rows, options) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / options.steps)) / 2
    )
    model.train()
    order = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        batch = rows[torch.randint(len(rows), (options.batch,), generator=order)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens that perplexity is measured on")
    parser.add_argument("--lora", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
