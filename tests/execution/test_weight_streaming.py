"""Streaming: the same bytes as in memory, in a memory limit far below the model's size, and files that are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from pyprune.config import ConfigError, Evaluation, PruneConfig, Reconstruction
from pyprune.execution.executor import Resident
from pyprune.model.skeleton import skeleton
from pyprune.pipeline.opening import open_model
from pyprune.pipeline.prune import prune

SUPPORT = Path(__file__).parents[1] / "support"
SAME_NAMES = [name for name in tiny.CONFIGS if name not in ("mixtral", "qwen3_moe", "gpt_neox")]


def source(folder, architecture="llama", **changes) -> str:
    tiny.model(architecture, **changes).save_pretrained(folder)
    return str(folder)


def run(model, output, stream="always", **fields):
    texts = Evaluation(text=[tiny.ids(2, 24), tiny.ids(3, 20)])
    fields = {"calibration": tiny.ids(12, 24), "evaluation": texts, **fields}
    return prune(model, stream=stream, output=str(output), progress=False, **fields)


def files(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same(one, other):
    one, other = files(one), files(other)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", SAME_NAMES)
def test_streamed_and_whole_give_the_same_bytes_and_perplexities(tmp_path, architecture):
    path = source(tmp_path / "dense", architecture)
    fields = {"evaluation": Evaluation(enabled=False)} if architecture in tiny.ENCODERS else {}
    whole, streamed = run(path, tmp_path / "whole", "never", **fields), run(path, tmp_path / "streamed", **fields)
    assert_same(tmp_path / "whole", tmp_path / "streamed")
    for a, b in zip(whole.report["evaluation"], streamed.report["evaluation"]):
        assert a["dense"] == b["dense"] and a["pruned"] == b["pruned"]
    assert [r["error"] for r in whole.report["weights"]] == [r["error"] for r in streamed.report["weights"]]
    auto = transformers.AutoModel if architecture in tiny.ENCODERS else transformers.AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), whole.model.parameters()))


@pytest.mark.parametrize(
    "fields",
    [
        dict(compute_dtype="bfloat16"),
        dict(dtype="bfloat16", method="wanda", pattern="2:4"),
        dict(inputs="dense"),
        dict(reconstruct="block", global_propagation=True, reconstruction=Reconstruction(epochs=1)),
        dict(reconstruct="cross_block", reconstruction=Reconstruction(epochs=1)),
    ],
)
def test_every_way_of_pruning_streams(tmp_path, fields):
    path = source(tmp_path / "dense")
    run(path, tmp_path / "whole", "never", **fields)
    run(path, tmp_path / "streamed", **fields)
    assert_same(tmp_path / "whole", tmp_path / "streamed")


def test_a_streamed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    from pyprune.execution.journal import Interrupted, Journal

    path = source(tmp_path / "dense", tie_word_embeddings=True)
    run(path, tmp_path / "whole")
    point = Journal.safe_point

    def stopping(self):
        self._stopping = len(self.entries) == 2
        point(self)

    monkeypatch.setattr(Journal, "safe_point", stopping)
    with pytest.raises(Interrupted):
        run(path, tmp_path / "parts")
    monkeypatch.undo()
    run(path, tmp_path / "parts", resume=True, stream="auto")  # goes on as it began: streamed
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 4


def test_the_skeleton_has_no_weights_but_every_buffer():
    for architecture in tiny.CONFIGS:
        real = tiny.model(architecture)
        real.config.architectures = [type(real).__name__]
        empty = skeleton(real.config)
        assert all(p.is_meta for p in empty.parameters())
        assert [(n, p.shape) for n, p in real.named_parameters()] == [(n, p.shape) for n, p in empty.named_parameters()]
        buffers = dict(empty.named_buffers())
        assert all(torch.equal(b, buffers[name]) for name, b in real.named_buffers())


def test_only_two_blocks_are_ever_present(tmp_path, monkeypatch):
    from pyprune.execution.weight_streaming import Streamed

    most = 0
    acquire = Streamed.acquire

    def counting(self, index):
        nonlocal most
        acquire(self, index)
        most = max(most, sum(not next(b.parameters()).is_meta for b in self.view.blocks))

    monkeypatch.setattr(Streamed, "acquire", counting)
    run(source(tmp_path / "dense"), tmp_path / "out")
    assert most == 1  # the one at work; the next one waits in the reader
    most = 0
    run(tmp_path / "dense", tmp_path / "cross", reconstruct="cross_block", reconstruction=Reconstruction(epochs=1))
    assert most == 2


def test_reading_ahead_while_recorders_stand_in_for_the_blocks_reads_the_blocks(tmp_path):
    """The reader thread once asked the model for a block's names at the moment its arguments were recorded."""
    path = source(tmp_path / "dense")
    opened = open_model(PruneConfig(model=path, output=str(tmp_path / "out"), stream="always"))
    view, found = opened.weights.view, {}
    plain = type(view)._forward

    def forward(self, input_ids, stand_ins):
        originals = list(self.blocks)
        for i, module in enumerate(stand_ins):
            self.blocks[i] = module
        found.update(opened.weights._read(1))
        for i, block in enumerate(originals):
            self.blocks[i] = block
        return plain(self, input_ids, stand_ins)

    view._forward = forward.__get__(view)
    view.record(tiny.ids(1, 8))
    assert set(found) == set(view.blocks[1].state_dict())
    opened.weights.acquire(1)
    assert not any(p.is_meta for p in view.blocks[1].parameters())


