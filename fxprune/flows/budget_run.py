"""Several budgets from one calibration: a checkpoint for each, and the curve of quality against size and speed.

    load ─ trace ─ calibrate ─ plans, each within the one before ─┬─ reconstruct, slim, verify, save ─ OUT/ratio-0.1
                                                                  └─ reconstruct, slim, verify, save ─ OUT/ratio-0.2
                                                                                        OUT/report.json, report.html

A budget's directory is finished when it has a `budget.json`. It names a hash of everything that the checkpoint and its
report follow from; a later run with the same hash leaves the directory as it is. Plans follow from the looser budgets
before them, so a tighter budget can be added to a list later, and only that one is made.
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

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import OutputError, UsageError
from fxprune.core.output import prepare_output, require_apart, write_json
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.pipeline import build_pass
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.assessment import Assessor
from fxprune.flows.pruning import check_model, pass_of
from fxprune.flows.reporting import versions
from fxprune.flows.workflow import run_pruning
from fxprune.models.loading import expand_user
from fxprune.models.manifest import read_manifest
from fxprune.structured.base import StructuredPass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.core.program import Program
    from fxprune.flows.assessment import Wanted
    from fxprune.flows.pruning import Destination
    from fxprune.structured.base import Budgets
    from fxprune.structured.targets import Target

__all__ = ["Budget", "OneBudget", "prune_budgets"]

_MARKER = "budgets.json"
_FINISHED = "budget.json"
_SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Budget:
    """One value of the target.

    Attributes:
        target: what to reach.
        name: of its directory, such as `ratio-0.1` or `params-100M`.
        digest: sha256 of all that its checkpoint and report follow from.
    """

    target: Target
    name: str
    digest: str


class OneBudget(Pass):
    """A structured pass at one of several budgets that share a calibration.

    In the history it is the pass itself with this one value. Its seconds are what this program took, the shared part
    in full.

    Args:
        step: the pass.
        budgets: what it planned.
        index: which plan is applied.
    """

    def __init__(self, step: StructuredPass, budgets: Budgets, index: int) -> None:
        self.name = step.name  # type: ignore[misc]  # it stands for the pass
        self._step = step
        self._budgets = budgets
        self._index = index

    def options(self) -> dict[str, Any]:
        """The pass's own, with this budget's value of the target."""
        target = self._budgets.targets[self._index]
        return {**self._step.options(), _option_of(target): target.value}

    def requires(self, program: Program) -> None:
        """See the pass."""
        self._step.requires(program)

    def call(self, program: Program) -> PassResult:
        """Reconstruct for this budget's plan."""
        result = self._step.apply(program, self._budgets, self._index)
        shared = {"budgets_of_one_calibration": len(self._budgets.targets)}
        return PassResult(result.program, modified=True, details={**result.details, **shared})

    def ensures(self, before: Program, after: Program) -> None:
        """See the pass."""
        self._step.ensures(before, after)

    def __call__(self, program: Program) -> PassResult:
        """Run the steps; the event's seconds hold those of the calibration, which the pass's own parts name."""
        result = super().__call__(program)
        *before, event = result.program.history
        event = dataclasses.replace(event, seconds=event.seconds + sum(self._budgets.seconds.values()))
        return PassResult(result.program.replace(history=(*before, event)), result.modified, result.details)


def _option_of(target: Target) -> str:
    return target.kind if target.kind == "ratio" else f"target_{target.kind}"


