"""What a user would take instead: llm-compressor's SparseGPT and Wanda, torch-pruning for structured width.

``python -m benchmarks run peers`` makes an environment for them in the user's cache, from the package index, once.
Every call is a process of its own (:mod:`benchmarks.peer_calls`) on the same float32 model and token ids; all
perplexities are taken here, by the same code on the same windows. Text is that of ``PYPRUNE_DATA`` if set, else the
package's own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import data, load_model
from benchmarks.jobs import TINY, Job, ids, model
from benchmarks.rows import Row, against
from pyprune.config import ConfigError
from pyprune.data import builtin
from pyprune.data.calibration import tokenize
from pyprune.evaluation.perplexity import perplexity
from pyprune.model.blocks import ModelView, weights_of
from pyprune.ops.qualification import cache_folder

REQUIREMENTS = ("llmcompressor==0.14.0.1", "torch-pruning==1.6.1")
CALLS = Path(__file__).with_name("peer_calls.py")
MODEL = "smollm2-135m"
SIZES = {"smoke": (2, 2), "quick": (16, 4), "full": (64, 24)}
"""Calibration sequences and windows of a preset."""
MASKS = [(method, pattern) for method in ("sparsegpt", "wanda") for pattern in ("unstructured", "2:4")]
WIDTH = 0.2
"""Share of the neurons that are removed."""
NEURONS = {"pattern": "neurons", "sparsity": WIDTH}
WAYS = {
    "magnitude": [("magnitude", "none"), ("magnitude", "liar")],
    "taylor": [("taylor", "none"), ("taylor", "liar"), ("wifv", "liar")],
}
"""torch-pruning's importance → our criteria and repairs beside it; the last is what :func:`pyprune.prune` does if it is
asked for nothing else."""
WORST = 1.05
"""Above this many times the peer's perplexity a row of ours is red: rounding alone moves it by a hundredth."""


@dataclass(frozen=True)
class Call:
    """One tool's way to a case; ``settings`` are those of :func:`pyprune.prune`, or what ``peer_calls`` reads."""

    tool: str
    dtype: str
    settings: dict
    reads_tokens: bool = True

    @property
    def backend(self) -> str:
        """As a row names it: a peer with its version."""
        if self.tool == "pyprune":
            if "criterion" in self.settings:
                return f"pyprune {self.settings['criterion']}, {self.settings['reconstruct']}"
            return f"pyprune {self.dtype}"
        wanted = self.tool.replace("llm-compressor", "llmcompressor")
        [version] = [r.split("==")[1] for r in REQUIREMENTS if r.startswith(wanted)]
        return f"{self.tool} {version}"


def cases(job: Job) -> Iterator[tuple[str, list[Call]]]:
    """Name and calls of every case; the first is the baseline."""
    for method, pattern in MASKS:
        settings = {"method": method, "pattern": pattern, "sparsity": 0.5}
        ours = [Call("pyprune", dtype, {**settings, "compute_dtype": dtype}) for dtype in job.dtypes]
        yield f"{method} {pattern}", [Call("llm-compressor", "float32", settings), *ours]
    for peer, ways in WAYS.items():
        calls = [Call("torch-pruning", "float32", {**NEURONS, "method": peer})]
        for criterion, repair in ways:
            settings = {**NEURONS, "criterion": criterion, "reconstruct": repair}
            reads = (criterion, repair) != ("magnitude", "none")
            if reads:
                settings["compute_dtype"] = "float32"
            calls.append(Call("pyprune", "float32", settings, reads_tokens=reads))
        yield f"neurons {peer}", calls


