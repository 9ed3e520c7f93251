"""Several goals of one pass from one calibration: a checkpoint for each, and the curve of quality against size.

    load ─ trace ─ calibrate ─ plans, each within the one before ─┬─ reconstruct, slim, verify, save ─ OUT/ratio-0.1
                                                                  └─ reconstruct, slim, verify, save ─ OUT/ratio-0.2
                                                                                        OUT/report.json, report.html

A goal's directory is finished when it has a `budget.json`. It names a hash of everything that the checkpoint and its
report follow from; a later run with the same hash leaves the directory as it is. Plans follow from the looser goals
before them, so a tighter one can be added to a list later, and only that one is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import OutputError
from fxprune.core.output import prepare_output, require_apart, write_json
from fxprune.core.pipeline import build_pass
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.assessment import Assessor
from fxprune.flows.reporting import versions
from fxprune.flows.steps import Outcome, carry_out, check_classes, open_program
from fxprune.models.loading import expand_user
from fxprune.models.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.core.goals import Goal
    from fxprune.core.pass_base import Pass
    from fxprune.flows.recipe import Recipe

__all__ = ["Wish", "run_goals"]

_MARKER = "budgets.json"
_FINISHED = "budget.json"


@dataclass(frozen=True)
class Wish:
    """One goal, and what tells whether it is reached.

    Attributes:
        goal: of the pass.
        digest: sha256 of all that its checkpoint and report follow from.
    """

    goal: Goal
    digest: str


def run_goals(recipe: Recipe, *, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Run a recipe whose one pass has several goals.

    Args:
        recipe: what is to be done; it was checked (`fxprune.flows.driver.check_recipe`).
        say: gets progress messages.

    Returns:
        The outcome, with the report over all goals.

    Raises:
        OutputError: there is something else in the output directory.
        FxpruneError: any step refused; goals that are finished stay.
    """
    (step,) = recipe.passes
    assert recipe.place.out is not None
    out = expand_user(recipe.place.out)
    require_apart(out, recipe.inputs)
    wishes = _wishes(step, _facts(recipe))
    todo = _open_output(out, wishes, overwrite=recipe.place.overwrite)
    watch = Stopwatch()
    if todo:
        _make(recipe, out, wishes=wishes, todo=todo, watch=watch, say=say)
    else:
        say(f"{out}: all budgets are finished")
    report = _overview(out, recipe, wishes, watch)
    resolve("fxprune.exporters.report_writer:write_report")(report, out)
    return Outcome(report, path=out)


def _make(
    recipe: Recipe,
    out: Path,
    *,
    wishes: Sequence[Wish],
    todo: Sequence[int],
    watch: Stopwatch,
    say: Callable[[str], None],
) -> None:
    """Make the goals that are not finished."""
    (step,) = recipe.passes
    check_classes(recipe)
    dense = open_program(recipe, watch, say)
    saving = build_pass("save", {"out": str(out / wishes[todo[0]].goal.name), "overwrite": True})
    dense = saving.precheck(build_pass("slim", {}).precheck(dense, step), step)
    step.requires(dense)
    say(f"{step.name}: one calibration for {len(wishes)} budgets")
    planned = step.for_goals(dense)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARKER, {"format": "fxprune budgets", "method": step.name, "model": recipe.name})
    with Assessor(recipe, dense, say) as assessor:
        for index in todo:
            wish = wishes[index]
            start = time.perf_counter()
            own = Stopwatch()
            own.seconds.update(watch.seconds)
            say(f"{wish.goal.text}: {wish.goal.name}")
            where = out / wish.goal.name
            program = carry_out(
                dense,
                [planned[index]],
                out=where,
                overwrite=True,  # `_open_output` has said that what is there is unfinished, or may go
                on_pass=lambda one: say(f"  {one.name}"),
            )
            speedup = wish.goal.value if wish.goal.speedup else None
            assessor.report(program, where, watch=own, speedup=speedup)
            seconds = time.perf_counter() - start
            write_json(where / _FINISHED, {"sha256": wish.digest, "target": wish.goal.text, "seconds": seconds})


# ---- which goals there are, and which are reached --------------------------------------------------------------------


def _wishes(step: Pass, facts: Mapping[str, Any]) -> list[Wish]:
    """The goals in their order, each with the hash of what it follows from."""
    goals = step.goals()
    found = []
    for index, goal in enumerate(goals):
        values = [one.value for one in goals[: index + 1]]
        kind = goal.option.removeprefix("target_")
        text = json.dumps({**facts, "target": [kind, values]}, sort_keys=True, default=str)
        found.append(Wish(goal, hashlib.sha256(text.encode()).hexdigest()))
    return found


