"""Packed checkpoints: back to the same bytes, as small as promised, and damaged ones refused by the tensor's name."""

from __future__ import annotations

import json
import random
import struct

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.config import ConfigError
from pyprune.model import packed_shards
from pyprune.model.packed_shards import PackedFiles, PackedShard
from pyprune.model.shards import Files, Shard
from pyprune.packed.files import packed_name


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer):
    """Folder of a half-zero bfloat16 LLaMA in two shards, and the packed one."""
    root = tmp_path_factory.mktemp("packed")
    model = tiny.zeroed(tiny.model("llama", vocab_size=tiny.CHARACTERS), 0.5).bfloat16()
    model.save_pretrained(root / "dense", max_shard_size="40KB")
    tokenizer.save_pretrained(root / "dense")
    (root / "dense" / "README.md").write_bytes(b"---\r\ntags: [x]\n---\n\n# model \xff\n\n## Use\n\nmore")
    (root / "dense" / "1_Pooling").mkdir()
    (root / "dense" / "1_Pooling" / "config.json").write_text("{}")
    assert len(list((root / "dense").glob("*.safetensors"))) > 1
    pyprune.pack(root / "dense", root / "packed")
    return root / "dense", root / "packed"


def tree(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pack_and_unpack_give_back_every_file_to_the_byte(pair, tmp_path):
    dense, packed = pair
    pyprune.unpack(packed, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(dense)
    assert (packed / "1_Pooling" / "config.json").read_text() == "{}"
    assert (
        b"pyprune.load" in (packed / "README.md").read_bytes()
        and "quantization" not in (packed / "config.json").read_text()
    )


def test_bits_that_are_no_zeros_are_kept(tmp_path):
    """−0.0, quiet and signalling NaN with payloads, infinities and subnormal numbers; other types as they are."""
    half = torch.zeros(64, 40, dtype=torch.int16)
    half[:, :6] = torch.tensor([-32768, 0x7FC1, 0x7F81, -0x80, 1, 0x7F80])  # the first is −0.0
    wide = torch.zeros(8, 33, dtype=torch.int32)
    wide[3, 32], wide[7, 0] = -(2**31), 0x7F800001
    tensors = {
        "layers.0.a.weight": half.view(torch.bfloat16),
        "layers.0.b.weight": wide.view(torch.float32),
        "layers.0.experts.up": half.clone().view(4, 16, 40).view(torch.float16),
        "layers.0.norm.weight": torch.zeros(9),
        "layers.0.eight": torch.zeros(16, 16).to(torch.float8_e4m3fn),
        "layers.0.long": torch.zeros(16, 16, dtype=torch.uint16),
        "layers.0.none.weight": torch.zeros(0, 16),
        "layers.0.odd.weight": torch.zeros(3, 9).double(),
        "embed_tokens.weight": torch.zeros(64, 64),
        "layers.0.embed.weight": torch.zeros(64, 64),
    }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt", "note": "ä"})
    found = pyprune.pack(tmp_path / "a", tmp_path / "b")
    shard = PackedShard(tmp_path / "b" / packed_name("model.safetensors"))
    assert shard.packed == {"layers.0.a.weight", "layers.0.b.weight", "layers.0.experts.up"} and found.weights == 3
    for name in shard.packed:
        assert torch.equal(shard.read(name).view(torch.uint8), tensors[name].view(torch.uint8))
    # what is stored is also an ordinary safetensors file
    assert load_file(shard.path)["layers.0.a.weight.values"].shape == (64 * 6,)
    pyprune.unpack(tmp_path / "b", tmp_path / "c")
    assert tree(tmp_path / "c") == tree(tmp_path / "a")


@pytest.mark.parametrize("sparsity, share", [(0.5, 0.57), (0.7, 0.37)])
def test_packed_matrices_are_as_small_as_promised(tmp_path, sparsity, share):
    weight = torch.nn.Linear(576, 192, bias=False)
    model = torch.nn.Sequential(torch.nn.Sequential(weight))
    model.embed = torch.nn.Embedding(7, 5)
    tiny.zeroed(model, sparsity)
    (tmp_path / "a").mkdir()
    save_file({"layers.0.weight": weight.weight.detach().bfloat16()}, tmp_path / "a" / "model.safetensors")
    found = pyprune.pack(tmp_path / "a", tmp_path / "b")
    stored = load_file(tmp_path / "b" / packed_name("model.safetensors"))
    assert found.dense_matrix_bytes == 576 * 192 * 2 and found.matrix_bytes == sum(t.nbytes for t in stored.values())
    assert found.matrix_bytes <= share * found.dense_matrix_bytes
    assert found.bytes == (tmp_path / "b" / packed_name("model.safetensors")).stat().st_size


def test_the_files_of_a_packed_folder_are_the_dense_ones(pair):
    dense, packed = Files(pair[0]), packed_shards.files_of(pair[1])
    assert isinstance(packed, PackedFiles) and set(packed.where) == set(dense.where) and packed.bytes == dense.bytes
    for name in dense.where:
        assert packed.info(name) == dense.info(name) and torch.equal(packed.read(name), dense.read(name))
    assert packed.packed == {name for name in dense.where if "proj" in name}
    assert packed.fingerprint() == PackedFiles(pair[1]).fingerprint()


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(pair, tmp_path):
    dense, packed = pair
    for call, source, message in (
        (pyprune.pack, packed, "packed already"),
        (pyprune.unpack, dense, "not packed"),
        (pyprune.pack, tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(source, tmp_path / "out")
    tiny.model("llama").save_pretrained(tmp_path / "full")
    with pytest.raises(ConfigError, match="save nothing: none of its 21 matrices"):
        pyprune.pack(tmp_path / "full", tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        pyprune.pack(dense, packed)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(pair, tmp_path, monkeypatch):
    import errno
    import shutil

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    for call, source in zip((pyprune.pack, pyprune.unpack), pair):
        with pytest.raises(ConfigError, match="no room to write"):
            call(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_progress_counts_every_byte_once(pair, tmp_path):
    for call, source, output in zip((pyprune.pack, pyprune.unpack), pair, "ab"):
        seen = []
        call(source, tmp_path / output, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == Files(pair[0]).bytes


def test_a_stock_loader_says_that_there_are_no_weights(pair):
    import transformers

    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(pair[1])


def rewritten(path, change) -> None:
    """Change the parsed header of a safetensors file and its data, then write it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


NAME = "model.layers.0.mlp.down_proj.weight"


def place(header, part: str) -> int:
    return header[NAME + part]["data_offsets"][0]


def flip_padding(header, data):
    data[place(header, ".mask") + 4] |= 0x80  # 33 columns: bit 7 of the fifth byte is column 39


def flip_bit(header, data):
    data[place(header, ".mask")] ^= 1


def swap_offsets(header, data):
    at = place(header, ".offsets")
    data[at + 4 : at + 8] = struct.pack("<i", -5)


def far_offset(header, data):
    at = place(header, ".offsets")
    data[at + 4 : at + 8] = struct.pack("<i", 2**30)


def lose_values(header, data):
    del header[NAME + ".values"]


def shorter_values(header, data):
    entry = header[NAME + ".values"]
    entry["shape"][0] -= 1
    entry["data_offsets"][1] -= 2


def other_mask(header, data):
    header[NAME + ".mask"]["shape"] = header[NAME + ".mask"]["shape"][::-1]


def other_type(header, data):
    header[NAME + ".values"]["dtype"] = "F16"


def dense_header(change):
    def damage(header, data):
        dense = json.loads(header["__metadata__"]["dense_header"])
        change(dense)
        header["__metadata__"]["dense_header"] = json.dumps(dense)

    return damage


def larger(dense):
    dense[NAME]["shape"] = [dense[NAME]["shape"][0] * 1000, dense[NAME]["shape"][1]]


@pytest.mark.parametrize(
    "damage",
    [
        flip_padding,
        flip_bit,
        swap_offsets,
        far_offset,
        lose_values,
        shorter_values,
        other_mask,
        other_type,
        dense_header(larger),
        dense_header(lambda dense: dense[NAME].update(dtype="F32")),
        dense_header(lambda dense: dense[NAME].update(shape=[-1, -33])),
        dense_header(lambda dense: dense[NAME].update(data_offsets=[0, 2])),
        dense_header(lambda dense: dense.pop(NAME)),
    ],
)
def test_a_damaged_matrix_is_refused_by_its_name(tmp_path, damage):
    tensors = {NAME: torch.randn(24, 33).bfloat16() * (torch.rand(24, 33) < 0.4), "norm.weight": torch.ones(3)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    pyprune.pack(tmp_path / "a", tmp_path / "b")
    rewritten(tmp_path / "b" / packed_name("model.safetensors"), damage)
    with pytest.raises(ConfigError, match=NAME.replace(".", r"\.")):
        pyprune.unpack(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("change", [dict(version="2"), dict(format="pt"), dict(dense_header="{")])
def test_another_format_and_a_newer_version_are_refused(tmp_path, change):
    (tmp_path / "a").mkdir()
    save_file({NAME: torch.eye(64)}, tmp_path / "a" / "model.safetensors")
    pyprune.pack(tmp_path / "a", tmp_path / "b")
    rewritten(
        tmp_path / "b" / packed_name("model.safetensors"), lambda header, data: header["__metadata__"].update(change)
    )
    with pytest.raises(ConfigError, match="version '2'|is no packed checkpoint|not valid JSON"):
        pyprune.unpack(tmp_path / "b", tmp_path / "c")


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Flipped bytes and truncation: a sentence, or other values of the right shape; never anything else."""
    generator = random.Random(0)
    (tmp_path / "a").mkdir()
    weight = torch.randn(24, 33).bfloat16() * (torch.rand(24, 33) < 0.4)
    save_file({NAME: weight, "layers.1.x": torch.eye(9)}, tmp_path / "a" / "model.safetensors")
    pyprune.pack(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / packed_name("model.safetensors")
    raw, refused = path.read_bytes(), 0
    for trial in range(400):
        data = bytearray(raw)
        if trial % 4 == 0:
            del data[generator.randrange(len(data)) :]
        for _ in range(generator.choice((0, 1, 3)) if trial % 4 == 0 else generator.choice((1, 1, 2, 9))):
            if data:
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            shard = PackedShard(path)
            for name in shard.entries:
                assert list(shard.read(name).shape) == shard.entries[name]["shape"]
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {"a": "../x"}, "metadata": {}, "files": {}}',
        '{"weight_map": {}, "metadata": {}, "files": {"../x": "y"}}',
        '{"weight_map": {}, "metadata": {}, "files": {"x": "../y"}}',
    ],
)
def test_a_damaged_index_is_refused(pair, tmp_path, text):
    (tmp_path / packed_shards.INDEX).write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        PackedFiles(tmp_path)


def test_runs_write_packed_checkpoints(tmp_path, folder, monkeypatch):
    """``--packed``: the same weights as the plain run, in a folder that loads, is measured, refined and unpacked."""
    from typer.testing import CliRunner

    from pyprune.cli.commands import app
    from pyprune.evaluation import gain
    from pyprune.packed.modules import SparseLinear

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    options = [
        "--method",
        "magnitude",
        "--sparsity",
        "0.7",
        "--probe-samples",
        "0",
        "--max-windows",
        "2",
        "--window",
        "48",
    ]
    plan = json.loads(run("prune", folder, "-o", tmp_path / "planned", "--packed", *options, "--plan", "--json"))
    for stream in ("never", "always"):
        run("prune", folder, "-o", tmp_path / stream, "--packed", "--stream", stream, *options)
    run("prune", folder, "-o", tmp_path / "plain", *options)
    plain = load_state(tmp_path / "plain")
    assert tree(tmp_path / "plain").keys() - tree(tmp_path / "never").keys()
    for stream in ("never", "always"):
        stored = sum(Shard(path).bytes for path in (tmp_path / stream).glob("*.safetensors"))
        assert plan["disk_bytes"]["checkpoint"] == pytest.approx(stored, rel=0.01)
        assert packed_shards.is_packed(tmp_path / stream) and not list((tmp_path / stream).glob("model*"))
        run("unpack", tmp_path / stream, "-o", tmp_path / f"{stream}-plain")
        state = load_state(tmp_path / f"{stream}-plain")
        assert all(torch.equal(state[key], plain[key]) for key in plain)
    card = (tmp_path / "never" / "README.md").read_text()
    assert "21 of 21 matrices packed" in card and card.index("## Packed") < card.index("## Use")
    assert "packed: 21 matrices without their zeros, 0." in run("inspect", tmp_path / "never")
    compared = run("compare", tmp_path / "never", tmp_path / "plain")
    assert f"folders of {tmp_path}" in compared.replace("\n", "") and "│ never " in compared and "│ plain " in compared
    training = ["--epochs", "1", "--num-samples", "4", "--seq-len", "16", "--max-windows", "2", "--window", "48"]
    run("refine", tmp_path / "never", "-o", tmp_path / "refined", "--packed", *training)
    assert any(isinstance(m, SparseLinear) for m in pyprune.load(tmp_path / "refined").model.modules())

    monkeypatch.setattr(
        gain,
        "_in_a_process",
        lambda name, *rest: gain.measure(name, tokens=16, new_tokens=2, batch_size=1, dtype="auto"),
    )
    shown = run("eval", tmp_path / "never", "--latency")
    card = (tmp_path / "never" / "README.md").read_text()
    assert "times the decoding speed" in shown and "times the decoding speed" in card and "## Packed" in card
    report = json.loads((tmp_path / "never" / "report.json").read_text())
    assert report["gain"][1]["parameters"] == report["gain"][0]["parameters"]
    assert report["gain"][1]["weight_bytes"] < report["gain"][0]["weight_bytes"]
    with pytest.raises(ConfigError, match="only masks leave zeros"):
        pyprune.PruneConfig(pattern="neurons", packed=True)


def load_state(folder) -> dict:
    files = Files(folder)
    return {name: files.read(name) for name in files.where}


def test_a_run_that_leaves_too_few_zeros_is_written_plain(tmp_path, folder):
    with pytest.warns(UserWarning, match="written unpacked"):
        pyprune.prune(
            str(folder), output=str(tmp_path / "out"), method="magnitude", sparsity=0.02, packed=True, probe_samples=0,
            evaluation={"enabled": False}, progress=False,
        )  # fmt: skip
    assert not list((tmp_path / "out").glob("*packed*")) and (tmp_path / "out" / "config.json").is_file()
    assert not any("Packed" in path.read_text() for path in (tmp_path / "out").glob("*.md"))
