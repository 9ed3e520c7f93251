"""The multiple-choice knapsack, against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.core.errors import PlanError, UsageError
from fxprune.structured.knapsack import Choice, Selection, least_cost, solve, solve_nested


def brute_force(choices: list[Choice], budget: float) -> float:
    """The least loss within the budget; infinite when nothing is."""
    totals = (
        (
            sum(choice.costs[level] for choice, level in zip(choices, levels, strict=True)),
            math.fsum(choice.losses[level] for choice, level in zip(choices, levels, strict=True)),
        )
        for levels in itertools.product(*(range(len(choice.widths)) for choice in choices))
    )
    return min((loss for cost, loss in totals if cost <= budget), default=math.inf)


def check(choices: list[Choice], budget: float, found: Selection) -> None:
    """The totals are those of the levels, and the budget holds."""
    assert found.cost == sum(choice.costs[level] for choice, level in zip(choices, found.levels, strict=True))
    assert found.loss == pytest.approx(
        sum(choice.losses[level] for choice, level in zip(choices, found.levels, strict=True))
    )
    assert found.cost <= budget * (1 + 1e-9)
    assert found.lower_bound <= found.loss


def choices_with(costs: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Choice]]:
    losses = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10, allow_subnormal=False))
    levels = st.lists(st.tuples(losses, costs), min_size=1, max_size=5)
    return st.lists(levels, min_size=1, max_size=5).map(
        lambda listed: [
            Choice(f"g{i}", "mlp", tuple(range(1, len(pairs) + 1)), *(tuple(column) for column in zip(*pairs)))  # noqa: B905 - one argument
            for i, pairs in enumerate(listed)
        ]
    )


@settings(max_examples=150, deadline=None)
@given(choices_with(st.integers(0, 12)), st.integers(0, 50))
def test_integer_costs_give_the_optimum(choices: list[Choice], budget: int) -> None:
    best = brute_force(choices, budget)
    if math.isinf(best):
        with pytest.raises(PlanError):
            solve(choices, budget)
        return
    found = solve(choices, budget)
    check(choices, budget, found)
    assert found.exact
    assert isinstance(found.cost, int)
    assert found.loss == pytest.approx(best, rel=1e-8, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(choices_with(st.floats(0.01, 5)), st.floats(0.1, 1))
def test_float_costs_give_the_optimum(choices: list[Choice], share: float) -> None:
    least = least_cost(choices)
    budget = least + share * (sum(max(choice.costs) for choice in choices) - least) + 1e-6
    found = solve(choices, budget)
    check(choices, budget, found)
    assert found.exact
    assert found.loss <= brute_force(choices, budget) * (1 + 1e-8) + 1e-12


def curves(blocks: int, levels: int, *, unit: float, seed: int = 0) -> list[Choice]:
    """Noisy loss curves of many blocks, costs in proportion to widths plus noise; too many for brute force."""
    rng = np.random.default_rng(seed)
    choices = []
    for block, kind in itertools.product(range(blocks), ("attention", "mlp")):
        widths = np.arange(1, (3 if kind == "attention" else levels) + 1)
        losses = rng.lognormal() * (1 - widths / widths[-1]) ** rng.uniform(1, 4) * (1 + 0.1 * rng.random(len(widths)))
        costs = unit * widths * (20 if kind == "attention" else 1)
        choices.append(
            Choice(f"{block}.{kind}", kind, tuple(widths.tolist()), tuple(losses.tolist()), tuple(costs.tolist()))
        )
    return choices


def dense_dp(choices: list[Choice], budget: int) -> float:
    """The textbook's dynamic program over every integer cost."""
    best = np.zeros(budget + 1)
    for choice in choices:
        nxt = np.full(budget + 1, np.inf)
        for loss, cost in zip(choice.losses, map(int, choice.costs), strict=True):
            nxt[cost:] = np.minimum(nxt[cost:], best[: budget + 1 - cost] + loss)
        best = nxt
    return float(best[-1])


@pytest.mark.parametrize("share", [0.9, 0.7, 0.4])
def test_a_large_problem_is_solved_exactly(share: float) -> None:
    choices = curves(30, 24, unit=1)
    budget = int(share * sum(max(choice.costs) for choice in choices))
    found = solve(choices, budget)
    check(choices, budget, found)
    assert found.exact
    assert found.loss == pytest.approx(dense_dp(choices, budget), rel=1e-8)


def test_when_pairs_are_merged_the_bound_still_holds_and_says_so() -> None:
    rng = np.random.default_rng(1)  # loss and cost correlated: nothing is dominated and the relaxation says little
    choices = []
    for index in range(14):
        costs = np.sort(rng.uniform(10, 11, 4))
        losses = 11 - costs + 0.001 * rng.random(4)
        choices.append(Choice(str(index), "mlp", (1, 2, 3, 4), tuple(losses.tolist()), tuple(costs.tolist())))
    budget = 14 * 10.437
    exact, merged = (solve(choices, budget, max_states=most) for most in (10**7, 50))
    check(choices, budget, merged)
    assert exact.exact
    assert not merged.exact
    assert exact.lower_bound == exact.loss
    assert merged.lower_bound <= exact.loss <= merged.loss
    assert merged.loss - merged.lower_bound < 0.05


