"""How a learned model is held to its size: a hard budget in every step, or a Lagrangian.

    hard         gates drawn so that the budget of the step is expected, then projected onto it
    lagrangian   gates drawn as they are; the penalty draws the expected size to the target (fxprune.learned.schedule)

Sparsity is the share of what the target counts that goes: parameters, MACs, bytes, or time by a latency table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.core.errors import TrainingError, UsageError
from fxprune.learned.expected_size import ExpectedLatency, ExpectedSize, independent_units
from fxprune.learned.hard_budget import BudgetProjector
from fxprune.learned.schedule import AugmentedLagrangian
from fxprune.measure.latency_table import load_table
from fxprune.weights.base import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.learned.expected_size import Measure, OpenUnits
    from fxprune.learned.gates import ProgramGates
    from fxprune.learned.options import L0Options
    from fxprune.learned.schedule import SparsitySchedule
    from fxprune.structured.curves import Limits
    from fxprune.structured.targets import CostModel, Target

__all__ = [
    "Drawn",
    "HardBudget",
    "LagrangianBudget",
    "SizeControl",
    "expected_sparsity",
    "target_sparsity",
]

_HALVINGS, _SECANTS = 7, 3
"""Halvings of the interval in which the offset is sought, which leave 1.6 of it, and secant steps in there."""
_WIDEST = 100.0
_FITS = 40
"""Halvings of that in which decided gates are brought within the budget."""


@dataclass(frozen=True)
class Drawn:
    """The gates of one step.

    Attributes:
        values: of the student, with gradients, by group.
        sparsity: of what is kept (hard), or expected (lagrangian).
        penalty: to be minimised over gates and maximised over multipliers; None under a hard budget.
        kept: (units,) bool by group, what the budget of the step keeps; None where nothing is projected.
    """

    values: Mapping[str, Tensor]
    sparsity: float
    penalty: Tensor | None = None
    kept: Mapping[str, Tensor] | None = None


def expected_sparsity(
    program: Program, groups: Sequence[Group], target: Target, table: str | None, mix: Mapping[str, float] | None
) -> tuple[Callable[[Mapping[str, OpenUnits]], Tensor], float]:
    """The expected sparsity of gates, and the sparsity that a target asks for.

    Args:
        program: the dense program.
        groups: those that have gates.
        target: what shall be reached.
        table: file of the latency table, for a speed-up.
        mix: of its cases.

    Returns:
        A function from open probabilities to the sparsity, a scalar with gradients; and the target.

    Raises:
        UsageError: the target is what the dense model has already.
    """
    if target.kind == "speedup":
        assert table is not None
        loaded = load_table(table)
        latency = ExpectedLatency(loaded, groups, mix or {case.case.name: 1.0 for case in loaded.cases})
        return lambda open_units: 1 - latency(open_units), target_sparsity(target, 1.0)
    measure: Measure = "params" if target.kind == "bytes" else target.kind
    size = ExpectedSize(program, groups, measure)
    one = dtype_of(program).itemsize if target.kind == "bytes" else 1
    return size.sparsity, target_sparsity(target, float(size.dense * one))


def target_sparsity(target: Target, dense: float) -> float:
    """The share that goes.

    Args:
        target: what shall be reached.
        dense: what the dense model has of it.

    Raises:
        UsageError: nothing would go.
    """
    if target.kind in {"ratio", "speedup"}:
        return target.value if target.kind == "ratio" else 1 - 1 / target.value
    if target.value >= dense:
        raise UsageError(f"the dense model has {dense:g} {target.kind} already, no more than {target}: ask for less")
    return 1 - target.value / dense


class SizeControl:
    """Base of the two.

    Attributes:
        gates: what is held.
        schedule: the sparsity that is aimed at.
        projector: what is legal and affordable; None where gates of layers or hidden channels forbid it.
    """

    gates: ProgramGates
    schedule: SparsitySchedule
    projector: BudgetProjector | None

    def draw(self, step: int, generator: torch.Generator) -> Drawn:
        """The student's gates in a step, from its random numbers."""
        raise NotImplementedError

    def decided(self, step: int) -> Drawn:
        """The gates as they would be decided after so many steps: 0 or 1, legal, without gradients."""
        raise NotImplementedError

    def soft(self, step: int) -> dict[str, Tensor]:
        """Like `decided`, kept units with their values at evaluation."""
        raise NotImplementedError

    def optimizer_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters of the control itself."""
        del lr
        return []

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The same by name."""
        return {}

    def figures(self) -> dict[str, float]:
        """What the log says of the control."""
        return {}

    def check_end(self) -> None:
        """Whether the target is met.

        Raises:
            TrainingError: it is not.
        """


