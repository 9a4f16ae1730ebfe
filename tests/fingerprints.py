"""Fingerprints of whole runs: SHA-256 of the weights and every number of the report, to compare two versions.

    python tests/fingerprints.py write before.json             # tiny models
    python tests/fingerprints.py write before.json --smollm2   # and SmolLM2-135M (pip install 'pyprune[demo]')
    python tests/fingerprints.py compare before.json           # runs again; lists what differs, exit status 1

A change that should change nothing (a new layout, a faster path that rounds the same) shows the same fingerprints.
Times, memory, versions and paths are left out. Only public names and the command line are used, so the script runs on
both sides of a rebuild. Equal fingerprints are promised for one machine and one set of versions alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYPRUNE_QUALIFY", "0")  # the same back-ends on both sides
sys.path.insert(0, str(Path(__file__).parent / "support"))

import tiny
import torch
from safetensors.torch import load_file

import pyprune

LEFT_OUT = (
    "finished",
    "seconds",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
    "versions",
    "machine",
    "model",
    "output",
    "directory",
    "dense",
    "backends",
    "source",
    "text",
    "description",
)
"""Keys of a report that say when, where and on what, not what came out."""
SMALL = dict(evaluation={"window": 16, "max_windows": 2}, probe_samples=1, progress=False)


def digest(folder: Path) -> str:
    """SHA-256 over the names, types and bytes of every tensor, however they are spread over files."""
    total = hashlib.sha256()
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def numbers(value):
    """A report without what ``LEFT_OUT`` names."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return value


def found(folder: Path) -> dict:
    names = [name for name in ("report.json", "refinement.json") if (folder / name).is_file()]
    reports = {name: numbers(json.loads((folder / name).read_text())) for name in names}
    for report in reports.values():
        report.pop("config", None)
        report.pop("warnings", None)
    return {"weights": digest(folder), "reports": reports}


def make_folder(place: Path, architecture: str) -> Path:
    tiny.model(architecture, vocab_size=tiny.CHARACTERS).save_pretrained(place)
    tiny.tokenizer(encoder=architecture in tiny.ENCODERS).save_pretrained(place)
    return place


def run(model: Path, output: Path, **fields) -> Path:
    pyprune.prune(str(model), output=str(output), **{**SMALL, **fields})
    return output


def command(*arguments: str, processes: int = 1, stop_after: int | None = None) -> None:
    """The command line, on its own or under torchrun."""
    start = [sys.executable, "-m", "pyprune"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "pyprune"]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pyprune {' '.join(arguments)} failed:\n{done.stderr}")


def interrupted(model: Path, output: Path, **fields) -> Path:
    """A run that is stopped after its second block and resumed."""
    import signal

    class Stop:
        def __init__(self, stream):
            self.stream, self.seen = stream, 0

        def write(self, text):
            self.stream.write(text)
            if " 2/" in text and not self.seen:
                self.seen = 1
                signal.raise_signal(signal.SIGINT)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    shown, sys.stderr = sys.stderr, Stop(sys.stderr)
    try:
        run(model, output, **{**fields, "progress": True})
    except KeyboardInterrupt:
        pass
    else:
        raise SystemExit("the run was to be interrupted and was not")
    finally:
        sys.stderr = shown
    pyprune.prune(str(model), output=str(output), resume=True, **{**SMALL, **fields})
    return output


