"""From a trained model to a program with a plan: decide the gates, merge LoRA, fold the gates, fit what is left.

    decided gates (0 or 1) ┐
    soft gates             ┴─ merged weights ─ folded ─ candidates ─ least divergence on held-out text
    decided gates ─ least squares on the dense model's inputs ─ second-order steps ─┘       (masks alone)

Masks alone leave the weights as they were, and what makes up for the units is fitted as the method `channel` does. LoRA
makes up for them too, but slower than least squares: a fit of the dense weights comes between its two parts (see
`fxprune.learned.run`), and none behind it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration.distillation import token_kl
from fxprune.calibration.engine import text_samples
from fxprune.calibration.kept_signals import kept_loss_signals
from fxprune.calibration.loss_signals import moments
from fxprune.core.errors import TrainingError
from fxprune.learned.gates import fold_gates
from fxprune.structured.reconstruct_consumers import consumers_of, reconstruct_consumers, reconstruct_on_grams
from fxprune.structured.second_order import second_order_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.structured.reconstruction import Reconstruction

__all__ = ["Finished", "choose", "program_divergence", "refit"]

_HELD_OUT = 32
"""One of so many samples says how long the second-order steps are."""


@dataclass(frozen=True)
class Finished:
    """A program with its plan and new weights.

    Attributes:
        program: folded; its consumers are 0 in the columns that go.
        choice: of the candidates.
        divergences: of every candidate from the intact model on held-out text, nats a token.
        consumers: what a fit did to each, for the report.
        notes: further figures.
    """

    program: Program
    choice: str
    divergences: Mapping[str, float]
    consumers: Sequence[Mapping[str, Any]] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def program_divergence(
    program: Program, intact: Program, tokens: Tensor, forward_dtype: torch.dtype | None, batch: int
) -> float:
    """Mean KL(intact || program) of predictions, nats a token.

    Args:
        program: any program of the same vocabulary.
        intact: the dense one.
        tokens: (samples, length) int64.
        forward_dtype: precision of the products.
        batch: samples at once.
    """
    total = 0.0
    with torch.no_grad():
        for part in torch.split(tokens, batch):
            logits = []
            for one in (program, intact):
                given = {**text_samples(one.interface, part).fixed(len(part)), "input_ids": part}
                with torch.autocast(part.device.type, forward_dtype, enabled=forward_dtype is not None):
                    outputs = one.graph_module(*(given.get(name, part) for name in one.interface.inputs))
                logits.append(dict(zip(one.interface.outputs, outputs, strict=True))["logits"])
            total += float(token_kl(*logits)) * len(part)
    return total / len(tokens)


def refit(
    merged: Program,
    intact: Program,
    binary: Mapping[str, Tensor],
    groups: Sequence[Group],
    tokens: Tensor,
    *,
    mode: Reconstruction,
    biases: bool,
    drift: float,
    steps: int,
    forward_dtype: torch.dtype | None,
    batch_size: int | None,
    seed: int,
    kept_in: str | None = None,
) -> Finished:
    """Fit what is left of the consumers: `fxprune.structured.reconstruction`, then `fxprune.structured.second_order`.

    Args:
        merged: the program with the weights that were learned.
        intact: the dense one.
        binary: decided gates, (units,) by group.
        groups: heads and MLP channels.
        tokens: (samples, length) calibration text.
        mode: what may change.
        biases: whether consumers may get biases.
        drift: see `fxprune.structured.reconstruct_consumers.reconstruct_consumers`.
        steps: second-order steps behind `dense`.
        forward_dtype: precision of the products.
        batch_size: samples at once; None to find it.
        seed: of the tokens that the model draws.
        kept_in: directory of loss signals, see `fxprune.calibration.kept_signals`.
    """
    plan = fold_gates(merged, binary).plan
    assert plan is not None
    consumers = consumers_of(groups, plan, merged.graph_module)
    notes: dict[str, Any] = {}
    if mode != "dense":
        rebuilt, done = reconstruct_consumers(
            merged,
            consumers,
            tokens,
            mode=mode,
            biases=biases,
            drift=drift,
            forward_dtype=forward_dtype,
            batch_size=batch_size,
        )
        return Finished(rebuilt.replace(plan=plan), mode, {}, done)
    signals, read = kept_loss_signals(
        kept_in, merged, groups, tokens, grams=True, labels="mixed", forward_dtype=forward_dtype, seed=seed
    )
    if read:
        notes["signals_read_from"] = kept_in
    grams, outputs = moments(signals)
    del signals
    rebuilt, done = reconstruct_on_grams(merged, consumers, grams)
    kept = {name: one.kept for name, one in consumers.items()}
    steps = min(steps, len(tokens) - 1)
    if steps > 0 and not all(bool(one.all()) for one in kept.values()):
        rebuilt, taken = second_order_steps(
            rebuilt,
            intact,
            kept,
            tokens,
            inputs=grams,
            outputs=outputs,
            steps=steps,
            held_out=max(1, min(len(tokens) // _HELD_OUT, len(tokens) - steps)),
            forward_dtype=forward_dtype,
            batch_size=batch_size,
        )
        notes["second_order_steps"] = [asdict(step) for step in taken]
    return Finished(rebuilt.replace(plan=plan), mode, {}, done, notes)


def choose(
    candidates: Mapping[str, Finished], intact: Program, held: Tensor, forward_dtype: torch.dtype | None, batch: int
) -> Finished:
    """The candidate nearest to the intact model on text that nothing was learned from; of equal ones the first.

    Raises:
        TrainingError: no candidate's predictions are finite.
    """
    found = {
        name: program_divergence(one.program, intact, held, forward_dtype, batch) for name, one in candidates.items()
    }
    finite = {name: value for name, value in found.items() if math.isfinite(value)}  # a NaN is less than nothing
    if not finite:
        raise TrainingError(
            f"the learned model's predictions are not finite on held-out text ({', '.join(found)}); lower lora_lr or "
            "mask_lr, or use float32"
        )
    best = min(finite, key=finite.__getitem__)
    one = candidates[best]
    return Finished(one.program, best, found, one.consumers, one.notes)
