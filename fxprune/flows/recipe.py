"""A recipe: what is to be done to a model, where the result goes, and what is measured of it.

    Recipe(model, passes, place, wanted)  ──  fxprune.flows.driver.run  ──►  an outcome

The passes are those that change the model. Tracing, locating, slimming, verifying, saving, measuring and the report are
the driver's. A recipe comes from a verb of the command line, from a function of Python, or from YAML:

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    out: slim
    passes:
      - sparsegpt: {pattern: "2:4", calibration: text.jsonl}
    measure: {ppl: [wiki.test.raw], speed: true}
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import UsageError
from fxprune.core.pipeline import load_pipeline
from fxprune.flows.wanted import Wanted
from fxprune.models.loading import LoadedModel, expand_user

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.core.pass_base import Pass

__all__ = ["OF_DRIVER", "Destination", "Recipe", "is_recipe", "recipe_of_yaml"]


OF_DRIVER = frozenset({*LOCATE, "insert_masks", "slim", "verify", "save"})
"""Passes that the driver runs itself."""


@dataclass(frozen=True)
class Destination:
    """Where the work is done and where the result goes.

    Attributes:
        out: directory of the checkpoint; None saves nothing.
        device: where the model runs.
        dtype: its precision; as saved when None.
        overwrite: whether an earlier output may be replaced.
        hold_zeros: whether zeros that no mask holds are held too, as another tool's pruning leaves them.
    """

    out: Path | None
    device: str = "cpu"
    dtype: str | None = None
    overwrite: bool = False
    hold_zeros: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is to be done.

    Attributes:
        model: hub id or directory, or a model that is loaded already.
        passes: those that change the model, in order; at most one removes units.
        place: where.
        wanted: what is measured afterwards.
        stream: work block by block from the shards, without ever holding the model.
        restart: throw away what an earlier run left unfinished, instead of going on with it.
    """

    model: str | LoadedModel
    passes: tuple[Pass, ...]
    place: Destination
    wanted: Wanted = field(default_factory=Wanted)
    stream: bool = False
    restart: bool = False

    @property
    def name(self) -> str:
        """What messages and reports call the model."""
        return self.model if isinstance(self.model, str) else self.model.name

    @property
    def inputs(self) -> list[str | Path]:
        """What is read, which no output may replace."""
        if isinstance(self.model, str):
            return [self.model]
        return [] if self.model.path is None else [self.model.path]

    @property
    def method(self) -> str:
        """What reports call the passes."""
        return " then ".join(step.name for step in self.passes)

    @property
    def seed(self) -> int:
        """Of the first pass that has one."""
        return next((int(step.seed) for step in self.passes if hasattr(step, "seed")), 0)


@validated(config=ConfigDict(extra="forbid"))
class _Measure:
    """The key `measure` of a YAML recipe; see `Wanted`."""

    ppl: str | list[str] = field(default_factory=list)
    windows: int | None = None
    guard: str = "python"
    speed: bool = False
    threads: int = 1
    repeats: int | None = None


@validated(config=ConfigDict(extra="forbid"))
class _Yaml:
    """The keys of a YAML recipe, without `passes`."""

    model: str
    out: str
    measure: _Measure = field(default_factory=_Measure)
    device: str = "cpu"
    dtype: str | None = None
    overwrite: bool = False
    hold_zeros: bool = False
    stream: bool = False
    restart: bool = False


def is_recipe(data: Any) -> bool:
    """Whether parsed YAML is a recipe, which says where its result goes; a pipeline has passes and a model alone."""
    return isinstance(data, dict) and bool(set(data) - {"model", "passes"})


def recipe_of_yaml(data: Mapping[str, Any], *, where: str, model: str | None = None) -> Recipe:
    """A recipe from parsed YAML; everything is validated before anything runs.

    Args:
        data: the keys of the module's docstring, and `device`, `dtype`, `overwrite`, `hold_zeros`, `stream`, `restart`.
        where: how messages call the file.
        model: hub id or directory, instead of the file's.

    Raises:
        UsageError: a key or an option is unknown or wrong.
        RegistryError: a pass is unknown.
    """
    others = {name: value for name, value in data.items() if name != "passes"} | ({"model": model} if model else {})
    try:
        found = TypeAdapter(_Yaml).validate_python(others)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = f"; the keys are passes, {', '.join(one.name for one in fields(_Yaml))}"
        raise UsageError(f"{where}: {key}: {first['msg']}{hint}") from error
    measure = {one.name: getattr(found.measure, one.name) for one in fields(_Measure)}
    measure["ppl"] = [measure["ppl"]] if isinstance(measure["ppl"], str) else measure["ppl"]
    place = Destination(
        expand_user(found.out), found.device, found.dtype, overwrite=found.overwrite, hold_zeros=found.hold_zeros
    )
    passes = tuple(load_pipeline(data, where=where))
    if own := [step.name for step in passes if step.name in OF_DRIVER]:
        raise UsageError(
            f"{where}: {own[0]} is run anyway where `out` is given: leave it out; without `out` a pipeline is run as "
            "it is written"
        )
    return Recipe(found.model, passes, place, Wanted(**measure), stream=found.stream, restart=found.restart)
