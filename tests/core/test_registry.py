"""The registry: lazy, without collisions, open to other packages; and the import rules that it makes possible."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pytest

from fxprune.core import registry
from fxprune.core.errors import RegistryError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.registry import get_pass, pass_names, register_pass, resolve
from fxprune.passes.slim import Slim

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.program import Program


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    monkeypatch.setattr(registry, "_loaded_entry_points", False)


class Mine(Pass):
    """A pass of another package."""

    name = "mine"

    def call(self, program: Program) -> PassResult:
        return PassResult(program, modified=False)


@pytest.mark.parametrize("name", sorted(registry._PASSES))
def test_every_pass_that_is_listed_exists_under_its_own_name(name: str) -> None:
    found = get_pass(name)
    assert issubclass(found, Pass)
    assert found.name == name


def test_a_class_can_be_registered_and_found() -> None:
    register_pass("mine", Mine)
    assert get_pass("mine") is Mine
    assert "mine" in pass_names()
    register_pass("mine", Mine)  # the same claim twice is no collision


def test_a_name_that_two_packages_claim_is_an_error_that_names_both() -> None:
    with pytest.raises(RegistryError, match=r"'slim' is claimed by both fxprune\.passes\.slim:Slim and .*:Mine"):
        register_pass("slim", Mine)
    assert get_pass("slim") is Slim


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RegistryError, match="unknown pass 'slimm'; did you mean 'slim'?"):
        get_pass("slimm")


@pytest.mark.parametrize("path", ["fxprune.passes.nothing:Slim", "fxprune.passes.slim:Nothing", "no_such_package:X"])
def test_what_cannot_be_loaded_is_named(path: str) -> None:
    with pytest.raises(RegistryError, match=f"cannot load '{path}'"):
        resolve(path)


def entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    def found(*, group: str) -> list[EntryPoint]:
        return [EntryPoint(name, value, group) for name, value in points if group == "fxprune.passes"]

    monkeypatch.setattr(registry, "entry_points", found)


def test_other_packages_add_passes_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "acme_pruning", sys.modules[__name__])
    entry_points(monkeypatch, ("acme", "acme_pruning:Mine"))
    assert "acme" in pass_names()
    assert get_pass("acme") is Mine


def test_an_entry_point_is_not_imported_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("broken", "acme_is_not_installed:Pass"))
    assert "broken" in pass_names()
    assert get_pass("slim") is Slim
    with pytest.raises(RegistryError, match="cannot load 'acme_is_not_installed:Pass'"):
        get_pass("broken")


def test_an_entry_point_cannot_take_the_name_of_another_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("slim", "acme_pruning:Mine"))
    with pytest.raises(RegistryError, match="'slim' is claimed by both"):
        get_pass("lift_linears")


# --- import rules ---------------------------------------------------------------------------------------------------


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_core_imports_no_passes_and_no_exporters(tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, sys, fxprune\n"
        "import fxprune.core.registry, fxprune.core.pipeline, fxprune.tracing.trace, fxprune.cli.main\n"
        "late = ('fxprune.passes', 'fxprune.exporters')\n"
        "names = [m.name for m in pkgutil.walk_packages(fxprune.__path__, 'fxprune.') if not m.name.startswith(late)]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names) > 150, sorted(m for m in sys.modules if m.startswith(late)))\n"
    )
    assert run_python(code, tmp_path) == "True []"


def test_importing_fxprune_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = "import sys, fxprune; print(fxprune.__version__, sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert run_python(code, tmp_path) == "0.1.0 []"


def test_no_global_packages_leak(tmp_path: Path) -> None:
    code = (
        "import fxprune.passes.slim\n"
        "from importlib.util import find_spec\n"
        "print([name for name in ('passes', 'exporters', 'tests', 'benchmarks', 'examples') if find_spec(name)])"
    )
    assert run_python(code, tmp_path) == "[]"
