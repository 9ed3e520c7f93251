"""What a structured method is given, and what it leaves for its budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

from fxprune.calibration.kept_signals import kept_loss_signals
from fxprune.core.progress import track
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.calibration.loss_signals import GroupSignals, SignalOptions
    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.structured.curves import Limits
    from fxprune.structured.targets import Target

__all__ = ["Budgets", "Case"]


@dataclass
class Case:
    """What a method is given.

    Attributes:
        program: the dense, located program.
        groups: the heads and MLP channels that may be pruned.
        tokens: (samples, length) int64 calibration text; no samples where nobody asks for text.
        limits: what must stay, by the group's name.
        forward_dtype: precision of the products of forward passes.
        batch_size: samples at once; None to find it.
        seed: of every random choice.
        signals: directory where loss signals are kept; None keeps none.
        grams: X^T X of what consumers read, by consumer, if a method has them; for a reconstruction that wants them.
        outputs: (out, out) by consumer, mean over tokens of g g^T, g the gradient of the loss by what it puts out, if a
            method has them.
        notes: what a method wants to say in the report, JSON data.
        kept_for_later: what a method's `curves` leaves for its `refine`.
    """

    program: Program
    groups: tuple[Group, ...]
    tokens: Tensor
    limits: Mapping[str, Limits]
    forward_dtype: torch.dtype | None
    batch_size: int | None
    seed: int
    signals: str | None = None
    grams: Mapping[str, Gram] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    kept_for_later: dict[str, Any] = field(default_factory=dict)

    def weight(self, linear: str) -> Tensor:
        """The (out, in) weight of a Linear."""
        weight: Tensor = get_attribute(self.program.graph_module, linear).weight.detach()
        return weight

    def loss_signals(self, tokens: Tensor, **how: Unpack[SignalOptions]) -> dict[str, GroupSignals]:
        """Signals of the groups, collected or kept from an earlier run (see `fxprune.calibration.kept_signals`).

        Args:
            tokens: (samples, length) int64, of the calibration text.
            **how: see `fxprune.calibration.loss_signals.collect_loss_signals`; seed, precision and batch size are the
                case's.
        """
        own: SignalOptions = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "forward_dtype": self.forward_dtype,
        }
        with track("gradients of the loss", len(tokens)) as advance:
            options: SignalOptions = {**how, **own, "on_batch": advance}
            signals, read = kept_loss_signals(self.signals, self.program, self.groups, tokens, **options)
        if read:
            self.notes["signals_read_from"] = self.signals
        return signals


@dataclass(frozen=True)
class Budgets:
    """Plans for one or more budgets, from one calibration.

    Attributes:
        targets, plans: what was asked for, loosest first, and a plan for each.
        tokens: the calibration text; no samples where nobody asks for text.
        description: of that text, for the report; None without one.
        seconds: by part.
        notes: of the method.
        grams, outputs: as a case has them; grams also as the reconstruction `dense` collected them.
        kept_for_later: what `finish` computes once for all budgets.
    """

    targets: tuple[Target, ...]
    plans: tuple[Plan, ...]
    tokens: Tensor
    description: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    notes: Mapping[str, Any]
    grams: Mapping[str, Gram] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    kept_for_later: dict[str, Any] = field(default_factory=dict)
