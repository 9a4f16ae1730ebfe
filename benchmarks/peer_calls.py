"""One pruning call of one tool, timed in a process of its own: ``python -I benchmarks/peer_calls.py TOOL JOB.json``.

It runs in the environment of the tool and imports nothing of this repository. The job names a folder with a float32
model, a file with token ids, and what is asked for; ``said.json`` and the changed model are left in its folder ``out``.
``run peers`` starts it (:mod:`benchmarks.peers`).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def llm_compressor(job: dict) -> Callable:
    """Its targets are named, because version 0.14 prunes the head too where it is only to be ignored."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    kinds = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))  # one is asked for all the same
    structure = "0:0" if job["pattern"] == "unstructured" else job["pattern"]

    def call(model, ids):
        modifier = kinds[job["method"]](sparsity=job["sparsity"], mask_structure=structure, targets=["re:.*_proj$"])
        loader = DataLoader([{"input_ids": row} for row in ids], batch_size=1)
        oneshot(model=model, dataset=loader, recipe=modifier, processor=unused, num_calibration_samples=len(ids))
        return model

    return call


def torch_pruning(job: dict) -> Callable:
    """Neurons of the feed-forward layers, the same share of each. All other layers are ignored by name: the groups that
    version 1.6 looks for around the attention of a LLaMA do not end."""
    import torch
    import torch_pruning as tp

    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}

    def call(model, ids):
        if job["method"] == "taylor":
            for row in ids:
                model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        gates = [block.mlp.gate_proj for block in model.model.layers]
        hidden = {*gates, *(block.mlp.up_proj for block in model.model.layers)}
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=ids[:1, :16],
            importance=kinds[job["method"]](),
            pruning_ratio=0.0,
            pruning_ratio_dict=dict.fromkeys(gates, job["sparsity"]),
            ignored_layers=[m for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in hidden],
            output_transform=lambda out: out.logits,
        )
        pruner.step()
        model.config.intermediate_size = gates[0].out_features
        return model

    return call


def pyprune(job: dict) -> Callable:
    import pyprune.pipeline.prune  # noqa: F401  (its imports are nobody's seconds)

    def call(model, ids):
        tokens = dict(source=ids, num_samples=len(ids), seq_len=ids.shape[1], held_out=0)
        return pyprune.prune(
            model,
            **job["settings"],
            **({"calibration": tokens} if job["reads_tokens"] else {}),
            evaluation={"enabled": False},
            probe_samples=0,
            progress=False,
            in_place=True,
            device="cpu",
        ).model

    return call


TOOLS = {
    "llm-compressor": (llm_compressor, ("llmcompressor", "compressed-tensors")),
    "torch-pruning": (torch_pruning, ("torch-pruning",)),
    "pyprune": (pyprune, ("pyprune",)),
}
"""Tool → how it is called, and the packages whose versions count."""


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most (``ru_maxrss`` would count the parent's too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    tool, path = sys.argv[1:]
    job = json.loads(Path(path).read_text())
    make, packages = TOOLS[tool]
    import numpy
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    call = make(job)
    ids = torch.from_numpy(numpy.load(job["ids"])).long()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    before = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    model = call(model, ids)
    said = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": memory("VmHWM"),
        "resident_before_bytes": before,
        "versions": {name: importlib.metadata.version(name) for name in (*packages, "torch", "transformers")},
    }
    out = Path(job["out"])
    state = {name: weight.detach().clone().contiguous() for name, weight in model.state_dict().items()}
    save_file(state, out / "state.safetensors")
    (out / "intermediate_size").write_text(str(model.config.intermediate_size))
    (out / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
