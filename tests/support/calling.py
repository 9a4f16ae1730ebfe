"""Commands of the command line, run in this process."""

from __future__ import annotations

import pytest

from pyprune.cli import commands


def call(capsys, *arguments):
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        commands.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err
