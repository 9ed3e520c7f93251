"""What the command line says of itself: short help, methods and their options, old spellings, what it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fxprune.cli.spellings import hint
from fxprune.core.pass_base import constructor_options
from fxprune.core.registry import get_pass, pass_names
from fxprune.flows.explain import explain, keywords, methods
from tests.commands import run_command

if TYPE_CHECKING:
    from pathlib import Path

SCREEN = 42
"""Lines of a help text, in a terminal of 100 columns."""


@pytest.mark.parametrize("verb", ["prune", "sparsify", "learn", "explain"])
def test_help_fits_one_screen(verb: str) -> None:
    command = [sys.executable, "-c", "from fxprune.cli.main import main; main()", verb, "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env={"COLUMNS": "100"}).stdout
    assert len(shown.splitlines()) <= SCREEN, shown


def test_neither_the_import_nor_help_loads_what_is_slow() -> None:
    """Seconds depend on the machine; what takes them is torch and transformers."""
    for code in ("import fxprune", "import sys; sys.argv = ['fxprune', '--help']; from fxprune.cli.main import app"):
        check = (
            f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers', 'onnx', 'scipy') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "[]"


def test_every_option_of_every_method_is_explained() -> None:
    for one in methods():
        assert one.summary
        assert one.options
        assert not [option.name for option in one.options if not option.meaning], one.name
    assert {one.verb for one in methods()} == {"prune", "sparsify", "learn"}
    pruning = [name for name in pass_names() if get_pass(name).prunes]
    assert len(methods()) == len(pruning)
    found = explain("sparsegpt")
    assert [option.name for option in found.options] == list(constructor_options(get_pass("sparsegpt")))
    assert "Frantar" in found.text
    assert {"windows", "overwrite"} <= set(keywords("sparsify"))


def test_explain_lists_methods_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, shown, _ = run_command(monkeypatch, capsys, "explain")
    assert status == 0
    assert all(name in shown for name in ("channel", "sparsegpt", "l0"))
    status, shown, err = run_command(monkeypatch, capsys, "explain", "channel", "--json", tmp_path / "channel.json")
    assert status == 0
    assert "fxprune prune MODEL --out DIR --method channel" in shown
    assert "round_to" in shown
    assert "hold_zeros" in err
    data = json.loads((tmp_path / "channel.json").read_text())
    assert {"name": "round_to", "kind": "int", "default": "8"}.items() <= next(
        option for option in data["options"] if option["name"] == "round_to"
    ).items()
    status, _, err = run_command(monkeypatch, capsys, "explain", "nonsense")
    assert status == 1
    assert "nonsense" in err


def test_old_spellings_end_with_the_new_one() -> None:
    assert hint("prune", "--pattern").endswith("fxprune sparsify MODEL --pattern ...")
    assert "--option allocation=VALUE of fxprune sparsify" in hint("prune", "--allocation")
    assert "--option exclude_lm_head=true of fxprune sparsify" in hint("prune", "--exclude-lm-head")
    assert hint("prune", "--epochs").endswith("fxprune learn MODEL --epochs ...")
    assert "--option warm_up=VALUE of fxprune learn" in hint("prune", "--warm-up")
    assert "write --option min_keep=VALUE;" in hint("prune", "--min-keep")
    assert hint("eval", "--pattern") == ""


def test_the_shell_completes() -> None:
    command = [sys.executable, "-c", "from fxprune.cli.main import app; app(prog_name='fxprune')"]
    environment = {"_FXPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "fxprune spar", "COMP_CWORD": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["sparsify"]
