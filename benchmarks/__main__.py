"""The benchmark suite's command line.

    python -m benchmarks list                                  # groups, presets, what each measures
    python -m benchmarks run ops pruning --preset quick        # on whatever device is there; a table and a JSON file
    python -m benchmarks compare before.json after.json        # what changed beyond noise
    python -m benchmarks readme                                # tables of README and docs from the committed results

Nothing is needed but a clone and the installed package: models are made from configurations, token ids are random.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ceilings, compare, jobs, ops_group, scaling, tables
from benchmarks.common import environment
from benchmarks.rows import Row, read, write
from pyprune import ops

JOBS = {
    "pruning": (jobs.pruning, "SparseGPT and Wanda, 50 % and 2:4, against a transcription of the published loop"),
    "reconstruction": (jobs.reconstruction, "BR+GP and CR against the published loop, the same steps"),
    "liar": (jobs.liar, "heads and neurons removed: no repair, bias, mask tuning, LIAR"),
    "streaming": (jobs.streaming, "activations moved beside the compute; weights read block by block"),
    "inference": (jobs.inference, "prefill and decoding of dense, smaller and packed models"),
    "scaling": (scaling.scaling, "cost against width, tokens, blocks, sparsity, processes; memory against model size"),
}
GROUPS = {"ops": "every op on every back-end against PyTorch", **{name: said for name, (_, said) in JOBS.items()}}
PRESETS = {
    "smoke": "tiny sizes, under a minute: does everything run?",
    "quick": "the sizes of SmolLM2 on a CPU, of LLaMA-2-7B on a GPU; minutes",
    "full": "all sizes, torch.compile beside eager, whole series; tens of minutes",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    run = commands.add_parser("run", help="measure groups")
    run.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all if none is named")
    run.add_argument("--preset", choices=PRESETS, default="quick", help="how much; quick if not set")
    run.add_argument("--device", choices=("cpu", "cuda"), help="the GPU if there is one, if not set")
    run.add_argument("--only", default="", help="ops whose name contains this")
    run.add_argument("--backends", default="", help="back-ends of the ops, by commas; all usable ones if not set")
    run.add_argument("--compile", action="store_true", help="torch.compile beside eager; the preset full has it")
    run.add_argument("--seconds", type=float, default=10, help="after which a case of an op stops; 10 if not set")
    run.add_argument("--out", type=Path, help="the JSON file; benchmarks/results/local/PRESET_DEVICE.json if not set")
    against = commands.add_parser("compare", help="what changed between two files beyond noise")
    against.add_argument("before", type=Path)
    against.add_argument("after", type=Path)
    readme = commands.add_parser("readme", help="rewrite the tables of README and docs from the committed results")
    readme.add_argument("--check", action="store_true", help="change nothing; exit status 1 if one is out of date")
    return top


def main() -> None:
    options = parser().parse_args()
    if options.command == "list":
        show()
    elif options.command == "run":
        sys.exit(measure(options))
    elif options.command == "compare":
        print(compare.text(read(options.before), read(options.after)))
    else:
        sys.exit(rewrite(options.check))


def show() -> None:
    for title, found in (("groups", GROUPS), ("presets", PRESETS)):
        print(title)
        print("\n".join(f"  {name:15} {said}" for name, said in found.items()))
    print("studies (each has --help)")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        if "def main(" in text and path.stem != "__main__":
            summary = ast.get_docstring(ast.parse(text)) or ""
            print(f"  {path.stem:15} {summary.splitlines()[0] if summary else ''}")


def measure(options: argparse.Namespace) -> int:
    """Exit status 1 if a row is red."""
    if unknown := [name for name in options.groups if name not in GROUPS]:
        sys.exit(f"there is no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: --device cpu")
    groups = options.groups or list(GROUPS)
    local = Path(__file__).parent / "results" / "local" / f"{options.preset}_{device}.json"
    path = options.out or local
    from transformers.utils import logging

    logging.disable_progress_bar()
    ops.verdicts(device)  # measured once per machine, before anything is timed
    begun, rows = time.perf_counter(), []
    about = {"preset": options.preset, "environment": environment(), "ceilings": {}}
    for found in _measured(groups, options, device, about):
        rows += found
        about["fits"] = scaling.fits(rows)
        write(path, rows, **about)
        for row in found:
            print(line(row), flush=True)
    if "scaling" in groups and scaling.plot(rows, path.with_suffix(".png")):
        print(path.with_suffix(".png"))
    red = [row for row in rows if row.correct.startswith("red")]
    print(f"{len(rows)} rows, {len(red)} red, {time.perf_counter() - begun:.0f} s; {path}")
    return 1 if red else 0


def _measured(groups: list[str], options: argparse.Namespace, device: str, about: dict) -> Iterator[list[Row]]:
    for group in groups:
        print(f"== {group}: {GROUPS[group]}", flush=True)
        if group != "ops":
            yield from JOBS[group][0](jobs.Job(device, options.preset))
            continue
        wanted = ops_group.Wanted(
            device,
            options.preset,
            options.only,
            options.compile or options.preset == "full",
            tuple(name for name in options.backends.split(",") if name),
        )
        ops_group.prepare(wanted)
        about["ceilings"] = ceilings.measure(device, [torch.float32, *ops_group.dtypes(wanted)])
        said = ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in about["ceilings"].items())
        print(f"   ceilings: {said}", flush=True)
        for key, size in ops_group.cases(wanted):
            yield ops_group.measure(key, size, wanted, about["ceilings"], options.seconds)


def line(row: Row) -> str:
    times = f"{tables.milliseconds(row.median):>10}" if row.samples else " " * 10
    ratio = f"{row.ratio:6.2f}×" if row.ratio else " " * 7
    share = f"{row.share:4.0%} of {row.ceiling}" if row.share else ""
    more = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
    colour = "" if row.correct == "green" else row.correct
    what = f"{row.name:24} {row.case:42} {row.dtype:9} {row.backend:28}"
    return f"   {what} {times} {ratio}  {share} {more} {colour}".rstrip()


def rewrite(check: bool) -> int:
    changed = tables.outdated()
    for path in changed:
        if not check:
            path.write_text(tables.rewritten(path.read_text()))
        print(f"{'out of date' if check else 'rewritten'}: {path}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    main()
