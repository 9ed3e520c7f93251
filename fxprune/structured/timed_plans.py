"""Plans for a speed-up, corrected by timing them.

    knapsack on the table ─ plan ─ exported with the weights as they are ─ timed beside the dense model
             └──────────── what the table's savings are worth ◄──────────────────┘

A latency table adds up what was measured one kind of block at a time, and each of its figures has an error. Only widths
decide how fast a model is, so a plan can be timed before anything is fitted: where the measured speed-up is not the
wanted one, the milliseconds that the table says are saved are taken to be worth as much more or less as the measured
ones were, and the plan is made anew.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.core.errors import PlanError, UsageError
from fxprune.core.pipeline import build_pass
from fxprune.measure.bench_gate import mixed_speedup
from fxprune.measure.latency_build import exported_runner
from fxprune.measure.ratios import Precision
from fxprune.measure.speed import bench, track_repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.measure.latency_table import LatencyTable
    from fxprune.runtimes.runners import Runner
    from fxprune.structured.targets import CostModel

__all__ = ["PlanTimer", "TimedPlan", "corrected_plans"]

_CLOSE = 0.01
"""How far a measured speed-up may be from the wanted one, as a share of it, for the plan to stay."""
_REPEATS, _PRECISION = 20, Precision(0.02, 80)
_APART = 1e-3
"""How much one speed-up that is asked of the table exceeds the one before at least, as a share of it."""
_LEAST, _MOST = 0.5, 2.0
"""Between what the table's savings are taken to be worth: beyond it is a disturbed measurement."""


@dataclass(frozen=True)
class TimedPlan:
    """A plan that was timed.

    Attributes:
        wanted: the speed-up.
        predicted: what the table says.
        measured: what the clock says; in a mix of cases that of the mix.
    """

    wanted: float
    predicted: float
    measured: float

    @property
    def worth(self) -> float:
        """Share of the dense time that was saved, of the share that the table predicts."""
        saved = (1 - 1 / self.measured) / (1 - 1 / self.predicted)
        return min(_MOST, max(_LEAST, saved))

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


class PlanTimer:
    """Times plans of one dense program in ONNX Runtime; a context manager that removes what it exported.

    Args:
        program: the dense, located program on the CPU.
        table: its latency table, for the cases and the threads.
        mix: weights of the cases; all alike by default.

    Raises:
        UsageError: the program is not on the CPU, or the mix does not fit the table.
    """

    def __init__(self, program: Program, table: LatencyTable, mix: Mapping[str, float] | None = None) -> None:
        device = next(program.graph_module.parameters()).device
        if device.type != "cpu":
            raise UsageError(f"plans are timed on the CPU, and the model is on {device}: use speed_rounds=0")
        self.program = program
        self.table = table
        self.shares = table.weights(mix or {case.case.name: 1.0 for case in table.cases})
        self._dense: Runner | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="fxprune-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._dense = None  # the session holds the file that goes now
        gc.collect()
        self._scratch.cleanup()

    def time(self, plan: Plan) -> float:
        """The measured speed-up of the shapes that a plan leaves.

        Raises:
            ExportError: one of the forms cannot be exported.
        """
        threads, where = self.table.identity.threads, Path(self._scratch.name)
        if self._dense is None:
            self._dense = exported_runner(self.program, where / "dense", threads)
        slim = build_pass("slim", {})(self.program.replace(plan=plan)).program
        runner = exported_runner(slim, where / "slim", threads)
        cases = [entry.case for entry in self.table.cases if self.shares[entry.case.name] > 0]
        with track_repeats() as progress:
            results = bench(
                self._dense,
                runner,
                cases,
                threads=threads,
                repeats=_REPEATS,
                precision=_PRECISION,
                progress=progress,
            )
        del slim, runner
        gc.collect()
        return mixed_speedup(results, self.shares)


def corrected_plans(
    planned: Callable[[Sequence[float]], list[Plan]],
    values: Sequence[float],
    costs: CostModel,
    *,
    groups: Sequence[Group],
    clock: Callable[[Plan], float],
    rounds: int,
) -> tuple[list[Plan], list[TimedPlan]]:
    """Plans for speed-ups, each timed, and made anew by what was measured.

    What the table's savings are worth depends on how much is saved, so every speed-up has its own correction, the mean
    of its timings. A plan whose speed-up is as wanted stays, unless the one before it, which it lies within, changes.

    Args:
        planned: plans for the speed-ups that the table shall predict, in ascending order.
        values: the speed-ups that are wanted, loosest first.
        costs: of the target `speedup`: shares of the dense model's time.
        groups: that the plans speak of.
        clock: the measured speed-up of a plan.
        rounds: how often a plan for one value is timed at most.

    Returns:
        The plans, and what was timed.

    Raises:
        PlanError: by what was measured no plan reaches a value.
    """
    asked = list(values)
    plans = planned(asked)
    timed: list[list[TimedPlan]] = [[] for _ in values]
    shapes: list[set[tuple[int, ...]]] = [set() for _ in values]
    for _ in range(rounds):
        far: list[int] = []
        for index, plan in enumerate(plans):
            shape = tuple(len(plan.kept_units(group)) for group in groups)
            if shape in shapes[index]:
                continue  # nothing that is not known
            shapes[index].add(shape)
            share = costs.fixed + sum(costs.cost(group, plan.kept_units(group)) for group in groups)
            one = TimedPlan(values[index], 1 / share, clock(plan))
            timed[index].append(one)
            if abs(one.measured / one.wanted - 1) > _CLOSE:
                far.append(index)
        if not far:
            break
        for index in far:
            worth = float(np.mean([each.worth for each in timed[index]]))
            asked[index] = 1 / max(1e-3, 1 - (1 - 1 / values[index]) / worth)
        for index in range(1, len(asked)):  # noise must not turn them round
            asked[index] = max(asked[index], asked[index - 1] * (1 + _APART))
        try:
            plans = planned(asked)
        except PlanError as error:
            last = timed[far[-1]][-1]
            raise PlanError(
                f"a plan that the latency table predicts to be {last.predicted:.2f} times as fast was measured at "
                f"{last.measured:.2f}; for {last.wanted:g} times the table would have to predict {asked[far[-1]]:.2f}: "
                f"{error}"
            ) from error
    return plans, [one for each in timed for one in each]
