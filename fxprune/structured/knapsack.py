"""The multiple-choice knapsack: one level for each block, least total loss within a budget of total cost.

    minimise  sum_i loss[i, l_i]   subject to  sum_i cost[i, l_i] <= budget

Costs are parameters, MACs or bytes (integers) or milliseconds (floats). The linear relaxation (a greedy walk along the
lower convex hulls, Sinha and Zoltners 1979) gives a lower bound, a multiplier and a first solution; the bound rules out
most levels, and dynamic programming over the undominated (cost, loss) pairs of what is left closes the gap (the core
idea of Pisinger 1995). The losses of allocation curves are nearly convex, so few pairs survive and the result is exact.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.core.errors import PlanError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CostArray = NDArray[Any]  # int64 or float64

__all__ = ["Choice", "Selection", "least_cost", "solve", "solve_nested"]

_MAX_STATES = 20_000
_MAX_CELLS = 200_000  # of the grid that integer costs lie on
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Choice:
    """The levels of one group, of which exactly one is taken.

    Attributes:
        name: of the group, for messages and results.
        kind: groups of one kind share a width in a uniform solution.
        widths: (levels,) units kept, each once, in any order.
        losses: (levels,) predicted loss of each level, not negative.
        costs: (levels,) cost of each level, not negative; integers are added exactly.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    losses: tuple[float, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.widths or not len(self.widths) == len(self.losses) == len(self.costs):
            raise PlanError(
                f"{self.name}: {len(self.widths)} widths, {len(self.losses)} losses and {len(self.costs)} costs; a "
                "choice needs as many of each, at least one"
            )
        if len(set(self.widths)) != len(self.widths):
            raise PlanError(f"{self.name}: a width is listed twice in {sorted(self.widths)}")
        for what, values in (("loss", self.losses), ("cost", self.costs)):
            wrong = [
                (width, value)
                for width, value in zip(self.widths, values, strict=True)
                if not (math.isfinite(value) and value >= 0)
            ]
            if wrong:
                width, value = wrong[0]
                raise PlanError(
                    f"{self.name}: the {what} of width {width} is {value}, which nothing can be traded against; check "
                    "the calibration and the cost table for values that are negative or not finite"
                )


@dataclass(frozen=True)
class Selection:
    """A solution.

    Attributes:
        levels: index of the chosen level of each choice, in their order.
        loss: total loss.
        cost: total cost, at most the budget; an int when all costs are.
        lower_bound: no solution within the budget has less loss than this; equal to `loss` when `exact`.
        exact: whether the search was complete. Otherwise so many pairs survived that near ones were merged, and
            `loss - lower_bound` is the most that a better solution could gain.
    """

    levels: tuple[int, ...]
    loss: float
    cost: float
    lower_bound: float
    exact: bool

    def widths(self, choices: Sequence[Choice]) -> dict[str, int]:
        """The chosen width of each choice, by name."""
        return {choice.name: choice.widths[level] for choice, level in zip(choices, self.levels, strict=True)}


def least_cost(choices: Sequence[Choice]) -> float:
    """The least total cost that any solution has."""
    return sum(min(choice.costs) for choice in choices)


def solve(
    choices: Sequence[Choice],
    budget: float,
    *,
    uniform: bool = False,
    describe: Callable[[float], str] = "{:g}".format,
    max_states: int = _MAX_STATES,
) -> Selection:
    """Choose one level each, with the least total loss whose total cost is within the budget.

    Args:
        choices: what to choose from.
        budget: the most that the levels may cost together. Float costs may exceed it by 1e-9 of it (rounding).
        uniform: the same width in every choice of a kind; only widths that all of a kind offer are considered.
        describe: puts a cost into words, for the message.
        max_states: when more undominated pairs than this survive, near ones are merged (see `Selection.exact`).

    Returns:
        The solution; of several with equal loss the cheapest.

    Raises:
        PlanError: nothing is within the budget (the message says the least reachable cost), there is nothing to choose
            from, or a kind has no width that all its choices offer.
    """
    return solve_nested(choices, [budget], uniform=uniform, describe=describe, max_states=max_states)[0]


def solve_nested(
    choices: Sequence[Choice],
    budgets: Sequence[float],
    *,
    uniform: bool = False,
    describe: Callable[[float], str] = "{:g}".format,
    max_states: int = _MAX_STATES,
) -> list[Selection]:
    """Solutions for several budgets, each of which keeps no more of any choice than the one before.

    Args:
        choices: what to choose from.
        budgets: from the loosest (largest) to the tightest, each once.
        uniform: see `solve`.
        describe: see `solve`.
        max_states: see `solve`.

    Returns:
        One solution a budget, in order; each is the best among those nested in its predecessor.

    Raises:
        UsageError: the budgets are not finite or not in this order.
        PlanError: see `solve`.
    """
    if not choices:
        raise PlanError("there is nothing to choose from: no group has levels; check what the model can be pruned by")
    if not budgets or not all(math.isfinite(budget) for budget in budgets):
        raise UsageError(f"budgets must be finite numbers, at least one; got {list(budgets)}")
    for looser, tighter in itertools.pairwise(budgets):
        if tighter >= looser:
            raise UsageError(
                f"budgets in the wrong order: {describe(tighter)} comes after {describe(looser)}; nested plans need "
                "them from the loosest to the tightest, each once"
            )
    ties = (
        _tied(choices)
        if uniform
        else [_Tie(choice, {index: range(len(choice.widths))}) for index, choice in enumerate(choices)]
    )
    allowed = [np.arange(len(tie.choice.widths)) for tie in ties]
    found: list[Selection] = []
    for budget in budgets:
        open_levels = [_Levels.of(tie.choice, rows) for tie, rows in zip(ties, allowed, strict=True)]
        taken, gap = _solve(open_levels, _capacity(open_levels, budget, describe), max_states)
        levels = [0] * len(choices)
        for tie, level in zip(ties, taken, strict=True):
            for member, own in tie.members.items():
                levels[member] = own[level]
        found.append(_selection(choices, levels, gap))
        for index, (tie, level) in enumerate(zip(ties, taken, strict=True)):
            widths = np.array(tie.choice.widths)
            allowed[index] = np.flatnonzero(widths <= widths[level])
    return found


# ---- choices that share a width ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tie:
    """A choice that stands for several: `members` says which level each of them takes for each level of it."""

    choice: Choice
    members: dict[int, Sequence[int]]


def _tied(choices: Sequence[Choice]) -> list[_Tie]:
    """One choice a kind, over the widths that all its members offer, with their summed losses and costs."""
    kinds: dict[str, list[int]] = {}
    for index, choice in enumerate(choices):
        kinds.setdefault(choice.kind, []).append(index)
    ties = []
    for kind, members in kinds.items():
        common = set.intersection(*(set(choices[index].widths) for index in members))
        if not common:
            raise PlanError(
                f"uniform widths: no width is offered by all {len(members)} {kind} groups; they differ in size, leave "
                "uniform out"
            )
        widths = tuple(sorted(common))
        levels = {index: [choices[index].widths.index(width) for width in widths] for index in members}
        rows = range(len(widths))
        losses = tuple(math.fsum(choices[index].losses[levels[index][row]] for index in members) for row in rows)
        costs = tuple(sum(choices[index].costs[levels[index][row]] for index in members) for row in rows)
        ties.append(_Tie(Choice(kind, kind, widths, losses, costs), dict(levels)))
    return ties


def _selection(choices: Sequence[Choice], levels: Sequence[int], gap: float | None) -> Selection:
    loss = math.fsum(choice.losses[level] for choice, level in zip(choices, levels, strict=True))
    cost = sum(choice.costs[level] for choice, level in zip(choices, levels, strict=True))
    return Selection(tuple(levels), loss, cost, loss if gap is None else max(0.0, loss - gap), gap is None)


# ---- one problem ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Levels:
    """The undominated levels of a choice, by rising cost and falling loss.

    Attributes:
        rows: (n,) which level of the choice each is.
        costs: (n,) cost above that of the cheapest.
        losses: (n,) loss.
        least: cost of the cheapest.
    """

    rows: NDArray[np.intp]
    costs: CostArray
    losses: FloatArray
    least: float

    @classmethod
    def of(cls, choice: Choice, rows: NDArray[np.intp]) -> _Levels:
        """Of the levels `rows`."""
        whole = all(isinstance(cost, (int, np.integer)) for cost in choice.costs)
        costs = np.array(choice.costs, dtype=np.int64 if whole else np.float64)[rows]
        losses = np.array(choice.losses, dtype=np.float64)[rows]
        order = np.lexsort((losses, costs))
        order = order[_undominated(losses[order])]
        return cls(rows[order], costs[order] - costs[order[0]], losses[order], costs[order[0]].item())


def _undominated(losses: FloatArray) -> NDArray[np.bool_]:
    """Of pairs in the order of their costs: those with less loss than all before, (n,)."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(losses)[:-1]))
    return losses < before


def _capacity(levels: Sequence[_Levels], budget: float, describe: Callable[[float], str]) -> float:
    """What the budget leaves above the cheapest levels."""
    least = sum(level.least for level in levels)
    if isinstance(least, int):
        capacity: float = math.floor(budget) - least
    else:
        capacity = budget - least + _TOLERANCE * abs(budget)
    if capacity < 0:
        raise PlanError(
            f"no plan is within {describe(budget)}; the best reachable is {describe(least)}, with the narrowest level "
            "of every group (allow narrower levels, such as with a smaller min_keep, or ask for less)"
        )
    return capacity


def _solve(levels: Sequence[_Levels], capacity: float, max_states: int) -> tuple[list[int], float | None]:
    """The best levels (as rows of the choices), and how far from the best they may be; None when they are the best."""
    relaxed = _relax(levels, capacity)
    best = relaxed.levels
    gap = relaxed.loss - relaxed.bound
    slack = _TOLERANCE * max(1e-300, relaxed.loss)
    exact = True
    if gap > slack:
        searched, exact = _search(levels, relaxed, capacity, gap + slack, max_states)
        best = best if searched is None or _loss(levels, searched) >= relaxed.loss else searched
    rows = [int(level.rows[chosen]) for level, chosen in zip(levels, best, strict=True)]
    return rows, None if exact else max(0.0, _loss(levels, best) - relaxed.bound)


def _loss(levels: Sequence[_Levels], chosen: Sequence[int]) -> float:
    return math.fsum(float(level.losses[index]) for level, index in zip(levels, chosen, strict=True))


@dataclass(frozen=True)
class _Relaxation:
    """The greedy solution (`levels`, `loss`), the lower bound of the linear relaxation, and its multiplier."""

    levels: list[int]
    loss: float
    bound: float
    multiplier: float


def _relax(levels: Sequence[_Levels], capacity: float) -> _Relaxation:
    """Walk from the cheapest levels along the convex hulls, the steepest fall of loss per cost first."""
    steps = []
    for index, level in enumerate(levels):
        hull = _lower_hull(level.costs, level.losses)
        for start, end in itertools.pairwise(hull):
            cost = level.costs[end] - level.costs[start]
            steps.append((float((level.losses[start] - level.losses[end]) / cost), index, end, cost.item()))
    steps.sort(key=lambda step: -step[0])  # stable: a hull's own steps, ever flatter, keep their order
    chosen = [0] * len(levels)
    stopped: set[int] = set()
    left, multiplier = capacity, 0.0
    for slope, index, end, cost in steps:
        if index in stopped:
            continue
        if cost <= left:
            chosen[index], left = end, left - cost
        else:
            multiplier = multiplier if stopped else slope
            stopped.add(index)
    # Lagrange: for any multiplier, the sum of the least (loss + multiplier * cost) less multiplier * capacity.
    least = (float((level.losses + multiplier * level.costs).min()) for level in levels)
    bound = math.fsum(least) - multiplier * capacity
    return _Relaxation(chosen, _loss(levels, chosen), bound, multiplier)


def _lower_hull(costs: CostArray, losses: FloatArray) -> list[int]:
    """Indices of the lower convex hull of points with rising costs and falling losses."""
    hull: list[int] = []
    for point in range(len(costs)):
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            run, rise = costs[last] - costs[first], losses[last] - losses[first]
            if rise * (costs[point] - costs[first]) < (losses[point] - losses[first]) * run:
                break
            hull.pop()
        hull.append(point)
    return hull


def _search(
    levels: Sequence[_Levels], relaxed: _Relaxation, capacity: float, gap: float, max_states: int
) -> tuple[list[int] | None, bool]:
    """Dynamic programming over (cost, reduced loss) pairs that can still beat the greedy solution.

    A level's reduced loss is by how much its loss + multiplier * cost exceeds the least of its choice. The loss of a
    solution is the relaxation's bound + the sum of its reduced losses + multiplier * (capacity left unused), so a
    partial solution whose reduced losses already exceed the gap is dropped.

    Returns:
        The best solution found, if any, as indices into each choice's undominated levels, and whether nothing was
        merged.
    """
    multiplier = relaxed.multiplier
    options = []
    for level in levels:
        value = level.losses + multiplier * level.costs
        reduced = value - value.min()
        index = np.flatnonzero(reduced <= gap)
        options.append((index, level.costs[index], reduced[index]))
    order = sorted(range(len(levels)), key=lambda i: len(options[i][0]))
    limit = _state_limit([costs for _, costs, _ in options], capacity, max_states)
    cost_left = [min(costs) for _, costs, _ in (options[i] for i in order)]
    most_left = [max(costs) for _, costs, _ in (options[i] for i in order)]
    least_after = np.append(np.cumsum(cost_left[::-1])[::-1][1:], 0)
    most_after = np.append(np.cumsum(most_left[::-1])[::-1][1:], 0)
    states = np.zeros(1, dtype=options[0][1].dtype), np.zeros(1)
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    exact = True
    for position, choice in enumerate(order):
        index, costs, reduced = options[choice]
        all_costs = (states[0][:, None] + costs).ravel()
        all_reduced = (states[1][:, None] + reduced).ravel()
        unused = np.maximum(0, capacity - all_costs - most_after[position])
        alive = (all_costs <= capacity - least_after[position]) & (all_reduced + multiplier * unused <= gap)
        kept = np.flatnonzero(alive)
        kept = kept[np.lexsort((all_reduced[kept], all_costs[kept]))]
        kept = kept[_undominated(all_reduced[kept] - multiplier * all_costs[kept])]
        if not len(kept):
            return None, exact
        if len(kept) > limit:
            kept, exact = kept[_nearly_undominated(all_costs[kept], all_reduced[kept], max_states)], False
        states = all_costs[kept], all_reduced[kept]
        trail.append((kept // len(index), index[kept % len(index)]))
    state = int(np.argmin(states[1] - multiplier * states[0]))
    chosen = [0] * len(levels)
    for choice, (parents, taken) in zip(reversed(order), reversed(trail), strict=True):
        chosen[choice], state = int(taken[state]), int(parents[state])
    return chosen, exact


def _state_limit(costs: Sequence[CostArray], capacity: float, max_states: int) -> float:
    """How many pairs to keep: any number when they are few because the costs lie on a coarse grid."""
    if not all(np.issubdtype(array.dtype, np.integer) for array in costs):
        return max_states
    unit = reduce(math.gcd, (int(cost) for array in costs for cost in array), 0)
    return math.inf if capacity <= _MAX_CELLS * max(1, unit) else max_states


def _nearly_undominated(costs: CostArray, reduced: FloatArray, most: int) -> NDArray[np.intp]:
    """Of pairs by rising cost: in each of `most` equal stretches of cost the one with the least reduced loss."""
    stretch = ((costs - costs[0]) * ((most - 1) / (costs[-1] - costs[0]))).astype(np.int64)
    order = np.lexsort((reduced, stretch))
    first = np.diff(stretch[order], prepend=-1) > 0
    return np.sort(order[first])
