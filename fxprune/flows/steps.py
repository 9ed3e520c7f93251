"""The steps that every run shares: what a class can serve, opening a program, and what belongs behind a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.models.methods import check_method, class_of_model
from fxprune.models.savable import require_savable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program
    from fxprune.core.stopwatch import Stopwatch
    from fxprune.flows.recipe import Recipe

__all__ = ["Outcome", "carry_out", "check_classes", "open_program", "prune_program"]


@dataclass(frozen=True)
class Outcome:
    """What came of a recipe.

    Attributes:
        report: as it is written beside the checkpoint.
        program: the program at the end; None where no whole model was held, or there are several.
        path: of the checkpoint, or of the directory with one for each goal; None if nothing was saved.
    """

    report: dict[str, Any]
    program: Program | None = None
    path: Path | None = None


def check_classes(recipe: Recipe) -> None:
    """Refuse what the model's class cannot serve, from its configuration alone.

    Raises:
        FxpruneError: there is no such model, its class is unknown, or it cannot serve a pass or a measurement.
    """
    loaded = recipe.model
    model_class, config = class_of_model(loaded) if isinstance(loaded, str) else (type(loaded.model), loaded.config)
    for step in recipe.passes:
        check_method(step, model_class, config)
        recipe.wanted.check_class(step, model_class, config, recipe.place.dtype)


def open_program(recipe: Recipe, watch: Stopwatch, say: Callable[[str], None]) -> Program:
    """Load, trace and locate.

    Raises:
        FxpruneError: the model cannot be loaded or traced, or could not be saved afterwards.
    """
    loaded = recipe.model
    if isinstance(loaded, str):
        say(f"loading {loaded}")
        with watch.stage("load"):
            loaded = load_model(loaded, dtype=recipe.place.dtype, device=recipe.place.device)
    say("tracing and locating")
    reader = next((step for step in recipe.passes if step.reads_text), None)
    program = front_end(loaded, watch, reader, hold_zeros=recipe.place.hold_zeros)
    if recipe.place.out is not None:
        require_savable(program.source)
    return program


def carry_out(
    program: Program,
    passes: Sequence[Pass],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    on_pass: Callable[[Pass], None] | None = None,
) -> Program:
    """Run passes and what belongs behind them: slim, verify and, with `out`, save and verify the reloaded checkpoint.

    Args:
        program: a program with groups.
        passes: those that change the model.
        out: where the checkpoint goes.
        overwrite: whether an earlier output may be replaced.
        on_pass: called before each pass, for progress.

    Raises:
        FxpruneError: any pass refused or any rung failed.
    """
    steps: list[Pass] = []
    for index, step in enumerate(passes):
        steps.append(step)
        if not step.keeps_shapes:
            steps += [build_pass("insert_masks", {}), build_pass("slim", {})]
            if index < len(passes) - 1:  # what comes next changes the form that is compared
                steps.append(build_pass("verify", {}))
    steps.append(build_pass("verify", {}))
    if out is not None:
        steps.append(build_pass("save", {"out": str(out), "overwrite": overwrite}))
        steps.append(build_pass("verify", {"checkpoint": str(out), "graph": False}))
    return Pipeline(steps, on_pass=on_pass)(program).program


def prune_program(
    program: Program,
    method: str,
    options: Mapping[str, Any],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    on_pass: Callable[[Pass], None] | None = None,
) -> Program:
    """Prune, slim, verify and, with `out`, save and verify the reloaded checkpoint.

    Args:
        program: a program with groups.
        method: name of a pruning pass.
        options: its options.
        out: where the checkpoint goes.
        overwrite: whether an earlier output may be replaced.
        on_pass: called before each pass, for progress.

    Returns:
        The slim program.

    Raises:
        FxpruneError: any pass refused or any rung failed.
    """
    return carry_out(program, [build_pass(method, options)], out=out, overwrite=overwrite, on_pass=on_pass)
