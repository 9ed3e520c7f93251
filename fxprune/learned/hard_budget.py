"""Hard budget: gates projected onto what a budget allows, in every step, with straight-through gradients.

    open probabilities ─ projection ─ kept units: legal, aligned, within the budget
    values * kept                                      forward:  a closed unit is exactly 0
    gradient of values, as if nothing were projected   backward: a closed unit can come back

The projection keeps the units that are most likely open, whatever they cost: what is given up is the open probability
of each unit times its cost, the same weighting as in the expected size, so that units of all groups are compared by
their probabilities. It is a multiple-choice knapsack over the legal widths of every group, solved greedily along the
lower hulls of loss against cost (the linear relaxation's solution), then filled up until no wider level fits. One legal
step of every group is reserved first, so that no group is ever empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.core.errors import PlanError, PreconditionError
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.learned.hard_concrete import LEAST_OPEN, open_probability
from fxprune.learned.unit_gates import HeadGates, UnitGates
from fxprune.measure.latency_table import block_shape
from fxprune.structured.curves import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from fxprune.core.groups import Group
    from fxprune.learned.gates import ProgramGates
    from fxprune.learned.hard_concrete import HardConcrete
    from fxprune.structured.targets import CostModel

    Floats = NDArray[np.float64]

__all__ = ["BudgetProjector", "Projection", "straight_through"]

_TOLERANCE = 1e-9
_LIMITS = Limits(8, 0.0)


class _StraightThrough(torch.autograd.Function):
    """values * kept forward, the gradient as it comes backward."""

    @staticmethod
    def forward(_: Any, values: Tensor, kept: Tensor) -> Tensor:
        return values * kept

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(values: Tensor, kept: Tensor) -> Tensor:
    """Zero the values that are not kept, but let gradients through as if nothing had been done.

    Args:
        values: gates, any shape.
        kept: same shape, bool.
    """
    result: Tensor = _StraightThrough.apply(values, kept.to(values.dtype))  # type: ignore[no-untyped-call]  # torch
    return result


@dataclass(frozen=True)
class Projection:
    """What a projection keeps.

    Attributes:
        kept: (units,) bool of every group, by name; a legal plan.
        cost: of it all, what no gate touches included.
    """

    kept: Mapping[str, Tensor]
    cost: float


@dataclass(frozen=True)
class _Levels:
    """The legal levels of one group, by rising cost.

    Attributes:
        shapes: (levels, 2) kept KV heads and places, or kept channels and 1; where there are parts, of one part.
        costs: (levels,) rising.
        unit_cost: of what one gate opens, on average.
    """

    shapes: NDArray[np.int64]
    costs: Floats
    unit_cost: float


class BudgetProjector:
    """Projects gates onto a budget.

    Args:
        gates: of a program; heads and MLP channels.
        model: what levels cost (`fxprune.structured.targets.cost_model`): parameters, MACs, bytes or time.
        budget: the most that all may cost, as `model.budget` gives it.
        limits: kept MLP widths are multiples of `round_to`, unless all are kept; `min_keep` of every group stays. One
            for all groups, or one for each by name.
        uniform: whether all groups of a kind keep the same width.

    Attributes:
        budget: see above; it may be changed between projections.
        dense: what all units cost.

    Raises:
        PlanError: the least of every group is more than the budget (the message says what can be reached), or uniform
            widths are wanted of groups that differ.
        PreconditionError: there are gates of layers or hidden channels, whose costs are not sums over groups.
    """

    def __init__(
        self,
        gates: ProgramGates,
        model: CostModel,
        budget: float,
        limits: Limits | Mapping[str, Limits] = _LIMITS,
        *,
        uniform: bool = False,
    ) -> None:
        self.budget = budget
        self._gates = gates
        self._fixed = model.fixed
        self._levels: list[_Levels] = []
        known: dict[tuple[str, int, int], float] = {}
        for member in gates:
            if not isinstance(member.group, (AttentionGroup, MlpGroup)):
                raise PreconditionError(
                    f"{member.group.name}: a hard budget is for heads and MLP channels, not for {member.group.kind}"
                )
            rows = []
            own = limits if isinstance(limits, Limits) else limits[member.group.name]
            for shape in _shapes(member, own):
                key = (block_shape(member.group), *shape)
                if key not in known:
                    known[key] = float(model.cost(member.group, _example(member, shape)))
                rows.append((known[key], shape))
            rows.sort()
            costs = np.array([cost for cost, _ in rows], dtype=np.float64)
            shapes = np.array([shape for _, shape in rows])
            self._levels.append(_Levels(shapes, costs, costs[-1] / float(shapes[-1].prod())))
        self.dense = model.fixed + sum(float(levels.costs[-1]) for levels in self._levels)
        self._kinds = _alike(gates, self._levels) if uniform else []
        least = model.fixed + sum(float(levels.costs[0]) for levels in self._levels)
        if least > budget + _TOLERANCE * abs(budget):
            raise PlanError(
                f"no gates are within {model.describe(budget)}; the best reachable is {model.describe(least)}, with "
                "the least legal width in every group (allow narrower widths, or ask for less)"
            )

    def project(self) -> Projection:
        """What to keep by the open probabilities of the gates as they are now; no gradients.

        Raises:
            PlanError: a gate is not a number.
        """
        with torch.no_grad():
            parts = [_worth(member) for member in self._gates]
        losses = [_losses(levels, *part) for levels, part in zip(self._levels, parts, strict=True)]
        for member, loss in zip(self._gates, losses, strict=True):
            if not np.isfinite(loss).all():
                raise PlanError(f"{member.group.name}: a gate is not a number; training has diverged")
        costs = [levels.costs for levels in self._levels]
        room = self.budget - self._fixed + _TOLERANCE * abs(self.budget)
        chosen = _together(costs, losses, self._kinds, room) if self._kinds else _allocate(costs, losses, room)
        kept, total = {}, self._fixed
        for member, levels, part, level in zip(self._gates, self._levels, parts, chosen, strict=True):
            kept[member.group.name] = _kept(member, part, levels.shapes[level])
            total += float(levels.costs[level])
        return Projection(kept, total)

    def apply(self, values: Mapping[str, Tensor], projection: Projection | None = None) -> dict[str, Tensor]:
        """Values with what the projection closes at 0, and straight-through gradients.

        Args:
            values: such as `ProgramGates.sample` or `soft` gives, by group.
            projection: one that was made before (it may be made anew every few steps); None makes one now.
        """
        kept = (projection or self.project()).kept
        return {name: straight_through(value, kept[name]) for name, value in values.items()}

    def decided(self) -> dict[str, Tensor]:
        """The gates at the end of training: soft values of what is kept, at least 0.01, and 0 for the rest.

        What `fold_gates` makes of them is legal, aligned and within the budget, whatever the gates are.
        """
        kept = self.project().kept
        with torch.no_grad():
            return {name: value.clamp(min=LEAST_OPEN) * kept[name] for name, value in self._gates.soft().items()}


# ---- levels --------------------------------------------------------------------------------------------------------


def _shapes(member: Any, limits: Limits) -> list[tuple[int, int]]:
    """The legal widths of a group."""
    group: Group = member.group
    if isinstance(member, HeadGates):
        sets, places = member.shape
        parts = group.units // (sets * places)
        fewest_sets = limits.least(sets) if member.kv is not None else sets
        fewest_places = 1 if member.slots is not None else places
        return [
            (s, p)
            for s in range(fewest_sets, sets + 1)
            for p in range(fewest_places, places + 1)
            if s * p * parts >= limits.least(group.units)
        ]
    step = math.lcm(limits.round_to, group.step)
    least = limits.least(group.units, step)
    parts = 1 if group.parts is None else len(group.parts)
    return [(count // parts, 1) for count in sorted({*range(least, group.units, step), group.units})]


def _example(member: Any, shape: tuple[int, int]) -> Sequence[int]:
    """Some units of such a width: all of one width cost the same."""
    sets, places = shape
    if isinstance(member, HeadGates):
        return sorted(int(head) for head in member.order[:sets, :places].reshape(-1))
    return range(sets) if member.order is None else sorted(member.order[:sets].reshape(-1).tolist())


def _worth(member: Any) -> tuple[Floats, Floats]:
    """What the gates are ranked by: open probabilities of KV heads and places, or of channels and of nothing."""
    if isinstance(member, HeadGates):
        sets, places = member.shape
        kv = np.ones(sets) if member.kv is None else _numbers(member.kv)
        slots = np.ones(places) if member.slots is None else _numbers(member.slots)
        return kv, slots
    assert isinstance(member, UnitGates)
    return _numbers(member.gates), np.ones(1)


def _numbers(gates: HardConcrete) -> Floats:
    """Open probabilities in float64, in which those close to 1 still differ."""
    return open_probability(gates.location().detach().double()).cpu().numpy()


def _losses(levels: _Levels, rows: Floats, columns: Floats) -> Floats:
    """The open probability that each level gives up, times the cost of a unit, (levels,)."""
    top_rows, top_columns = (np.concatenate([[0.0], np.cumsum(-np.sort(-part))]) for part in (rows, columns))
    held = top_rows[levels.shapes[:, 0]] * top_columns[levels.shapes[:, 1]]
    return np.asarray(np.maximum(0.0, rows.sum() * columns.sum() - held) * levels.unit_cost)


def _kept(member: Any, part: tuple[Floats, Floats], shape: NDArray[np.int64]) -> Tensor:
    """The units of a level; of equal ones the first."""
    on = []
    for worth, count in zip(part, shape, strict=True):
        chosen = np.zeros(len(worth), dtype=bool)
        chosen[np.argsort(-worth, kind="stable")[: int(count)]] = True
        on.append(torch.from_numpy(chosen).to(next(member.parameters()).device))
    return member.spread(on[0], on[1]) if isinstance(member, HeadGates) else member.spread(on[0])


# ---- allocation ----------------------------------------------------------------------------------------------------


def _allocate(costs: Sequence[Floats], losses: Sequence[Floats], room: float) -> list[int]:
    """A level for each group, with a small total loss, whose total cost is at most `room`."""
    hulls = [_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    owner = np.concatenate([np.full(len(hull) - 1, index) for index, hull in enumerate(hulls)])
    run = np.concatenate([np.diff(cost[hull]) for cost, hull in zip(costs, hulls, strict=True)])
    fall = np.concatenate([-np.diff(loss[hull]) for loss, hull in zip(losses, hulls, strict=True)])
    # Along a hull slopes only fall; a stable sort keeps a group's own equal steps in order.
    order = np.argsort(-fall / np.maximum(run, 1e-300), kind="stable")
    left = room - sum(float(cost[hull[0]]) for cost, hull in zip(costs, hulls, strict=True))
    taken = int(np.searchsorted(np.cumsum(run[order]), left, side="right"))
    left -= float(run[order[:taken]].sum())
    steps = np.bincount(owner[order[:taken]], minlength=len(hulls))
    chosen = [int(hull[step]) for hull, step in zip(hulls, steps, strict=True)]
    return _filled(costs, losses, chosen, left)


def _alike(gates: ProgramGates, levels: Sequence[_Levels]) -> list[list[int]]:
    """Indices of the groups of each kind, whose levels must be the same."""
    kinds: dict[str, list[int]] = {}
    for index, member in enumerate(gates):
        same = kinds.setdefault(member.group.kind, [])
        same.append(index)
        if not np.array_equal(levels[index].shapes, levels[same[0]].shapes):
            raise PlanError(f"{member.group.name}: uniform widths need {member.group.kind} groups of one size")
    return list(kinds.values())


def _together(
    costs: Sequence[Floats], losses: Sequence[Floats], kinds: Sequence[Sequence[int]], room: float
) -> list[int]:
    """A level for each kind, of the least total loss within `room`: every combination is tried."""
    cost, loss = np.zeros(()), np.zeros(())
    for same in kinds:
        cost = np.add.outer(cost, sum(costs[index] for index in same))
        loss = np.add.outer(loss, sum(losses[index] for index in same))
    # Of equal losses the dearer one: what is left over of a budget is of no use.
    allowed = np.where(cost <= room, loss - 1e-12 * cost / max(1.0, float(cost.max())), np.inf)
    best = np.unravel_index(int(np.argmin(allowed)), allowed.shape)
    chosen = [0] * len(costs)
    for same, level in zip(kinds, best, strict=True):
        for index in same:
            chosen[index] = int(level)
    return chosen


def _hull(costs: Floats, losses: Floats) -> NDArray[np.int64]:
    """Indices of the lower convex hull of a group's levels, from the cheapest to that of the least loss."""
    slopes = np.diff(losses) / np.maximum(np.diff(costs), 1e-300)
    if (np.diff(costs) > 0).all() and (slopes <= 0).all() and (np.diff(slopes) >= 0).all():
        return np.arange(len(costs))
    hull: list[int] = []
    for point in range(len(costs)):
        if hull and losses[point] >= losses[hull[-1]]:
            continue
        while hull and costs[point] <= costs[hull[-1]]:
            hull.pop()
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            rise = (losses[last] - losses[first]) * (costs[point] - costs[first])
            if rise < (losses[point] - losses[first]) * (costs[last] - costs[first]):
                break
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _filled(costs: Sequence[Floats], losses: Sequence[Floats], chosen: list[int], left: float) -> list[int]:
    """Widen groups, the best gain for its cost first, until nothing wider fits into what is left."""
    while True:
        best: tuple[float, int, int] | None = None
        for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            now = chosen[index]
            more, gain = cost - cost[now], loss[now] - loss
            fits = np.flatnonzero((more > 0) & (more <= left) & (gain > 0))
            if len(fits):
                rate = gain[fits] / more[fits]
                place = int(np.argmax(rate))
                if best is None or rate[place] > best[0]:
                    best = float(rate[place]), index, int(fits[place])
        if best is None:
            return chosen
        _, index, level = best
        left -= float(costs[index][level] - costs[index][chosen[index]])
        chosen[index] = level
