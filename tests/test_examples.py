"""The examples run, on a tiny model; the pass in docs/how-to-add.md works from a package of its own."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxprune
from fxprune.cli.main import main
from fxprune.core import registry
from fxprune.core.pipeline import Pipeline
from fxprune.passes.slim import Slim
from tests.families import located

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as `python examples/SCRIPT ARGS` would, in an empty directory; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def execute(script: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return execute


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 180)
    return path


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama in a precision that people bring."""
    if request.param == "float32":
        return tiny_llama_dir
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=request.param)
    loaded.save_pretrained(tmp_path / request.param)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_quickstart_saves_a_model_that_loads(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    shown = run("quickstart.py", model, text, tmp_path / "slim")
    assert "model.layers.0.self_attn [attention]: 6 query heads on 2 KV heads of 10, read by o_proj" in shown
    assert "slim = masked: max abs error" in shown
    counted = re.search(r"([\d,]+) -> ([\d,]+) parameters", shown)
    assert counted is not None
    dense, slim = (int(number.replace(",", "")) for number in counted.groups())
    assert slim < dense
    loaded = fxprune.load(tmp_path / "slim")
    assert sum(p.numel() for p in loaded.parameters()) == slim
    assert loaded.dtype is AutoModelForCausalLM.from_pretrained(model).dtype


def test_sparsegpt_saves_what_plain_transformers_loads(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    shown = run("sparsegpt.py", model, text, tmp_path / "sparse")
    assert "14 Linears, 50.0% of their weights removed" in shown
    assert "zeros in the first one: 50.0%" in shown
    assert len((EXAMPLES / "sparsegpt.py").read_text().splitlines()) < 30


def test_own_pass_runs_and_verifies(run: Run, model: Path) -> None:
    assert "slim = masked: max abs error" in run("own_pass.py", model)


def test_slim_runs_in_a_torch_fx_pass_manager(run: Run) -> None:
    assert "Linear(in_features=16, out_features=24" in run("fx_pass_manager.py")


def test_the_yaml_pipeline_runs(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = (EXAMPLES / "pipeline.yaml").read_text()
    assert "calibration: self" in pipeline
    (tmp_path / "pipeline.yaml").write_text(pipeline.replace("calibration: self", f"calibration: {text}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fxprune", "run", "pipeline.yaml", "--model", str(tiny_llama_dir)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert fxprune.load(tmp_path / "slim").config.model_type == "llama"


# --- docs/how-to-add.md ---------------------------------------------------------------------------------------------


def block(language: str) -> str:
    """The first code block of a language in docs/how-to-add.md."""
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "docs" / "how-to-add.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_shows_the_example_as_it_is() -> None:
    source = (EXAMPLES / "own_pass.py").read_text()
    body = source[source.index("class NormPrune") : source.index("if __name__")].strip()
    assert body in block("python")
    assert len(block("python").splitlines()) < 40


def test_a_package_written_by_the_book_adds_its_pass_to_yaml_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install a package that holds nothing but what the page shows, and use its pass by name."""
    name, target = re.findall(r'(\w+) = "(my_package:\w+)"', block("toml"))[0]
    metadata = tmp_path / "site" / "my_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (tmp_path / "site" / "my_package.py").write_text(block("python"))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[fxprune.passes]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    monkeypatch.setattr(registry, "_loaded_entry_points", False)
    (tmp_path / "pipeline.yaml").write_text(f"passes:\n  - {name}: {{keep: 0.5}}\n  - insert_masks\n")
    pipeline = Pipeline.from_yaml(tmp_path / "pipeline.yaml")
    assert type(pipeline.passes[0]).__module__ == "my_package"
    masked = pipeline(located("llama")).program
    assert masked.plan is not None
    assert {len(units) for units in masked.plan.kept.values()} == {8}  # half of 20, a multiple of 8
    slim = Slim()(masked).program
    assert slim.graph_module.get_parameter("model.layers.0.mlp.down_proj.weight").shape == (30, 8)