def prune_budgets(
    model: str,
    method: str,
    options: Mapping[str, Any],
    place: Destination,
    wanted: Wanted,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prune a model to several budgets: one loading, one trace, one calibration.

    Args:
        model: hub id or directory.
        method: name of a structured pass.
        options: its options; the target is a list.
        place: where; `overwrite` allows directories of earlier runs with other options to be replaced.
        wanted: what to measure of each.
        say: gets progress messages.

    Returns:
        The report over all budgets, as it is written to `place.out`.

    Raises:
        UsageError: an option is wrong, or budgets are not in order.
        OutputError: there is something else in the output directory.
        FxpruneError: any step refused; budgets that are finished stay.
    """
    place = dataclasses.replace(place, out=expand_user(place.out))
    step = build_pass(pass_of(method, options), options)
    if not isinstance(step, StructuredPass):
        raise UsageError(f"{method} takes one target at a time")
    wanted.check(step, place.device)
    require_apart(place.out, [model])
    budgets = _budgets(step, _facts(model, step, place, wanted))
    todo = _open_output(place, budgets)
    watch = Stopwatch()
    if todo:
        _run(model, step, place, wanted, budgets=budgets, todo=todo, watch=watch, say=say)
    else:
        say(f"{place.out}: all budgets are finished")
    report = _overview(place.out, step, budgets, watch)
    resolve("fxprune.exporters.report_writer:write_report")(report, place.out)
    return report


def _run(
    model: str,
    step: StructuredPass,
    place: Destination,
    wanted: Wanted,
    *,
    budgets: Sequence[Budget],
    todo: Sequence[int],
    watch: Stopwatch,
    say: Callable[[str], None],
) -> None:
    """Make the budgets that are not finished."""
    check_model(model, step, wanted)
    say(f"loading {model}")
    with watch.stage("load"):
        loaded = load_model(model, dtype=place.dtype, device=place.device)
    say("tracing and locating")
    dense = front_end(loaded, watch, step, hold_zeros=place.hold_zeros)
    saving = build_pass("save", {"out": str(place.out / budgets[todo[0]].name), "overwrite": True})
    dense = saving.precheck(build_pass("slim", {}).precheck(dense, step), step)
    step.requires(dense)
    say(f"{step.name}: one calibration for {len(budgets)} budgets")
    planned = step.budgets(dense)
    place.out.mkdir(parents=True, exist_ok=True)
    write_json(place.out / _MARKER, {"format": "fxprune budgets", "method": step.name, "model": model})
    with Assessor(wanted, step, dense, say) as assessor:
        for index in todo:
            budget = budgets[index]
            start = time.perf_counter()
            own = Stopwatch()
            own.seconds.update(watch.seconds)
            say(f"{budget.target}: {budget.name}")
            out = place.out / budget.name
            program = run_pruning(
                dense,
                OneBudget(step, planned, index),
                out=out,
                overwrite=True,  # `_open_output` has said that what is there is unfinished, or may go
                on_pass=lambda one: say(f"  {one.name}"),
            )
            wished = budget.target.value if budget.target.kind == "speedup" else None
            assessor.report(program, out, method=step.name, seed=step.seed, target=wished, watch=own)
            seconds = time.perf_counter() - start
            write_json(out / _FINISHED, {"sha256": budget.digest, "target": str(budget.target), "seconds": seconds})


# ---- which budgets there are, and which are finished -----------------------------------------------------------------


def _budgets(step: StructuredPass, facts: Mapping[str, Any]) -> list[Budget]:
    """The budgets in their order, each with the hash of what it follows from."""
    targets = step.targets
    grows = targets[0].kind in {"ratio", "speedup"}
    for one, other in itertools.pairwise(targets):
        if one.value == other.value or (other.value > one.value) != grows:
            way = "grow" if grows else "shrink"
            listed = ", ".join(f"{target.value:g}" for target in targets)
            raise UsageError(f"budgets go from loose to tight: values of {_option_of(one)} must {way}, got {listed}")
    found = []
    for index, target in enumerate(targets):
        values = [target.value for target in targets[: index + 1]]
        text = json.dumps({**facts, "target": [target.kind, values]}, sort_keys=True, default=str)
        found.append(Budget(target, _name(target), hashlib.sha256(text.encode()).hexdigest()))
    names = [budget.name for budget in found]
    if len(set(names)) < len(names):
        raise UsageError(f"budgets {', '.join(names)} lie too close together to be told apart")
    return found


def _name(target: Target) -> str:
    value = f"{target.value:g}"
    if target.kind in {"params", "macs", "bytes"}:
        limit, suffix = next(((limit, suffix) for limit, suffix in _SUFFIXES if target.value >= limit), (1.0, ""))
        value = f"{target.value / limit:g}{suffix}"
    return f"{target.kind}-{value}"


def _facts(model: str, step: StructuredPass, place: Destination, wanted: Wanted) -> dict[str, Any]:
    """All that results follow from, but for the target; files count by their content."""
    options = {name: value for name, value in step.options().items() if not _is_target(name)}
    if options.get("text_field") is None:  # what was made before there was this option is found again
        options.pop("text_field", None)
    texts = [text for text in (*wanted.ppl, wanted.guard, step.calibration, step.table or "") if text]
    return {
        "fxprune": version("fxprune"),
        "model": _files_of(model),
        "dtype": place.dtype,
        **({"hold_zeros": True} if place.hold_zeros else {}),
        "device": place.device,
        "method": step.name,
        "options": options,
        "wanted": dataclasses.asdict(wanted),
        "texts": {text: _content(text) for text in texts},
    }


def _is_target(option: str) -> bool:
    return option == "ratio" or option.startswith("target_")


def _content(text: str) -> str | None:
    path = expand_user(text)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _files_of(model: str) -> Any:
    """A local model by the names, sizes and times of its files; one on the hub by its name."""
    path = expand_user(model)
    if not path.is_dir():
        return model
    files = sorted(file for file in path.iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _open_output(place: Destination, budgets: Sequence[Budget]) -> list[int]:
    """Which budgets are still to be made.

    Raises:
        OutputError: the directory holds something else, or results of other options that may not be replaced.
    """
    out = place.out
    if not (out / _MARKER).is_file():
        prepare_output(out, overwrite=False)
        return list(range(len(budgets)))
    todo = []
    for index, budget in enumerate(budgets):
        digest = _digest(out / budget.name)
        if digest == budget.digest:
            continue
        if digest is not None and not place.overwrite:
            raise OutputError(
                f"{out / budget.name} was made with other options, another model or looser budgets before it; choose "
                "another directory, or allow it to be replaced with --overwrite"
            )
        prepare_output(out / budget.name, overwrite=True)
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


def _overview(out: Path, step: StructuredPass, budgets: Sequence[Budget], watch: Stopwatch) -> dict[str, Any]:
    """The report over all budgets, from their own reports."""
    read_report = resolve("fxprune.exporters.report:read_report")
    reports = [read_report(out / budget.name / "report.json") for budget in budgets]
    plans = [read_manifest(out / budget.name).plan["kept"] for budget in budgets]
    entries: list[dict[str, Any]] = []
    seconds = dict(watch.seconds)
    structured = reports[0].get("structured", {})
    seconds |= {part: value for part, value in structured.get("seconds", {}).items() if part != "reconstruct"}
    for budget, report in zip(budgets, reports, strict=True):
        entry = {"name": budget.name, "target": str(budget.target)}
        sections = ("params", "macs", "quality", "guard", "speed", "gate")
        entries.append(entry | {section: report[section] for section in sections if section in report})
        seconds[budget.name] = json.loads((out / budget.name / _FINISHED).read_bytes())["seconds"]
    return {
        "model": reports[0].get("model"),
        "model_class": reports[0].get("model_class"),
        "method": step.name,
        "seed": step.seed,
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
