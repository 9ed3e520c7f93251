"""The training loop of learned pruning: gates, LoRA and multipliers against numerous teachers.

    batch ─┬─ teacher (other gates, other adapters, same weights), no gradients ─┐
           └─ student: gates of the step ─ logits, hidden states ────────────────┴─ KL + layers + penalty ─ AdamW

When the gates are decided the consumers may be fitted once (`refit`). The student goes on with these weights and LoRA
from its start, held to the intact model.

A loop of its own rather than transformers' `Trainer` or accelerate: the gates must stay in the masks until the backward
pass is over, teacher and student are one module, the multipliers ascend, and a checkpoint has to bring all of it back
bit by bit without pickle, which both of them use for optimizers and random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.calibration.distillation import DistillationWeights, distillation_loss, token_kl
from fxprune.calibration.loss_scale import backward
from fxprune.core.errors import NotFiniteError, PlanError, TrainingError
from fxprune.core.schedule import cosine
from fxprune.learned.log import TrainingLog
from fxprune.learned.state import load_optimizer, optimizer_tensors
from fxprune.learned.teachers import Snapshot, Teachers, worn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from fxprune.learned.model import GatedModel
    from fxprune.learned.options import L0Options
    from fxprune.learned.size import Drawn, SizeControl
    from fxprune.learned.state import StateDirectory

__all__ = ["Learner", "batch_of", "divergence", "next_token_loss"]

_CLIP = 1.0
_MARKS = 100
"""How often in a training the widths are put down."""


def batch_of(tokens: Tensor, step: int, batch: int, seed: int) -> Tensor:
    """The sequences of a step, (batch, length): every epoch reads all of them in an order of its own.

    Args:
        tokens: (samples, length).
        step: from 0.
        batch: sequences; at most samples.
        seed: of the orders.
    """
    epoch, place = divmod(step, len(tokens) // batch)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return tokens[order[place * batch : (place + 1) * batch].to(tokens.device)]


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next tokens, a float32 scalar.

    Args:
        logits: (batch, length, vocabulary).
        tokens: (batch, length).
        mask: (batch, length) bool, tokens that are to be predicted; all but the first when None.
    """
    targets = tokens[:, 1:] if mask is None else tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def divergence(
    model: GatedModel,
    values: Mapping[str, Tensor],
    tokens: Tensor,
    intact: Snapshot,
    batch: int,
) -> float:
    """Mean KL(intact || model) of predictions, nats a token.

    Args:
        model: with its adapters as they are.
        values: of the gates.
        tokens: (samples, length), held out.
        intact: the model as it was.
        batch: samples at once.
    """
    total = 0.0
    with torch.no_grad(), model.frozen():
        for part in torch.split(tokens, batch):
            with worn(intact, model.adapters) as before, model.gates.applied(_on(before, model.device)):
                wanted, _ = model(part)
            with model.as_refit(), model.gates.applied(values):
                found, _ = model(part)
            total += float(token_kl(found, wanted)) * len(part)
    return total / len(tokens)


def _on(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in values.items()}


@dataclass(frozen=True)
class _Losses:
    total: Tensor
    figures: Mapping[str, float]


