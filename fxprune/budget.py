"""Budgets: from scored units to a legal plan that hits a requested size.

Units are removed in *steps*: a run of MLP channels that keeps the width a multiple of what the hardware likes, or a
whole KV head with its query heads. Inside a group the least important units make up the first step, so a ranking of
steps never removes a better unit before a worse one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fxprune.errors import PlanError, UsageError
from fxprune.groups import AttentionGroup
from fxprune.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from fxprune.groups import Group

__all__ = ["Step", "allocate", "allocate_uniform", "check_ratio", "steps_of"]


@dataclass(frozen=True)
class Step:
    """A legal portion of a group's units.

    Attributes:
        group: name of the group.
        units: the units it removes.
        score: predicted damage: damage per parameter times cost.
        cost: parameters that go with it.
    """

    group: str
    units: tuple[int, ...]
    score: float
    cost: int


def check_ratio(ratio: float) -> None:
    """Raise `UsageError` unless 0 < ratio < 1 (NaN included)."""
    if not 0 < ratio < 1:
        raise UsageError(
            f"ratio must lie between 0 and 1, got {ratio}; it is the share of block Linear parameters removed"
        )


def steps_of(group: Group, scores: NDArray[np.float64], *, round_to: int, min_keep: float) -> list[Step]:
    """Cut a group's units into steps, least important first.

    Args:
        group: the group.
        scores: (units,) predicted damage per parameter of removing each unit, in any one scale for all groups.
        round_to: kept MLP widths are multiples of this, unless nothing is removed.
        min_keep: share of the units that must stay; at least one legal step always stays.

    Returns:
        The steps that may be taken, in order; taking any first few of them is legal.
    """
    if isinstance(group, AttentionGroup):
        # A KV head goes only when all its query heads do, so it is worth as much as the best of them.
        heads = [group.heads_of(kv) for kv in range(group.kv_heads)]
        damage = np.array([float(scores[members].max()) for members in heads])
        cost = [len(members) * group.unit_parameters + group.shared_parameters for members in heads]
        keep = max(1, int(np.ceil(min_keep * len(heads))))
        order = np.argsort(damage, kind="stable")[: len(heads) - keep]
        return [Step(group.name, tuple(heads[kv]), float(damage[kv]) * cost[kv], cost[kv]) for kv in order]
    order = np.argsort(scores, kind="stable")
    keep = max(round_to, int(np.ceil(min_keep * group.units)))
    steps, start = [], 0
    length = group.units % round_to or round_to
    while group.units - (start + length) >= keep:
        units = order[start : start + length]
        damage_of_run = float(scores[units].sum()) * group.unit_parameters
        cost_of_run = length * group.unit_parameters
        steps.append(Step(group.name, tuple(int(unit) for unit in units), damage_of_run, cost_of_run))
        start, length = start + length, round_to
    return steps


def _plan(groups: Sequence[Group], taken: Sequence[Step]) -> Plan:
    removed: dict[str, set[int]] = {group.name: set() for group in groups}
    for step in taken:
        removed[step.group].update(step.units)
    return Plan.of(
        {group.name: [unit for unit in range(group.units) if unit not in removed[group.name]] for group in groups}
    )


def _unreachable(target: int, reachable: int, total: int) -> PlanError:
    return PlanError(
        f"no legal plan removes {target / total:.1%} of the block Linear parameters; the most that can go is "
        f"{reachable / total:.1%} (every block keeps its minimum; lower --min-keep or the ratio)"
    )


def allocate(groups: Sequence[Group], steps: Mapping[str, Sequence[Step]], target: int, total: int) -> Plan:
    """One ranking over all groups: take the steps with the least damage per parameter until the target is met.

    Args:
        groups: all groups.
        steps: for each group its steps in order.
        target: parameters to remove.
        total: parameters of all block Linears, for messages.

    Returns:
        A plan whose removed parameters differ from the target by at most half the smallest step; where all small steps
        are taken before the target is met, by at most half the smallest of those that are left.

    Raises:
        PlanError: all steps together are too few, or the smallest step is more than twice the target.
    """
    reachable = sum(step.cost for listed in steps.values() for step in listed)
    smallest = min((step.cost for listed in steps.values() for step in listed), default=0)
    if reachable + smallest / 2 < target or not smallest:
        raise _unreachable(target, reachable, total)
    # Damage per parameter never falls along a group's own steps, so the ranking respects their order.
    ranked = sorted(
        (step.score / step.cost, name, index) for name, listed in steps.items() for index, step in enumerate(listed)
    )
    next_of = dict.fromkeys(steps, 0)
    taken: list[Step] = []
    removed = 0
    for _, name, index in ranked:
        step = steps[name][index]
        if index == next_of[name] and removed + step.cost <= target + smallest / 2:
            taken.append(step)
            removed += step.cost
            next_of[name] += 1
    removed = _fill(steps, next_of, taken, removed, lambda size, cost: size + cost <= target + smallest / 2)
    _fill(steps, next_of, taken, removed, lambda size, cost: size + cost / 2 <= target)  # if only large steps are left
    if not taken:
        raise PlanError(
            f"the smallest legal step removes {smallest} parameters ({smallest / total:.2%}), more than twice the "
            f"requested {target / total:.2%}; raise the ratio or lower --round-to"
        )
    return _plan(groups, taken)


def _fill(
    steps: Mapping[str, Sequence[Step]],
    next_of: dict[str, int],
    taken: list[Step],
    removed: int,
    fits: Callable[[int, int], bool],
) -> int:
    """Take what still fits after large steps were passed over; return how much is removed then."""
    while True:
        fitting = [
            (listed[next_of[name]].score / listed[next_of[name]].cost, name)
            for name, listed in steps.items()
            if next_of[name] < len(listed) and fits(removed, listed[next_of[name]].cost)
        ]
        if not fitting:
            return removed
        _, name = min(fitting)
        step = steps[name][next_of[name]]
        taken.append(step)
        removed += step.cost
        next_of[name] += 1


def allocate_uniform(groups: Sequence[Group], steps: Mapping[str, Sequence[Step]], target: int, total: int) -> Plan:
    """The same number of steps in every group of a kind: the widths a plain config can say.

    Of all combinations whose size is within half a step of the best reachable, the one with the least damage wins.

    Args:
        groups: all groups; groups of one kind must be alike.
        steps: for each group its steps in order.
        target: parameters to remove.
        total: parameters of all block Linears, for messages.

    Returns:
        The plan.

    Raises:
        PlanError: groups of one kind differ in size, or the target cannot be reached.
    """
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    for kind, members in kinds.items():
        shapes = {(group.units, group.unit_parameters, group.shared_parameters) for group in members}
        if len(shapes) > 1:
            raise PlanError(f"uniform widths need alike groups, but the {kind} groups of this model differ in size")
    options: list[tuple[int, float, dict[str, int]]] = [(0, 0.0, {})]
    for kind, members in kinds.items():
        longest = min(len(steps[group.name]) for group in members)
        options = [
            (
                cost + sum(step.cost for group in members for step in steps[group.name][:count]),
                damage + sum(step.score for group in members for step in steps[group.name][:count]),
                {**counts, kind: count},
            )
            for cost, damage, counts in options
            for count in range(longest + 1)
        ]
    reachable = max(cost for cost, _, _ in options)
    gap = min(abs(cost - target) for cost, _, _ in options)
    step = min(
        (
            sum(steps[g.name][0].cost for g in members)
            for members in kinds.values()
            if all(steps[g.name] for g in members)
        ),
        default=0,
    )
    if not step or reachable + step / 2 < target:
        raise _unreachable(target, reachable, total)
    near = [option for option in options if abs(option[0] - target) <= max(gap, step / 2) and option[0]]
    if not near:
        raise PlanError(f"the smallest uniform step removes {step / total:.2%}, more than twice the requested share")
    _, _, counts = min(near, key=lambda option: (option[1], abs(option[0] - target)))
    return _plan(groups, [step for g in groups for step in steps[g.name][: counts[g.kind]]])
