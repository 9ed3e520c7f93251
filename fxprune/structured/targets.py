"""Targets: what a structured run shall reach, and from curves the plans that reach it at the least predicted loss.

A target is a share of the block Linears' parameters, or a number of parameters, MACs, bytes, or a measured speed-up.
All of them become one multiple-choice knapsack: a cost for each level of each curve, and a budget.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fxprune.channels.accounting import count_parameters, macs_per_token
from fxprune.channels.block_linears import block_linear_parameters
from fxprune.core.budget import check_ratio
from fxprune.core.errors import PlanError, UsageError
from fxprune.core.groups import AttentionGroup
from fxprune.core.plan import Plan
from fxprune.structured.knapsack import Choice, solve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.measure.latency_table import LatencyTable
    from fxprune.structured.curves import Curve

__all__ = ["CostModel", "Target", "TargetKind", "budgets_of", "cost_model", "plans_for"]

TargetKind = Literal["ratio", "params", "macs", "bytes", "speedup"]


_SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Target:
    """What shall be reached.

    Attributes:
        kind: `ratio`: the share of the block Linears' parameters that goes; `params`, `macs` (a token, all Linears,
            attention scores aside) and `bytes` (of all weights): the most that the slim model has; `speedup`: by a
            latency table.
        value: how much.

    Raises:
        UsageError: the value is out of range.
    """

    kind: TargetKind
    value: float

    def __post_init__(self) -> None:
        if self.kind == "ratio":
            check_ratio(self.value)
        elif self.kind == "speedup" and not 1 < self.value < float("inf"):
            raise UsageError(f"a target speed-up is larger than 1, got {self.value}")
        elif not 0 < self.value < float("inf"):
            raise UsageError(f"target_{self.kind} must be positive, got {self.value}")

    @property
    def option(self) -> str:
        """The option of a pass that holds it."""
        return self.kind if self.kind == "ratio" else f"target_{self.kind}"

    @property
    def short(self) -> str:
        """A name for files, such as `ratio-0.1` or `params-100M`."""
        value = f"{self.value:g}"
        if self.kind in {"params", "macs", "bytes"}:
            limit, suffix = next(((limit, suffix) for limit, suffix in _SUFFIXES if self.value >= limit), (1.0, ""))
            value = f"{self.value / limit:g}{suffix}"
        return f"{self.kind}-{value}"

    def __str__(self) -> str:
        return {"ratio": f"ratio {self.value:g}", "speedup": f"speed-up {self.value:g}"}.get(
            self.kind, f"{self.value:g} {self.kind}"
        )


@dataclass(frozen=True)
class CostModel:
    """What levels cost.

    Attributes:
        cost: of a group of which some units stay.
        fixed: what pruning does not touch.
        budget: the most that all may cost for a value of the target.
        describe: a total cost in words.
    """

    cost: Callable[[Group, Sequence[int]], float]
    fixed: float
    budget: Callable[[float], float]
    describe: Callable[[float], str]


def cost_model(
    kind: TargetKind,
    program: Program,
    groups: Sequence[Group],
    table: LatencyTable | None = None,
    mix: Mapping[str, float] | None = None,
) -> CostModel:
    """The cost model of a kind of target.

    Args:
        kind: of the target.
        program: the dense, lifted program.
        groups: what may be pruned.
        table: latencies, for `speedup`.
        mix: what share of the time each of the table's cases stands for, by name; all of them alike by default.

    Raises:
        UsageError: `speedup` without a table, or a mix that names unknown cases.
    """
    if kind == "speedup":
        if table is None:
            raise UsageError("a target speed-up needs a latency table: fxprune bench MODEL --table FILE measures one")
        shares = table.weights(mix or {case.case.name: 1.0 for case in table.cases})
        base = table.base(shares)
        return CostModel(
            lambda group, kept: table.cost(group, kept, shares),
            base,
            lambda value: table.budget(value, shares) + base,
            lambda cost: f"a speed-up of {table.speedup(cost - base, shares):.2f}",
        )
    outputs = program.interface.outputs
    module = program.graph_module
    if kind == "ratio":
        total = block_linear_parameters(module, outputs=outputs)
        dense = sum(_elements(group) for group in groups)
        return CostModel(
            lambda group, kept: _elements(group) - group.parameters_removed(kept),
            total - dense,
            lambda value: round((1 - value) * total),
            lambda cost: f"{1 - cost / total:.1%} of the block Linear parameters removed",
        )
    if kind == "macs":
        total = macs_per_token(module, outputs=outputs).linear
        dense = sum(_macs(group) for group in groups)
        return CostModel(_macs, total - dense, round, lambda cost: f"{_amount(cost)} MACs a token")
    size = 1 if kind == "params" else next(p.element_size() for p in module.parameters() if p.is_floating_point())
    total = count_parameters(module) * size
    dense = sum(_elements(group) for group in groups) * size
    unit = "parameters" if kind == "params" else "bytes"
    return CostModel(
        lambda group, kept: (_elements(group) - group.parameters_removed(kept)) * size,
        total - dense,
        round,
        lambda cost: f"{_amount(cost)} {unit}",
    )


def _amount(number: float) -> str:
    """A number with three significant digits or more, in thousands, millions or billions."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:.4g}"