class Learner:
    """Trains a gated model.

    Args:
        model: gates and adapters, at their start.
        control: of the size.
        tokens: (samples, length) int64 on the model's device.
        options: of the training.
        state: where it is kept; None keeps nothing.
        refit: from the decided gates, (units,) by group, to weights by Linear, called when the gates stop learning; if
            there are none, LoRA goes on as it is. None leaves the weights as they are, too.

    Attributes:
        teachers: the intact model, and earlier states of the student.
        rows: the log.
        step: steps that are done.
        notes: further JSON data that a checkpoint keeps.
    """

    def __init__(
        self,
        model: GatedModel,
        control: SizeControl,
        tokens: Tensor,
        options: L0Options,
        state: StateDirectory | None = None,
        *,
        refit: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model = model
        self.refit = refit if options.settle_steps else None
        self.control = control
        self.tokens = tokens
        self.options = options
        self.state = state
        self.rows: list[dict[str, Any]] = []
        self.step = 0
        self.generator = torch.Generator().manual_seed(options.seed)
        intact = Snapshot(0.0, model.gates.ones(), model.zeroed())
        limit = options.teacher_bytes
        if limit is None:
            weights = sum(p.numel() * p.element_size() for p in model.program.graph_module.parameters())
            limit = max(4 * intact.bytes, weights // 4)
        self.teachers = Teachers(intact, interval=options.interval, gap=options.gap, limit_bytes=limit)
        reference = options.mode == "reference"
        length, layers = tokens.shape[1], max(1, model.layers)
        self._weights = DistillationWeights(
            # The reference code sums over the tokens of a sequence, and over layers.
            logits=float(length) if reference else 1.0,
            layers=options.layer_weight * (layers if reference else 1) if options.hidden else 0.0,
            temperature=options.temperature,
        )
        self.notes: dict[str, Any] = {}
        self._saved = -1
        self._settled: Drawn | None = None
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(model.gates.parameters()), "lr": options.mask_lr, "weight_decay": 0.0},
                {"params": list(model.adapters.values()), "lr": options.lora_lr, "weight_decay": 0.0},
                *control.optimizer_groups(options.multiplier_lr),
            ]
        )

    # ---- one step --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, from where the state directory stands.

        Raises:
            TrainingError: the loss is not finite, or the target is not met in the end; the last good checkpoint stays.
            CheckpointError: the directory holds another training.
        """
        self._resume()
        options = self.options
        path = None if self.state is None else self.state.log
        with TrainingLog(path, options.steps, self.step) as log, self.model.frozen():
            self.rows = log.rows
            while self.step < options.steps:
                if self.refit is not None and self.step == options.learning_steps:
                    self._fit(self.refit)
                figures, drawn = self._one(self.step)
                mark = self.step % max(1, options.steps // _MARKS) == 0 or self.step + 1 == options.steps
                log.add(self.step, figures, _widths(drawn) if mark else None)
                self.step += 1
                if self.step % options.save_every == 0 and self.step < options.steps:
                    self.save()
        self.control.check_end()
        self.save()

    def _fit(self, refit: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Go on with fitted weights, which make up for the units without LoRA, and with LoRA from its start."""
        self.model.refit = {name: weight.detach() for name, weight in refit(self.settled().values).items()}
        if not self.model.refit:
            return
        self.model.load_adapters(self.teachers.intact.adapters)
        for parameter in self.model.adapters.values():
            self.optimizer.state.pop(parameter, None)

    def _one(self, step: int) -> tuple[dict[str, float], Drawn]:
        options, model = self.options, self.model
        settled = step >= options.learning_steps
        tokens = batch_of(self.tokens, step, options.batch, options.seed)
        try:
            drawn = self.settled() if settled else self.control.draw(step, self.generator)
        except PlanError as error:
            raise self._diverged(step, str(error)) from error
        teacher = self._teacher(step, drawn.sparsity)
        wanted = None if teacher is None else self._wanted(tokens, teacher)
        with model.as_refit():
            losses = self._losses(tokens, drawn, wanted)
            self.optimizer.zero_grad()
            if not math.isfinite(float(losses.total.detach())):
                raise self._diverged(step, "the loss is not finite", tokens)
            with model.gates.applied(drawn.values):
                parameters = self.named_parameters().values()
                finite = backward(losses.total, parameters, model.dtype, tokens.numel())
        del wanted
        # The snapshot is of the state that the teacher's place in the order was found for: before the update.
        if not settled and options.distillation == "progressive" and self.teachers.is_due(drawn.sparsity):
            gates = drawn.kept or self.control.decided(step).values
            floats = {name: value.float() for name, value in gates.items()}
            self.teachers.record(Snapshot(drawn.sparsity, floats, model.adapters, step))
        if not finite:
            raise self._diverged(step, "a gradient is not finite", tokens)
        norm = torch.nn.utils.clip_grad_norm_(list(model.adapters.values()), _CLIP) if model.adapters else None
        self.optimizer.param_groups[1]["lr"] = options.lora_lr * self._factor(step)
        self.optimizer.step()
        figures = {
            "loss": float(losses.total.detach()),
            **losses.figures,
            "sparsity": drawn.sparsity,
            "target": self.control.schedule.at(step),
            **self.control.figures(),
        }
        if teacher is not None:
            figures["teacher"] = teacher.sparsity
        if norm is not None:
            figures["gradient_norm"] = float(norm)
        return figures, drawn

    def _factor(self, step: int) -> float:
        """Of LoRA's learning rate, which starts anew behind a fit."""
        if self.options.mode == "reference":
            return 1.0
        if self.refit is None:
            return cosine(step, self.options.steps)
        settled = step - self.options.learning_steps
        return cosine(step, self.options.steps) if settled < 0 else cosine(settled, self.options.settle_steps)

    def settled(self) -> Drawn:
        """The gates as they are decided when they stop learning."""
        if self._settled is None:
            self._settled = self.control.decided(self.options.learning_steps)
        return self._settled

    def _teacher(self, step: int, sparsity: float) -> Snapshot | None:
        options, schedule = self.options, self.control.schedule
        if options.distillation == "none":
            return None
        if options.distillation == "plain":
            return self.teachers.intact
        if not schedule.reached(step):
            return self.teachers.while_pruning(sparsity)
        # Weak teachers are for gates that move: once they are decided, the student is held to the intact model.
        done = (step - schedule.warm_up_steps) / max(1, options.learning_steps - 1 - schedule.warm_up_steps)
        return self.teachers.afterwards(min(1.0, done), schedule.target)

    def _wanted(self, tokens: Tensor, teacher: Snapshot) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What a teacher says."""
        model = self.model
        with torch.no_grad(), worn(teacher, model.adapters) as gates, model.gates.applied(_on(gates, model.device)):
            return model(tokens)

    def _losses(self, tokens: Tensor, drawn: Drawn, wanted: tuple[Tensor, tuple[Tensor, ...]] | None) -> _Losses:
        model, options = self.model, self.options
        with model.gates.applied(drawn.values):
            logits, states = model(tokens)
        if wanted is None:
            loss = next_token_loss(logits, tokens)
            figures = {"lm": float(loss.detach())}
        else:
            found = distillation_loss(
                (logits, states), wanted, weights=self._weights, normalised=options.mode == "fixed"
            )
            loss = found.total
            figures = {"kl": float(found.logits)}
            if self._weights.layers:
                figures["layers"] = float(found.layers)
        if drawn.penalty is not None and drawn.penalty.requires_grad:
            loss = loss + drawn.penalty
            figures["penalty"] = float(drawn.penalty.detach())
        return _Losses(loss, figures)

    def _diverged(self, step: int, why: str, tokens: Tensor | None = None) -> TrainingError:
        kept = "no checkpoint was made"
        if self.state is not None and self._saved >= 0:
            kept = f"the last good checkpoint, of step {self._saved}, is in {self.state.path}"
        said = (
            f"training diverged in step {step}: {why}; {kept}. Lower lora_lr or mask_lr, or let the sparsity rise more "
            "slowly (warm_up)"
        )
        if tokens is None:
            return TrainingError(said)
        if self.model.dtype is torch.float16:
            said += "; or load the model in bfloat16 or float32, which end later than float16"
        return NotFiniteError(said, tokens)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return {
            **{f"gates/{name}": p for name, p in self.model.gates.named_parameters()},
            **{f"adapters/{name}": p for name, p in self.model.adapters.items()},
            **{f"control/{name}": p for name, p in self.control.named_parameters().items()},
        }

    def save(self) -> None:
        """Write a checkpoint, where there is a directory."""
        if self.state is None or self._saved == self.step:
            return
        named = self.named_parameters()
        buffers = {f"buffers/{name}": value for name, value in self.model.gates.named_buffers()}
        tensors = {**named, **buffers, **optimizer_tensors(self.optimizer, named)}
        tensors |= {f"refit/{name}": weight for name, weight in self.model.refit.items()}
        tensors["generator"] = self.generator.get_state()
        self.state.write(self.step, tensors, self.teachers, notes=self.notes)
        self._saved = self.step

    def _resume(self) -> None:
        found = None if self.state is None else self.state.read()
        if self.state is None:
            return
        if found is None:  # teachers of a run that was killed before its first checkpoint are not this one's
            self.state.clear()
            return
        tensors = self.state.tensors(found["tensors"])
        named = self.named_parameters()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[name])
            for name, value in self.model.gates.named_buffers():
                value.copy_(tensors[f"buffers/{name}"])
        load_optimizer(self.optimizer, named, tensors)
        device = self.model.device
        fitted = {name.removeprefix("refit/"): value for name, value in tensors.items() if name.startswith("refit/")}
        self.model.refit = {name: value.to(device) for name, value in fitted.items()}
        self.generator.set_state(tensors["generator"])
        self.state.load_teachers(found, self.teachers)
        self.notes |= found.get("notes", {})
        self.step = self._saved = int(found["step"])


def _widths(drawn: Drawn) -> dict[str, int]:
    """How many units of each group are open."""
    kept: Mapping[str, Tensor] = drawn.kept or drawn.values
    counts: Sequence[int] = torch.stack([(value > 0).sum() for value in kept.values()]).tolist()
    return dict(zip(kept, counts, strict=True))
