"""``--help`` at 80 columns, completion, and the end of an interrupted command."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer

from pyprune.cli import commands, options
from pyprune.config import ConfigError, Evaluation, PruneConfig, Structured
from pyprune.keywords import keywords

GROUP = typer.main.get_command(commands.app)


def help_of(capsys, monkeypatch, *command, columns="80"):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        commands.main([*command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_every_option_name_is_whole_at_80_columns(capsys, monkeypatch, name):
    text = help_of(capsys, monkeypatch, name)
    assert max(map(len, text.splitlines())) <= 80
    names = [flag for p in GROUP.commands[name].params for flag in (*p.opts, *p.secondary_opts) if flag[0] == "-"]
    for flag in names:
        assert re.search(rf"(^| ){flag}\b", text, flags=re.M), f"{flag} is cut or missing"


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_no_types_and_no_spelling_of_python(capsys, monkeypatch, name):
    text = " ".join(help_of(capsys, monkeypatch, name).split())
    assert not re.search(r"<\w|list\[|\bNone\b", text.replace("(None in Python", ""))
    fields = {p for p in keywords() if "_" in p}
    words = set(re.findall(r"(?<![\w-])[a-z]+(?:_[a-z]+)+", text))
    assert not words & fields, "options are spelt as options"


def test_a_command_says_its_own_defaults(capsys, monkeypatch):
    text = " ".join(help_of(capsys, monkeypatch, "refine").split())
    assert re.search(r"--no-global-propagation [^\[]*\[default: on\]", text)
    assert "Folder to write the refined model to." in text and "[default: 0.0002]" in text
    assert "documentation and a novel that come with pyprune" in " ".join(help_of(capsys, monkeypatch, "eval").split())


def test_all_windows_are_asked_for_by_a_word():
    assert options.nested({"evaluation.max_windows": "all"}) == {"evaluation": {"max_windows": None}}
    assert options.nested({"evaluation.max_windows": "3"}) == {"evaluation": {"max_windows": 3}}
    with pytest.raises(ConfigError, match="max_windows must be a whole number or all, got 'most'"):
        options.nested({"evaluation.max_windows": "most"})


def test_what_most_runs_use_stands_before_the_advanced_sections(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, "prune")
    common, _, advanced = text.partition("\nAdvanced: ")
    shown = re.findall(r"^  (?:-\w, )?--([\w-]+)", common, flags=re.M)
    assert 15 <= len(shown) <= 25 and {"sparsity", "calibration", "text", "output"} <= set(shown)
    flags = {name.replace("_", "-"): path for name, path in keywords().items()}
    rest = re.findall(r"^  --([\w-]+)", advanced, flags=re.M)
    assert {flags[name] for name in rest} == set(flags.values()) - {"model", *options.COMMON}


def test_help_says_defaults_once():
    assert options.described(Evaluation, "max_windows").endswith("[default: 24]")
    assert options.described(Evaluation, "enabled").endswith("[default: on]")
    assert "[default" not in options.described(Evaluation, "window"), "its text gives the default"
    assert options.described(Structured, "nonstandard").endswith("[default: refuse]")
    assert "[default" not in options.described(PruneConfig, "sparsity")


def test_commands_and_choices_complete():
    """What a shell calls for <TAB>: the script itself, with the words so far."""
    environment = {**os.environ, "_PYPRUNE_COMPLETE": "complete_bash"}
    for words, wanted in (("pyprune co", "compare"), ("pyprune prune --method wa", "wanda")):
        run = subprocess.run(
            [sys.executable, "-c", "from pyprune.cli.commands import main; main(prog='pyprune')"],
            env={**environment, "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
            capture_output=True,
            text=True,
        )
        assert run.stdout.split() == [wanted], run.stderr


def test_an_interruption_anywhere_is_one_sentence_and_exit_code_130(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyprune.inspect", interrupted)
    with pytest.raises(SystemExit) as stop:
        commands.main(["inspect", "somewhere"])
    assert stop.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"
