"""Where learned pruning starts from: the plan and the scores of the one-shot method `channel`.

One backward pass over some of the text gives the Fisher information of every unit (see
`fxprune.calibration.loss_signals`); the knapsack gives the plan of that budget. Gates then start in the order of the
scores, with each group's boundary where the plan has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxprune.calibration.kept_signals import kept_loss_signals
from fxprune.core.progress import track
from fxprune.structured.curves import EVENNESS, balanced, score_curve
from fxprune.structured.targets import plans_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.structured.curves import Limits
    from fxprune.structured.targets import CostModel

__all__ = ["OneShot", "one_shot"]


@dataclass(frozen=True)
class OneShot:
    """The start.

    Attributes:
        plan: within the budget; None where none was asked for.
        scores: (units,) float64 by group, the Fisher information.
        read: whether they were kept from an earlier run.
    """

    plan: Plan | None
    scores: Mapping[str, Tensor]
    read: bool = False


def one_shot(
    program: Program,
    groups: Sequence[Group],
    tokens: Tensor,
    costs: CostModel,
    value: float | None,
    *,
    limits: Mapping[str, Limits],
    uniform: bool = False,
    evenness: float = EVENNESS,
    forward_dtype: torch.dtype | None = None,
    seed: int = 0,
    kept_in: str | None = None,
) -> OneShot:
    """Score the units and plan.

    Args:
        program: the dense program.
        groups: heads and MLP channels.
        tokens: (samples, length) int64.
        costs: what levels cost.
        value: of the target; None for scores alone.
        limits: what must stay, by group.
        uniform: whether widths of a kind are the same everywhere.
        evenness: of the plan, see `fxprune.structured.curves.evened`.
        forward_dtype: precision of the products.
        seed: of the tokens that the model draws.
        kept_in: directory of loss signals, see `fxprune.calibration.kept_signals`.

    Raises:
        PlanError: no plan reaches the target.
        CalibrationError: values are not finite.
    """
    with track("one-shot scores", len(tokens)) as advance:
        signals, read = kept_loss_signals(
            kept_in,
            program,
            groups,
            tokens,
            grams=False,
            labels="mixed",
            forward_dtype=forward_dtype,
            seed=seed,
            on_batch=advance,
        )
    scores = {name: one.fisher for name, one in signals.items()}
    if value is None:
        return OneShot(None, scores, read)
    curves = {g.name: score_curve(g, scores[g.name].cpu().numpy(), limits[g.name]) for g in groups}
    (plan,) = plans_for(groups, balanced(curves, groups, evenness=evenness), costs, [value], uniform=uniform)
    return OneShot(plan, scores, read)