def cases(place: Path) -> dict[str, Callable[[], Path]]:
    """Name → a run that returns its output folder."""
    llama, bert = make_folder(place / "llama", "llama"), make_folder(place / "bert", "bert")
    mixtral, gpt2 = make_folder(place / "mixtral", "mixtral"), make_folder(place / "gpt2", "gpt2")
    text = place / "text.txt"
    text.write_text("".join(f"The {k}th line of {k * k % 977} tells of {k * 7 % 131} things.\n" for k in range(900)))
    data = {"calibration": {"source": str(text), "num_samples": 8, "seq_len": 24, "held_out": 2}}
    trained = {**data, "reconstruction": {"epochs": 2, "batch_size": 4, "lr": 1e-3}}
    both = dict(global_propagation=True)
    streamed = run(llama, place / "for-refine", method="wanda", sparsity=0.5, **data)
    made: dict[str, Callable[[], Path]] = {}

    def case(name: str, model: Path, how=run, **fields) -> None:
        made[name] = lambda: how(model, place / name, **fields)

    def refine(name: str, *options: str) -> None:
        def work() -> Path:
            command(
                "refine",
                str(streamed),
                "-o",
                str(place / name),
                "--dense",
                str(llama),
                "--calibration",
                str(text),
                "--num-samples",
                "8",
                "--seq-len",
                "24",
                "--epochs",
                "2",
                "--text",
                str(text),
                "--window",
                "16",
                "--max-windows",
                "2",
                *options,
            )
            return place / name

        made[name] = work

    def shared(name: str, *options: str) -> None:
        def work() -> Path:
            command(
                "prune",
                str(llama),
                "-o",
                str(place / name),
                "--calibration",
                str(text),
                "--num-samples",
                "8",
                "--seq-len",
                "24",
                "--text",
                str(text),
                "--window",
                "16",
                "--max-windows",
                "2",
                *options,
                processes=2,
            )
            return place / name

        made[name] = work

    for architecture, folder in (("llama", llama), ("bert", bert), ("mixtral", mixtral), ("gpt2", gpt2)):
        for method in ("magnitude", "wanda", "sparsegpt"):
            case(f"{architecture}-{method}-50", folder, method=method, sparsity=0.5, **data)
            case(f"{architecture}-{method}-2to4", folder, method=method, pattern="2:4", **data)
        case(f"{architecture}-neurons", folder, pattern="neurons", sparsity=0.25, reconstruct="liar", **data)
    case("llama-dense-inputs", llama, method="sparsegpt", inputs="dense", sparsity=0.5, **data)
    case("llama-magnitude-layer", llama, method="magnitude", sparsity=0.5, reconstruct="layer", **data)
    case("llama-block", llama, method="wanda", sparsity=0.5, reconstruct="block", **trained)
    case("llama-block-gp", llama, method="wanda", sparsity=0.5, reconstruct="block", **both, **trained)
    case("llama-cross", llama, method="sparsegpt", sparsity=0.5, reconstruct="cross_block", **trained)
    case("llama-cross-gp", llama, method="sparsegpt", sparsity=0.5, reconstruct="cross_block", **both, **trained)
    case(
        "llama-layer-gp",
        llama,
        method="sparsegpt",
        sparsity=0.5,
        reconstruct="layer",
        **both,
        **{**data, "reconstruction": {"layerwise_target": "dense"}},
    )
    case("llama-heads", llama, pattern="heads", sparsity=0.5, reconstruct="liar", **data)
    case("llama-both", llama, pattern="structured", sparsity=0.5, reconstruct="liar", criterion="obs_greedy", **data)
    case(
        "bert-both",
        bert,
        pattern="structured",
        sparsity=0.5,
        reconstruct="liar",
        structured={"nonstandard": "save"},
        **data,
    )
    case(
        "llama-global",
        llama,
        pattern="neurons",
        sparsity=0.3,
        reconstruct="bias",
        structured={"allocation": "global", "nonstandard": "save"},
        **data,
    )
    case("llama-bfloat16", llama, method="sparsegpt", sparsity=0.5, compute_dtype="bfloat16", **data)
    case("llama-streamed", llama, method="sparsegpt", sparsity=0.5, stream="always", **data)
    case("llama-neurons-streamed", llama, pattern="neurons", sparsity=0.25, reconstruct="liar", stream="always", **data)
    case("llama-resumed", llama, interrupted, method="sparsegpt", sparsity=0.5, **data)
    case(
        "llama-cross-resumed",
        llama,
        interrupted,
        method="wanda",
        sparsity=0.5,
        reconstruct="cross_block",
        **both,
        **trained,
    )
    case("llama-neurons-resumed", llama, interrupted, pattern="neurons", sparsity=0.25, reconstruct="liar", **data)
    refine("llama-refine")
    refine("llama-refine-cross", "--cross-block", "--stream", "always")
    shared("llama-two-processes", "--method", "sparsegpt", "--sparsity", "0.5")
    shared("llama-neurons-two-processes", "--pattern", "neurons", "--sparsity", "0.25", "--reconstruct", "liar")

    def curve() -> Path:
        run(
            llama,
            place / "curve",
            pattern="neurons",
            sparsity=[0.25, 0.5],
            reconstruct="liar",
            probe_samples=2,
            calibration={"source": str(text), "num_samples": 8, "seq_len": 24},
        )
        return place / "curve" / "sparsity-0.5"

    made["llama-curve"] = curve
    return made


def smollm2(place: Path) -> dict[str, Callable[[], Path]]:
    """SmolLM2-135M, few tokens: minutes."""
    few = dict(
        calibration={"num_samples": 4, "seq_len": 128, "held_out": 1},
        probe_samples=1,
        evaluation={"window": 128, "max_windows": 2},
        progress=False,
    )

    def case(name: str, **fields):
        def work() -> Path:
            pyprune.prune("smollm2-135m", output=str(place / name), **few, **fields)
            return place / name

        return work

    return {
        "smollm2-sparsegpt-2to4": case("smollm2-sparsegpt-2to4", method="sparsegpt", pattern="2:4"),
        "smollm2-neurons": case("smollm2-neurons", pattern="neurons", sparsity=0.25, reconstruct="liar"),
    }


def differences(before, now, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{path}/{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for k, pair in enumerate(zip(before, now)) for line in differences(*pair, f"{path}/{k}")]
    return [] if before == now else [f"{path}: {str(before)[:60]} → {str(now)[:60]}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M too")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        todo = cases(place) | (smollm2(place) if options.smollm2 else {})
        for name, work in todo.items():
            if options.only in name:
                result[name] = found(work())
                print(f"{name} {result[name]['weights'][:16]}", flush=True)
    if options.what == "write":
        options.file.write_text(json.dumps(result, indent=1) + "\n")
        return
    before = json.loads(options.file.read_text())
    before = {name: numbers(value) for name, value in before.items() if name in result}
    lines = differences(before, json.loads(json.dumps(result)))
    print("\n".join(lines[:60]) or f"{len(result)} runs: the same weights and the same numbers")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
