"""The benchmark suite's command line.

    python -m benchmarks list                                  # groups, presets, studies
    python -m benchmarks run ops pruning --preset quick        # on whatever device is there; a table and a JSON file
    python -m benchmarks study main_job --help                 # one of the longer measurements
    python -m benchmarks compare before.json after.json        # what changed beyond noise
    python -m benchmarks readme                                # tables of README and docs from the committed results

Nothing is needed but a clone and the installed package: models are made from configurations, token ids are random.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ceilings, compare, jobs, ops_group, peers, scaling, tables
from benchmarks.common import environment
from benchmarks.rows import Row, read, write
from pyprune import ops
from pyprune.config import ConfigError

JOBS = {
    "pruning": (jobs.pruning, "SparseGPT and Wanda, 50 % and 2:4, against a transcription of the published loop"),
    "reconstruction": (jobs.reconstruction, "BR+GP and CR against the published loop, the same steps"),
    "liar": (jobs.liar, "heads and neurons removed: no repair, bias, mask tuning, LIAR"),
    "streaming": (jobs.streaming, "activations moved beside the compute; weights read block by block"),
    "inference": (jobs.inference, "prefill and decoding of dense, smaller and packed models"),
    "scaling": (scaling.scaling, "cost against width, tokens, blocks, sparsity, processes; memory against model size"),
}
GROUPS = {"ops": "every op on every back-end against PyTorch", **{name: said for name, (_, said) in JOBS.items()}}
OPTIONAL = {"peers": (peers.peers, "llm-compressor and torch-pruning on the same tokens; installs them, so ask for it")}
"""Groups that run only where they are named."""
ISAS = {
    "own": {},
    "avx2": {
        "PYPRUNE_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""What makes PyTorch and our kernels keep to an instruction set; ``own`` is whatever the processor has."""
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
    groups = f"of {', '.join(GROUPS)}, which are all if none is named, and {', '.join(OPTIONAL)}"
    run.add_argument("groups", nargs="*", metavar="GROUP", help=groups)
    run.add_argument("--preset", choices=PRESETS, default="quick", help="how much; quick if not set")
    run.add_argument("--device", choices=("cpu", "cuda"), help="the GPU if there is one, if not set")
    run.add_argument("--only", default="", help="ops, cases of peers and scaling, whose name contains this")
    run.add_argument("--backends", default="", help="back-ends of the ops, by commas; all usable ones if not set")
    run.add_argument("--compile", action="store_true", help="torch.compile beside eager; the preset full has it")
    run.add_argument("--seconds", type=float, default=10, help="after which a case of an op stops; 10 if not set")
    run.add_argument("--isa", nargs="+", choices=ISAS, help="instruction sets of a CPU, each in a process of its own")
    run.add_argument("--out", type=Path, help="the JSON file; benchmarks/results/local/PRESET_DEVICE.json if not set")
    run.add_argument(
        "--add", action="store_true", help="keep the rows of that file, from the same machine and versions"
    )
    study = commands.add_parser("study", help="run one of the studies that `list` names")
    study.add_argument("name", metavar="STUDY")
    study.add_argument("arguments", nargs=argparse.REMAINDER, help="its own; --help lists them")
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
        try:
            status = measure(options)
        except ConfigError as error:  # a packaged model that is not installed
            sys.exit(str(error))
        sys.exit(status)
    elif options.command == "study":
        sys.exit(start(options.name, options.arguments))
    elif options.command == "compare":
        print(compare.text(read(options.before), read(options.after)))
    else:
        sys.exit(rewrite(options.check))