def _elements(group: Group) -> int:
    """Parameters of all units, and of what they share."""
    return group.parameters_removed(())


def _macs(group: Group, kept: Sequence[int] | None = None) -> int:
    """MACs a token of the Linears' rows and columns that the kept units own."""
    kept = range(group.units) if kept is None else kept
    own = sum(s.per_unit * s.elements for s in group.slices if s.role) * len(kept)
    if group.sharing is None:
        return own
    sets = len({int(group.sharing[unit]) for unit in kept})
    return own + sum(s.per_unit * s.elements for s in group.shared if s.role) * sets


def budgets_of(model: CostModel, values: Sequence[float]) -> list[float]:
    """The most that all may cost, for each value of the target.

    Raises:
        UsageError: the values do not go from loose to tight.
    """
    budgets = [model.budget(value) for value in values]
    if any(later >= earlier for earlier, later in itertools.pairwise(budgets)):
        raise UsageError(f"budgets must go from loose to tight, got {', '.join(f'{v:g}' for v in values)}")
    return budgets


def plans_for(
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    model: CostModel,
    values: Sequence[float],
    *,
    uniform: bool = False,
) -> list[Plan]:
    """The plan of least loss for each value of a target, each within the one before.

    Args:
        groups: the groups that have curves.
        curves: by the group's name.
        model: what levels cost.
        values: of the target, each tighter than the one before.
        uniform: the same counts in every group of a kind; groups of a kind must be alike.

    Raises:
        UsageError: the values are not in order.
        PlanError: no plan reaches a value (the message says the best that can be reached), or uniform counts were asked
            for groups that differ.
    """
    budgets = budgets_of(model, values)
    if uniform:
        _require_alike(groups)
    plans = []
    left = dict(curves)
    for budget in budgets:
        choices = [_choice(group, left[group.name], model) for group in groups]
        found = solve(
            choices,
            budget - model.fixed,
            uniform=uniform,
            describe=lambda cost: model.describe(cost + model.fixed),
        )
        kept = {
            group.name: left[group.name].levels[level].kept for group, level in zip(groups, found.levels, strict=True)
        }
        left = {name: left[name].within(units) for name, units in kept.items()}
        plans.append(Plan.of(kept))
    return plans


def _choice(group: Group, curve: Curve, model: CostModel) -> Choice:
    levels = curve.levels
    return Choice(
        group.name,
        group.kind,
        tuple(_width(group, level.kept) for level in levels),
        tuple(level.loss for level in levels),
        tuple(model.cost(group, level.kept) for level in levels),
    )


def _width(group: Group, kept: Sequence[int]) -> int:
    """A number that names the shape of what stays: kept units, for heads with their KV heads."""
    if isinstance(group, AttentionGroup):
        return len(kept) * (group.kv_heads + 1) + len(group.kv_kept(kept))
    return len(kept)


def _require_alike(groups: Sequence[Group]) -> None:
    shapes: dict[str, set[tuple[int, int, int]]] = {}
    for group in groups:
        shapes.setdefault(group.kind, set()).add((group.units, group.unit_parameters, group.shared_parameters))
    for kind, found in shapes.items():
        if len(found) > 1:
            raise PlanError(f"uniform widths need alike groups, but the {kind} groups of this model differ in size")
