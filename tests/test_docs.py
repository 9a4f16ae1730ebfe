"""The documentation: it builds without a warning, its scripts run, and every command in it works on a tiny model.

In the commands, what stands for the user's own things (``MODEL``, ``text.jsonl``, …) is a tiny model and a small text;
what needs a network, a GPU, several processes or a build is read but not run: its options exist, or its targets do.
"""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import typer.main
from calling import call

import pyprune

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if "random_model" in path.read_text()]
"""Those that make their own model; the others need what a test has not, and have tests of their own."""
MODELS = ("MODEL", "smollm2-135m", "minilm-l6-v2")
"""Names that stand for a dense model in a command."""
DEFAULTS = {"calibration.SAMPLES": 8, "calibration.TOKENS": 32, "evaluation.WINDOW": 64}
"""What the defaults of a run are here."""
SMALL = {"--seq-len": "32", "--window": "64", "--num-samples": "8", "--epochs": "1", "--max-windows": "2"}
"""Options that are too large for a tiny model, or for a test."""
ELSEWHERE = ("allenai/", "torchrun", "--latency", "arc_easy,hellaswag", "tensorboard:")
"""Words of commands that need a network, several machines, an extra, or a minute."""


def blocks(language: str) -> list[tuple[Path, str]]:
    return [(path, m[2]) for path in DOCUMENTS for m in BLOCK.finditer(path.read_text()) if m[1] == language]


def commands() -> list:
    """A parameter per line of every bash block, continued lines joined."""
    found = []
    for path, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...")]
            if words:
                found.append(pytest.param(words, id=f"{path.stem}: {' '.join(words)}"[:100]))
    return found


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the documentation's packages are not installed (.[docs])")
    pytest.importorskip("myst_parser", reason="the documentation's packages are not installed (.[docs])")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "api.html").read_text()
    assert all(f"pyprune.{name}" in page for name in pyprune.__all__ if name != "__version__"), "docs/api.md"


def anchors(text: str) -> set[str]:
    """What a link may name behind ``#``, from the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path):
    """Sphinx cannot say this: files outside ``docs`` are no pages of it."""
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not heading or heading in anchors(target.read_text()), f"{path.name}: {link}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_script_of_the_gallery_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert path.name in (ROOT / "docs" / "gallery.md").read_text(), "docs/gallery.md does not name it"


def test_the_gallery_names_every_example():
    text = (ROOT / "docs" / "gallery.md").read_text()
    missing = [path.name for path in (ROOT / "examples").iterdir() if f"examples/{path.name}" not in text]
    assert [name for name in missing if name != "__pycache__"] == []


@pytest.fixture(autouse=True)
def small_defaults(monkeypatch):
    for name, value in DEFAULTS.items():
        monkeypatch.setattr(f"pyprune.config.{name}", value)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that commands name: texts, a dense and a pruned model, results."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.model("llama", vocab_size=tiny.CHARACTERS).save_pretrained(folder / "MODEL")
    tiny.tokenizer().save_pretrained(folder / "MODEL")
    prose = [f"The cat sat on mat {i} and looked at the dog, who did not look back. " * 4 for i in range(100)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    for name in ("test.txt", "wiki.test.txt", "prose.txt"):
        (folder / name).write_text("\n".join(prose))
    np.save(folder / "ids.npy", tiny.ids(12, 32).numpy())
    for name in ("pruned", "half", "again", "small"):
        extra = dict(pattern="neurons", reconstruct="liar") if name == "small" else {}
        pyprune.prune(
            str(folder / "MODEL"),
            output=str(folder / name),
            calibration=dict(source=str(folder / "text.jsonl"), num_samples=4, seq_len=32, held_out=2),
            evaluation=dict(text=str(folder / "test.txt"), max_windows=2),
            progress=False,
            **extra,
        )
    pyprune.prune(
        str(folder / "MODEL"),
        output=str(folder / "curve"),
        method="magnitude",
        sparsity=[0.3, 0.5],
        evaluation=dict(text=str(folder / "test.txt"), max_windows=2),
        progress=False,
    )
    pyprune.pack(str(folder / "pruned"), str(folder / "packed"))
    shutil.copytree(folder / "pruned", folder / "runs" / "first")
    shutil.copytree(folder / "MODEL", folder / "BASE")
    (folder / "data" / "piqa").mkdir(parents=True)
    question = {"question": "Which one?", "choices": ["this", "that one"], "gold": 1}
    goal = {"goal": "sit", "sol1": "on the mat", "sol2": "off it"}
    for name in ("arc_easy.jsonl", "data/arc_easy_test.jsonl"):
        (folder / name).write_text(f"{json.dumps(question)}\n" * 4)
    (folder / "data" / "piqa" / "valid.jsonl").write_text(f"{json.dumps(goal)}\n" * 4)
    (folder / "data" / "piqa" / "valid-labels.lst").write_text("0\n" * 4)
    texts = dict(calibration=str(folder / "text.jsonl"), text=str(folder / "test.txt"))
    pyprune.refine(str(folder / "small"), output=str(folder / "refined"), num_samples=4, seq_len=32, epochs=1, **texts)
    return folder


@pytest.mark.parametrize("words", commands())
def test_a_command_works(words, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    while "=" in words[0] and words[0].split("=")[0].isupper():
        name = words.pop(0).split("=")[0]
        sources = [ROOT / "setup.py", *(ROOT / "pyprune").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
        assert any(name in path.read_text() for path in sources) or name == "OUT", f"nothing reads {name}"
    check = {"pyprune": pyprune_command, "make": make_command, "pip": pip_command, "python": python_command}
    check |= {"pytest": files_exist, "torchrun": torchrun_command, ".venv/bin/pre-commit": lambda *_: None}
    check |= {".venv/bin/pip": pip_command}
    assert words[0] in check or words[0].endswith(".sh"), f"a command that this test does not know: {words[0]}"
    check.get(words[0], files_exist)(words, capsys, tmp_path)


def pyprune_command(words: list[str], capsys, tmp_path) -> None:
    arguments = ["MODEL" if word in MODELS else word for word in words[1:]]
    if any(part in word for part in ELSEWHERE for word in words):
        parse(arguments)
        return
    for flag, value in SMALL.items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
    for flag in ("-o", "--output"):  # what a command writes is written once per test
        if flag in arguments:
            place = arguments.index(flag) + 1
            arguments[place] = str(tmp_path / arguments[place])
    status, _, err = call(capsys, *arguments)
    assert status == 0 or (arguments[0] == "check" and status == 1), err  # a tiny model's figures may well fail


def parse(arguments: list[str]) -> None:
    """Raises click's error if an option or command does not exist."""
    from pyprune.cli.commands import app

    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


