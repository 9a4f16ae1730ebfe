"""LIAR on real models: criteria × reconstructions × sparsities, cell by cell, each cell kept once it is done.

    PYPRUNE_DATA=… python -m benchmarks.liar --minutes 5        # as many missing cells as fit, most telling first
    PYPRUNE_DATA=… python -m benchmarks.liar --report           # tables and plots from the cells there are

Encoder: all-MiniLM-L6-v2 on all STS-B test pairs (Spearman) and on SST-2 with a linear head; decoder: SmolLM2-135M on
WikiText-2 test. The grid shares one dense pass of statistics; cells marked ``propagated`` are whole runs of
``pyprune.prune``. Calibration never sees a test sentence or a label.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch

import pyprune
from benchmarks.common import data
from pyprune.allocation import choose, uniform_count
from pyprune.calibration import CalibrationData, tokenize
from pyprune.config import PruneConfig
from pyprune.evaluate import window_losses
from pyprune.evaluate_tasks import encode, fit_head, predict, read_pairs, similarities, spearman, token_ids
from pyprune.group_criteria import NEEDS_GRADIENTS, Scored, score
from pyprune.liar import Problem, repair
from pyprune.model import ModelView, weights_of
from pyprune.prune import Run
from pyprune.slicing import Pick, add_biases, slice_block
from pyprune.stream import Executor
from pyprune.structured_block import has_slot, observe
from pyprune.structured_plan import make_plan, twin
from pyprune.taps import mask_gradients

CRITERIA = ("wifv", "obs_greedy", "activation", "obs", "taylor", "fisher", "magnitude", "random")
METHODS = ("none", "bias", "mask_tuning", "liar")
ABLATIONS = {"liar_weight": {"interpolate": "weight"}, "liar_bias": {"interpolate": "bias"},
             "liar_p": {"interpolate_weights": True}}
DTYPE = torch.bfloat16
SENTENCES = 2048


def cells() -> list[dict]:
    """Every cell, most telling first."""
    out: list[dict] = []

    def add(task, pattern, sparsities, criteria, methods, seeds=(0,), **more):
        out.extend({"task": task, "pattern": pattern, "sparsity": s, "criterion": c, "method": m, "seed": seed,
                    "sentences": SENTENCES, "inputs": "dense", **more}
                   for seed in seeds for s in sparsities for c in criteria for m in methods)

    main = ("wifv", "obs_greedy")
    for task in ("sts", "sst2", "ppl"):
        add(task, "neurons", (0.0,), ("wifv",), ("none",))
    add("ppl", "neurons", (0.5,), ("obs_greedy", "wifv"), ("liar", "bias", "none"))
    add("ppl", "neurons", (0.5,), ("obs_greedy",), ("liar",), inputs="propagated")
    add("ppl", "neurons", (0.5,), ("obs_greedy",), ("liar",), inputs="propagated", sentences=64)
    add("sts", "neurons", (0.5, 0.7), CRITERIA, METHODS)
    add("sts", "heads", (0.5,), CRITERIA, METHODS)
    add("sts", "neurons", (0.3, 0.9), CRITERIA, METHODS)
    add("sts", "neurons", (0.5, 0.7), main, METHODS, seeds=(1, 2))
    add("sts", "structured", (0.2, 0.3, 0.4, 0.5), main, ("liar",))
    add("sts", "neurons", (0.5, 0.7), ("wifv",), tuple(ABLATIONS))
    add("sts", "heads", (0.5,), ("wifv",), tuple(ABLATIONS))
    for n in (32, 64, 128, 256, 512, 1024, 4096):
        out.append({"task": "sts", "pattern": "neurons", "sparsity": 0.5, "criterion": "wifv", "method": "liar",
                    "seed": 0, "sentences": n, "inputs": "dense"})
    add("sts", "neurons", (0.5, 0.7), main, ("liar", "bias"), inputs="propagated")
    add("ppl", "neurons", (0.1, 0.2, 0.3, 0.4), ("wifv",), ("liar", "bias", "none"))
    add("sst2", "neurons", (0.5,), CRITERIA, METHODS)
    add("ppl", "heads", (1 / 3,), ("wifv", "obs", "random"), ("liar", "bias", "none"))
    add("sts", "heads", (0.25, 0.75), CRITERIA, METHODS)
    add("sst2", "neurons", (0.3, 0.7), CRITERIA, METHODS)
    add("sts", "neurons", (0.1, 0.2, 0.4, 0.6, 0.8), CRITERIA, METHODS)
    add("sst2", "heads", (0.25, 0.5), CRITERIA, METHODS)
    add("ppl", "neurons", (0.1, 0.2, 0.3, 0.4, 0.5), ("magnitude", "random"), ("liar", "bias", "none"))
    add("sts", "heads", (0.1, 0.4, 0.6), CRITERIA, METHODS)
    unique = {key(c): c for c in out}
    return list(unique.values())


def key(cell: dict) -> str:
    return "{task}-{pattern}-{sparsity:.2f}-{criterion}-{method}-{inputs}-{sentences}-s{seed}".format(**cell)


# ---- data ----------------------------------------------------------------------------------------------------------

def sentences(task: str, count: int, seed: int) -> list[str]:
    """Unlabelled training sentences of the task."""
    name, fields = {"sts": ("stsb", ("sentence1", "sentence2")), "sst2": ("sst2", ("sentence",))}[task]
    rows = [json.loads(line) for line in data(name, "train.jsonl").read_text().splitlines()]
    found = sorted({row[f].strip() for row in rows for f in fields})
    random.Random(seed).shuffle(found)
    return found[:count]


def wikitext(tokenizer, split: str, count: int, length: int, seed: int | None = None) -> list[torch.Tensor]:
    """Non-overlapping pieces of WikiText-2: the first ones, or a draw by seed."""
    ids = tokenize([data("wikitext-2", f"{split}.txt").read_text()[:4_000_000]], tokenizer)
    pieces = list(ids.split(length))[:-1]
    if seed is not None:
        random.Random(seed).shuffle(pieces)
    return pieces[:count]


# ---- one model and the statistics of one calibration draw -----------------------------------------------------------

class Bench:
    """Dense model, its scores by criterion and its moments, for one (task, pattern, sentences, seed)."""

    def __init__(self, cell: dict, windows: int):
        self.task, self.windows = cell["task"], windows
        self.model, self.tokenizer = pyprune.load("smollm2-135m" if self.task == "ppl" else "minilm-l6-v2")
        if self.task == "ppl":
            count = 32 if cell["sentences"] == SENTENCES else cell["sentences"]
            self.calibration = wikitext(self.tokenizer, "train", count, 512, cell["seed"])
        else:
            self.calibration = token_ids(self.tokenizer, sentences(self.task, cell["sentences"], cell["seed"]))
        self.config = PruneConfig(pattern=cell["pattern"], sparsity=0.5, criterion="wifv", reconstruct="liar",
                                  inputs="dense", seed=cell["seed"],
                                  structured={"nonstandard": "save"})
        view = ModelView(self.model)
        drawn = CalibrationData(sequences=self.calibration, fingerprint="", description="")
        self.run = Run(self.config, view, Executor(view, compute_dtype=DTYPE), [weights_of(b) for b in view.blocks],
                       drawn)
        self.splits: list | None = None
        self.scores: dict[str, list] = {}
        self.gradients = None
        self.plan = make_plan(self.run)

    @torch.no_grad()
    def observe(self) -> None:
        stream = self.run.executor.embed(self.calibration)
        self.splits = []
        for index, groups in enumerate(self.plan.groups):
            with self.run.executor.compute(index) as module:
                self.splits.append(observe(self.run, index, module, groups, stream, target=stream))

    def score(self, criterion: str) -> list:
        if criterion in NEEDS_GRADIENTS and self.gradients is None:
            self.gradients = mask_gradients(self.run.view, self.plan.groups, self.calibration, dtype=DTYPE,
                                            device=torch.device("cpu"), seed=self.config.seed)
        if criterion not in self.scores:
            self.scores[criterion] = [[score(criterion, Scored(
                g, g.consumer.view(block).float(), self.splits[i][j], has_slot(self.run, self.plan, i, g),
                None if self.gradients is None else self.gradients[i][j], block, 1000 * self.config.seed + i))
                for j, g in enumerate(self.plan.groups[i])] for i, block in enumerate(self.run.view.blocks)]
        return self.scores[criterion]

    @torch.no_grad()
    def pruned(self, cell: dict) -> tuple[torch.nn.Module, dict]:
        """Model of one cell, and what its repairs say."""
        if cell["sparsity"] == 0:
            return self.model, {}
        if self.splits is None:
            self.observe()
        scores = self.score(cell["criterion"])
        model = twin(self.model, self.run.view.path)
        method = "liar" if cell["method"] in ABLATIONS else cell["method"]
        options = ABLATIONS.get(cell["method"], {})
        notes = {"dampings": [], "errors": [], "methods": [], "norm_ratios": []}
        seconds = 0.0
        for i, block in enumerate(model.get_submodule(self.run.view.path)):
            picks = []
            for j, group in enumerate(self.plan.groups[i]):
                weight = group.consumer.view(self.run.view.blocks[i]).float().contiguous()
                own = getattr(self.run.view.blocks[i].get_submodule(group.consumer.module_path), "bias", None)
                bias = torch.zeros(len(weight)) if own is None else own.data.float()
                kept = choose(group, scores[i][j], uniform_count(group, cell["sparsity"]))
                started = time.perf_counter()
                done = repair(Problem(weight, bias, group, self.splits[i][j]), kept, method, **options)
                seconds += time.perf_counter() - started
                picks.append(Pick(group, kept, done.weight, done.bias))
                for name, value in (("dampings", done.damping), ("errors", done.error), ("methods", done.method),
                                    ("norm_ratios", done.norm_ratio)):
                    notes[name].append(value)
            slice_block(block, picks)
        flags = dict.fromkeys(self.plan.flags.values(), True)
        for name, value in flags.items():
            setattr(model.config, name, value)
        add_biases(model, flags)
        return model, {**notes, "solve_seconds": seconds}

    def propagated(self, cell: dict) -> tuple[torch.nn.Module, dict]:
        source = pyprune.Calibration(source=self.calibration, num_samples=len(self.calibration), held_out=0)
        result = pyprune.prune(self.model, tokenizer=self.tokenizer, pattern=cell["pattern"], calibration=source,
                               sparsity=cell["sparsity"], criterion=cell["criterion"], reconstruct=cell["method"],
                               compute_dtype="bfloat16", seed=cell["seed"], probe_samples=0, progress=False,
                               evaluation={"enabled": False}, structured={"nonstandard": "save"})
        rows = result.report["weights"]
        return result.model, {"seconds_by_phase": result.report["seconds"], "methods": [r["method"] for r in rows],
                              "dampings": [r["damping"] for r in rows], "errors": [r["error_held_out"] for r in rows],
                              "norm_ratios": [r["norm_ratio"] for r in rows]}

    # ---- measures --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> dict:
        """``value`` and the per-row numbers that a paired bootstrap needs."""
        if self.task == "sts":
            first, second, gold = read_pairs(data("stsb", "test.jsonl"))
            found = similarities(model, self.tokenizer, first, second, dtype=DTYPE)
            return {"value": spearman(found, gold), "rows": [round(v, 5) for v in found.tolist()]}
        if self.task == "sst2":
            return self._sst2(model)
        fast = copy.deepcopy(model).to(DTYPE)
        rows = []
        for ids in wikitext(self.tokenizer, "test", self.windows, 1024):
            rows.append(float(window_losses(fast(ids[None], use_cache=False).logits, ids[None])))
        return {"value": float(torch.tensor(rows).mean().exp()), "rows": rows}

    def _sst2(self, model: torch.nn.Module) -> dict:
        """Accuracy on SST-2 dev of a linear head that was fitted once, on the dense model's vectors."""
        if not hasattr(self, "head"):
            lines = data("sst2", "train.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            random.Random(0).shuffle(rows)
            rows = rows[:8000]
            vectors = encode(self.model, token_ids(self.tokenizer, [r["sentence"] for r in rows]), dtype=DTYPE)
            self.head = fit_head(vectors, torch.tensor([r["label"] for r in rows]))
        dev = [json.loads(line) for line in data("sst2", "dev.jsonl").read_text().splitlines()]
        vectors = encode(model, token_ids(self.tokenizer, [r["sentence"] for r in dev]), dtype=DTYPE)
        right = (predict(vectors, self.head) > 0).long() == torch.tensor([r["label"] for r in dev])
        return {"value": float(right.float().mean()), "rows": right.long().tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="stop starting cells after this long")
    parser.add_argument("--cache", default="build/liar", help="folder of finished cells")
    parser.add_argument("--only", default="", help="cells whose key contains this")
    parser.add_argument("--windows", type=int, default=12, help="WikiText-2 test windows of 1,024 tokens")
    parser.add_argument("--report", action="store_true", help="write tables and plots from the finished cells")
    parser.add_argument("--out", default=None, help="folder of the results (default: benchmarks/results)")
    args = parser.parse_args()
    cache = Path(args.cache)
    cache.mkdir(parents=True, exist_ok=True)
    if args.report:
        from benchmarks.liar_report import write_report

        write_report(cache, args.out)
        return
    started, bench, owner = time.monotonic(), None, None
    todo = [c for c in cells() if args.only in key(c) and not (cache / f"{key(c)}.json").exists()]
    print(f"{len(todo)} cells to do", flush=True)
    while todo and time.monotonic() - started < 60 * args.minutes:
        # stay with the statistics at hand while the next few cells need them
        same = [c for c in todo[:96] if owner == (c["task"], c["pattern"], c["sentences"], c["seed"])]
        cell = same[0] if same else todo[0]
        todo.remove(cell)
        wanted = (cell["task"], cell["pattern"], cell["sentences"], cell["seed"])
        if owner != wanted:
            bench, owner = Bench(cell, args.windows), wanted
        began = time.perf_counter()
        model, notes = bench.propagated(cell) if cell["inputs"] == "propagated" else bench.pruned(cell)
        pruned = time.perf_counter()
        found = bench.measure(model)
        row = {**cell, **found, **notes, "windows": args.windows if cell["task"] == "ppl" else None,
               "prune_seconds": pruned - began, "measure_seconds": time.perf_counter() - pruned}
        temporary = cache / "partial"
        temporary.write_text(json.dumps(row))
        temporary.rename(cache / f"{key(cell)}.json")
        print(f"{key(cell)}: {row['value']:.4f}  ({row['prune_seconds']:.1f} + {row['measure_seconds']:.1f} s)",
              flush=True)


if __name__ == "__main__":
    main()
