"""LIAR on real models: criteria × reconstructions × sparsities, cell by cell, each cell kept once it is done.

    PYPRUNE_DATA=… python -m benchmarks.liar --minutes 5        # as many missing cells as fit, most telling first
    PYPRUNE_DATA=… OMP_NUM_THREADS=1 python -m benchmarks.liar --part 0/2 & … --part 1/2    # one process a core
    PYPRUNE_DATA=… python -m benchmarks.liar --report           # tables and plots from the cells there are

What is in the results already is not done again; new cells join it.

Encoder: all-MiniLM-L6-v2 on all STS-B test pairs (Spearman) and on SST-2 with a linear head; decoder: SmolLM2-135M on
WikiText-2 test. The cells of one task, pattern and seed share one dense pass of statistics for each way of weighting
tokens, the scores of a criterion and the tokenised test; cells marked ``propagated`` or ``sequential`` are whole runs
of ``pyprune.prune``. Calibration never sees a test sentence or a label.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import random
import re
import time
from pathlib import Path

import torch

import pyprune
from benchmarks.common import command_line, data
from benchmarks.liar_table import read_cells
from pyprune.config import PruneConfig
from pyprune.data.calibration import CalibrationData, tokenize
from pyprune.effects import WEIGHTS_ALONE
from pyprune.evaluation.perplexity import window_losses
from pyprune.evaluation.tasks import encode, fit_head, predict, read_pairs, spearman, token_ids
from pyprune.execution.executor import Executor
from pyprune.execution.run import Findings, Run
from pyprune.model.blocks import ModelView, weights_of
from pyprune.structured.allocation import choose, uniform_count
from pyprune.structured.block import has_slot
from pyprune.structured.config_edits import add_biases
from pyprune.structured.criteria import NEEDS_GRADIENTS, NEEDS_MOMENTS, Scored, score
from pyprune.structured.liar import Problem, repair
from pyprune.structured.observation import observe_moments
from pyprune.structured.preparation import prepare, twin
from pyprune.structured.slicing import Pick, slice_block
from pyprune.structured.taps import gradient_sequences, mask_gradients
from pyprune.structured.units import find_units

CRITERIA = ("wifv", "obs_greedy", "activation", "obs", "taylor", "fisher", "magnitude", "random")
METHODS = {
    # the baselines and LIAR as published: every token counts the same
    "none": ("none", "uniform", {}),
    "bias": ("bias", "uniform", {}),
    "mask_tuning": ("mask_tuning", "uniform", {}),
    "liar_uniform": ("liar", "uniform", {}),
    # what pyprune does unless told otherwise: tokens weighted, in another way in post-norm and in pre-norm models
    "liar": ("liar", "auto", {}),
    "bias_relative": ("bias", "relative", {}),
    "mask_tuning_relative": ("mask_tuning", "relative", {}),
    "liar_relative": ("liar", "relative", {}),
    # the paper's figure 5b
    "liar_weight": ("liar", "auto", {"interpolate": "weight"}),
    "liar_bias": ("liar", "auto", {"interpolate": "bias"}),
    "liar_p": ("liar", "auto", {"interpolate_weights": True}),
}
"""Name → reconstruction, token weights, further options."""
GRID = ("none", "bias", "mask_tuning", "liar_uniform", "liar")
ABLATIONS = ("liar_weight", "liar_bias", "liar_p")
PLAIN = "_plain"
"""Suffix of a criterion whose mask comes from unweighted statistics."""
DTYPE = torch.bfloat16
SENTENCES = 2048
NEURONS = (0.5, 0.7, 0.3, 0.9, 0.4, 0.6, 0.8, 0.2, 0.1)
HEADS = (0.5, 0.25, 0.75, 0.4, 0.6, 0.1)
TASKS = ("sts", "sst2", "ppl", "ppl_all")
"""``ppl_all``: every window of the test text, for the headline; ``ppl``: the first ones, for the grid."""


def cells() -> list[dict]:
    """Every cell, most telling first."""
    out: list[dict] = []

    def add(task, pattern, sparsities, criteria, methods, seeds=(0,), **more):
        out.extend(
            {
                "task": task,
                "pattern": pattern,
                "sparsity": s,
                "criterion": c,
                "method": m,
                "seed": seed,
                "sentences": SENTENCES,
                "inputs": "dense",
                **more,
            }
            for seed in seeds
            for s in sparsities
            for c in criteria
            for m in methods
        )

    main = ("wifv", "obs_greedy")
    relative = ("bias_relative", "mask_tuning_relative")
    for task in ("sts", "ppl"):
        add(task, "neurons", (0.0,), ("wifv",), ("none",))
    add("sts", "neurons", (0.5, 0.7), CRITERIA, GRID)
    add("ppl", "neurons", (0.5,), main, GRID)
    add("sts", "neurons", (0.5, 0.7), CRITERIA, relative)
    add("sts", "neurons", NEURONS[2:], CRITERIA, GRID)
    add("sts", "heads", HEADS[:3], CRITERIA, GRID)
    add("sts", "neurons", (0.5, 0.7), CRITERIA, GRID, seeds=(1, 2))
    add("sts", "structured", (0.2, 0.3, 0.4, 0.5), main, ("liar", "liar_uniform"))
    add("sst2", "neurons", (0.0,), ("wifv",), ("none",))
    add("sst2", "neurons", (0.5, 0.7, 0.3), CRITERIA, GRID)
    add("ppl", "neurons", (0.5,), ("random", "taylor", "fisher"), (*GRID, "liar_relative"))
    add("ppl", "neurons", (0.3, 0.4, 0.2, 0.1), main, GRID)
    add("sts", "neurons", (0.5, 0.7), main, ABLATIONS)
    add("sts", "neurons", (0.5, 0.7), ("obs" + PLAIN, "obs_greedy" + PLAIN), ("liar", "liar_uniform"))
    add("sts", "heads", (0.5,), ("wifv",), ABLATIONS)
    for n in (32, 64, 128, 256, 512, 1024, 4096):
        add("sts", "neurons", (0.5,), ("wifv",), ("liar",), sentences=n)
    add("sts", "neurons", (0.5, 0.7), main, ("liar",), inputs="propagated")
    add("sts", "neurons", (0.5,), ("random", "fisher"), ("liar",), inputs="propagated")
    for inputs in ("propagated", "sequential"):
        add("sts", "neurons", (0.5,), main[:1], ("liar",), seeds=(0, 1, 2), inputs=inputs)
        add("sts", "structured", (0.5,), main[:1], ("liar",), inputs=inputs)
    add("ppl", "neurons", (0.5,), main[1:], ("liar",), inputs="propagated")
    add("ppl_all", "neurons", (0.0,), ("wifv",), ("none",))
    add("ppl_all", "neurons", (0.5,), main[1:], ("liar",))
    add("ppl_all", "neurons", (0.5,), main[1:], ("liar",), inputs="propagated")
    add("ppl", "heads", (1 / 3,), ("wifv", "obs", "random"), GRID)
    add("sts", "heads", HEADS[3:], CRITERIA, GRID)
    add("sts", "heads", (0.5,), CRITERIA, GRID, seeds=(1, 2))
    add("sst2", "heads", (0.25, 0.5), CRITERIA, GRID)
    add("sts", "neurons", NEURONS[2:], main, GRID, seeds=(1, 2))
    add("sst2", "neurons", (0.5, 0.7, 0.3), main, GRID, seeds=(1, 2))
    add("ppl", "neurons", (0.5,), main, ("bias", "mask_tuning", "liar"), seeds=(1, 2))
    add("ppl", "neurons", (0.5, 0.3), ("magnitude", "activation"), GRID)
    unique = {key(c): c for c in out}
    return list(unique.values())


def finished(cells: list[dict], rows: list[dict]) -> set[str]:
    """Keys of the cells that an earlier report holds. It has no test rows, which a comparison needs, so cells that are
    compared with each other count together: all of them or none."""

    def group(cell: dict) -> tuple:
        return tuple(v for k, v in cell.items() if k not in ("method", "seed"))

    known = {key(row) for row in rows}
    partial = {group(cell) for cell in cells if key(cell) not in known}
    return {key(cell) for cell in cells if group(cell) not in partial}


def key(cell: dict) -> str:
    return "{task}-{pattern}-{sparsity:.2f}-{criterion}-{method}-{inputs}-{sentences}-s{seed}".format(**cell)


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


@functools.lru_cache
def loaded(name: str):
    return pyprune.load(name)


@functools.lru_cache
def stsb(tokenizer) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Ids of all first sentences, then all second ones, of STS-B test, and the human scores."""
    first, second, gold = read_pairs(data("stsb", "test.jsonl"))
    return token_ids(tokenizer, [*first, *second]), gold


