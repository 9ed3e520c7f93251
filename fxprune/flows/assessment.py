"""What is measured of a model that a recipe made: perplexity, the guard, speed and its gate; and its report.

Several models of one dense model share what is measured of the dense one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import UsageError
from fxprune.core.registry import resolve
from fxprune.flows.guard import Guard
from fxprune.flows.quality import perplexities
from fxprune.flows.reporting import report_of
from fxprune.flows.slim_speed import SpeedRun, speed_plan, timed_pass
from fxprune.measure.sparse_speed import measure_sparse_speed
from fxprune.weights.base import NO_SPEED_UP

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program
    from fxprune.core.stopwatch import Stopwatch
    from fxprune.evaluation.perplexity import PerplexityResult
    from fxprune.flows.recipe import Recipe

__all__ = ["Assessor", "failed_gate", "warnings_of"]


class Assessor:
    """Measures the programs that a recipe made from one dense program, and writes their reports.

    A context manager: the exported dense graph is removed at its end.

    Args:
        recipe: what was done, and what to measure.
        program: the dense, located program.
        say: gets progress messages.

    Raises:
        UsageError: a text was named for the guard, and the program cannot read text.
    """

    def __init__(self, recipe: Recipe, program: Program, say: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.wanted = recipe.wanted
        self.say = say
        self._learner = _learner(recipe, program)
        self._program = program
        self._dense: dict[str, PerplexityResult] = {}
        self._guard: Guard | None = None
        self._shapes_stay = all(step.keeps_shapes for step in recipe.passes)
        self._speed: SpeedRun | None = None
        if self.wanted.times(recipe.passes) and not self._shapes_stay:
            plan = speed_plan(timed_pass(recipe.passes), self.wanted.threads, self.wanted.repeats)
            self._speed = SpeedRun(plan)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._speed is not None:
            self._stack.enter_context(self._speed)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def report(
        self, program: Program, out: Path | None, *, watch: Stopwatch, speedup: float | None = None
    ) -> dict[str, Any]:
        """Measure a program and write its report; before speed is measured it is written once without.

        Args:
            program: what the recipe made.
            out: where its checkpoint is; None writes nothing.
            watch: has the seconds so far, and gets those of measuring.
            speedup: the speed-up that was asked for; that of the recipe's pass when None.

        Raises:
            FxpruneError: something could not be measured; what was is in the report.
        """
        found = self._quality(program, watch)
        report = self._written(program, out, watch, found)
        if not self.wanted.times(self.recipe.passes):
            return report
        what = "sparse" if self._shapes_stay else "slim"
        self.say(f"exporting the dense and the {what} form, and timing them")
        with watch.stage("bench"):
            if self._speed is None:
                found["speed"] = measure_sparse_speed(program, threads=self.wanted.threads).to_json()
                stated = program.results["sparsity"] | {"speed": NO_SPEED_UP}
                program = program.with_results(sparsity=stated)
            else:
                wished = speedup if speedup is not None else _single(self.recipe.passes)
                program, results, verdict = self._speed.measure(program, wished)
                found["speed"] = [result.to_json() for result in results]
                if verdict is not None:
                    found["gate"] = verdict.to_json()
        return self._written(program, out, watch, found)

    def _written(
        self, program: Program, out: Path | None, watch: Stopwatch, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        recipe = self.recipe
        report = report_of(program, method=recipe.method, seed=recipe.seed, seconds=watch.seconds, **found)
        if out is not None:
            resolve("fxprune.exporters.report_writer:write_report")(report, out)
        return report

    def _quality(self, program: Program, watch: Stopwatch) -> dict[str, Any]:
        """The sections `quality` and `guard`; what was not asked for is absent."""
        found: dict[str, Any] = {}
        if self.wanted.ppl:
            self.say("measuring perplexity")
            with watch.stage("quality"):
                found["quality"] = perplexities(
                    program, self.wanted.ppl, windows=self.wanted.windows, known=self._dense
                )
        if self._learner is not None:
            self.say("guarding against overfitting to the calibration text")
            with watch.stage("guard"):
                if self._guard is None:
                    self._guard = Guard(self._program, self._learner.calibration_spec(), self.wanted.guard)
                found["guard"] = self._guard.judge(program)
        return found


def _single(passes: Sequence[Pass]) -> float | None:
    """The target speed-up of a pass that has one."""
    targets = [getattr(step, "target_speedup", None) for step in passes]
    target = next((value for value in targets if value is not None), None)
    return target[0] if isinstance(target, (list, tuple)) else target


def _learner(recipe: Recipe, program: Program) -> Any:
    """The pass that the guard looks at, if it runs: one that may learn its text by heart, on a model that reads any."""
    wanted = recipe.wanted
    learner = next((step for step in recipe.passes if step.guarded and step.reads_text), None)
    if wanted.guard == "none" or learner is None:
        return None
    source = program.source
    if source is not None and source.tokenizer is not None and program.interface.causal:
        return learner
    if wanted.guard != "python":
        raise UsageError("--guard reads text: it needs a causal language model with a tokenizer")
    return None


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a user must be told of a report, of all its budgets: guards that warn, and why speed gates failed."""
    found = []
    for where, part in _parts(report):
        if warning := part.get("guard", {}).get("warning"):
            found.append(f"{where}{warning}")
        if not part.get("gate", {}).get("passed", True):
            gate = part["gate"]
            found.append(f"{where}the speed gate failed (target {gate['target']:g}x, within 5%)")
            found += [f"{where}{reason}" for reason in gate["reasons"]]
    return found


def failed_gate(report: Mapping[str, Any]) -> bool:
    """Whether a speed gate of a report, or of one of its budgets, failed."""
    return any(not part.get("gate", {}).get("passed", True) for _, part in _parts(report))


def _parts(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The report, and its budgets with how messages call them."""
    entries = report.get("budgets", {}).get("entries", [])
    return [("", report), *((f"{entry['name']}: ", entry) for entry in entries)]
