"""Pipelines: lists of passes that are passes themselves, written in Python or in YAML.

    passes:
      - lift_linears
      - locate_mlp
      - channel: {ratio: 0.2, calibration: text.jsonl}
      - slim
      - verify

A YAML pipeline is validated as a whole (pass names, option names, option types) before anything runs.
"""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import yaml
from pydantic import ConfigDict, ValidationError, create_model

from fxprune.core.errors import UsageError
from fxprune.core.pass_base import Pass, PassResult, constructor_options
from fxprune.core.registry import get_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.core.program import Program

__all__ = ["Pipeline", "build_pass", "load_pipeline", "read_yaml"]


class Pipeline(Pass):
    """Runs passes one after the other; modified if any of them modified something.

    Args:
        passes: the passes, in order.
        on_pass: called with each pass before it runs, for progress.
    """

    name: ClassVar[str] = "pipeline"

    def __init__(self, passes: Sequence[Pass], *, on_pass: Callable[[Pass], None] | None = None) -> None:
        self.passes = tuple(passes)
        self._on_pass = on_pass

    def options(self) -> dict[str, Any]:
        """The names of the passes."""
        return {"passes": [step.name for step in self.passes]}

    def call(self, program: Program) -> PassResult:
        """Run the passes, after all of them were asked for what can be known before."""
        before = program
        program = self.precheck(program)
        modified = program is not before
        for index, step in enumerate(self.passes):
            if step.prunes:
                for later in self.passes[index + 1 :]:
                    asked = later.precheck(program, step)
                    program, modified = asked, modified or asked is not program
            if self._on_pass is not None:
                self._on_pass(step)
            result = step(program)
            program, modified = result.program, modified or result.modified
        return PassResult(program, modified)

    def precheck(self, program: Program, pruning: Pass | None = None) -> Program:
        """Ask every pass."""
        for step in self.passes:
            program = step.precheck(program, pruning)
        return program

    def __call__(self, program: Program) -> PassResult:
        """Run the passes; each writes its own entry of the history, the pipeline adds none."""
        self.requires(program)
        return self.call(program)

    @classmethod
    def from_yaml(cls, path: Path) -> Pipeline:
        """Read and validate a YAML pipeline.

        Raises:
            UsageError: the file is not YAML of the right form, or an option is wrong.
            RegistryError: a pass is unknown.
        """
        return cls(load_pipeline(read_yaml(path), where=str(path)))


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; raises `UsageError` when it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {error}") from error


def load_pipeline(data: Any, *, where: str = "pipeline") -> list[Pass]:
    """Turn parsed YAML into passes; everything is validated before the first pass is built.

    Args:
        data: a mapping with the key `passes`, or the list itself. Each entry is a name or `{name: {option: value}}`.
        where: how messages call the source.

    Returns:
        The passes.

    Raises:
        UsageError: the form is wrong or an option is.
        RegistryError: a pass is unknown.
    """
    steps = data.get("passes") if isinstance(data, dict) else data
    if not isinstance(steps, list) or not steps:
        raise UsageError(f"{where}: expected a list of passes under the key 'passes'")
    parsed: list[tuple[str, dict[str, Any]]] = []
    for index, step in enumerate(steps):
        if isinstance(step, str):
            parsed.append((step, {}))
        elif isinstance(step, dict) and len(step) == 1:
            name, options = next(iter(step.items()))
            if options is not None and not isinstance(options, dict):
                raise UsageError(f"{where}: options of pass {name!r} (entry {index + 1}) must be a mapping")
            parsed.append((str(name), dict(options or {})))
        else:
            raise UsageError(f"{where}: entry {index + 1} must be a pass name or a mapping with one pass name")
    checked = [(get_pass(name), _validated(get_pass(name), options, f"{where}: {name}")) for name, options in parsed]
    return [cls(**options) for cls, options in checked]


def build_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Build one pass by name with validated options.

    Raises:
        UsageError: an option is wrong.
        RegistryError: the pass is unknown.
    """
    cls = get_pass(name)
    return cls(**_validated(cls, dict(options), name))


def _validated(cls: type[Pass], options: dict[str, Any], where: str) -> dict[str, Any]:
    """Check options against the constructor's signature; return them with pydantic's conversions."""
    declared = constructor_options(cls)
    parameters = {name: parameter for name, (parameter, _) in declared.items()}
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(parameters) or 'no options'}"
            raise UsageError(f"{where}: unknown option {option!r}{hint}")
    hints: dict[str, Any] = {}
    for constructor in dict.fromkeys(constructor for _, constructor in reversed(declared.values())):
        hints |= get_type_hints(constructor, {**_TYPE_NAMES, **getattr(constructor, "__globals__", {})})
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in parameters.items()
    }
    model = create_model(
        f"{cls.__name__}Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields
    )
    try:
        values = model(**options)
    except ValidationError as error:
        # Of the alternatives that an option has, the one that fits furthest says best what is wrong.
        worst = max(error.errors(), key=lambda one: len(_place(options, one["loc"])))
        option, given = ".".join(_place(options, worst["loc"])), worst["input"]
        hint = sexagesimal_hint(given) if worst["type"] == "string_type" and type(given) is int else ""
        reason = f"{worst['msg']}, not {given}; {hint}" if hint else worst["msg"]
        raise UsageError(f"{where}: option {option}: {reason}") from error
    return {name: getattr(values, name) for name in options}


def _place(options: dict[str, Any], location: tuple[int | str, ...]) -> list[str]:
    """Where in the options an error lies: pydantic's location without the names of a union's alternatives."""
    place, value = [str(location[0])], options.get(str(location[0]))
    for key in location[1:]:
        steps = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(steps, dict) and key in steps:
            place.append(str(key))
            value = steps[key]
    return place


def _type_names() -> dict[str, Any]:
    from collections.abc import Mapping, Sequence  # noqa: PLC0415 - names for annotations that are strings
    from pathlib import Path  # noqa: PLC0415

    import torch  # noqa: PLC0415

    return {"Path": Path, "Any": Any, "Sequence": Sequence, "Mapping": Mapping, "torch": torch, "Tensor": torch.Tensor}


_TYPE_NAMES = _type_names()


def sexagesimal_hint(number: int) -> str:
    """What to write instead, where `2:4` without quotes became 124: YAML 1.1 reads it in base 60; else empty."""
    if number < 60:
        return ""
    pattern = f"{number // 60}:{number % 60}"
    return f"YAML reads {pattern} without quotes as this number: write '{pattern}' with quotes"
