"""Perplexity with statistics of ``propagated`` and of ``sequential`` inputs, on real text, cell by cell.

SmolLM2-135M, calibrated on rows of ``calibration/wiki_64x512.npy``, bfloat16 forward there and in the measurement;
perplexity on WikiText-2 test and on C4, windows of 1,024 tokens. ``order`` is the seed of a permutation of the
calibration sequences (0: as they are stored), of which the first ``samples`` are taken: with fewer than all of them
orders are draws of the data; with all of them rounding alone differs, and near-ties in the masks fall the other way. A
run that was stopped goes on.

    python -m benchmarks.inputs_table --samples 16 --windows 12 --orders 0 1 2 3 4
    python -m benchmarks.inputs_table --methods obs_greedy --patterns "neurons 50%"
    python -m benchmarks.inputs_table --table
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics

import numpy as np
import torch

import pyprune
from benchmarks import common
from pyprune.config import Calibration, Evaluation
from pyprune.evaluation.perplexity import perplexity
from pyprune.evaluation.windows import windows as windows_of

NAME = "inputs_table"
PATTERNS = {
    "50%": {"pattern": "unstructured", "sparsity": 0.5},
    "70%": {"pattern": "unstructured", "sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "neurons 50%": {"pattern": "neurons", "sparsity": 0.5, "reconstruct": "liar"},
}
METHODS = {
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "wifv": {"criterion": "wifv"},
    "obs_greedy": {"criterion": "obs_greedy"},
}
TEXTS = {"wikitext2": ("evaluation", "wt2_test_24x1024.npy"), "c4": ("c4", "c4_sample.jsonl")}
WAYS = ("propagated", "sequential")


def cell(dense, samples: torch.Tensor, windows: dict, method: str, pattern: str, way: str, compute: str) -> dict:
    calibration = Calibration(source=samples, num_samples=len(samples), seq_len=samples.shape[1], held_out=0)
    with common.Spent() as spent:
        result = pyprune.prune(
            copy.deepcopy(dense),
            **METHODS[method],
            **PATTERNS[pattern],
            calibration=calibration,
            inputs=way,
            compute_dtype=compute,
            probe_samples=0,
            evaluation=Evaluation(enabled=False),
            in_place=True,
            progress=False,
        )
    found = {name: perplexity(result.model, own, dtype=compute) for name, own in windows.items()}
    return {**found, "cpu_seconds": spent.cpu, "warnings": result.report["warnings"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"], choices=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["50%", "70%", "2:4"], choices=list(PATTERNS))
    parser.add_argument("--orders", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--compute", default="bfloat16")
    parser.add_argument("--table", action="store_true", help="print what is measured; measure nothing")
    parser.add_argument("--out", help="folder of the result, and of a partial one to go on with")
    options = parser.parse_args()
    rows = common.read(NAME, options.out)
    if options.table:
        print(table(rows))
        return

    stored = torch.from_numpy(np.load(common.data("calibration", "wiki_64x512.npy"))).long()
    dense, tokenizer = common.load_model(options.model)
    texts = {name: str(common.data(*parts)) for name, parts in TEXTS.items()}
    evaluation = Evaluation(text=list(texts.values()), window=1024, max_windows=options.windows)
    windows = {name: windows_of(evaluation, tokenizer, source=path) for name, path in texts.items()}
    setting = {key: getattr(options, key) for key in ("model", "samples", "windows", "compute")}
    setting["evaluated"] = options.compute

    def missing(key: dict) -> bool:
        return not any(all(row.get(name) == value for name, value in key.items()) for row in rows)

    def keep(row: dict) -> None:
        rows.append(row)
        common.write(NAME, rows, options.out)
        print(row, flush=True)

    if missing(key := {**setting, "method": "dense"}):
        keep({**key, **{name: perplexity(dense, own, dtype=options.compute) for name, own in windows.items()}})
    for order, pattern, method, way in itertools.product(options.orders, options.patterns, options.methods, WAYS):
        key = {**setting, "method": method, "pattern": pattern, "order": order, "inputs": way}
        if missing(key):
            chosen = stored[_order(order, len(stored))[: options.samples]]
            keep({**key, **cell(dense, chosen, windows, method, pattern, way, options.compute)})
    print(table(rows))


def _order(seed: int, count: int) -> torch.Tensor:
    if seed == 0:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def table(rows: list[dict]) -> str:
    """Markdown: means over orders, and the mean of ``log(sequential / propagated)`` with its standard error."""
    lines = [
        "| samples | method | pattern | orders | WikiText-2: propagated | sequential | change | "
        "C4: propagated | sequential | change |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        if row["method"] != "dense":
            key = tuple(
                row.get(name, "float32") for name in ("samples", "windows", "compute", "evaluated", "method", "pattern")
            )
            groups.setdefault(key, {})[row["order"], row["inputs"]] = row
    for (samples, _, _, _, method, pattern), found in groups.items():
        pairs = [
            [found[order, way] for way in WAYS]
            for order in sorted({order for order, _ in found})
            if all((order, way) in found for way in WAYS)
        ]
        if not pairs:
            continue
        cells = []
        for text in TEXTS:
            values = [[row[text] for row in pair] for pair in pairs]
            cells += [_spread([pair[k] for pair in values]) for k in range(2)]
            cells.append(change([math.log(after / before) for before, after in values]))
        lines.append(f"| {samples} | {method} | {pattern} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def change(logs: list[float]) -> str:
    """Mean change in percent, ± its standard error where there are several."""
    mean = 100 * math.expm1(statistics.mean(logs))
    if len(logs) < 2:
        return f"{mean:+.1f} %"
    return f"{mean:+.1f} ± {100 * statistics.stdev(logs) / len(logs) ** 0.5:.1f} %"


if __name__ == "__main__":
    common.command_line(main)
