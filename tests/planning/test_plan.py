"""The plan says what the run then does, and does nothing itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import pyprune
from pyprune.cli import commands
from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig, override
from pyprune.execution import unopened
from pyprune.execution.executor import Executor
from pyprune.pipeline.opening import open_model, why_not_streamed
from pyprune.reporting import plan_table


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert", "phi3", "opt"])
def test_the_plan_names_what_the_run_prunes(tmp_path, architecture):
    model = tiny.model(architecture)
    model.save_pretrained(tmp_path)
    ignore = ["*.1.*"]  # the second block
    found = pyprune.plan(PruneConfig(model=str(tmp_path), ignore=ignore, calibration=Calibration(seq_len=24)))
    result = pyprune.prune(
        str(tmp_path),
        calibration=tiny.ids(6, 24),
        evaluation=Evaluation(enabled=False),
        method="magnitude",
        progress=False,
        ignore=ignore,
    )
    planned = {row["name"]: row["shape"] for row in found["weights"] if row["prune"]}
    assert planned == {row["name"]: row["shape"] for row in result.report["weights"]}
    assert found["coverage"] == result.report["coverage"]
    left = [row["name"] for row in found["weights"] if not row["prune"]]
    assert sorted(left) == sorted(result.report["coverage"]["skipped"])
    assert all(row["why"] for row in found["weights"] if not row["prune"])
    assert found["memory_bytes"]["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["disk_bytes"]["checkpoint"] == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.05)
    assert found["model"]["parameters"] == result.report["model"]["parameters"]


def test_flops_are_those_of_the_passes(tmp_path):
    model = tiny.model("llama")
    model.save_pretrained(tmp_path)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)

    def flops(**fields):
        return pyprune.plan(
            {
                "model": str(tmp_path),
                "evaluation": {"enabled": False},
                "probe_samples": 0,
                "calibration": {"num_samples": 10, "seq_len": 100},
                **fields,
            }
        )["flops"]

    assert flops(method="wanda")["forward"] == 2 * 2 * 1000 * matrices, "statistics and propagation: two passes"
    assert flops(method="wanda", inputs="dense")["forward"] == 2 * 1000 * matrices
    assert flops(method="magnitude", calibration={}) == {}
    assert flops()["gram"] == 3 * 1000 * (3 * 32**2 + 64**2), "q, k and v share one input, gate and up another"
    assert flops(reconstruct="block")["reconstruct"] == 5 * 3 * 2 * 1000 * matrices


def test_command_prints_and_stops(tmp_path, folder, capsys):
    arguments = ["prune", str(folder), "-o", str(tmp_path / "out"), "--plan", "--pattern", "2:4", "--ignore", "v_proj"]
    with pytest.raises(SystemExit) as stop:
        commands.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not stop.value.code and not (tmp_path / "out").exists()
    assert found["coverage"]["skipped"] == [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(3)]
    assert found["seconds"]["total"] > 0 and found["disk_bytes"]["free"] > 0
    with pytest.raises(SystemExit):
        commands.main(arguments)
    out = capsys.readouterr().out
    for text in (
        "self_attn.v_proj.weight",
        "no: not among targets, or ignored",
        "64×32",
        "sparsegpt 2:4",
        "loaded whole: they fit into memory",
        "2 per block (statistics, propagation), over 64 sequences",
        "none: everything is computed on the CPU" if not torch.cuda.is_available() else "device memory",
        "while running",
        "time           about",
    ):
        assert text in out


def test_the_evaluation_of_a_whole_text_is_in_the_estimate(tmp_path, folder):
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "book.txt").write_text("a word and " * 60_000)  # one token a character, more than are tokenised
    fields = dict(text=str(tmp_path / "book.txt"), off_domain="none", window=100, num_samples=2, seq_len=16)
    whole = pyprune.plan(folder, max_windows=None, calibration=str(tmp_path / "book.txt"), **fields)
    assert whole["evaluation"] == {"windows": 6600, "tokens": 660_000}
    few = pyprune.plan(folder, max_windows=66, calibration=str(tmp_path / "book.txt"), **fields)
    assert whole["flops"]["evaluation"] == 100 * few["flops"]["evaluation"]
    assert whole["seconds"]["evaluation"] > 10 * few["seconds"]["evaluation"]
    fields |= dict(text=tiny.ids(3, 250), calibration=tiny.ids(8, 16), max_windows=None)
    assert pyprune.plan(folder, **fields)["evaluation"]["windows"] == 6, "two from each row"


@pytest.mark.parametrize("kind", ["sentences", "ids", "no tokenizer"])
def test_sequences_of_their_own_length_are_counted_as_the_run_counts_them(tmp_path, kind):
    tiny.model("bert").save_pretrained(tmp_path / "bert")
    sentences = [f"sentence{'a' * (i % 11)}{i}" for i in range(60)]  # ids of white space are beyond its vocabulary
    source = [row[: 4 + i % 9] for i, row in enumerate(tiny.ids(60, 20))] if kind == "ids" else sentences
    fields = dict(calibration={"source": source, "num_samples": 12, "held_out": 4}, seed=3, probe_samples=2)
    if kind == "no tokenizer":
        found = pyprune.plan(tmp_path / "bert", seq_len=32, **fields)
        assert found["calibration"] == {"sequences": 12, "tokens": 12 * 32, "at_most": True}
        assert any("12 sequences, at most 384 tokens" in text for _, text in plan_table.plan_rows(found))
        return
    if kind == "sentences":
        tiny.tokenizer(encoder=True).save_pretrained(tmp_path / "bert")
    found = pyprune.plan(tmp_path / "bert", **fields)
    report = pyprune.prune(str(tmp_path / "bert"), progress=False, **fields).report
    assert found["calibration"] == {"sequences": 12, "tokens": report["calibration"]["tokens"], "at_most": False}
    longer = [row.repeat(5) for row in source] if kind == "ids" else [text * 4 for text in sentences]
    fields["calibration"]["source"] = longer
    more = pyprune.plan(tmp_path / "bert", **fields)
    assert more["flops"]["forward"] > 2 * found["flops"]["forward"]
    assert more["memory_bytes"]["activations"] > 2 * found["memory_bytes"]["activations"]


def test_a_large_vocabulary_hides_no_widths(tmp_path):
    """Such embeddings are made smaller for the rehearsal, the blocks are not."""
    config = tiny.CONFIGS["llama"]()
    config.vocab_size, config.architectures = 300_000, ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    fields = dict(pattern="neurons", sparsity=0.25, calibration=tiny.ids(4, 16), evaluation=False)
    found = pyprune.plan(tmp_path, **fields)
    assert found["achieved"] == [{"asked": 0.25, "removed": {"neurons": 0.25}, "notes": []}]
    assert plan_table.achieved_rows(found) == ["0.25 asked for, 0.25 of the neurons will be removed"]
    found["achieved"][0]["removed"] = {}  # as where the blocks are too large to be rehearsed
    assert plan_table.achieved_rows(found) == ["0.25 asked for, about that share of each block"]
    found["settings"]["allocation"] = "global"
    assert plan_table.achieved_rows(found) == ["0.25 asked for, widths depend on the scores"]


def test_sampling_is_in_the_estimate(folder):
    few, many = (pyprune.plan(folder, self_generated=n, self_generated_for="all") for n in (32, 320))
    assert many["seconds"]["sampling"] > 2 * few["seconds"]["sampling"] > 0
    assert "sampling" not in pyprune.plan(folder)["seconds"]


def test_what_does_not_fit_is_said(folder, capsys):
    found = pyprune.plan({"model": str(folder)})
    found["free_bytes"]["memory"], found["disk_bytes"]["free"] = 1000, 1000
    warnings = [text for label, text in plan_table.plan_rows(found) if label == "warning"]
    assert warnings == ["more host memory is needed than is free", "more disk is needed than is free"]


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, "they fit into memory"),
        ({"stream": "never"}, "stream is never"),
        ({"stream": "always", "output": "out"}, "stream is always"),
    ],
)
def test_whether_weights_stream_is_said_with_the_reason(folder, tmp_path, fields, reason):
    if "output" in fields:
        fields = {**fields, "output": str(tmp_path / "out")}
    found = pyprune.plan({"model": str(folder), **fields})
    assert found["streamed_because"] == reason and found["streamed"] == (fields.get("stream") == "always")


def test_files_that_cannot_be_streamed_are_looked_at(tmp_path):
    """A mixture of experts is stored one tensor per expert, not as the model holds it."""
    tiny.model("mixtral").save_pretrained(tmp_path / "experts")
    with pytest.raises(ConfigError, match="cannot be streamed: its files have no .*names are not the model's"):
        pyprune.plan({"model": str(tmp_path / "experts"), "stream": "always", "output": str(tmp_path / "out")})
    for file in (tmp_path / "experts").glob("*.safetensors"):
        file.unlink()
    found = pyprune.plan({"model": str(tmp_path / "experts"), "stream": "always", "output": str(tmp_path / "out")})
    assert (
        found["streamed_because"] == "stream is always; if the names in their files, which are not here, are the "
        "model's"
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": "2:5"}, "pattern 2:5 does not divide the 32 inputs of model.layers.0.self_attn.q_proj.weight"),
        ({"targets": ["nothing"]}, "targets pattern 'nothing' selects no prunable weight"),
        ({"model": "./nowhere"}, "unknown model './nowhere'"),
        ({"model": None}, "no model"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
    ],
)
def test_refusals_are_those_of_the_run(folder, fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        pyprune.plan({"model": str(folder), **fields})


def test_nothing_is_allocated_for_the_weights(tmp_path):
    config = tiny.CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 8, 128
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(tmp_path)
    found = pyprune.plan({"model": str(tmp_path)})
    assert found["model"]["parameters"] > 60e9 and found["memory_bytes"]["weights"] > 120e9


MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
import json, pyprune, tiny, torch
from pyprune.config import Calibration, Evaluation
folder, stream = sys.argv[2], sys.argv[3]

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

tiny.model("llama").save_pretrained(folder + "/warm")
pyprune.prune(folder + "/warm", output=folder + "/warm-out", stream="always", calibration=tiny.ids(8, 32),
              evaluation=Evaluation(text=tiny.ids(1, 32)), progress=False)  # libraries, threads
base = status("VmRSS")
calibration = dict(num_samples=32, seq_len=256, held_out=2)
fields = dict(model=folder + "/dense", output=folder + "/out", stream=stream)
pyprune.prune(**fields, progress=False, calibration=Calibration(source=tiny.ids(34, 256), **calibration),
              evaluation=Evaluation(text=tiny.ids(2, 512), window=512))
grown = status("VmHWM") - base
found = pyprune.plan({**fields, "output": folder + "/other", "calibration": calibration,
                      "evaluation": {"window": 512, "max_windows": 2}})
print(json.dumps([grown, found["memory_bytes"]]))
"""


