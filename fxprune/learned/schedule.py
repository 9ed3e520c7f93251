"""Which sparsity training is held to, step by step, and the penalty that holds it there.

    penalty = l1 (s - t) + l2 (s - t)^2          s: expected sparsity, t: the step's target

The multipliers l1 and l2 start at 0 and are learned by gradient ascent: an augmented Lagrangian, Wang, Wohlwend, Lei
2020, "Structured pruning of large language models", section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxprune.core.errors import UsageError
from fxprune.learned.hard_concrete import KeepsFloat32

__all__ = ["AugmentedLagrangian", "ScheduleShape", "SparsitySchedule"]

ScheduleShape = Literal["linear", "cubic"]


@dataclass(frozen=True)
class SparsitySchedule:
    """The sparsity that is aimed at in each step: it rises for so many steps, then stays.

    Attributes:
        target: sparsity in the end, a share of what is counted, inside (0, 1).
        warm_up_steps: steps until it is reached; 0 asks for all of it at once.
        steps: of the whole training.
        shape: `linear`, or `cubic`: fast first, t (1 - (1 - step / warm_up)^3) (Zhu and Gupta 2017).
        start: sparsity at step 0.

    Raises:
        UsageError: a value is out of range, or training ends before the target is reached.
    """

    target: float
    warm_up_steps: int
    steps: int
    shape: ScheduleShape = "linear"
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise UsageError(f"the target sparsity must lie between 0 and 1, got {self.target}")
        if not 0 <= self.start <= self.target:
            raise UsageError(
                f"the schedule starts at sparsity {self.start}; it must lie in [0, {self.target}], its target"
            )
        if self.shape not in get_args(ScheduleShape):
            raise UsageError(f"a schedule is {' or '.join(get_args(ScheduleShape))}, got {self.shape!r}")
        if self.steps < 1 or self.warm_up_steps < 0:
            raise UsageError(f"a schedule of {self.steps} steps, {self.warm_up_steps} of them warm-up, is impossible")
        if self.warm_up_steps >= self.steps:
            reached = self.at(self.steps - 1)
            raise UsageError(
                f"training ends at step {self.steps} with the target sparsity at {reached:.3f}, before the "
                f"{self.target:g} that is asked for: the warm-up takes {self.warm_up_steps} steps, and "
                f"gates learn in {self.steps}, those before they settle. "
                f"Use {self.warm_up_steps + 1} steps or more, or at most {self.steps - 1} warm-up steps there "
                "(options steps, warm_up, settle)"
            )

    def at(self, step: int) -> float:
        """The sparsity aimed at in a step, counted from 0; from `warm_up_steps` on it is exactly the target."""
        if step >= self.warm_up_steps:
            return self.target
        share = max(0, step) / self.warm_up_steps
        if self.shape == "cubic":
            share = 1 - (1 - share) ** 3
        return self.start + (self.target - self.start) * share

    def reached(self, step: int) -> bool:
        """Whether the step aims at the final sparsity: the second stage of progressive distillation has begun."""
        return step >= self.warm_up_steps


class AugmentedLagrangian(KeepsFloat32):
    """The penalty with its two multipliers (see the module's docstring).

    The multipliers stay in float32, in whatever precision the model is.

    Attributes:
        linear: l1, a float32 scalar.
        quadratic: l2, a float32 scalar; ascent can only raise it.
    """

    linear: nn.Parameter
    quadratic: nn.Parameter

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))
        self.quadratic = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """The penalty, a float32 scalar: to be minimised over the gates and maximised over the multipliers.

        Args:
            sparsity: expected sparsity, a scalar; float32 or float64.
            target: the step's target.
        """
        gap = (sparsity - target).to(self.linear.dtype)
        return self.linear * gap + self.quadratic * gap.square()

    def optimizer_group(self, lr: float) -> dict[str, Any]:
        """The multipliers as a parameter group of a torch optimizer: gradient ascent, no decay."""
        return {"params": [self.linear, self.quadratic], "lr": lr, "weight_decay": 0.0, "maximize": True}
