"""Learned structured pruning: L0 gates and LoRA, distilled from numerous teachers, down to a slim model.

    x ─ o_proj, down_proj          x * gate ─ (W + LoRA)          x ─ W', 0 in the columns that go      and a Plan
         the dense graph                  training                         merged and folded

NutePrune (Li et al. 2024, "NutePrune: efficient progressive pruning with numerous teachers for large language models")
with its reference code's faults mended and its size held exactly. Heads and MLP channels have hard-concrete gates,
which start in the order of the one-shot scores of the method `channel`. In every step the gates are drawn so that the
step's budget is expected and projected onto it, the budget falls to the target, and LoRA on the frozen weights learns
to make up for what is closed, from a teacher that is an earlier, denser state of the student. When the gates are
decided the consumers are fitted as `channel` does, and LoRA starts anew from these weights, held to the intact model.
Then it is merged, the gates are folded, and slimming and verification follow as for any method.

`mode="reference"` is the paper's algorithm (see `fxprune.learned.options`), hidden channels included, with a
Lagrangian.

Refused:
 1. what `fxprune.structured.base` refuses, and several targets in one run;
 2. a schedule by which the gates stop learning before the target is reached (before anything is loaded);
 3. LoRA targets that match no Linear or one whose weight is tied, and gates of hidden channels or layers under a hard
    budget;
 4. a training that diverges, or a Lagrangian that misses its target: the last good checkpoint is kept;
 5. a state directory of a training with other settings;
 6. options that have no part in the training that is asked for, such as `tolerance` under a hard budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fxprune.calibration.overflow import naming_overflow
from fxprune.channels.lora_targets import lora_targets
from fxprune.core.errors import PreconditionError, UsageError
from fxprune.core.pass_base import PassResult, constructor_options
from fxprune.learned.expected_size import ExpectedSize, independent_units
from fxprune.learned.options import BudgetMode, Distillation, L0Options, Mode, PostLoss, steps_of
from fxprune.learned.run import CURVE_POINTS, EXTRA_KINDS, Run, unit_index
from fxprune.learned.schedule import ScheduleShape  # noqa: TC001 - as above
from fxprune.learned.state import StateDirectory
from fxprune.learned.unit_gates import HeadScheme  # noqa: TC001 - as above
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import EVENNESS, check_evenness
from fxprune.structured.reconstruction import Reconstruction  # noqa: TC001 - options are validated by their annotations
from fxprune.weights.base import dtype_of, forward_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.structured.base import Budgets

__all__ = ["L0Prune"]

_ROUND_TO, _MIN_KEEP = (constructor_options(StructuredPass)[name][0].default for name in ("round_to", "min_keep"))


class L0Prune(StructuredPass):
    """Learn which units stay, and what makes up for the others (see the module's docstring).

    Args:
        steps: of the training; or
        epochs: times that the samples are read, 1 by default.
        batch: sequences a step.
        samples: sequences, of calibration text.
        seq_len: tokens of each.
        held_out: how many of them nothing is learned from; what is decided by measuring is decided on these.
        mode: `fixed`, or `reference` for the paper's algorithm.
        kinds: which groups have gates: `attention` and `mlp`, with a Lagrangian also `hidden` and `layers`.
        budget: `hard` or `lagrangian`; by the mode unless told otherwise.
        schedule: see `fxprune.learned.options.L0Options`, as what follows.
        warm_up: see there.
        settle: see there; 0.3 in mode `fixed`, 0 otherwise.
        warm_start: see there; by default in mode `fixed`.
        start_samples: how many samples the one-shot scores are of.
        evenness: of the one-shot plan, see `fxprune.passes.channel.ChannelPrune`.
        spread: see there.
        drop_rate: see there.
        heads: see there.
        mask_lr: see there.
        multiplier_lr: see there.
        lora_rank: see there; 0 learns masks alone.
        lora_alpha: see there.
        lora_targets: see there.
        lora_lr: see there.
        distillation: see there.
        layer_weight: see there; 0.9 where layers were located, 0 otherwise.
        temperature: see there.
        gap: see there.
        interval: see there.
        teacher_bytes: see there.
        checkpointing: see there.
        tolerance: see there.
        state: directory where the training is kept and resumed from; None keeps nothing.
        save_every: steps from one checkpoint to the next.
        post_steps: of LoRA with fixed masks at the end.
        post_data: instruction set for it, see `fxprune.learned.post.read_instructions`; the calibration text by
            default.
        post_loss: `lm`, or `distil` from the intact model; by default the first for instructions.
        post_lr: its learning rate.
        reconstruct: what is fitted when the gates are decided; `dense` by default, `none` with LoRA and no `settle`, or
            with gates of other kinds than heads and MLP channels. Behind `dense`, LoRA starts anew from what was fitted
            and learns for the steps that are left; other fits come when LoRA has been merged.
        fit_samples: how many samples it uses.
        fit_steps: second-order steps behind `dense`.
        **options: of every structured method, see `fxprune.structured.base.StructuredPass`.
    """

    name = "l0"
    verb: ClassVar[str] = "learn"
    needs_data: ClassVar[bool] = True
    reads_loss: ClassVar[bool] = True

    def __init__(
        self,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        batch: int = 4,
        samples: int = 1024,
        seq_len: int = 256,
        held_out: int = 16,
        mode: Mode = "fixed",
        kinds: Sequence[str] | None = None,
        budget: BudgetMode | None = None,
        schedule: ScheduleShape = "linear",
        warm_up: float = 0.4,
        settle: float | None = None,
        warm_start: bool | None = None,
        start_samples: int = 64,
        evenness: float = EVENNESS,
        spread: float = 8.0,
        drop_rate: float = 0.01,
        heads: HeadScheme = "both",
        mask_lr: float = 0.1,
        multiplier_lr: float = 0.1,
        lora_rank: int = 8,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] = ("all",),
        lora_lr: float = 2e-3,
        distillation: Distillation = "progressive",
        layer_weight: float | None = None,
        temperature: float = 1.0,
        gap: float = 0.1,
        interval: float = 0.01,
        teacher_bytes: int | None = None,
        checkpointing: bool = False,
        tolerance: float = 0.02,
        state: str | None = None,
        save_every: int = 50,
        post_steps: int = 0,
        post_data: str | None = None,
        post_loss: PostLoss | None = None,
        post_lr: float = 2e-4,
        reconstruct: Reconstruction | None = None,
        fit_samples: int = 256,
        fit_steps: int = 4,
        **options: Any,
    ) -> None:
        fixed = mode == "fixed"
        kinds = tuple(kinds or (("attention", "mlp") if fixed else ("attention", "mlp", "hidden")))
        self.settle = (0.3 if fixed else 0.0) if settle is None else settle
        # LoRA alone makes up for what went unless the gates are decided before the end, and something can be fitted.
        fits = not lora_rank or (self.settle > 0 and not set(kinds) & set(EXTRA_KINDS))
        own = reconstruct or ("dense" if fits else "none")
        units = tuple(kind for kind in kinds if kind not in EXTRA_KINDS) or ("attention", "mlp")
        super().__init__(samples=samples, seq_len=seq_len, kinds=units, reconstruct=own, **options)
        self.kinds = kinds
        self.steps, self.epochs, self.batch = steps, epochs, batch
        self.held_out, self.mode = held_out, mode
        self.budget: BudgetMode = budget or ("hard" if fixed else "lagrangian")
        self.schedule, self.warm_up = schedule, warm_up
        self.warm_start = fixed if warm_start is None else warm_start
        self.evenness = evenness
        self.start_samples, self.spread, self.drop_rate, self.heads = start_samples, spread, drop_rate, heads
        self.mask_lr, self.multiplier_lr = mask_lr, multiplier_lr
        self.lora_rank, self.lora_alpha, self.lora_lr = lora_rank, lora_alpha, lora_lr
        self.lora_targets = tuple(lora_targets)
        self.distillation, self.layer_weight, self.temperature = distillation, layer_weight, temperature
        self.gap, self.interval, self.teacher_bytes = gap, interval, teacher_bytes
        self.checkpointing, self.tolerance = checkpointing, tolerance
        self.state, self.save_every = state, save_every
        self.post_steps, self.post_data, self.post_lr = post_steps, post_data, post_lr
        self.post_loss: PostLoss = post_loss or ("lm" if post_data else "distil")
        self.fit_samples, self.fit_steps = fit_samples, fit_steps
        self._check_own()

    def forget(self) -> None:
        """See the base: the state of the training."""
        if self.state is None:
            super().forget()
        else:
            StateDirectory(Path(self.state), {}).clear()

    def _check_own(self) -> None:
        if len(self.targets) > 1:
            raise UsageError(f"{self.name} trains for one target at a time; run it once for each")
        if not 1 <= self.held_out < self.samples:
            raise UsageError(f"held_out must be at least 1 and less than the {self.samples} samples")
        if self.start_samples < 1 or self.fit_samples < 1 or self.fit_steps < 0:
            raise UsageError("start_samples and fit_samples must be at least 1, and fit_steps at least 0")
        check_evenness(self.evenness)
        if self.post_steps < 0 or not 0 < self.post_lr < float("inf"):
            raise UsageError(
                f"post_steps must be 0 or more and post_lr positive, got {self.post_steps}, {self.post_lr}"
            )
        if self.post_data is not None and not self.post_steps:
            raise UsageError("post_data is for fine-tuning: say for how many post_steps")
        if self.post_steps and not self.lora_rank:
            raise UsageError("post fine-tuning trains LoRA: use a lora_rank above 0")
        extra = [kind for kind in self.kinds if kind in EXTRA_KINDS]
        if extra and self.budget == "hard":
            raise UsageError(f"a hard budget is for heads and MLP channels, not for {extra[0]}: use budget=lagrangian")
        if extra and (self.reconstruct != "none" or self.uniform or self.keep):
            raise UsageError(
                f"with gates of {extra[0]} there is no reconstruct, uniform or keep; "
                "use lora_rank above 0 or reconstruct=none, and leave the others out"
            )
        if extra and (self.round_to, self.min_keep) != (_ROUND_TO, _MIN_KEEP):
            raise UsageError(f"with gates of {extra[0]} widths are what the gates say: leave round_to and min_keep out")
        self._check_idle()
        made = self.training_options(layers=True)
        target = self.targets[0]
        # Other targets become a sparsity when the model is known; when it is reached is known now.
        made.schedule_to(target.value if target.kind == "ratio" else 0.5)

    def _check_idle(self) -> None:
        """Refuse what was asked for and has no part in this training. Sizes of parts that are left out may stay."""
        hard, progressive = self.budget == "hard", self.distillation == "progressive"
        starts = self.warm_start and bool(set(self.kinds) - set(EXTRA_KINDS))
        idle = (
            (True, "gates, whose size is what the latency table says", ("speed_rounds",)),
            (hard, "budget=hard", ("multiplier_lr", "tolerance")),
            (hard and self.warm_start, "a warm start and budget=hard", ("drop_rate",)),
            (not self.warm_start, "warm_start=false", ("spread", "evenness")),
            (not progressive, f"distillation={self.distillation}", ("gap", "interval", "teacher_bytes")),
            (self.distillation == "none", "distillation=none", ("temperature", "layer_weight")),
            (not self.lora_rank, "lora_rank=0", ("lora_lr", "lora_alpha")),
            (not self.post_steps, "post_steps=0", ("post_lr",)),
            (not starts and self.reconstruct != "dense", "neither one-shot scores nor a fit", ("signals",)),
        )
        defaults = constructor_options(L0Prune)
        for name, why in ((name, why) for is_so, why, names in idle if is_so for name in names):
            if getattr(self, name) != defaults[name][0].default:
                raise UsageError(f"{name}={getattr(self, name)} has no part in a training with {why}: leave it out")

    def training_options(self, *, layers: bool) -> L0Options:
        """The settings of the training.

        Args:
            layers: whether a stack of layers was located.

        Raises:
            UsageError: a value is out of range.
        """
        weight = (0.9 if layers else 0.0) if self.layer_weight is None else self.layer_weight
        same = {name for name in L0Options.__dataclass_fields__ if hasattr(self, name)} - {"steps", "layer_weight"}
        found: dict[str, Any] = {name: getattr(self, name) for name in same}
        steps = steps_of(self.samples - self.held_out, self.batch, self.steps, self.epochs)
        return L0Options(steps=steps, layer_weight=weight, **found)

    @property
    def refits_decided(self) -> bool:
        """Whether consumers are fitted between the gates' last step and LoRA's last ones."""
        return bool(self.lora_rank) and self.reconstruct == "dense" and self.settle > 0

    def gated(self, program: Program) -> tuple[Group, ...]:
        """The groups that have gates."""
        extra = tuple(group for group in program.groups if group.kind in self.kinds and group.kind in EXTRA_KINDS)
        return (*(self.scored(program) if set(self.kinds) - set(EXTRA_KINDS) else ()), *extra)

    def requires(self, program: Program) -> None:
        """See the base; the groups of all kinds are there, and LoRA finds its Linears."""
        if set(self.kinds) - set(EXTRA_KINDS):
            super().requires(program)
        else:
            self.require_text(program)
        missing = {kind for kind in self.kinds if kind in EXTRA_KINDS} - {group.kind for group in program.groups}
        if missing:
            raise PreconditionError(
                f"no {min(missing)} group was located, so it can have no gates: leave it out of kinds, as in "
                "kinds=attention,mlp"
            )
        if self.lora_rank:
            lora_targets(program, self.lora_targets)

    def budgets(self, program: Program) -> Budgets:
        """There are no plans apart from training."""
        del program
        raise UsageError(f"{self.name} trains for one target at a time; run it once for each")

    # ---- the way ---------------------------------------------------------------------------------------------------

    def call(self, program: Program) -> PassResult:
        """Train, decide, merge and fold; the plan is left in `Program.plan`.

        Raises:
            TrainingError: the training diverged or missed its target.
        """
        seconds: dict[str, float] = {}
        tokens, description = self._text(program, seconds)
        if self.reconstruct != "none":
            self._require_enough(program, self.scored(program), tokens[: -self.held_out][: self.fit_samples])
        precision = forward_precision(self.forward_dtype, dtype_of(program), tokens.device)
        with naming_overflow(program, tokens[: max(self.start_samples, self.fit_samples)], precision):
            with self.saying_what_stays(program):
                run = Run(self, program, tokens, seconds)
            finished = run.finished()
        learner = run.learner
        plan = finished.program.plan
        assert plan is not None
        kept = {
            group.name: independent_units(group, torch.zeros(group.units).index_fill(0, unit_index(plan, group), 1.0))
            for group in run.groups
        }
        removed = float(ExpectedSize(program, run.groups, "ratio").sparsity(kept))
        stride = max(1, len(learner.rows) // CURVE_POINTS)
        rows = [row for row in learner.rows if row["step"] % stride == 0 or row is learner.rows[-1]]
        curves = [{k: v for k, v in row.items() if k not in {"widths", "steps_per_second"}} for row in rows]
        widths = [{"step": row["step"], "widths": row["widths"]} for row in learner.rows if "widths" in row]
        learning = {
            "mode": self.mode,
            "budget": self.budget,
            "distillation": self.distillation,
            "lora_rank": self.lora_rank,
            "steps": run.options.steps,
            "batch": self.batch,
            "tokens_seen": run.options.steps * self.batch * self.seq_len,
            "teachers": len(learner.teachers.snapshots) + 1,
            "held_out_kl": run.measured | {f"final, {k}": v for k, v in finished.divergences.items()},
            "choice": finished.choice,
            "curves": curves,
            "widths": [*widths[:-1][:: max(1, len(widths) // 40)], *widths[-1:]],
            "post": run.post,
        }
        section: dict[str, Any] = {
            "method": self.name,
            "target": str(self.targets[0]),
            "removed_share": removed,
            "uniform": self.uniform,
            "reconstruct": self.reconstruct,
            "consumers": list(finished.consumers),
            "seconds": seconds,
            "learning": learning,
            **run.notes,
            **finished.notes,
        }
        if stays := self.left_alone(program):
            section["left_alone"] = stays
        results = {} if description is None else {"calibration": description}
        after = finished.program.with_results(**results, structured=section)
        details = {"requested": str(self.targets[0]), "removed_share": removed, "seconds": seconds}
        return PassResult(after, modified=True, details=details)