class HardBudget(SizeControl):
    """A budget that no step exceeds.

    Args:
        gates: of heads and MLP channels.
        costs: what levels cost.
        budget: the most that all may cost in the end.
        limits: see `fxprune.learned.hard_budget.BudgetProjector`.
        uniform: whether widths of a kind are the same everywhere.
        expected: the expected sparsity, see `expected_sparsity`.
        options: of the training.

    Raises:
        PlanError: the budget cannot be reached.
        UsageError: the budget is met already, or the schedule is impossible.
    """

    projector: BudgetProjector

    def __init__(
        self,
        gates: ProgramGates,
        costs: CostModel,
        budget: float,
        *,
        limits: Mapping[str, Limits],
        uniform: bool,
        expected: Callable[[Mapping[str, OpenUnits]], Tensor],
        options: L0Options,
    ) -> None:
        self.gates = gates
        self.budget = budget
        self.projector = BudgetProjector(gates, costs, budget, limits, uniform=uniform)
        if budget >= self.projector.dense:
            raise UsageError(f"the dense model is within the budget already ({costs.describe(budget)}): ask for less")
        self.schedule = options.schedule_to(1 - budget / self.projector.dense)
        self._expected = expected

    def _aim(self, step: int) -> None:
        """Set the budget and the offset of the gates for a step."""
        sparsity = self.schedule.at(step)
        reached = self.schedule.reached(step)
        self.projector.budget = self.budget if reached else (1 - sparsity) * self.projector.dense
        low, high = (-_WIDEST, self._excess(-_WIDEST, sparsity)), (_WIDEST, self._excess(_WIDEST, sparsity))
        for index in range(_HALVINGS + _SECANTS):
            middle = (low[0] + high[0]) / 2
            if index >= _HALVINGS and low[1] > high[1]:
                middle = high[0] - high[1] * (high[0] - low[0]) / (high[1] - low[1])
            excess = self._excess(middle, sparsity)
            low, high = ((middle, excess), high) if excess > 0 else (low, (middle, excess))
        self.gates.set_offset(high[0])

    def _excess(self, offset: float, sparsity: float) -> float:
        """By how much the expected sparsity with an offset is more than wanted."""
        self.gates.set_offset(offset)
        with torch.no_grad():
            return float(self._expected(self.gates.open_units())) - sparsity

    def draw(self, step: int, generator: torch.Generator) -> Drawn:
        """See `SizeControl`."""
        self._aim(step)
        projection = self.projector.project()
        values = self.projector.apply(self.gates.sample(generator), projection)
        return Drawn(values, 1 - projection.cost / self.projector.dense, kept=projection.kept)

    def decided(self, step: int) -> Drawn:
        """See `SizeControl`."""
        self._aim(step)
        projection = self.projector.project()
        values = {name: kept.float() for name, kept in projection.kept.items()}
        return Drawn(values, 1 - projection.cost / self.projector.dense, kept=projection.kept)

    def soft(self, step: int) -> dict[str, Tensor]:
        """See `SizeControl`."""
        self._aim(step)
        return self.projector.decided()


