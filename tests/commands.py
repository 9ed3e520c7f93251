"""Running a command, or a recipe of one pass, in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from fxprune.cli import common
from fxprune.cli import main as cli
from fxprune.core.pipeline import build_pass
from fxprune.flows.driver import run
from fxprune.flows.recipe import Destination, Recipe
from fxprune.flows.wanted import Wanted


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> tuple[int, str, str]:
    """Run `fxprune ARGS`; returns exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["fxprune", *(str(arg) for arg in args)])
    monkeypatch.setattr(common, "out", Console(width=200, file=sys.stdout))
    monkeypatch.setattr(common, "err", Console(width=200, file=sys.stderr))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def done(
    model: str, method: str, options: Mapping[str, Any], place: Destination, wanted: Wanted | None = None, **how: Any
) -> dict[str, Any]:
    """Run a recipe of one pass; returns its report."""
    return run(Recipe(model, (build_pass(method, options),), place, wanted or Wanted(), **how)).report
