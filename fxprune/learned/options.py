"""Options of learned pruning: how the gates, the size, the adapters and the teachers are trained.

`fixed` is what to use. `reference` is NutePrune as its authors run it (Li et al. 2024, and their code): no warm start,
a Lagrangian, gates drawn to the end, constant learning rates, the divergence summed over a sequence and the squared
errors of hidden states over layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fxprune.core.errors import UsageError
from fxprune.learned.schedule import ScheduleShape, SparsitySchedule
from fxprune.learned.unit_gates import HeadScheme

__all__ = ["BudgetMode", "Distillation", "L0Options", "Mode", "PostLoss", "steps_of"]

Mode = Literal["fixed", "reference"]
BudgetMode = Literal["hard", "lagrangian"]
Distillation = Literal["none", "plain", "progressive"]
PostLoss = Literal["lm", "distil"]


@dataclass(frozen=True)
class L0Options:
    """Settings of one training.

    Attributes:
        steps: of the whole training.
        batch: sequences a step.
        mode: see the module's docstring.
        budget: `hard` projects onto the budget in every step, `lagrangian` learns multipliers.
        schedule: how the target sparsity rises.
        warm_up: share of the steps after which it is reached.
        settle: share of the steps, at the end, in which the gates are decided and adapters alone learn, anew where the
            consumers have been fitted in between; masks alone learn to the end.
        warm_start: whether gates start in the order of the one-shot scores.
        spread: of the warm start, see `fxprune.learned.hard_concrete.ranked_log_alpha`.
        drop_rate: probability of each unit to be closed at the start, without a warm start.
        heads: gates of query heads, see `fxprune.learned.unit_gates.HeadGates`.
        mask_lr: learning rate of the gates.
        multiplier_lr: of the Lagrangian's multipliers.
        lora_rank: 0 trains masks alone.
        lora_alpha: scale of LoRA times the rank; None for twice the rank.
        lora_targets: see `fxprune.channels.lora_targets.lora_targets`.
        lora_lr: learning rate of LoRA.
        distillation: `none` is the next-token loss; the teacher of `plain` is the intact model, the teachers of
            `progressive` are `fxprune.learned.teachers`, until the gates are decided and the intact model takes their
            place.
        layer_weight: of the loss over hidden states.
        temperature: of the divergence.
        gap: by how much teachers are denser than the student.
        interval: sparsity from one teacher to the next.
        teacher_bytes: the most that all teachers may take; None for a quarter of what the weights take, but four
            teachers at least.
        checkpointing: whether activations inside blocks are computed again in the backward pass.
        save_every: steps from one checkpoint to the next.
        tolerance: how far from the target, in sparsity, the expected size may end with a Lagrangian.
        seed: of every random choice.

    Raises:
        UsageError: a value is out of range.
    """

    steps: int
    batch: int = 4
    mode: Mode = "fixed"
    budget: BudgetMode = "hard"
    schedule: ScheduleShape = "linear"
    warm_up: float = 0.4
    settle: float = 0.3
    warm_start: bool = True
    spread: float = 8.0
    drop_rate: float = 0.01
    heads: HeadScheme = "both"
    mask_lr: float = 0.1
    multiplier_lr: float = 0.1
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("all",)
    lora_lr: float = 2e-3
    distillation: Distillation = "progressive"
    layer_weight: float = 0.9
    temperature: float = 1.0
    gap: float = 0.1
    interval: float = 0.01
    teacher_bytes: int | None = None
    checkpointing: bool = False
    save_every: int = 50
    tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (
            ("mode", Mode),
            ("budget", BudgetMode),
            ("distillation", Distillation),
            ("heads", HeadScheme),
            ("schedule", ScheduleShape),
        ):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} is one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        self._check_ranges()
        self._check_lora()

    def _check_ranges(self) -> None:
        least = {"steps": 1, "batch": 1, "save_every": 1, "lora_rank": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("mask_lr", "multiplier_lr", "lora_lr", "spread", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("drop_rate", "gap", "interval"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("warm_up", "settle", "tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.layer_weight < float("inf"):
            raise UsageError(f"layer_weight must be 0 or more, got {self.layer_weight}")

    def _check_lora(self) -> None:
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise UsageError(f"lora_alpha must be positive, got {self.lora_alpha}; use lora_rank=0 for no LoRA")
        if self.lora_rank and not self.lora_targets:
            raise UsageError("LoRA needs targets: name Linears, or use all")
        if not self.lora_rank and self.lora_targets != ("all",):
            raise UsageError("lora_targets are of LoRA, which lora_rank=0 leaves out: drop one of the two")

    @property
    def settle_steps(self) -> int:
        """Steps at the end with decided gates."""
        return round(self.settle * self.steps) if self.lora_rank else 0

    @property
    def learning_steps(self) -> int:
        """Steps in which the gates learn."""
        return self.steps - self.settle_steps

    @property
    def hidden(self) -> bool:
        """Whether hidden states are distilled."""
        return self.distillation != "none" and self.layer_weight > 0

    def schedule_to(self, target: float) -> SparsitySchedule:
        """The schedule of the gates.

        Args:
            target: sparsity in the end.

        Raises:
            UsageError: the gates stop learning before the target is reached.
        """
        return SparsitySchedule(target, round(self.warm_up * self.steps), self.learning_steps, self.schedule)


def steps_of(samples: int, batch: int, steps: int | None, epochs: float | None) -> int:
    """How many steps a training has.

    Args:
        samples: sequences that are trained on.
        batch: of them a step.
        steps: as given.
        epochs: times that all samples are read; 1 where neither is given.

    Raises:
        UsageError: both are given, or there is not one batch.
    """
    if steps is not None and epochs is not None:
        raise UsageError("give steps or epochs, not both")
    if batch < 1:
        raise UsageError(f"batch must be at least 1, got {batch}")
    if samples < batch:
        raise UsageError(f"{samples} sequences to train on are less than a batch of {batch}: use more samples")
    if steps is not None:
        return steps
    epochs = 1.0 if epochs is None else epochs
    if not 0 < epochs < float("inf"):
        raise UsageError(f"epochs must be positive, got {epochs}")
    return max(1, round(epochs * (samples // batch)))
