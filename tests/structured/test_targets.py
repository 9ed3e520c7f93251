"""Targets: every kind is reached by what slimming gives, plans are nested, and what cannot be reached is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fxprune.channels.accounting import bytes_of_weights, count_parameters, macs_per_token
from fxprune.channels.block_linears import block_linear_parameters
from fxprune.core.errors import PlanError, PreconditionError, UsageError
from fxprune.measure.latency_table import save_table
from fxprune.passes.random_units import RandomUnits
from fxprune.passes.slim import Slim
from fxprune.structured.curves import Limits, score_curve
from fxprune.structured.targets import Target, budgets_of, cost_model, plans_for
from tests.families import located
from tests.measure.test_latency_table import BASE, CASES, table, true_total
from tests.units import mlp

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.structured.curves import Curve


def program() -> Program:
    return located("llama")


def curves(seed: int = 0) -> dict[str, Curve]:
    random = np.random.default_rng(seed)
    return {g.name: score_curve(g, random.random(g.units), Limits(4, 0.1)) for g in program().groups}


def measured(kind: str, plan: Plan | None) -> float:
    """What a target speaks of, counted on the slim form."""
    one = program() if plan is None else Slim()(program().replace(plan=plan)).program
    outputs = one.interface.outputs
    if kind == "ratio":
        dense = block_linear_parameters(program().graph_module, outputs=program().interface.outputs)
        return 1 - block_linear_parameters(one.graph_module, outputs=outputs) / dense
    if kind == "macs":
        return macs_per_token(one.graph_module, outputs=outputs).linear
    return (count_parameters if kind == "params" else bytes_of_weights)(one.graph_module)


@pytest.mark.parametrize("kind", ["ratio", "params", "macs", "bytes"])
def test_every_kind_is_reached_and_costs_are_what_slimming_gives(kind: Any) -> None:
    dense = measured(kind, None)
    groups = program().groups
    least = measured(kind, plans_for(groups, curves(), cost_model("ratio", program(), groups), [0.75])[0])
    values = [0.15, 0.4] if kind == "ratio" else [dense - share * (dense - least) for share in (0.2, 0.5)]
    model = cost_model(kind, program(), groups)
    plans = plans_for(groups, curves(), model, values)
    for value, plan in zip(values, plans, strict=True):
        plan.validate(groups)
        reached = measured(kind, plan)
        assert reached >= value if kind == "ratio" else reached <= value
        cost = model.fixed + sum(model.cost(group, plan.kept_units(group)) for group in groups)
        if kind != "ratio":
            assert cost == reached
    for group in groups:
        assert set(plans[1].kept_units(group)) <= set(plans[0].kept_units(group))
    assert plans[0] != plans[1]


def test_the_plan_of_least_loss_is_found() -> None:
    group, other = mlp("m", 8, cost=10), mlp("n", 8, cost=10)
    cheap, dear = np.full(8, 1.0), np.array([2.0, 2.0, 0.1, 0.1, 2, 2, 2, 2])
    found = {one.name: score_curve(one, scores, Limits(1, 0.1)) for one, scores in ((group, cheap), (other, dear))}
    model = cost_model("params", program(), [])
    model = type(model)(lambda _, kept: 10 * len(kept), 0, lambda value: value, "{:g}".format)
    (plan,) = plans_for([group, other], found, model, [120])
    assert len(plan.removed_units(group)) == 2
    assert plan.removed_units(other) == [2, 3]


def test_a_speed_up_is_reached_by_the_table() -> None:
    groups = program().groups
    model = cost_model("speedup", program(), groups, table(), {"prefill": 1.0})
    for speedup in (1.2, 1.6):
        (plan,) = plans_for(groups, curves(), model, [speedup])
        times = table().predict(groups, plan)
        assert table().cases[0].dense_ms / times["prefill-16"] >= speedup * (1 - 1e-9)
    (first, second) = plans_for(groups, curves(), model, [1.2, 1.6])
    assert all(set(second.kept_units(g)) <= set(first.kept_units(g)) for g in groups)
    assert true_total(groups, {}, CASES[0].name) > BASE["prefill-16"]


def test_a_mix_of_cases_speaks_for_itself() -> None:
    groups = program().groups
    both = cost_model("speedup", program(), groups, table(), None)
    decode = cost_model("speedup", program(), groups, table(), {"decode": 1.0})
    kept = list(range(4))
    assert both.cost(groups[0], kept[:3]) != decode.cost(groups[0], kept[:3])
    with pytest.raises(UsageError, match="names 0 of the measured cases"):
        cost_model("speedup", program(), groups, table(), {"training": 1.0})


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    save_table(table(located("llama", intermediate_size=24)), tmp_path / "table.json")
    step = RandomUnits(target_speedup=1.2, table=str(tmp_path / "table.json"), threads=1, speed_rounds=0)
    with pytest.raises(PreconditionError, match="measured on something else: model: .* in the table"):
        step.budgets(program())
    save_table(table(), tmp_path / "table.json")
    other = RandomUnits(target_speedup=1.2, table=str(tmp_path / "table.json"), threads=7)
    with pytest.raises(PreconditionError, match="threads: 1 in the table, 7 here"):
        other.budgets(program())
    (plan,) = step.budgets(program()).plans
    plan.validate(program().groups)


@pytest.mark.parametrize(
    ("kind", "value", "best"),
    [
        ("ratio", 0.97, r"the best reachable is \d+\.\d% of the block Linear parameters removed"),
        ("params", 10, r"the best reachable is \d+(\.\d+)? k parameters"),
        ("macs", 10, r"the best reachable is \d+(\.\d+)? k MACs a token"),
        ("bytes", 10, r"the best reachable is \d+(\.\d+)? k bytes"),
    ],
)
def test_what_no_plan_reaches_is_refused_with_the_best_that_one_does(kind: Any, value: float, best: str) -> None:
    groups = program().groups
    with pytest.raises(PlanError, match=best):
        plans_for(groups, curves(), cost_model(kind, program(), groups), [value])


def test_a_speed_up_that_no_plan_reaches_says_the_best() -> None:
    groups = program().groups
    model = cost_model("speedup", program(), groups, table(), {"prefill": 1.0})
    with pytest.raises(PlanError, match=r"the best reachable is a speed-up of 1\.\d\d"):
        plans_for(groups, curves(), model, [50.0])


@pytest.mark.parametrize(
    ("kind", "values"), [("ratio", [0.3, 0.2]), ("ratio", [0.2, 0.2]), ("params", [9000, 9500]), ("macs", [9e3, 9.5e3])]
)
def test_budgets_in_the_wrong_order_are_refused(kind: Any, values: list[float]) -> None:
    model = cost_model(kind, program(), program().groups)
    with pytest.raises(UsageError, match="from loose to tight"):
        plans_for(program().groups, curves(), model, values)
    with pytest.raises(UsageError, match="from loose to tight"):
        budgets_of(model, values)


def test_uniform_counts_need_alike_groups() -> None:
    groups = [mlp("m", 8), mlp("n", 16)]
    found = {one.name: score_curve(one, np.ones(one.units), Limits(4, 0.1)) for one in groups}
    model = type(cost_model("params", program(), []))(lambda _, kept: len(kept), 0, lambda v: v, "{:g}".format)
    with pytest.raises(PlanError, match="the mlp groups of this model differ in size"):
        plans_for(groups, found, model, [12], uniform=True)
    plans_for(groups, found, model, [12])


@pytest.mark.parametrize(
    ("kind", "value"), [("ratio", 0.0), ("ratio", 1.0), ("params", -1), ("bytes", float("nan")), ("speedup", 1.0)]
)
def test_values_out_of_range_are_refused(kind: Any, value: float) -> None:
    with pytest.raises(UsageError):
        Target(kind, value)


def test_a_speed_up_needs_a_table() -> None:
    with pytest.raises(UsageError, match="fxprune bench MODEL --table FILE"):
        cost_model("speedup", program(), program().groups)