@pytest.mark.parametrize("stream", ["never", "always"])
def test_memory_is_within_a_quarter_of_a_real_run(tmp_path, stream):
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    # every matrix in a mapping of its own: what is freed is given back, so that the peak is the run's, not the heap's
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    support = str(Path(__file__).parents[1] / "support")
    made = subprocess.run(
        [sys.executable, "-c", MEASURED, support, str(tmp_path), stream],
        text=True,
        capture_output=True,
        timeout=240,
        env=environment,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    grown, planned = json.loads(made.stdout.splitlines()[-1])
    print(f"grown by {grown / 1e6:.0f} MB; planned", {part: round(size / 1e6) for part, size in planned.items()})
    assert planned["total"] - planned["process"] == pytest.approx(grown, rel=0.25)


@pytest.mark.parametrize(
    "pattern, inputs, reconstruct, passes",
    [
        ("neurons", "propagated", "liar", {"statistics": 1, "propagation": 1, "dense": 1}),
        ("structured", "propagated", "liar", {"statistics": 2, "propagation": 1, "dense": 1}),
        ("structured", "sequential", "liar", {"statistics": 1, "propagation": 0, "dense": 1}),
        ("structured", "dense", "liar", {"statistics": 1, "propagation": 0, "dense": 0}),
        ("heads", "propagated", "none", {"statistics": 0, "propagation": 0, "dense": 0}),
    ],
)
def test_a_structured_plan_names_what_the_run_cuts_and_its_passes(
    tmp_path, monkeypatch, pattern, inputs, reconstruct, passes
):
    tiny.model("llama").save_pretrained(tmp_path / "model")
    fields = dict(
        pattern=pattern, inputs=inputs, reconstruct=reconstruct, sparsity=0.5, criterion="wifv", probe_samples=0
    ) | (dict(criterion="magnitude") if reconstruct == "none" else {})
    found = pyprune.plan({"model": str(tmp_path / "model"), **fields})
    counts = Counter()
    forward = Executor.forward

    def counting(self, index, module, hidden, beside):
        counts[index, len(hidden)] += 1
        return forward(self, index, module, hidden, beside)

    monkeypatch.setattr(Executor, "forward", counting)
    reads = dict(calibration=tiny.ids(4, 16), batch_size=4) if any(passes.values()) else {}
    result = pyprune.prune(str(tmp_path / "model"), evaluation={"enabled": False}, progress=False, **reads, **fields)
    assert {w["name"] for w in found["weights"] if w["prune"]} >= {w["name"] for w in result.report["weights"]}
    assert found["coverage"]["fraction"] == result.report["coverage"]["fraction"]
    assert found["passes"] == {**passes, "allocation": 0, "training": 0} and counts[0, 4] == sum(passes.values())
    # one sequence tells the power of the stream before each of these; or where its passes stop, with and without what
    # heads and neurons give
    assert counts[0, 1] == (3 if inputs == "sequential" else passes["statistics"])
    spared = [w["why"] for w in found["weights"] if ".self_attn." in w["name"]]
    assert (pattern != "neurons") or set(spared) == {"no part of its neurons"}


@pytest.fixture
def little_memory(monkeypatch):
    """A machine with so many bytes free."""

    def free(size: int) -> None:
        monkeypatch.setattr(unopened, "available_memory", lambda: size)

    return free


@pytest.mark.parametrize("kind", ["plain", "wider", "experts", "smaller", "no output", "several sparsities", "pickled"])
@pytest.mark.parametrize("free", [2.5, 1.5])
def test_the_plan_streams_where_the_run_does(tmp_path, little_memory, kind, free):
    """``free``: memory in units of the weights as they would lie in it; half of it may be taken."""
    model = tiny.model("mixtral" if kind == "experts" else "llama")
    path, fields = tmp_path / "dense", {"output": str(tmp_path / "out"), "evaluation": {"enabled": False}}
    if kind == "wider":  # stored in half of what the run asks for
        model.bfloat16()
        fields["dtype"] = "float32"
    model.save_pretrained(path)
    if kind == "pickled":
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    if kind == "smaller":
        pyprune.prune(
            str(path),
            output=str(tmp_path / "sized"),
            pattern="neurons",
            criterion="wifv",
            sparsity=0.5,
            structured={"allocation": "global", "nonstandard": "save"},
            calibration=tiny.ids(4, 16),
            evaluation={"enabled": False},
            progress=False,
        )
        path = tmp_path / "sized"
    if kind == "no output":
        del fields["output"]
    if kind == "several sparsities":
        fields |= dict(pattern="neurons", sparsity=[0.25, 0.5])
    size = sum(p.numel() for p in model.parameters()) * 4
    little_memory(int(free * size))
    config = override(None, {"model": str(path), **fields})
    streamed, why = unopened.Unopened(config.model, config.dtype).streams(config.stream, why_not_streamed(config))
    assert open_model(config).weights.streamed == streamed
    reasons = {
        "plain": "are more than half of the",
        "wider": "are more than half of the",
        "experts": "names are not",
        "smaller": "sizes of their own",
        "no output": "needs an output folder",
        "pickled": "safetensors files",
        "several sparsities": "several models at once",
    }
    tight = free < 2 and kind != "smaller"  # which is smaller than the dense one, and fits
    if kind == "smaller":
        little_memory(size // 2)
        assert unopened.Unopened(config.model).streams("auto") == (False, "its blocks have sizes of their own")
    assert streamed == (tight and kind in ("plain", "wider"))
    expected = reasons[kind] if tight or kind == "pickled" else "they fit into memory"
    assert expected in why