class Bench:
    """Dense model, its scores by criterion and its moments, for one (task, pattern, sentences, seed)."""

    def __init__(self, cell: dict, windows: int):
        self.decoder = cell["task"].startswith("ppl")
        self.windows = windows
        self.model, self.tokenizer = loaded("smollm2-135m" if self.decoder else "minilm-l6-v2")
        if self.decoder:
            count = 32 if cell["sentences"] == SENTENCES else cell["sentences"]
            self.calibration = wikitext(self.tokenizer, "train", count, 512, cell["seed"])
        else:
            self.calibration = token_ids(self.tokenizer, sentences(cell["task"], cell["sentences"], cell["seed"]))
        config = PruneConfig(
            pattern=cell["pattern"],
            sparsity=0.5,
            criterion="wifv",
            reconstruct="liar",
            inputs="dense",
            seed=cell["seed"],
            structured={"nonstandard": "save"},
        )
        view = ModelView(self.model)
        drawn = CalibrationData(sequences=self.calibration, fingerprint="", description="")
        selected = [weights_of(block) for block in view.blocks]
        self.run = Run(config, view, Executor(view, compute_dtype=DTYPE), selected, drawn)
        self.seed = cell["seed"]
        self.scores: dict[str, list] = {}
        self.gradients = None
        self.found = Findings()
        self.structured = prepare(self.run, self.found, find_units(view, selected, config))
        self._splits: dict[str, list] = {}

    @torch.no_grad()
    def splits(self, weighting: str) -> list:
        """Moments of every consumer's input on the dense stream, with tokens weighted as asked."""
        if weighting == "auto":
            normed = {g.normed for groups in self.structured.prepared.groups for g in groups}
            weighting = "relative" if normed == {True} else "balanced"
        if weighting not in self._splits:
            settings = dataclasses.replace(self.run.config.structured, token_weights=weighting)
            run = dataclasses.replace(self.run, config=dataclasses.replace(self.run.config, structured=settings))
            stream = self.run.executor.embed(self.calibration)
            found = self._splits[weighting] = []
            for index, groups in enumerate(self.structured.prepared.groups):
                with self.run.executor.compute(index) as module:
                    found.append(observe_moments(run, self.found, index, module, groups, stream, target=stream))
        return self._splits[weighting]

    def score(self, criterion: str) -> list:
        if criterion not in self.scores:
            name = criterion.removesuffix(PLAIN)
            splits = self.splits("auto" if name == criterion else "uniform")
            if name in NEEDS_GRADIENTS and self.gradients is None:
                self.gradients = mask_gradients(
                    self.run.view,
                    self.structured.prepared.groups,
                    gradient_sequences(self.calibration),
                    dtype=DTYPE,
                    device=torch.device("cpu"),
                    seed=self.seed,
                )
            groups = self.structured.prepared.groups
            self.scores[criterion] = [
                [
                    score(
                        name,
                        Scored(
                            g,
                            g.consumer.view(block).float(),
                            splits[i][j],
                            has_slot(self.structured, i, g),
                            None if self.gradients is None else self.gradients[i][j],
                            block,
                            1000 * self.seed + i,
                        ),
                    )
                    for j, g in enumerate(groups[i])
                ]
                for i, block in enumerate(self.run.view.blocks)
            ]
        return self.scores[criterion]

    @torch.no_grad()
    def pruned(self, cell: dict) -> tuple[torch.nn.Module, dict]:
        """Model of one cell, and what its repairs say."""
        if cell["sparsity"] == 0:
            return self.model, {}
        method, weighting, options = METHODS[cell["method"]]
        splits, scores = self.splits(weighting), self.score(cell["criterion"])
        model = twin(self.model, self.run.view.path)
        notes = {"dampings": [], "errors": [], "methods": [], "norm_ratios": []}
        seconds = 0.0
        for i, block in enumerate(model.get_submodule(self.run.view.path)):
            picks = []
            for j, group in enumerate(self.structured.prepared.groups[i]):
                weight = group.consumer.view(self.run.view.blocks[i]).float().contiguous()
                own = getattr(self.run.view.blocks[i].get_submodule(group.consumer.module_path), "bias", None)
                bias = torch.zeros(len(weight)) if own is None else own.data.float()
                kept = choose(group, scores[i][j], uniform_count(group, cell["sparsity"]))
                started = time.perf_counter()
                done = repair(Problem(weight, bias, group, splits[i][j]), kept, method, **options)
                seconds += time.perf_counter() - started
                picks.append(Pick(group, kept, done.weight, done.bias))
                for name, value in (
                    ("dampings", done.damping),
                    ("errors", done.error),
                    ("methods", done.method),
                    ("norm_ratios", done.norm_ratio),
                ):
                    notes[name].append(value)
            slice_block(block, picks)
        flags = dict.fromkeys(self.structured.prepared.flags.values(), True)
        for name, value in flags.items():
            setattr(model.config, name, value)
        add_biases(model, flags)
        return model, {**notes, "solve_seconds": seconds}

    def whole(self, cell: dict) -> tuple[torch.nn.Module, dict]:
        """Model of one cell by a run of its own, and what that says."""
        method, weighting, _ = METHODS[cell["method"]]
        reads, structured, began = {}, {"nonstandard": "save"}, time.process_time()
        if method != "none" or cell["criterion"] not in WEIGHTS_ALONE:
            reads = {
                "calibration": pyprune.Calibration(source=self.calibration, held_out=0),
                "compute_dtype": "bfloat16",
            }
        if method != "none" or cell["criterion"] in NEEDS_MOMENTS:
            structured["token_weights"] = weighting
        result = pyprune.prune(
            self.model,
            tokenizer=self.tokenizer,
            pattern=cell["pattern"],
            sparsity=cell["sparsity"],
            criterion=cell["criterion"],
            reconstruct=method,
            seed=cell["seed"],
            probe_samples=0,
            progress=False,
            evaluation={"enabled": False},
            structured=structured,
            **({"inputs": cell["inputs"]} if reads else {}),
            **reads,
        )
        rows = result.report["weights"]
        return result.model, {
            "prune_cpu_seconds": time.process_time() - began,
            "seconds_by_phase": result.report["seconds"],
            "methods": [r["method"] for r in rows],
            "dampings": [r["damping"] for r in rows],
            "errors": [r["error_held_out"] for r in rows],
            "norm_ratios": [r["norm_ratio"] for r in rows],
        }

    @torch.no_grad()
    def measure(self, model: torch.nn.Module, task: str) -> dict:
        """``value`` and the per-row numbers that a paired bootstrap needs."""
        if task == "sts":
            ids, gold = stsb(self.tokenizer)
            a, b = encode(model, ids, dtype=DTYPE).split(len(gold))
            found = torch.nn.functional.cosine_similarity(a, b)
            return {"value": spearman(found, gold), "rows": [round(v, 5) for v in found.tolist()]}
        if task == "sst2":
            return self._sst2(model)
        fast = copy.deepcopy(model).to(DTYPE)
        rows = []
        for ids in wikitext(self.tokenizer, "test", self.windows if task == "ppl" else 10**6, 1024):
            rows.append(float(window_losses(fast(ids[None], use_cache=False).logits, ids[None])))
        return {"value": float(torch.tensor(rows).mean().exp()), "rows": rows, "windows": len(rows)}

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


