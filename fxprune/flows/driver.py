"""The driver: it runs a recipe, whatever its passes are.

    check everything ─ load ─ trace, locate ─ passes ─ slim ─ verify ─ save ─ verify what was saved ─ measure ─ report
                                                └─ for each goal of a pass, if it has several (fxprune.flows.goals)
    check everything ─ block by block from the shards (fxprune.flows.streaming_run) ─ report

A pass says what it needs (`fxprune.core.pass_base`): whether it keeps shapes, what its goals are, whether it can be
streamed. No pass has code here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.core.errors import UsageError
from fxprune.core.output import prepare_output
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.assessment import Assessor
from fxprune.flows.goals import run_goals
from fxprune.flows.steps import Outcome, carry_out, check_classes, open_program
from fxprune.flows.streaming_run import prune_streaming

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fxprune.flows.recipe import Recipe

__all__ = ["check_recipe", "run"]


def check_recipe(recipe: Recipe) -> None:
    """Refuse what can be known of a recipe without its model.

    Raises:
        UsageError: options that do not go together.
        CalibrationError: a text cannot be read.
    """
    if not recipe.passes:
        raise UsageError("there is nothing to do: name a pass")
    cutting = [step.name for step in recipe.passes if not step.keeps_shapes]
    if len(cutting) > 1:
        raise UsageError(
            f"{' and '.join(cutting)} both remove units: save what the first leaves, and give that to the second"
        )
    several = [step.name for step in recipe.passes if step.goals()]
    if several and len(recipe.passes) > 1:
        raise UsageError(f"{several[0]} has several targets, which no other pass can follow: give it one, or it alone")
    if several and recipe.place.out is None:
        raise UsageError(f"{several[0]} has several targets, and each is a checkpoint: say where they go (out)")
    if several and recipe.restart:
        raise UsageError(f"{several[0]} goes on at the first target that is not finished: leave restart out")
    if recipe.stream:
        _check_stream(recipe)
    recipe.wanted.check(recipe.passes, recipe.place.device)


def _check_stream(recipe: Recipe) -> None:
    for step in recipe.passes:
        if reason := step.why_not_streamed():
            raise UsageError(reason)
    if len(recipe.passes) > 1:
        raise UsageError("streaming reads the shards once, for one pass: run the others after it")
    if recipe.place.out is None or not isinstance(recipe.model, str):
        raise UsageError("streaming goes from the shards of a checkpoint to those of another: name both")
    if recipe.wanted.ppl or recipe.wanted.speed:
        raise UsageError("--ppl and --measure-speed run the whole model, which --stream never holds: do it later")
    if recipe.place.hold_zeros:
        raise UsageError("hold_zeros looks at all weights, and --stream has one block of them at a time")
    if recipe.place.dtype is not None:
        raise UsageError("--stream keeps the dtype of the shards; leave --dtype out")


def run(recipe: Recipe, *, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Run a recipe: one model, or one for each goal of its pass.

    Args:
        recipe: what is to be done.
        say: gets progress messages.

    Returns:
        The outcome; of several goals the report over all of them.

    Raises:
        UsageError: options do not go together, or goals are not in order.
        OutputError: there is something else in the output directory.
        FxpruneError: any step refused, or a rung of the verification failed; goals that are finished stay.
    """
    check_recipe(recipe)
    if recipe.stream:
        return _streamed(recipe, say)
    if any(step.goals() for step in recipe.passes):
        return run_goals(recipe, say=say)
    place = recipe.place
    if place.out is not None:
        prepare_output(place.out, overwrite=place.overwrite, inputs=recipe.inputs)
    check_classes(recipe)
    if recipe.restart:
        for step in recipe.passes:
            step.forget()
    watch = Stopwatch()
    program = open_program(recipe, watch, say)
    with Assessor(recipe, program, say) as assessor:
        program = carry_out(
            program, recipe.passes, out=place.out, overwrite=place.overwrite, on_pass=lambda step: say(step.name)
        )
        report = assessor.report(program, place.out, watch=watch)
    return Outcome(report, program, place.out)


def _streamed(recipe: Recipe, say: Callable[[str], None]) -> Outcome:
    (step,) = recipe.passes
    place = recipe.place
    assert place.out is not None
    assert isinstance(recipe.model, str)
    report: Mapping[str, Any] = prune_streaming(
        recipe.model,
        place.out,
        step,  # type: ignore[arg-type]  # it said that it can be streamed
        device=place.device,
        overwrite=place.overwrite,
        restart=recipe.restart,
        on_block=lambda done, blocks: say(f"block {done} of {blocks}"),
    )
    resolve("fxprune.exporters.report_writer:write_report")(report, place.out)
    return Outcome(dict(report), path=place.out)
