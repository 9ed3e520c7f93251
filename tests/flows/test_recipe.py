"""Recipes: several passes in one run, from YAML too; what does not go together is refused before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

import fxprune
from fxprune.core.pipeline import build_pass
from fxprune.flows.driver import run
from fxprune.flows.recipe import Destination, Recipe, recipe_of_yaml
from fxprune.flows.wanted import Wanted
from fxprune.tracing.weight_masks import read_masks
from tests.commands import run_command

if TYPE_CHECKING:
    from pathlib import Path

UNITS = ("magnitude-units", {"ratio": 0.3})
WEIGHTS = ("magnitude", {"sparsity": 0.5})


def recipe(model: object, out: Path | None, *passes: tuple[str, dict[str, Any]], **more: Any) -> Recipe:
    steps = tuple(build_pass(name, options) for name, options in passes)
    return Recipe(str(model), steps, Destination(out), Wanted(guard="none"), **more)


@pytest.mark.parametrize("order", [(WEIGHTS, UNITS), (UNITS, WEIGHTS)])
def test_two_passes_in_one_run(order: tuple[Any, ...], tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Zeros and smaller Linears, in either order; the proof is made after each, and the masks are saved."""
    outcome = run(recipe(tiny_llama_dir, tmp_path / "out", *order))
    assert outcome.report["method"] == " then ".join(name for name, _ in order)
    assert all(rung["passed"] for rung in outcome.report["verify"])
    assert "reloaded checkpoint = slim" in {rung["rung"] for rung in outcome.report["verify"]}
    slim, masks = fxprune.load(tmp_path / "out"), read_masks(tmp_path / "out")
    assert outcome.report["params"]["removed_share_blocks"] >= 0.25
    assert len(masks) == 14
    for name, mask in masks.items():
        weight = slim.get_parameter(name)
        assert weight.shape == mask.shape
        assert not bool(weight[~mask].any())
    assert 0.4 < float(torch.cat([(~mask).flatten() for mask in masks.values()]).float().mean()) < 0.6
    names = [event["name"] for event in outcome.report["history"]]
    assert names.index(order[0][0]) < names.index(order[1][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, out: recipe(m, out), "nothing to do"),
        (lambda m, out: recipe(m, out, UNITS, ("random", {"ratio": 0.2})), "magnitude-units and random both remove"),
        (lambda m, out: recipe(m, out, ("random", {"ratio": [0.1, 0.2]}), WEIGHTS), "several targets, which no other"),
        (lambda m, out: recipe(m, out, UNITS, stream=True), "magnitude-units needs the whole model in memory"),
        (lambda m, out: recipe(m, out, UNITS, restart=True), "keeps nothing of an unfinished run"),
        (lambda m, out: recipe(m, out, ("random", {"ratio": [0.1, 0.2]}), restart=True), "leave restart out"),
        (
            lambda m, out: recipe(m, out, *[("wanda", {"calibration": "t.txt"})] * 2, stream=True),
            "reads the shards once, for one pass",
        ),
    ],
)
def test_passes_that_do_not_go_together(make: Any, message: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(fxprune.UsageError, match=message):
        run(make(tiny_llama_dir, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_in_yaml_runs_and_is_what_python_does(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    data = {
        "model": str(tiny_llama_dir),
        "out": str(tmp_path / "yaml"),
        "passes": [{"magnitude": {"pattern": "2:4"}}, {"magnitude-units": {"ratio": 0.3}}],
        "measure": {"ppl": ["python"], "windows": 1, "guard": "none"},
    }
    file.write_text(yaml.safe_dump(data))
    status, shown, err = run_command(monkeypatch, capsys, "run", file)
    assert status == 0, err
    assert "magnitude then magnitude-units" in shown
    run(recipe(tiny_llama_dir, tmp_path / "python", ("magnitude", {"pattern": "2:4"}), UNITS))
    one, other = (fxprune.load(tmp_path / name).state_dict() for name in ("yaml", "python"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour: Unexpected keyword argument.*the keys are passes, model, out"),
        ({"measure": {"speeed": True}}, r"measure\.speeed"),
        ({"passes": [{"channel": {"ratio": 2}}]}, "between 0 and 1"),
        ({"passes": ["lift_linears", {"channel": {"ratio": 0.2}}]}, "lift_linears is run anyway"),
        ({"model": None}, "model: "),
    ],
)
def test_a_wrong_recipe_is_told_before_anything_runs(change: dict[str, Any], message: str) -> None:
    data = {"model": "nowhere", "out": "out", "passes": [{"channel": {"ratio": 0.2}}]} | change
    with pytest.raises(fxprune.UsageError, match=message):
        recipe_of_yaml(data, where="r.yaml")


def test_the_table_of_a_speed_up_is_asked_for_wherever_its_pass_stands(tiny_llama_dir: Path, tmp_path: Path) -> None:
    timed = ("magnitude-units", {"target_speedup": 1.3, "table": str(tmp_path / "missing.json")})
    for passes in ((timed, WEIGHTS), (WEIGHTS, timed)):
        with pytest.raises(fxprune.UsageError, match="cannot be read as a latency table"):
            run(recipe(tiny_llama_dir, tmp_path / "out", *passes))
