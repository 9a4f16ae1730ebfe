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
from benchmarks.common import command_line, environment
from benchmarks.listing import Listing, rate
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
OPTIONAL = {
    "peers": (
        peers.peers,
        "llm-compressor and torch-pruning on the same tokens; installs both tools; runs only if named",
    ),
}
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
    commands.add_parser("list", help="list groups, presets and studies")
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
    study.add_argument("name", metavar="STUDY", help="its name")
    rest = study.add_argument("arguments", nargs=argparse.REMAINDER, help="its own; --help lists them")
    rest.required = False  # some versions of Python name it beside a STUDY that is missing
    against = commands.add_parser("compare", help="what changed between two files beyond noise")
    against.add_argument("before", type=Path, help="the JSON file of an earlier run")
    against.add_argument("after", type=Path, help="that of a later run, whose rows are called slower or faster")
    readme = commands.add_parser("readme", help="rewrite the tables of README and docs from the committed results")
    readme.add_argument("--check", action="store_true", help="change nothing; exit status 1 if one is out of date")
    return top


def main() -> None:
    options = parser().parse_args()
    if options.command == "list":
        show()
    elif options.command == "run":
        sys.exit(measure(options))
    elif options.command == "study":
        start(options.name, options.arguments)
    elif options.command == "compare":
        compare.print_comparison(read(options.before), read(options.after))
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


def start(name: str, arguments: list[str]) -> None:
    """Run a study as a program. Raises ConfigError if there is none of that name."""
    if name not in studies():
        raise ConfigError(f"there is no study {name!r}; there are {', '.join(studies())}")
    sys.argv = [f"python -m benchmarks study {name}", *arguments]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")


def show() -> None:
    groups = {**GROUPS, **{name: said for name, (_, said) in OPTIONAL.items()}}
    parts = {"groups": groups, "presets": PRESETS, "studies (python -m benchmarks study NAME --help)": studies()}
    for title, found in parts.items():
        print(title)
        print("\n".join(f"  {name:20} {said}" for name, said in found.items()))


def measure(options: argparse.Namespace) -> int:
    """Exit status 1 if a row is red. Raises ConfigError before anything is measured if something does not exist."""
    if unknown := [name for name in options.groups if name not in (*GROUPS, *OPTIONAL)]:
        raise ConfigError(f"there is no group {unknown[0]!r}; there are {', '.join((*GROUPS, *OPTIONAL))}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here: --device cpu")
    if options.isa and device != "cpu":
        raise ConfigError("instruction sets are those of a CPU: --device cpu")
    groups = options.groups or list(GROUPS)
    if "peers" in groups and device != "cpu":
        raise ConfigError("the group peers compares on a CPU: --device cpu")
    check_names(groups, options, device)
    wanted = ops_wanted(options, device)
    ops_group.check_backends(wanted)
    if "ops" in groups:
        ops_group.check_usable(wanted)
    path = options.out or Path(__file__).parent / "results" / "local" / f"{options.preset}_{device}.json"
    about = {"preset": options.preset, "environment": environment(), "ceilings": {}}
    kept = earlier(path, about) if options.add and path.exists() else []
    from transformers.utils import logging

    logging.disable_progress_bar()
    begun, rows = time.perf_counter(), []
    if not options.isa:
        ops.verdicts(device)  # measured once per machine, before anything is timed
    listing = Listing(ops_group.expected(wanted))
    measured = _per_isa(options, groups, about) if options.isa else _measured(groups, options, device, about)
    for found in measured:
        rows += found
        again = {row.key for row in rows}
        everything = [row for row in kept if row.key not in again] + rows
        about["fits"] = scaling.fits(everything)
        write(path, everything, **about)
        if not options.isa:
            print("\n".join(listing.lines(found)), flush=True)
    if "scaling" in groups and scaling.plot(everything, path.with_suffix(".png")):
        print(path.with_suffix(".png"))
    red = [row for row in rows if row.correct.startswith("red")]
    print(f"{len(rows)} rows, {len(red)} red, {time.perf_counter() - begun:.0f} s; {path}")
    return 1 if red else 0


def check_names(groups: list[str], options: argparse.Namespace, device: str) -> None:
    """Raises ConfigError with what there is if ``--only`` leaves nothing of the groups that it chooses from."""
    job = jobs.Job(device, options.preset)
    names = {
        "ops": lambda: ops_group.names(),
        "peers": lambda: [name for name, _ in peers.cases(job)],
        "scaling": lambda: scaling.names(job),
    }
    known = {group: names[group]() for group in groups if group in names}
    if not options.only or any(options.only in name for found in known.values() for name in found):
        return
    if not known:
        raise ConfigError(f"--only chooses from {', '.join(names)}, not from {', '.join(groups)}")
    said = []
    for group, found in known.items():
        none, plural = ("op's name", "ops") if group == "ops" else (f"case of {group}", f"cases of {group}")
        said.append(f"no {none} contains {options.only!r}; {plural} are {', '.join(found)}")
    raise ConfigError("; ".join(said))


def ops_wanted(options: argparse.Namespace, device: str) -> ops_group.Wanted:
    """What of the ops a run measures."""
    return ops_group.Wanted(
        device,
        options.preset,
        options.only,
        options.compile or options.preset == "full",
        tuple(name.strip() for name in options.backends.split(",") if name.strip()),
    )


def earlier(path: Path, about: dict) -> list[Row]:
    """Rows of a file that more are added to, its ceilings put into ``about``. Raises ConfigError with what differs."""
    rows, was = read(path)
    differ = compare.differences(was, about)
    if was["preset"] != about["preset"]:
        differ.append(f"preset: {was['preset']} → {about['preset']}")
    if differ:
        raise ConfigError(f"{path} was measured under other conditions, so nothing is added to it: {'; '.join(differ)}")
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
                raise ConfigError(f"the process for {isa} ended with status {done.returncode} and left no rows")
            rows, found = read(part)
        name = isa if isa != "own" else ""
        about["ceilings"] |= {f"{key} {name}".rstrip(): value for key, value in found["ceilings"].items()}
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
        wanted = ops_wanted(options, device)
        ops_group.prepare(wanted)
        about["ceilings"] |= ceilings.measure(device, [torch.float32, *ops_group.dtypes(wanted)])
        said = ", ".join(f"{name} {rate(name, value)}" for name, value in about["ceilings"].items())
        print(f"   ceilings: {said}", flush=True)
        for key, size in ops_group.cases(wanted):
            yield ops_group.measure(key, size, wanted, about["ceilings"], options.seconds)


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
    command_line(main)