def shared(cell: dict) -> tuple:
    """What cells must have in common to use the same statistics."""
    return cell["task"].removesuffix("_all"), cell["pattern"], cell["sentences"], cell["seed"]


def share_of(cell: dict, parts: int) -> int:
    """Which process runs a cell: a criterion stays with one, so that its scores are computed once."""
    names = [c + suffix for c in CRITERIA for suffix in ("", PLAIN)]
    return names.index(cell["criterion"]) // 2 % parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="stop starting cells after this long")
    parser.add_argument("--cache", default="build/liar_cells", help="folder of finished cells")
    parser.add_argument("--only", default="", help="cells whose key this expression is found in")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th share of the cells, for n processes at once")
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
    part, parts = map(int, args.part.split("/"))
    done = finished(cells(), read_cells(args.out))
    todo = [
        c
        for c in cells()
        if re.search(args.only, key(c))
        and share_of(c, parts) == part
        and key(c) not in done
        and not (cache / f"{key(c)}.json").exists()
    ]
    print(f"{len(todo)} cells to do", flush=True)
    while todo and time.monotonic() - started < 60 * args.minutes:
        # stay with the statistics at hand while the next few cells need them
        same = [c for c in todo[:96] if owner == shared(c)]
        cell = same[0] if same else todo[0]
        todo.remove(cell)
        wanted = shared(cell)
        if owner != wanted:
            bench, owner = Bench(cell, args.windows), wanted
        began = time.perf_counter()
        model, notes = bench.pruned(cell) if cell["inputs"] == "dense" else bench.whole(cell)
        pruned = time.perf_counter()
        found = bench.measure(model, cell["task"])
        row = {
            **cell,
            **found,
            **notes,
            "prune_seconds": pruned - began,
            "measure_seconds": time.perf_counter() - pruned,
        }
        temporary = cache / f"partial{part}"
        temporary.write_text(json.dumps(row))
        temporary.rename(cache / f"{key(cell)}.json")
        print(
            f"{key(cell)}: {row['value']:.4f}  ({row['prune_seconds']:.1f} + {row['measure_seconds']:.1f} s"
            + (f", {row['prune_cpu_seconds']:.1f} CPU s)" if "prune_cpu_seconds" in row else ")"),
            flush=True,
        )


if __name__ == "__main__":
    command_line(main)