def environment(requirements: tuple[str, ...] = REQUIREMENTS) -> Path:
    """The interpreter of an environment with the peers and this torch; made in the cache where it is not there yet.

    Raises ConfigError with pip's last line if a package cannot be had.
    """
    version = torch.__version__
    digest = hashlib.sha256(repr((requirements, version, sys.version_info[:2])).encode()).hexdigest()[:12]
    folder = cache_folder() / f"peers-{digest}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"   {', '.join(requirements)} into {folder}: minutes, once", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    failed = ""
    for wanted in dict.fromkeys((version, version.split("+")[0])):  # an index may have one of the two alone
        command = [python, "-m", "pip", "install", "-q", f"torch=={wanted}", *requirements]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode == 0:
            (folder / "complete").touch()
            return python
        failed = failed or last_line(done.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    raise ConfigError(f"the peers could not be installed: {failed}")


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


@dataclass(frozen=True)
class Given:
    """What all contenders are given."""

    dense: torch.nn.Module
    samples: Tensor
    windows: list[Tensor]
    what: str


def given(job: Job) -> Given:
    sequences, count = SIZES[job.preset]
    if job.preset == "smoke":
        tokens = ids(TINY)
        return Given(model(TINY), tokens[:sequences], list(tokens[-count:]), f"{TINY}, random")
    dense, tokenizer = load_model(MODEL)
    if os.environ.get("PYPRUNE_DATA"):
        names = "Wikipedia", "WikiText-2"
        samples = torch.from_numpy(np.load(data("calibration", "wiki_64x512.npy"))).long()
        held = torch.from_numpy(np.load(data("evaluation", "wt2_test_24x1024.npy"))).long()
    else:
        names = "essays", "a novel"
        samples = _cut(builtin.paragraphs(builtin.ESSAYS), tokenizer, 512)
        held = _cut(builtin.paragraphs(builtin.NOVEL), tokenizer, 1024)
    samples, held = samples[:sequences], held[:count]
    what = f"{MODEL}, {len(samples)}×{samples.shape[1]} tokens of {names[0]}, {len(held)} windows of {names[1]}"
    return Given(dense, samples, list(held), what)


def _cut(paragraphs: list[str], tokenizer, length: int) -> Tensor:
    tokens = tokenize(paragraphs, tokenizer)
    return tokens[: len(tokens) // length * length].view(-1, length)


def peers(job: Job) -> Iterator[list[Row]]:
    wanted = [(name, calls) for name, calls in cases(job) if job.only in name]
    known = given(job)
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        known.dense.save_pretrained(place / "dense")
        np.save(place / "ids.npy", known.samples.numpy())
        before = perplexity(known.dense, known.windows)
        for name, calls in wanted:
            rows: list[Row] = []
            for call in calls:
                interpreter = sys.executable if call.tool == "pyprune" else python
                rows.append(_row(name, call, known, _called(interpreter, call, place)))
                rows[-1].figures["dense_perplexity"] = before
                against(judged(rows), rows[0].backend)
                yield rows[-1:]


def _called(interpreter: str | Path, call: Call, place: Path) -> dict | str:
    """What the process said, ``changed`` the model that it left; a sentence if it failed."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    settings = dict(call.settings)
    if call.tool == "pyprune":
        if settings["pattern"] == "2:4":
            del settings["sparsity"]  # the pattern says it
        settings = {"settings": settings}
    asked = {"model": str(place / "dense"), "ids": str(place / "ids.npy"), "out": str(out), **settings}
    asked |= {"reads_tokens": call.reads_tokens, "threads": torch.get_num_threads()}
    (out / "job.json").write_text(json.dumps(asked))
    command = [str(interpreter), "-I", str(CALLS), call.tool, str(out / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        return last_line(done.stderr)
    return {**json.loads((out / "said.json").read_text()), "changed": out}


def _row(name: str, call: Call, known: Given, said: dict | str) -> Row:
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    row = Row("peers", name, known.what, call.dtype, "cpu", call.backend, [], clock=clock)
    if isinstance(said, str):
        row.correct = f"red: it failed: {said}"
        return row
    changed = load_changed(known.dense, said["changed"])
    row.samples = [said[f"{clock}_seconds"]]
    row.figures = {key: said[key] for key in ("cpu_seconds", "peak_bytes")}
    row.figures["perplexity"] = perplexity(changed, known.windows)
    row.correct = what_is_wrong(changed, known.dense, call.settings)
    return row


def load_changed(dense: torch.nn.Module, out: Path) -> torch.nn.Module:
    """The dense model's class with the weights, and the width, that a process left; LIAR adds biases to the FFN."""
    state = load_file(out / "state.safetensors")
    config = copy.deepcopy(dense.config)
    config.intermediate_size = int((out / "intermediate_size").read_text())
    config.mlp_bias = any(name.endswith(".mlp.down_proj.bias") for name in state)
    changed = type(dense)(config).eval()
    changed.load_state_dict(state)
    return changed


def what_is_wrong(changed: torch.nn.Module, dense: torch.nn.Module, settings: dict) -> str:
    """Green if as much is gone as was asked for: zeros of every weight, N:M in every group, or neurons."""
    if settings["pattern"] == "neurons":
        want = dense.config.intermediate_size * (1 - settings["sparsity"])
        found = changed.config.intermediate_size
        return "green" if abs(found - want) <= 1 else f"red: {found} neurons are left, not {want:.0f}"
    view = ModelView(changed)
    for index, block in enumerate(view.blocks):
        for ref in weights_of(block):
            name, weight = view.name(index, ref), ref.view(block)
            zeros = float((weight == 0).float().mean())
            if abs(zeros - settings["sparsity"]) > 0.005:
                return f"red: {zeros:.1%} of {name} are zero, not {settings['sparsity']:.0%}"
            if settings["pattern"] == "2:4" and int((weight.reshape(-1, 4) != 0).sum(1).max()) > 2:
                return f"red: {name} is not 2:4"
    return "green"


def judged(rows: list[Row]) -> list[Row]:
    """Rows of a case, those red whose perplexity is far above the peer's, which comes first."""
    peer = rows[0].figures.get("perplexity")
    for row in rows[1:]:
        found = row.figures.get("perplexity")
        if peer and found and found > WORST * peer and row.correct == "green":
            row.correct = f"red: perplexity {found:.4g}, the peer's is {peer:.4g}"
    return rows
