"""Structured pruning without retraining: Fisher information, one knapsack, least squares on the dense model's inputs.

    calibration text ─ one pass forward and back ─ gradients of the units, X^T X and g g^T of every consumer
                                                     └ curves in units of the loss ─ knapsack ─ Plan ─ new weights

What removing a unit does to the loss is, to second order, the Fisher information of its mask: the squared sum, over the
tokens of a sample, of x dL/dx. Half of the samples are scored on the text, half on tokens that the model draws itself:
the first says what this text asks for, the second, by its expectation, what the model knows. One knapsack over all
blocks, heads and channels spends the budget; then what is left of each consumer makes up for what went, by least
squares on the inputs of the dense model, which the same pass has summed up. At last a few second-order steps move these
weights together toward the dense model's predictions (see `fxprune.structured.second_order`).

With `criterion="obs"` the other inputs make up for a unit already when it is scored: structured optimal brain surgeon
on the Gram matrices, with outputs weighed by the gradients of the loss (see `fxprune.structured.obs`). One sweep a
block gives all widths. It is no better on text like the calibration's and worse on other text (figures below), where
what makes up for a unit may not be there.

Graph and refusals are those of `fxprune.structured.base`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from fxprune.calibration.head_inputs import head_inputs
from fxprune.calibration.loss_signals import moments
from fxprune.core.errors import UsageError
from fxprune.core.groups import AttentionGroup
from fxprune.core.plan import Plan
from fxprune.core.progress import track
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import (
    ATTENTION,
    EVENNESS,
    balanced,
    check_evenness,
    obs_channel_curve,
    obs_head_curve,
    score_curve,
)
from fxprune.structured.obs import Elimination, matrix_root, positive_definite, swap
from fxprune.structured.second_order import second_order_steps
from fxprune.weights.base import dtype_of, forward_precision
from fxprune.weights.distillation import check_distillation, distil_units

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fxprune.calibration.loss_signals import GroupSignals
    from fxprune.core.program import Program
    from fxprune.structured.base import Budgets, Case
    from fxprune.structured.curves import Curve
    from fxprune.structured.reconstruction import Reconstruction

__all__ = ["ChannelPrune"]


_HELD_OUT = 8
"""One of so many samples of a second-order step says how long the steps are."""
_STEP_SAMPLES = 24
"""A step has at least so many samples unless told otherwise."""

Criterion = Literal["fisher", "obs"]
"""What a unit is worth: what the loss says of it alone, or what is lost when the others make up for it."""


class ChannelPrune(StructuredPass):
    """Remove the units that the loss minds least, and let the others make up for them.

    Perplexity of SmolLM2-135M on wiki.valid (30 windows) / on C4 that was not seen, dense 20.9 / 35.5, both criteria
    with 128 samples of text and the same reconstruction, heads counting three times: `fisher` 24.9 / 40.0, 31.6 / 47.5
    and 42.4 / 60.7, `obs` 26.9 / 40.8, 33.3 / 48.7 and 43.3 / 60.5 with 10%, 20% and 30% removed. Heads left as they
    are, 256 samples, half of them drawn: 24.3 / 39.7 and 39.9 / 59.1 with 10% and 30% removed.

    Args:
        criterion: `fisher`, or `obs` for structured optimal brain surgeon in units of the loss.
        damping: of `obs`: share of the median of a Gram matrix' diagonal that is added to it.
        signal_samples: how many of the calibration samples the backward pass uses; None for all.
        attention: factor on the loss of heads. What heads do (copying names from far back) shows little on ordinary
            calibration text and much on other text; above 1, channels go instead where they can.
        evenness: from 0 to 1, how much the layers' MLPs are put on one scale before the knapsack (see
            `fxprune.structured.curves.evened`): at 0 the loss alone decides, at 1 all layers lose nearly as many
            channels. The loss of single units empties the layers in the middle, and what these lose together is more.
            SmolLM2-135M, 64 samples, perplexity on wiki.valid (30 windows) / of the last words of LAMBADA's documents
            401 to 1000:
            31.3 / 127 at 0, 31.0 / 119 at 0.5 and 32.6 / 135 at 1 with 20% removed, 40.2 / 260, 39.7 / 226 and
            44.4 / 258 with 30%. With 128 samples (60 windows, documents 401 to 900, no steps) 37.4 / 119, 37.7 / 124
            and 38.1 / 121 at 0, 0.25 and 0.5 with 20% removed, 49.9 / 276, 49.0 / 239 and 49.4 / 226 with 30%: it helps
            where text is scarce or much goes, and is off unless asked for.
        swaps: of `obs`: rounds in which channels change places once their number is known. After a sweep in steps of 8
            channels they lower the error of SmolLM2-135M's layers by less than 0.01%, and cost a second a block.
        steps: how many second-order steps toward the dense model's predictions follow the reconstruction, at most (see
            `fxprune.structured.second_order`); with `reconstruct="none"` nothing changes, by them neither.
        step_samples: how many of the calibration samples each step uses, as long as there are as many; 3 of 16 by
            default, but 24 at least.
        distil_epochs: how often all projections then learn from the calibration text what the dense model predicts (see
            `fxprune.weights.distillation`); 0 leaves it out. It costs minutes a budget and brings little where little
            was lost: at 20%, with 64 samples, the divergence on others falls from 0.265 to 0.260 nats a token.
        distil_rate: their highest learning rate, a share of the root mean square of a Linear's weights.
        **options: of every structured method, see `StructuredPass`.
    """

    name = "channel"
    reconstruction: ClassVar[Reconstruction] = "dense"
    reads_loss: ClassVar[bool] = True

    def __init__(
        self,
        *,
        criterion: Criterion = "fisher",
        damping: float = 0.01,
        signal_samples: int | None = None,
        attention: float = ATTENTION,
        evenness: float = EVENNESS,
        swaps: int = 0,
        steps: int = 2,
        step_samples: int | None = None,
        distil_epochs: float = 0.0,
        distil_rate: float = 5e-4,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if criterion not in get_args(Criterion):
            raise UsageError(f"criterion is one of {', '.join(get_args(Criterion))}, got {criterion!r}")
        if not 0 < damping < float("inf"):
            raise UsageError(f"damping must be positive, got {damping}")
        if signal_samples is not None and signal_samples < 1:
            raise UsageError(f"signal_samples must be at least 1, got {signal_samples}")
        if not 0 < attention < float("inf"):
            raise UsageError(f"attention must be positive, got {attention}")
        check_evenness(evenness)
        if swaps < 0:
            raise UsageError(f"swaps must be 0 or more, got {swaps}")
        if swaps and criterion != "obs":
            raise UsageError("swaps exchange channels by optimal brain surgeon; they go with criterion=obs")
        if steps < 0:
            raise UsageError(f"steps must be 0 or more, got {steps}")
        if step_samples is not None and step_samples < 2:
            raise UsageError(f"step_samples must be at least 2, got {step_samples}")
        check_distillation(distil_epochs, distil_rate)
        if distil_epochs and self.reconstruct == "none":
            raise UsageError("reconstruct=none leaves all weights as they are: distil_epochs does not go with it")
        self.distil_epochs, self.distil_rate = distil_epochs, distil_rate
        self.criterion = criterion
        self.damping = damping
        self.signal_samples = signal_samples
        self.attention = attention
        self.evenness = evenness
        self.swaps = swaps
        self.steps = steps
        self.step_samples = max(_STEP_SAMPLES, 3 * self.samples // 16) if step_samples is None else step_samples
        self.inverts = criterion == "obs"

    @property
    def _steps(self) -> bool:
        return self.steps > 0 and self.reconstruct != "none"

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """One backward pass; then the units' scores, or a sweep for each group."""
        tokens = case.tokens[: self.signal_samples]
        signals = case.loss_signals(
            tokens,
            grams=self.criterion == "obs" or self.reconstruct == "dense" or self._steps,
            labels="mixed" if self.criterion == "fisher" else "data",
        )
        if self.swaps:
            case.kept_for_later.update(signals)
        case.grams, case.outputs = moments(signals)
        if self.criterion == "fisher":
            found = {
                group.name: score_curve(group, signals[group.name].fisher.cpu().numpy(), case.limits[group.name])
                for group in case.groups
            }
        else:
            found = self._sweeps(signals, case)
        return balanced(found, case.groups, attention=self.attention, evenness=self.evenness)

    def _sweeps(self, signals: Mapping[str, GroupSignals], case: Case) -> dict[str, Curve]:
        """The curves of optimal brain surgeon."""
        found = {}
        with track("curves", len(case.groups)) as advance:
            for index, group in enumerate(case.groups):
                problems = [
                    Elimination(hessian, weight)
                    for hessian, weight in self._problems(signals[group.name], case).values()
                ]
                blocks = [torch.from_numpy(piece.indices).to(problems[0].device) for piece in group.consumers]
                limits = case.limits[group.name]
                if isinstance(group, AttentionGroup):
                    found[group.name] = obs_head_curve(group, problems, blocks, limits)
                else:
                    found[group.name] = obs_channel_curve(group, problems, blocks, limits)
                advance(index + 1)
        return found

    def finish(
        self, dense: Program, rebuilt: Program, kept: Mapping[str, Tensor], budgets: Budgets
    ) -> tuple[Program, dict[str, Any]]:
        """Second-order steps and distillation, where anything went and weights may change."""
        stepped = budgets.tokens[: self.steps * self.step_samples]
        steps = min(self.steps, len(stepped) - 1) if self._steps else 0
        if all(bool(one.all()) for one in kept.values()) or (steps < 1 and not self.distil_epochs):
            return rebuilt, {}
        precision = forward_precision(self.forward_dtype, dtype_of(dense), stepped.device)
        how: dict[str, Any] = {"forward_dtype": precision, "batch_size": self.batch_size}
        read = budgets.tokens if self.distil_epochs else stepped
        teacher = budgets.kept_for_later.get("teacher")
        if teacher is None or len(teacher) < len(read):
            teacher = budgets.kept_for_later["teacher"] = head_inputs(dense, read, **how)
        notes: dict[str, Any] = {}
        if steps > 0:
            rebuilt, taken = second_order_steps(
                rebuilt,
                dense,
                kept,
                stepped,
                inputs=budgets.grams,
                outputs=budgets.outputs,
                steps=steps,
                held_out=max(1, min(min(self.step_samples, len(stepped)) // _HELD_OUT, len(stepped) - steps)),
                teacher=teacher[: len(stepped)],
                **how,
            )
            notes["second_order_steps"] = [asdict(step) for step in taken]
        if self.distil_epochs:
            wanted: dict[str, Any] = {"epochs": self.distil_epochs, "rate": self.distil_rate, "teacher": teacher}
            rebuilt, done = distil_units(rebuilt, dense, kept, budgets.tokens, **wanted, **how)
            notes["distilled"] = done.to_json()
        return rebuilt, notes

    def _problems(self, signals: GroupSignals, case: Case) -> dict[str, tuple[Tensor, Tensor]]:
        """The damped Gram matrix and the scaled weight (in, out) of each consumer, float64."""
        found = {}
        for name, gram in signals.inputs.items():
            root = matrix_root(signals.outputs[name] / signals.tokens)
            live = gram.diagonal() > 0  # what is always 0 is free
            scaled_weight = (case.weight(name).double().t() @ root) * live[:, None]
            hessian, used = positive_definite(gram / signals.tokens, self.damping)
            if used > self.damping:
                case.notes.setdefault("damping_raised", {})[name] = used
            found[name] = hessian, scaled_weight
        return found

    def refine(self, case: Case, plan: Plan, within: Plan | None) -> Plan:
        """Channels change places at the width they have, among those that the looser budget kept."""
        if not self.swaps:
            return plan
        kept = dict(plan.kept)
        gained = 0.0
        for group in case.groups:
            units = plan.kept_units(group)
            whole = len(units) == group.units
            if isinstance(group, AttentionGroup) or len(group.consumers) > 1 or group.parts is not None or whole:
                continue
            ((hessian, weight),) = self._problems(case.kept_for_later[group.name], case).values()
            allowed = range(group.units) if within is None else within.kept_units(group)
            columns = torch.from_numpy(group.consumers[0].indices[:, 0])
            free = torch.zeros(len(hessian), dtype=torch.bool)
            free[columns[list(allowed)]] = True
            stays = torch.zeros_like(free)
            stays[columns[[unit for unit in units if free[columns[unit]]]]] = True
            stays, gain = swap(hessian, weight, stays, free, len(units), rounds=self.swaps)
            gained += gain
            kept[group.name] = tuple(torch.where(stays[columns])[0].tolist())
        case.notes.setdefault("gained_by_swaps", []).append(gained)
        return Plan.of(kept)