class LagrangianBudget(SizeControl):
    """An expected size that is drawn to the target.

    Args:
        gates: of any kind.
        expected: the expected sparsity.
        target: sparsity in the end.
        options: of the training.
        projector: makes a legal plan within the budget of the gates in the end; None decides each group for itself.
    """

    def __init__(
        self,
        gates: ProgramGates,
        expected: Callable[[Mapping[str, OpenUnits]], Tensor],
        target: float,
        options: L0Options,
        projector: BudgetProjector | None,
    ) -> None:
        self.gates = gates
        self.schedule = options.schedule_to(target)
        self.projector = projector
        self._expected = expected
        self._tolerance = options.tolerance
        self._lagrangian = AugmentedLagrangian(next(gates.parameters()).device)

    def draw(self, step: int, generator: torch.Generator) -> Drawn:
        """See `SizeControl`."""
        sparsity = self._expected(self.gates.open_units())
        penalty = self._lagrangian(sparsity, self.schedule.at(step))
        return Drawn(self.gates.sample(generator), float(sparsity.detach()), penalty)

    def _sparsity(self) -> float:
        with torch.no_grad():
            return float(self._expected(self.gates.open_units()))

    def decided(self, step: int) -> Drawn:
        """See `SizeControl`."""
        values = {name: (value > 0).float() for name, value in self.soft(step).items()}
        return Drawn(values, self._sparsity())

    def soft(self, step: int) -> dict[str, Tensor]:
        """See `SizeControl`; the budget is made to hold when it has been trained for."""
        if step < self.schedule.steps:
            return self.gates.deterministic()
        return self._fitted() if self.projector is None else self.projector.decided()

    def _fitted(self) -> dict[str, Tensor]:
        """Decided gates that remove what is asked for: where their rounded numbers do not, all are closed a bit more.

        A product of rounded numbers is not what was expected of the product, and half a unit of each group adds up.
        """
        found = self.gates.deterministic()
        if self._removed(found) >= self.schedule.target:
            return found
        low, high = -_WIDEST, 0.0
        try:
            for _ in range(_FITS):
                middle = (low + high) / 2
                self.gates.set_offset(middle)
                tried = self.gates.deterministic()
                if self._removed(tried) >= self.schedule.target:
                    low, found = middle, tried
                else:
                    high = middle
        finally:
            self.gates.set_offset(0.0)
        return found

    def _removed(self, values: Mapping[str, Tensor]) -> float:
        """The sparsity of a plan."""
        kept = {
            one.group.name: independent_units(one.group, (values[one.group.name] > 0).float()) for one in self.gates
        }
        return float(self._expected(kept))

    def optimizer_groups(self, lr: float) -> list[dict[str, Any]]:
        """See `SizeControl`."""
        return [self._lagrangian.optimizer_group(lr)]

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `SizeControl`."""
        return dict(self._lagrangian.named_parameters())

    def figures(self) -> dict[str, float]:
        """The multipliers."""
        return {
            "lambda_linear": float(self._lagrangian.linear.detach()),
            "lambda_quadratic": float(self._lagrangian.quadratic.detach()),
        }

    def check_end(self) -> None:
        """See `SizeControl`."""
        sparsity, target = self._sparsity(), self.schedule.target
        if not abs(sparsity - target) <= self._tolerance:
            raise TrainingError(
                f"the budget is not met: the gates ended at an expected sparsity of {sparsity:.3f}, the target is "
                f"{target:.3f} within {self._tolerance:g}; train for more steps after the warm-up, raise multiplier_lr "
                "or mask_lr, or use the hard budget, which is always met"
            )
        if self.projector is None and self._removed(self.soft(self.schedule.steps)) < target:
            raise TrainingError(
                f"the budget is not met: with one unit left in every group the sparsity is below {target:.3f}; ask for "
                "less, or give gates to more kinds of groups"
            )