def _facts(recipe: Recipe) -> dict[str, Any]:
    """All that results follow from, but for the goals; files count by their content."""
    (step,) = recipe.passes
    place, wanted = recipe.place, recipe.wanted
    held = {goal.option for goal in step.goals()}
    options = {name: value for name, value in step.options().items() if name not in held and not _is_target(name)}
    if options.get("text_field") is None:  # what was made before there was this option is found again
        options.pop("text_field", None)
    named = (*wanted.ppl, wanted.guard, options.get("calibration"), options.get("table"))
    return {
        "fxprune": version("fxprune"),
        "model": _files_of(recipe),
        "dtype": place.dtype,
        **({"hold_zeros": True} if place.hold_zeros else {}),
        "device": place.device,
        "method": step.name,
        "options": options,
        "wanted": dataclasses.asdict(wanted),
        "texts": {text: _content(text) for text in named if text},
    }


def _is_target(option: str) -> bool:
    return option == "ratio" or option.startswith("target_")


def _content(text: str) -> str | None:
    path = expand_user(text)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _files_of(recipe: Recipe) -> Any:
    """A local model by the names, sizes and times of its files; one on the hub by its name."""
    path = expand_user(recipe.model) if isinstance(recipe.model, str) else recipe.model.path
    if path is None or not path.is_dir():
        return recipe.name
    files = sorted(file for file in path.iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _open_output(out: Path, wishes: Sequence[Wish], *, overwrite: bool) -> list[int]:
    """Which goals are still to be reached.

    Raises:
        OutputError: the directory holds something else, or results of other options that may not be replaced.
    """
    if not (out / _MARKER).is_file():
        prepare_output(out, overwrite=False)
        return list(range(len(wishes)))
    todo = []
    for index, wish in enumerate(wishes):
        digest = _digest(out / wish.goal.name)
        if digest == wish.digest:
            continue
        if digest is not None and not overwrite:
            raise OutputError(
                f"{out / wish.goal.name} was made with other options, another model or looser budgets before it; "
                "choose another directory, or allow it to be replaced with --overwrite"
            )
        prepare_output(out / wish.goal.name, overwrite=True)
        todo.append(index)
    return todo


def _digest(directory: Path) -> str | None:
    """The hash of a finished directory; None of an unfinished one."""
    try:
        data = json.loads((directory / _FINISHED).read_bytes())
    except (OSError, ValueError):
        return None
    return str(data["sha256"]) if isinstance(data, dict) and "sha256" in data else None


# ---- the report over all --------------------------------------------------------------------------------------------


def _overview(out: Path, recipe: Recipe, wishes: Sequence[Wish], watch: Stopwatch) -> dict[str, Any]:
    """The report over all goals, from their own reports."""
    read_report = resolve("fxprune.exporters.report:read_report")
    reports = [read_report(out / wish.goal.name / "report.json") for wish in wishes]
    plans = [read_manifest(out / wish.goal.name).plan["kept"] for wish in wishes]
    entries: list[dict[str, Any]] = []
    seconds = dict(watch.seconds)
    structured = reports[0].get("structured", {})
    seconds |= {part: value for part, value in structured.get("seconds", {}).items() if part != "reconstruct"}
    for wish, report in zip(wishes, reports, strict=True):
        entry = {"name": wish.goal.name, "target": wish.goal.text}
        sections = ("params", "macs", "quality", "guard", "speed", "gate")
        entries.append(entry | {section: report[section] for section in sections if section in report})
        seconds[wish.goal.name] = json.loads((out / wish.goal.name / _FINISHED).read_bytes())["seconds"]
    return {
        "model": reports[0].get("model"),
        "model_class": reports[0].get("model_class"),
        "method": recipe.method,
        "seed": recipe.seed,
        "budgets": {"nested": _nested(plans), "entries": entries},
        "calibration": reports[0].get("calibration"),
        "seconds": seconds,
        "machine": reports[-1].get("machine"),
        "versions": versions(),
    }


def _nested(plans: Sequence[Any]) -> bool:
    """Whether each plan keeps nothing but what the one before keeps; a group that a plan does not name stays whole."""
    return all(
        group in after and set(after[group]) <= set(kept)
        for before, after in itertools.pairwise(plans)
        for group, kept in before.items()
    )
