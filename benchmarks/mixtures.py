"""What the calibration text does to a pruned model elsewhere: perplexity over the dense model's on four kinds of text.

    python -m benchmarks.mixtures             # SparseGPT 50 % and half of the neurons with LIAR, 64 × 512 tokens each
    python -m benchmarks.mixtures --table     # the finished rows as the table of docs/evaluation.md

Rows are written as they are finished; a run goes on where an earlier one stopped. ``OUT`` also gets the self-generated
sequences.
"""

from __future__ import annotations

import argparse

from benchmarks import common
from pyprune.config import Calibration, Evaluation, PruneConfig
from pyprune.evaluation.domains import Asked
from pyprune.evaluation.perplexity import measure
from pyprune.evaluation.windows import windows_of
from pyprune.reporting.record import paired_ratio

NAME = "mixtures"
METHODS = {
    "sparsegpt": dict(method="sparsegpt", sparsity=0.5),
    "liar": dict(pattern="neurons", criterion="obs_greedy", sparsity=0.5),
}
DOCUMENTATION, ESSAYS = "builtin:documentation", "builtin:essays"
CALIBRATIONS = {
    "documentation": ([DOCUMENTATION], 0),
    "documentation + essays": ([DOCUMENTATION, ESSAYS], 0),
    "Wikipedia": (["wikipedia"], 0),
    "documentation + essays + Wikipedia": ([DOCUMENTATION, ESSAYS, "wikipedia"], 0),
    "documentation + essays, half self-generated": ([DOCUMENTATION, ESSAYS], 0.5),
    "self-generated": ([], 1),
}
"""Name → sources, and the share of self-generated sequences (``self_generated_for="all"``)."""
TEXTS = {
    "documentation": "builtin:documentation-rest",
    "WikiText-2": "wikitext",
    "C4": "c4",
    "novel": "builtin:novel",
}


def sources(names: list[str]) -> list[str]:
    files = {
        "wikipedia": ("wikipedia", "enwiki_sample.jsonl"),
        "wikitext": ("wikitext-2", "test.txt"),
        "c4": ("c4", "c4_sample.jsonl"),
    }
    return [str(common.data(*files[name])) if name in files else name for name in names]


def config_of(method: str, calibration: str, samples: int, seq_len: int) -> PruneConfig:
    named, share = CALIBRATIONS[calibration]
    generated = round(samples * share)
    found = sources(named)
    own: dict = {"source": found if len(found) > 1 else found[0]} if found else {"num_samples": 0}
    if generated:
        path = str(common.result_path(f"generated-{seq_len}", suffix=".jsonl"))
        own |= {"self_generated": generated, "self_generated_for": "all", "self_generated_path": path}
    if generated < samples:
        own["num_samples"] = samples - generated
    return PruneConfig(
        **METHODS[method],
        compute_dtype="bfloat16",
        probe_samples=0,
        calibration=Calibration(seq_len=seq_len, held_out=0, **own),
        evaluation=Evaluation(enabled=False),
    )


def run(options: argparse.Namespace) -> None:
    import pyprune

    evaluation = Evaluation(window=512, max_windows=options.windows, dtype="bfloat16")
    rows = common.read(NAME)
    done = {(row["method"], row["calibration"]) for row in rows}
    cells = [(m, c) for m in options.methods for c in CALIBRATIONS if (m, c) not in done]
    model, tokenizer = common.load_model("smollm2-135m")
    asked = [Asked(source, None, options.windows) for source in sources(list(TEXTS.values()))]
    texts = windows_of(asked, evaluation, tokenizer)
    dense = measure(model, texts, evaluation)
    for method, calibration in cells:
        config = config_of(method, calibration, options.samples, options.seq_len)
        with common.Spent() as spent:
            result = pyprune.prune(model, config, tokenizer=tokenizer, progress=False)
        pruned = measure(result.model, texts, evaluation)
        rows.append(
            {
                "method": method,
                "calibration": calibration,
                "sequences": options.samples,
                "seq_len": options.seq_len,
                "windows": options.windows,
                "cpu_seconds": spent.cpu,
                "texts": {
                    name: {
                        "dense": d["perplexity"],
                        "pruned": p["perplexity"],
                        **paired_ratio(d["losses"], p["losses"]),
                    }
                    for name, d, p in zip(TEXTS, dense, pruned)
                },
            }
        )
        common.write(NAME, rows)
        print(method, calibration, {k: round(v["ratio"], 3) for k, v in rows[-1]["texts"].items()}, flush=True)


def table(rows: list[dict]) -> str:
    lines = ["| | calibrated on | " + " | ".join(TEXTS) + " |", "|---|---|" + "---|" * len(TEXTS)]
    for row in rows:
        cells = [f"{row['texts'][name]['ratio']:.2f}" for name in TEXTS]
        lines.append(f"| {row['method']} | {row['calibration']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="print the finished rows as a table")
    options = parser.parse_args()
    if options.table:
        print(table(common.read(NAME)))
    else:
        run(options)


if __name__ == "__main__":
    common.command_line(main)