@pytest.mark.parametrize("uniform", [False, True])
def test_nested_budgets_give_nested_widths(uniform: bool) -> None:
    choices = curves(6, 12, unit=0.37)
    total = sum(max(choice.costs) for choice in choices)
    budgets = [share * total for share in (0.9, 0.8, 0.6, 0.3)]
    found = solve_nested(choices, budgets, uniform=uniform)
    for looser, tighter in itertools.pairwise(found):
        before, after = looser.widths(choices), tighter.widths(choices)
        assert all(after[name] <= before[name] for name in before)
        assert tighter.loss >= looser.loss
    for budget, selection in zip(budgets, found, strict=True):
        check(choices, budget, selection)
    assert found[0].levels == solve(choices, budgets[0], uniform=uniform).levels


def test_a_nested_solution_is_the_best_of_those_that_are_nested() -> None:
    # alone, 6 would best be spent on b: nested in what 9 gave, it cannot be
    c = Choice("c", "mlp", (1, 2, 3), (9.0, 2.0, 1.9), (0, 4, 5))
    d = Choice("d", "mlp", (1, 2, 3), (9.0, 3.0, 0.0), (0, 4, 6))
    assert solve([c, d], 9).levels == (2, 1)
    assert solve([c, d], 6).levels == (0, 2)
    assert [selection.levels for selection in solve_nested([c, d], [9, 6])] == [(2, 1), (2, 0)]


def test_uniform_gives_every_choice_of_a_kind_the_same_width() -> None:
    a = Choice("a", "mlp", (8, 16, 24), (6.0, 1.0, 0.0), (1, 2, 3))
    b = Choice("b", "mlp", (24, 16, 8), (0.0, 3.0, 4.0), (3, 2, 1))  # in another order
    c = Choice("c", "attention", (1, 3), (7.0, 0.0), (1, 3))
    found = solve([a, b, c], 7, uniform=True)
    assert found.widths([a, b, c]) == {"a": 16, "b": 16, "c": 3}
    assert (found.loss, found.cost) == (4.0, 7)
    assert solve([a, b, c], 7).loss <= found.loss


def test_uniform_uses_only_widths_that_all_offer() -> None:
    a = Choice("a", "mlp", (8, 16), (5.0, 0.0), (1, 2))
    b = Choice("b", "mlp", (8, 12), (5.0, 0.0), (1, 2))
    assert solve([a, b], 10, uniform=True).widths([a, b]) == {"a": 8, "b": 8}
    with pytest.raises(PlanError, match="no width is offered by all 2 mlp groups"):
        solve([a, Choice("c", "mlp", (12,), (0.0,), (1,))], 10, uniform=True)


def test_of_equal_losses_the_cheapest_is_taken() -> None:
    assert solve([Choice("a", "mlp", (1, 2, 3), (1.0, 1.0, 2.0), (3, 2, 9))], 10).levels == (1,)


def test_a_budget_that_nothing_meets_says_what_can_be_reached() -> None:
    choices = curves(3, 4, unit=1.0)
    assert least_cost(choices) == pytest.approx(63.0)
    with pytest.raises(PlanError, match=r"no plan is within 60 ms; the best reachable is 63 ms"):
        solve(choices, 60, describe=lambda cost: f"{cost:g} ms")
    assert solve(choices, 63).cost == pytest.approx(63)


def test_budgets_in_the_wrong_order_are_refused() -> None:
    choices = curves(2, 4, unit=1.0)
    for budgets in ([50, 60], [50, 50]):
        with pytest.raises(UsageError, match="wrong order: .* from the loosest to the tightest"):
            solve_nested(choices, budgets)
    for wrong in ([], [math.nan]):
        with pytest.raises(UsageError, match="finite"):
            solve_nested(choices, wrong)


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(PlanError, match="nothing to choose from"):
        solve([], 1)


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ((0.0, math.nan), (1, 2), "loss of width 16 is nan"),
        ((0.0, 1.0), (1.0, math.inf), "cost of width 16 is inf"),
        ((-1.0, 1.0), (1, 2), "loss of width 8 is -1"),
        ((1.0,), (1, 2), "as many of each"),
    ],
)
def test_malformed_choices_are_refused(losses: tuple[float, ...], costs: tuple[float, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Choice("layers.3.mlp", "mlp", (8, 16), losses, costs)
    with pytest.raises(PlanError, match="listed twice"):
        Choice("layers.3.mlp", "mlp", (8, 8), (0.0, 0.0), (1, 2))