def studies() -> dict[str, str]:
    """Name → summary of the modules here that are programs of their own."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        if "def main(" in text and path.stem not in ("__main__", "peer_calls"):
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def start(name: str, arguments: list[str]) -> str | None:
    """Run a study as a program; a sentence if there is none of that name."""
    if name not in studies():
        return f"there is no study {name!r}; there are {', '.join(studies())}"
    sys.argv = [f"python -m benchmarks study {name}", *arguments]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return None


def show() -> None:
    groups = {**GROUPS, **{name: said for name, (_, said) in OPTIONAL.items()}}
    parts = {"groups": groups, "presets": PRESETS, "studies (python -m benchmarks study NAME --help)": studies()}
    for title, found in parts.items():
        print(title)
        print("\n".join(f"  {name:20} {said}" for name, said in found.items()))


def measure(options: argparse.Namespace) -> int:
    """Exit status 1 if a row is red."""
    if unknown := [name for name in options.groups if name not in (*GROUPS, *OPTIONAL)]:
        sys.exit(f"there is no group {unknown[0]!r}; there are {', '.join((*GROUPS, *OPTIONAL))}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: --device cpu")
    if options.isa and device != "cpu":
        sys.exit("instruction sets are those of a CPU: --device cpu")
    groups = options.groups or list(GROUPS)
    path = options.out or Path(__file__).parent / "results" / "local" / f"{options.preset}_{device}.json"
    about = {"preset": options.preset, "environment": environment(), "ceilings": {}}
    kept = earlier(path, about) if options.add and path.exists() else []
    from transformers.utils import logging

    logging.disable_progress_bar()
    begun, rows = time.perf_counter(), []
    if not options.isa:
        ops.verdicts(device)  # measured once per machine, before anything is timed
    measured = _per_isa(options, groups, about) if options.isa else _measured(groups, options, device, about)
    for found in measured:
        rows += found
        again = {row.key for row in rows}
        everything = [row for row in kept if row.key not in again] + rows
        about["fits"] = scaling.fits(everything)
        write(path, everything, **about)
        if not options.isa:
            print("\n".join(map(line, found)), flush=True)
    if "scaling" in groups and scaling.plot(everything, path.with_suffix(".png")):
        print(path.with_suffix(".png"))
    red = [row for row in rows if row.correct.startswith("red")]
    print(f"{len(rows)} rows, {len(red)} red, {time.perf_counter() - begun:.0f} s; {path}")
    return 1 if red else 0


def earlier(path: Path, about: dict) -> list[Row]:
    """Rows of a file that more are added to, its ceilings put into ``about``. Raises SystemExit with what differs."""
    rows, was = read(path)
    differ = compare.differences(was, about)
    if was["preset"] != about["preset"]:
        differ.append(f"preset: {was['preset']} → {about['preset']}")
    if differ:
        sys.exit(f"{path} was measured under other conditions, so nothing is added to it: {'; '.join(differ)}")
    about["ceilings"] |= was["ceilings"]
    return rows


def _per_isa(options: argparse.Namespace, groups: list[str], about: dict) -> Iterator[list[Row]]:
    """The rows of each instruction set, from a process that was kept to it."""
    for isa in options.isa:
        print(f"==== {isa}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, "part.json")
            command = [sys.executable, "-m", "benchmarks", "run", *groups, "--device", "cpu", "--out", str(part)]
            command += ["--preset", options.preset, "--only", options.only, "--backends", options.backends]
            command += ["--seconds", str(options.seconds), *["--compile"] * options.compile]
            done = subprocess.run(command, env={**os.environ, **ISAS[isa]}, cwd=Path(__file__).parents[1])
            if not part.exists():
                sys.exit(f"the process for {isa} ended with status {done.returncode} and left no rows")
            rows, found = read(part)
        name = isa if isa != "own" else ""
        about["ceilings"] |= {f"{key} {name}".rstrip(): rate for key, rate in found["ceilings"].items()}
        for row in rows:
            row.isa = name
        yield rows


def _measured(groups: list[str], options: argparse.Namespace, device: str, about: dict) -> Iterator[list[Row]]:
    for group in groups:
        work, said = (JOBS | OPTIONAL).get(group) or (None, GROUPS[group])
        print(f"== {group}: {said}", flush=True)
        if work is not None:
            yield from work(jobs.Job(device, options.preset, options.only))
            continue
        wanted = ops_group.Wanted(
            device,
            options.preset,
            options.only,
            options.compile or options.preset == "full",
            tuple(name for name in options.backends.split(",") if name),
        )
        ops_group.prepare(wanted)
        about["ceilings"] |= ceilings.measure(device, [torch.float32, *ops_group.dtypes(wanted)])
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
    if not check:
        for path in tables.draw():
            print(f"drawn: {path}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    main()
