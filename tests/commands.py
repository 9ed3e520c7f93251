"""Running a command in the test's own process."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from fxprune.cli import main as cli


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> tuple[int, str, str]:
    """Run `fxprune ARGS`; returns exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["fxprune", *(str(arg) for arg in args)])
    monkeypatch.setattr(cli, "_out", Console(width=200, file=sys.stdout))
    monkeypatch.setattr(cli, "_err", Console(width=200, file=sys.stderr))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err