def torchrun_command(words: list[str], capsys, tmp_path) -> None:
    if "pyprune" in words:
        parse([word for word in words[words.index("pyprune") + 1 :] if word != "…"])


def make_command(words: list[str], *_) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name = word.split("=")[0]
        assert re.search(rf"^{name}\s*(:|\?=|:=)", text, re.MULTILINE), f"the Makefile has no {name}"


def pip_command(words: list[str], *_) -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for word in words[2:]:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", text, re.MULTILINE), f"there is no extra {name}"


def python_command(words: list[str], *_) -> None:
    if words[1:3] == ["-m", "benchmarks"]:
        sys.path.insert(0, str(ROOT))
        try:
            from benchmarks.__main__ import parser

            parser().parse_args(words[3:])
        finally:
            sys.path.remove(str(ROOT))
    elif words[1] == "-m" and words[2].startswith("benchmarks."):
        assert (ROOT / "benchmarks" / f"{words[2].partition('.')[2]}.py").is_file()
    else:
        files_exist(words)


def files_exist(words: list[str], *_) -> None:
    named = [word for word in words if re.fullmatch(r"(examples|tests|benchmarks)[\w./]*", word)]
    assert named and all((ROOT / name).exists() for name in named), words


def known(loads: re.Match, place: Path, written: Path) -> str:
    """A call of ``load`` of what is there already, or was saved by the same passage."""
    return loads[0] if (place / loads[1]).exists() else f'load("{written}/{loads[1]}")'


@pytest.mark.parametrize("path", sorted({path for path, _ in blocks("python")}), ids=lambda path: path.stem)
def test_python_in_a_document_runs(path, place, tmp_path, monkeypatch):
    """All passages of a document, one after the other. Names that a reader has already (``model``, ``texts``, …) are
    there; packaged models are a tiny one."""
    monkeypatch.chdir(place)
    text = "\n".join(passage for document, passage in blocks("python") if document == path)
    for name in MODELS:
        text = text.replace(f'"{name}"', f'"{place / "MODEL"}"')
    text = re.sub(r'(save\(|save_pretrained\(|output=)"([\w-]+)"', rf'\1"{tmp_path}/\2"', text)
    text = re.sub(r'load\("([\w-]+)"\)', lambda found: known(found, place, tmp_path), text)
    given = {
        "pyprune": pyprune,
        "torch": torch,
        "weight": torch.eye(16),
        "x": torch.ones(2, 16),
        "run": types.SimpleNamespace(log=lambda values, step: None),
        "bias": torch.zeros(16),
        "model": tiny.model("llama", vocab_size=tiny.CHARACTERS),
        "dense": tiny.model("llama", vocab_size=tiny.CHARACTERS),
        "pruned": pyprune.load(str(place / "pruned"))[0],
        "tokenizer": tiny.tokenizer(),
        "calibration": str(place / "text.jsonl"),
        "texts": [json.loads(line)["text"] for line in (place / "text.jsonl").read_text().splitlines()],
    }
    if importlib.util.find_spec("peft") is None:
        text = "".join(line for line in text.splitlines(keepends=True) if "peft_model" not in line)
    elif "peft_model" in text:
        import peft

        lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
        given["peft_model"] = peft.get_peft_model(pyprune.load(str(place / "pruned"))[0], lora)
    text = text.replace('"study"', f'"{tmp_path}/study"')
    given["optimizer"] = torch.optim.AdamW(given["pruned"].parameters())
    script = tmp_path / "script.py"
    script.write_text(text)
    runpy.run_path(str(script), init_globals=given)
