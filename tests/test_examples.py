"""The examples run, on a tiny model."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fxprune
from fxprune.pipeline import Pipeline, build_pass
from fxprune.registry import register_pass

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(script: str, *args: object, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *(str(arg) for arg in args)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 60)
    return path


def test_quickstart_saves_a_model_that_loads(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    shown = run("quickstart.py", tiny_llama_dir, text, tmp_path / "slim", cwd=tmp_path)
    assert "slim = masked: max abs error" in shown
    assert fxprune.load(tmp_path / "slim").config.model_type == "llama"


def test_own_pass_runs_from_outside_the_package(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert "slim = masked: max abs error" in run("own_pass.py", tiny_llama_dir, cwd=tmp_path)


def test_own_pass_works_in_a_pipeline_by_name(tiny_llama: object) -> None:
    norm = runpy.run_path(str(EXAMPLES / "own_pass.py"))["NormPrune"]
    register_pass("norm_of_the_example", norm)
    names = ("lift_linears", "locate_mlp", "norm_of_the_example", "insert_masks", "slim")
    program = Pipeline([build_pass(name, {}) for name in names])(fxprune.trace(tiny_llama)).program  # type: ignore[arg-type]
    assert {len(units) for units in program.plan.kept.values()} == {56}  # three quarters of 80, a multiple of 8


def test_contributing_shows_the_example_as_it_is() -> None:
    shown = (ROOT / "CONTRIBUTING.md").read_text()
    source = (EXAMPLES / "own_pass.py").read_text()
    body = source[source.index("class NormPrune") : source.index("if __name__")].strip()
    assert body in shown
    assert len(body.splitlines()) < 40


def test_the_yaml_pipeline_runs(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    pipeline = (EXAMPLES / "pipeline.yaml").read_text().replace("calibration: self", f"calibration: {text}")
    (tmp_path / "pipeline.yaml").write_text(pipeline)
    command = [sys.executable, "-c", "from fxprune.cli import main; main()", "run", "pipeline.yaml"]
    command += ["--model", str(tiny_llama_dir)]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, timeout=300)
    assert fxprune.load(tmp_path / "slim").config.model_type == "llama"


def test_slim_runs_in_a_torch_fx_pass_manager(tmp_path: Path) -> None:
    assert "Linear(in_features=16, out_features=24" in run("fx_pass_manager.py", cwd=tmp_path)
