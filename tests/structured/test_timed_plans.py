"""Plans for a speed-up are corrected by a clock; what is exported for it is real, what the clock says is made up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fxprune.core.errors import PlanError, UsageError
from fxprune.measure.speed import SpeedResult
from fxprune.structured import timed_plans
from fxprune.structured.curves import Limits, score_curve
from fxprune.structured.targets import cost_model, plans_for
from fxprune.structured.timed_plans import PlanTimer, TimedPlan, corrected_plans
from fxprune.tracing.graphs import copy_graph_module
from tests.families import located
from tests.measure.test_latency_table import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.structured.targets import CostModel

MIX = {"prefill": 1.0}


def program() -> Program:
    return located("llama", intermediate_size=64)


def planner() -> tuple[Any, CostModel]:
    groups = program().groups
    curves = {g.name: score_curve(g, np.arange(1.0, g.units + 1), Limits(1, 0.05)) for g in groups}
    costs = cost_model("speedup", program(), groups, table(program()), MIX)
    return lambda values: plans_for(groups, curves, costs, values), costs


def predicted(plan: Plan) -> float:
    _, costs = planner()
    return 1 / (costs.fixed + sum(costs.cost(g, plan.kept_units(g)) for g in program().groups))


def worth(share: float) -> Any:
    """A machine on which a plan saves so much of what the table says."""
    return lambda plan: 1 / (1 - share * (1 - 1 / predicted(plan)))


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_a_table_that_promises_too_much_or_too_little_is_corrected(share: float) -> None:
    planned, costs = planner()
    clock = worth(share)
    plain = clock(planned([1.3])[0])
    assert abs(plain / 1.3 - 1) > 0.03
    (plan,), timed = corrected_plans(planned, [1.3], costs, groups=program().groups, clock=clock, rounds=3)
    assert abs(clock(plan) / 1.3 - 1) < abs(plain / 1.3 - 1) / 3
    assert clock(plan) > 1.3 * 0.99
    assert timed[0] == TimedPlan(1.3, pytest.approx(predicted(planned([1.3])[0])), pytest.approx(plain))
    assert timed[0].worth == pytest.approx(share)
    assert len(timed) == 2  # the second was as wanted


def test_a_table_that_is_right_is_left_alone_and_rounds_end() -> None:
    planned, costs = planner()
    groups = program().groups
    plans, timed = corrected_plans(planned, [1.2, 1.3], costs, groups=groups, clock=worth(1.0), rounds=3)
    assert plans == planned([1.2, 1.3])
    assert [one.wanted for one in timed] == [1.2, 1.3]  # each once
    noisy = iter((1.1, 1.1, 1.35, 1.5))
    plans, timed = corrected_plans(planned, [1.2, 1.3], costs, groups=groups, clock=lambda _: next(noisy), rounds=2)
    assert [(one.wanted, one.measured) for one in timed] == [(1.2, 1.1), (1.2, 1.35), (1.3, 1.1), (1.3, 1.5)]
    for plan in plans:
        plan.validate(groups)
    assert all(set(plans[1].kept_units(g)) <= set(plans[0].kept_units(g)) for g in groups)


def test_each_of_several_speed_ups_has_its_own_correction() -> None:
    """A machine on which the first savings are worth less than the later ones."""
    planned, costs = planner()
    groups = program().groups

    def clock(plan: Plan) -> float:
        return float(worth(0.7 if predicted(plan) < 1.33 else 1.0)(plan))

    values = [1.15, 1.4]
    plans, timed = corrected_plans(planned, values, costs, groups=groups, clock=clock, rounds=3)
    for plan, value in zip(plans, values, strict=True):
        assert abs(clock(plan) / value - 1) < 0.02
    assert [one.wanted for one in timed].count(1.4) == 1  # it was as wanted
    assert all(set(plans[1].kept_units(g)) <= set(plans[0].kept_units(g)) for g in groups)


def test_noise_does_not_turn_speed_ups_round() -> None:
    planned, costs = planner()
    groups = program().groups
    found = iter((1.05, 1.5))  # the looser one seems to need far more than the tighter one
    plans, _ = corrected_plans(planned, [1.2, 1.25], costs, groups=groups, clock=lambda _: next(found), rounds=1)
    assert predicted(plans[1]) >= predicted(plans[0]) > 1.3
    assert all(set(plans[1].kept_units(g)) <= set(plans[0].kept_units(g)) for g in groups)


def test_what_no_plan_reaches_by_the_clock_is_refused() -> None:
    planned, costs = planner()
    with pytest.raises(PlanError, match=r"predicts to be 1\.6\d times as fast was measured at 1\.05; for 1\.6 times"):
        corrected_plans(planned, [1.6], costs, groups=program().groups, clock=lambda _: 1.05, rounds=2)


def test_disturbed_measurements_are_believed_within_bounds() -> None:
    assert TimedPlan(1.3, 1.3, 0.9).worth == 0.5
    assert TimedPlan(1.3, 1.3, 9.0).worth == 2.0


def test_the_timer_times_the_shapes_of_a_plan_beside_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = program()
    planned, _ = planner()
    (plan,) = planned([1.3])
    seen: list[tuple[int, int]] = []

    def bench(dense: Any, slim: Any, cases: Sequence[Any], **options: Any) -> list[SpeedResult]:
        assert options["threads"] == 1
        seen.append(tuple(one.path.stat().st_size for one in (dense, slim)))
        speeds = {"prefill": 2.0, "decode": 4.0}
        return [
            SpeedResult("ort", case, 1, (speeds[case.kind],) * 3, (1.0,) * 3, (speeds[case.kind],) * 2)
            for case in cases
        ]

    monkeypatch.setattr(timed_plans, "bench", bench)
    exports: list[str] = []
    make = timed_plans.exported_runner

    def noting(one: Program, directory: Any, threads: int) -> Any:
        exports.append(directory.name)
        return make(one, directory, threads)

    monkeypatch.setattr(timed_plans, "exported_runner", noting)
    with PlanTimer(found, table(found)) as timer:
        assert timer.time(plan) == pytest.approx(1 / (0.5 / 2 + 0.5 / 4))  # both cases, alike
        assert timer.time(plan) == pytest.approx(1 / (0.5 / 2 + 0.5 / 4))
    with PlanTimer(found, table(found), MIX) as timer:
        assert timer.time(plan) == pytest.approx(2)
    assert exports == ["dense", "slim", "slim", "dense", "slim"]  # the dense form once a timer
    assert all(slim < dense for dense, slim in seen)


def test_plans_are_timed_on_the_cpu_only() -> None:
    found = program()
    elsewhere = found.replace(graph_module=copy_graph_module(found.graph_module).to("meta"), channels=None)
    with pytest.raises(UsageError, match="the model is on meta: use speed_rounds=0"):
        PlanTimer(elsewhere, table(found))