LIMITED = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import tiny, torch
from pyprune.model.skeleton import skeleton
from pyprune.pipeline.opening import open_model
from pyprune.pipeline.prune import prune
from pyprune.config import Evaluation
folder, stream = sys.argv[2], sys.argv[3]

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

fields = dict(calibration=tiny.ids(8, 32), evaluation=Evaluation(text=tiny.ids(1, 32)), progress=False, probe_samples=1)
tiny.model("llama").save_pretrained(folder + "/warm")
prune(folder + "/warm", output=folder + "/warm-" + stream, stream="always", **fields)  # libraries, threads, arenas
before = status("VmData"), status("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (before[0] + int(sys.argv[4]), -1))
result = prune(folder + "/dense", output=folder + "/out-" + stream, stream=stream, **fields)
print(status("VmHWM") - before[1], result.report["sparsity"])
"""


def test_a_model_prunes_in_a_memory_limit_far_below_its_size(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=30,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    size = sum(p.stat().st_size for p in (tmp_path / "dense").glob("*.safetensors"))
    assert size > 350e6
    limit = 170 * 10**6  # two blocks are 26 MB, the factorisation of 1408 columns needs four matrices of 8 MB

    # one arena, and every matrix in a mapping of its own: else glibc's heap, which does not shrink while anything lives
    # at its end, adds 30 to 60 MB that depend on the moment at which the reader thread takes its turn
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}

    def attempt(stream):
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(SUPPORT), str(tmp_path), stream, str(limit)],
            text=True,
            capture_output=True,
            timeout=240,
            env=environment,
        )

    whole = attempt("never")
    assert whole.returncode != 0 and "emory" in whole.stderr, "the limit must be too small to load the model whole"
    streamed = attempt("auto")  # auto sees that the model does not fit
    assert streamed.returncode == 0, streamed.stderr[-3000:]
    grown, sparsity = map(float, streamed.stdout.split()[-2:])
    print(f"{size / 1e6:.0f} MB of weights, grown by {grown / 1e6:.0f} MB")
    assert grown < limit and abs(sparsity - 0.5) < 0.01


def test_what_cannot_be_streamed_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be streamed: .*needs an output folder"):
        prune(source(tmp_path / "dense"), stream="always", calibration=tiny.ids(8, 16), progress=False)
    with pytest.raises(ConfigError, match="cannot be streamed: its files have no .*names are not the model's"):
        run(source(tmp_path / "experts", "mixtral"), tmp_path / "out")


def test_auto_loads_whole_what_fits_or_cannot_be_streamed(tmp_path):
    path = source(tmp_path / "dense")
    opened = open_model(PruneConfig(model=path, output=str(tmp_path / "out")))
    assert type(opened.weights) is Resident
    run(source(tmp_path / "experts", "mixtral"), tmp_path / "moe", stream="auto")


@pytest.fixture
def broken(tmp_path):
    """A function that rewrites the tensors of a tiny checkpoint."""
    path = Path(source(tmp_path / "dense"))

    def rewrite(change):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return str(path)

    return rewrite


def test_a_missing_tensor_is_named(broken, tmp_path):
    path = broken(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"no model\.layers\.1\.mlp\.up_proj\.weight"):
        run(path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        run(path, tmp_path / "out", "never")


def test_a_tensor_of_another_shape_is_named_with_both(broken, tmp_path):
    name = "model.layers.2.self_attn.q_proj.weight"
    path = broken(lambda t: t.update({name: torch.zeros(16, 32)}))
    with pytest.raises(
        ConfigError,
        match=r"layers\.2\.self_attn\.q_proj\.weight in .* has shape \[16, 32\], its "
        r"architecture needs \[32, 32\]",
    ):
        run(path, tmp_path / "out")


def test_a_weight_that_is_nan_is_named_with_its_place(broken, tmp_path):
    def poison(t):
        t["model.layers.1.mlp.down_proj.weight"][3, 7] = float("nan")

    path = broken(poison)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj\.weight holds nan at \[3, 7\]"):
        run(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("stream", ["always", "never"])
def test_a_truncated_file_is_named(tmp_path, stream):
    path = Path(source(tmp_path / "dense")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="model.safetensors is truncated"):
        run(path.parent, tmp_path / "out", stream)


def test_a_shard_that_the_index_names_but_nobody_has(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    next((tmp_path / "dense").glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match="cannot read .*model-00002"):
        run(tmp_path / "dense", tmp_path / "out")


def test_a_block_that_changes_between_two_halves_of_a_run_is_noticed(tmp_path, monkeypatch):
    from pyprune.execution.journal import Interrupted, Journal

    path = Path(source(tmp_path / "dense"))
    point = Journal.safe_point

    def stopping(self):
        self._stopping = True
        point(self)

    monkeypatch.setattr(Journal, "safe_point", stopping)
    with pytest.raises(Interrupted):
        run(path, tmp_path / "out")
    monkeypatch.undo()
    source(path, seed=3)
    with pytest.raises(ConfigError, match="model.weights was"):
        run(path, tmp_path / "out", resume=True)
    header = json.loads((tmp_path / "out" / ".pyprune" / "run.json").read_text())
    assert header["streamed"] is True
