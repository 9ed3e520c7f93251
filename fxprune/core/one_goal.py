"""A pass at one of several goals that share what is computed once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fxprune.core.pass_base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.core.goals import Goal
    from fxprune.core.program import Program

__all__ = ["OneGoal"]


class OneGoal(Pass):
    """A pass at one of its goals. In the history it is the pass itself with this one value.

    Its seconds are what this program took, the shared part in full.

    Args:
        step: the pass.
        goal: which of its goals.
        work: what is left to do for this goal.
        seconds: what was shared took.
        goals: how many share it.
    """

    def __init__(
        self, step: Pass, goal: Goal, work: Callable[[Program], PassResult], *, seconds: float, goals: int
    ) -> None:
        self.name = step.name  # type: ignore[misc]  # it stands for the pass
        self.prunes = step.prunes  # type: ignore[misc]  # as above
        self.keeps_shapes = step.keeps_shapes  # type: ignore[misc]  # as above
        self.goal = goal
        self._step = step
        self._work = work
        self._seconds = seconds
        self._goals = goals

    def options(self) -> dict[str, Any]:
        """The pass's own, with this value of its target."""
        return {**self._step.options(), self.goal.option: self.goal.value}

    def requires(self, program: Program) -> None:
        """See the pass."""
        self._step.requires(program)

    def call(self, program: Program) -> PassResult:
        """Do what is left for this goal."""
        result = self._work(program)
        shared = {"budgets_of_one_calibration": self._goals}
        return PassResult(result.program, modified=True, details={**result.details, **shared})

    def ensures(self, before: Program, after: Program) -> None:
        """See the pass."""
        self._step.ensures(before, after)

    def __call__(self, program: Program) -> PassResult:
        """Run the steps; the event's seconds hold those of the shared part, which the pass's own parts name."""
        result = super().__call__(program)
        *before, event = result.program.history
        event = dataclasses.replace(event, seconds=event.seconds + self._seconds)
        return PassResult(result.program.replace(history=(*before, event)), result.modified, result.details)
