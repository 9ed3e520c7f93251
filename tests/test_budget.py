"""Budgets: one ranking hits the target, removes no better unit before a worse one, and keeps every minimum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.budget import allocate, allocate_uniform, check_ratio, steps_of
from fxprune.errors import PlanError, UsageError
from fxprune.groups import AttentionGroup, Group, MlpGroup, UnitSlice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fxprune.plan import Plan

some = settings(deadline=None, max_examples=200, derandomize=True)


def mlp(name: str, units: int, cost: int = 3) -> MlpGroup:
    """An MLP whose channels cost `cost` parameters each."""
    return MlpGroup(name, 0, (UnitSlice(f"{name}.down.weight", 1, np.arange(units).reshape(-1, 1), cost, "columns"),))


def attention(name: str, kv_heads: int, per_kv: int, cost: int = 10, shared: int = 7) -> AttentionGroup:
    """An attention whose query heads cost `cost` parameters each and whose KV heads cost `shared`."""
    heads = np.arange(kv_heads * per_kv)
    slices = (UnitSlice(f"{name}.o.weight", 1, heads.reshape(-1, 1), cost, "columns"),)
    both = (UnitSlice(f"{name}.k.weight", 0, np.arange(kv_heads).reshape(-1, 1), shared, "rows"),)
    return AttentionGroup(name, 0, slices, both, heads // per_kv, head_dim=1)


def size(groups: list[Group]) -> int:
    return sum(group.parameters_removed([0]) + group.unit_parameters + group.shared_parameters for group in groups)


def removed(groups: list[Group], plan: Plan) -> int:
    return sum(group.parameters_removed(plan.kept_units(group)) for group in groups)


# --- steps ----------------------------------------------------------------------------------------------------------


def test_steps_of_an_mlp_are_its_least_important_channels_in_aligned_runs() -> None:
    scores = np.array([5.0, 1, 4, 2, 3, 0, 9, 8, 7, 6])
    steps = steps_of(mlp("m", 10), scores, round_to=4, min_keep=0.0)
    # 10 is no multiple of 4: the first step brings the width to 8, the next to 4, and 4 always stay.
    assert [set(step.units) for step in steps] == [{5, 1}, {3, 4, 2, 0}]
    assert [step.cost for step in steps] == [6, 12]
    assert steps[0].score / steps[0].cost <= steps[1].score / steps[1].cost


@pytest.mark.parametrize(
    ("units", "round_to", "min_keep", "widths"),
    [
        (32, 8, 0.0, [24, 16, 8]),
        (32, 8, 0.3, [24, 16]),
        (32, 8, 0.5, [24, 16]),
        (33, 8, 0.0, [32, 24, 16, 8]),
        (32, 1, 0.97, []),
        (6, 8, 0.0, []),
    ],
)
def test_widths_are_rounded_and_the_minimum_is_kept(
    units: int, round_to: int, min_keep: float, widths: list[int]
) -> None:
    steps = steps_of(mlp("m", units), np.arange(units, dtype=float), round_to=round_to, min_keep=min_keep)
    left = units - np.cumsum([len(step.units) for step in steps])
    assert left.tolist() == widths


def test_steps_of_an_attention_are_whole_kv_heads() -> None:
    group = attention("a", kv_heads=3, per_kv=2, cost=10, shared=7)
    steps = steps_of(group, np.array([9.0, 9, 1, 1, 4, 4]), round_to=8, min_keep=0.0)
    assert [step.units for step in steps] == [(2, 3), (4, 5)]
    assert [step.cost for step in steps] == [27, 27]
    assert len(steps_of(group, np.zeros(6), round_to=8, min_keep=0.5)) == 1
    assert steps_of(attention("mqa", 1, 4), np.zeros(4), round_to=8, min_keep=0.0) == []


# --- one ranking ----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Group], dict[str, NDArray[np.float64]], int, float]:
    """Groups, scores, rounding and a ratio."""
    groups: list[Group] = []
    for index in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            groups.append(mlp(f"mlp{index}", draw(st.integers(9, 40)), draw(st.integers(1, 9))))
        else:
            kv_heads, per_kv = draw(st.integers(2, 5)), draw(st.integers(1, 3))
            groups.append(
                attention(f"attn{index}", kv_heads, per_kv, draw(st.integers(5, 60)), draw(st.integers(1, 40)))
            )
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = {group.name: rng.normal(size=group.units) for group in groups}
    return groups, scores, draw(st.sampled_from([1, 4, 8])), draw(st.floats(0.02, 0.9))


@some
@given(problem=problems())
def test_the_ranking_hits_the_target_within_half_a_step_and_removes_no_better_unit_first(
    problem: tuple[list[Group], dict[str, NDArray[np.float64]], int, float],
) -> None:
    groups, scores, round_to, ratio = problem
    steps = {g.name: steps_of(g, scores[g.name], round_to=round_to, min_keep=0.1) for g in groups}
    every = [step for listed in steps.values() for step in listed]
    total = size(groups)
    target = round(ratio * total)
    try:
        plan = allocate(groups, steps, target, total)
    except PlanError as error:
        smallest = min((step.cost for step in every), default=0)
        unreachable = sum(step.cost for step in every) + smallest / 2 < target
        assert unreachable or not smallest or smallest / 2 > target, error
        return
    plan.validate(groups)
    gap = removed(groups, plan) - target
    left, taken = [], []
    for group in groups:
        gone = set(plan.removed_units(group))
        count = sum(set(step.units) <= gone for step in steps[group.name])
        assert gone == {unit for step in steps[group.name][:count] for unit in step.units}  # the worst ones, in order
        taken += steps[group.name][:count]
        left += steps[group.name][count : count + 1]
    smallest = min(step.cost for step in every)
    if any(step.cost == smallest for step in left):
        assert abs(gap) <= smallest / 2
    assert gap <= max(step.cost for step in taken) / 2
    assert all(gap + step.cost > 0 and gap + step.cost >= -gap for step in left)  # one more would be no nearer


def test_units_of_different_groups_compete_by_damage_per_parameter() -> None:
    groups: list[Group] = [mlp("cheap", 16), mlp("dear", 16)]
    scores = {"cheap": np.full(16, 1.0), "dear": np.full(16, 2.0)}
    steps = {g.name: steps_of(g, scores[g.name], round_to=4, min_keep=0.0) for g in groups}
    plan = allocate(groups, steps, 3 * 8, size(groups))
    assert [len(plan.removed_units(group)) for group in groups] == [8, 0]
    plan = allocate(groups, steps, 3 * 16, size(groups))
    assert [len(plan.removed_units(group)) for group in groups] == [12, 4]  # the cheap one keeps its minimum


def test_a_large_step_does_not_overshoot_while_small_ones_are_left() -> None:
    groups: list[Group] = [attention("a", 4, 1, cost=900, shared=100), mlp("m", 400, 3)]
    scores = {"a": np.full(4, -9.0), "m": np.zeros(400)}
    steps = {g.name: steps_of(g, scores[g.name], round_to=8, min_keep=0.0) for g in groups}
    plan = allocate(groups, steps, 600, size(groups))
    assert removed(groups, plan) == 600
    assert not plan.removed_units(groups[0])


def test_a_large_step_is_taken_when_it_comes_nearer_and_no_small_one_is_left() -> None:
    groups: list[Group] = [attention("a", 4, 1, cost=900, shared=100), mlp("m", 24, 3)]
    scores = {group.name: np.zeros(group.units) for group in groups}
    steps = {g.name: steps_of(g, scores[g.name], round_to=8, min_keep=0.0) for g in groups}
    assert removed(groups, allocate(groups, steps, 600, size(groups))) == 1048


def test_what_no_plan_reaches_is_an_error_that_says_what_can_be_reached() -> None:
    groups: list[Group] = [mlp("m", 16)]
    steps = {"m": steps_of(groups[0], np.zeros(16), round_to=8, min_keep=0.0)}
    with pytest.raises(PlanError, match=r"no legal plan removes 89\.6% .* the most that can go is 50\.0%"):
        allocate(groups, steps, round(0.9 * 48), 48)
    with pytest.raises(PlanError, match=r"the smallest legal step removes 24 parameters \(50\.00%\), more than twice"):
        allocate(groups, steps, 5, 48)
    with pytest.raises(PlanError, match="no legal plan"):
        allocate(groups, {"m": []}, 5, 48)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_a_ratio_outside_zero_and_one_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio must lie between 0 and 1"):
        check_ratio(ratio)


# --- uniform --------------------------------------------------------------------------------------------------------


@some
@given(seed=st.integers(0, 1000), ratio=st.floats(0.08, 0.8), layers=st.integers(1, 4))
def test_a_uniform_plan_keeps_the_same_width_in_every_layer_and_comes_near(
    seed: int, ratio: float, layers: int
) -> None:
    groups: list[Group] = [mlp(f"mlp{i}", 40, 3) for i in range(layers)]
    groups += [attention(f"attn{i}", 4, 2) for i in range(layers)]
    rng = np.random.default_rng(seed)
    steps = {g.name: steps_of(g, rng.normal(size=g.units), round_to=8, min_keep=0.1) for g in groups}
    total = size(groups)
    plan = allocate_uniform(groups, steps, round(ratio * total), total)
    plan.validate(groups)
    assert plan.is_uniform(groups)
    nearest = min(abs(layers * (m * 24 + a * 27) - round(ratio * total)) for m in range(5) for a in range(4) if m + a)
    assert abs(removed(groups, plan) - round(ratio * total)) <= max(nearest, layers * 24 / 2)
    for group in groups:
        count = sum(set(step.units) <= set(plan.removed_units(group)) for step in steps[group.name])
        assert len(plan.removed_units(group)) == sum(len(step.units) for step in steps[group.name][:count])


def test_uniform_widths_need_alike_groups() -> None:
    groups: list[Group] = [mlp("a", 16), mlp("b", 24)]
    steps = {g.name: steps_of(g, np.zeros(g.units), round_to=8, min_keep=0.0) for g in groups}
    with pytest.raises(PlanError, match="the mlp groups of this model differ in size"):
        allocate_uniform(groups, steps, 10, 120)


def test_a_uniform_plan_out_of_reach_is_an_error() -> None:
    groups: list[Group] = [mlp("a", 16), mlp("b", 16)]
    steps = {g.name: steps_of(g, np.zeros(g.units), round_to=8, min_keep=0.0) for g in groups}
    with pytest.raises(PlanError, match="no legal plan removes"):
        allocate_uniform(groups, steps, 90, 96)
    with pytest.raises(PlanError, match="the smallest uniform step removes"):
        allocate_uniform(groups, steps, 10, 96)
