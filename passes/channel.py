"""Structured pruning from calibration activations: MLP channels and KV heads under one budget.

    calibration text ─ mean and variance of what every consumer reads ─ score per unit ─ one ranking ─ Plan
                                                └─ bias compensation ─ new consumer biases

A channel's score is the variance that it contributes to the output of its consumer, fluctuation times squared weight
norm, standardised over the consumer's channels so that layers compare (FLAP, An et al. 2024, sections 3.2 and 3.3). A
unit scores the mean of its channels, a KV head as much as the best of its query heads. What a removed channel
contributes on average is put back as a bias of the consumer (FLAP, section 3.4), so only the fluctuation is lost.

Before and after, for a consumer whose channels 2 and 5 go:

    x ─ down_proj(W)              x ─ down_proj(W, bias = W[:, 2]·mean₂ + W[:, 5]·mean₅)       and a Plan

Refused:
 1. a program without groups, or without a cache-carrying language-model interface to run text through;
 2. a ratio outside (0, 1), or one that no legal plan reaches;
 3. a consumer that two groups share (its bias could not be told apart).

Heads and MLP channels are scored; hidden channels, experts, their channels and layers are left as they are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.accounting import block_linear_parameters
from fxprune.activations import collect_statistics
from fxprune.budget import allocate, allocate_uniform, check_ratio, steps_of
from fxprune.calibration import CalibrationSpec, calibration_set
from fxprune.channels import get_attribute
from fxprune.errors import PostconditionError, PreconditionError, UsageError
from fxprune.graphs import copy_graph_module
from fxprune.groups import AttentionGroup, MlpGroup
from fxprune.lifted import make_linear, origin_of
from fxprune.pass_base import Pass, PassResult
from fxprune.progress import track
from fxprune.runners import GraphRunner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from fxprune.activations import ChannelStatistics
    from fxprune.groups import Group
    from fxprune.plan import Plan
    from fxprune.program import Program

__all__ = ["ChannelPrune", "add_biases", "unit_scores"]


def unit_scores(
    group: Group, weights: Mapping[str, Tensor], statistics: Mapping[str, ChannelStatistics]
) -> NDArray[np.float64]:
    """Standardised fluctuation of each unit, the mean over its channels.

    Args:
        group: the group.
        weights: weight (out, in) of each consumer.
        statistics: moments of what each consumer reads.

    Returns:
        (units,) float64; 0 is an average channel of its consumer, 1 is one standard deviation above.
    """
    total = np.zeros(group.units)
    for piece in group.consumers:
        name = piece.parameter.removesuffix(".weight")
        moments = statistics[name]
        energy = (moments.variance * weights[name].double().square().sum(0).to(moments.variance.device)).cpu().numpy()
        spread = max(float(energy.std()), np.finfo(np.float64).tiny)
        total += ((energy - energy.mean()) / spread)[piece.indices].mean(1)
    return total / len(group.consumers)


def compensation(
    group: Group, plan: Plan, weights: Mapping[str, Tensor], statistics: Mapping[str, ChannelStatistics]
) -> dict[str, Tensor]:
    """What the removed units of a group add to their consumers on average, (out,) float64 by consumer."""
    removed = plan.removed_units(group)
    biases = {}
    for piece in group.consumers if removed else ():
        name = piece.parameter.removesuffix(".weight")
        columns = torch.from_numpy(piece.indices[removed].reshape(-1)).to(weights[name].device)
        biases[name] = weights[name].double()[:, columns] @ statistics[name].mean.to(weights[name].device)[columns]
    return biases


def add_biases(program: Program, biases: Mapping[str, Tensor]) -> Program:
    """Return the program with something added to the biases of some Linears; weights stay shared."""
    graph_module = copy_graph_module(program.graph_module)
    for name, bias in biases.items():
        old = get_attribute(graph_module, name)
        own = torch.zeros_like(bias) if old.bias is None else old.bias.detach().to(bias)
        new = nn.Parameter((own + bias).to(old.weight.dtype), old.weight.requires_grad)
        graph_module.set_submodule(name, make_linear(old.weight, new, origin_of(old)))
    return program.replace(graph_module=graph_module, channels=None)


def _nothing_found(program: Program) -> str:
    """Why there is no group: candidates that were refused, and the operators that pin channels."""
    if program.channels is None:
        return "no group that could be pruned was found: run locate_attention and locate_mlp first"
    refused = [f"{name}: {why}" for event in program.history for name, why in event.details.get("refused", {}).items()]
    pins = list(dict.fromkeys(map(str, program.channels.pins)))
    found = [("refused", refused), ("pinned by", pins)]
    listed = [f"{what} {'; '.join(lines[:8])}{'; ...' if len(lines) > 8 else ''}" for what, lines in found if lines]
    return f"no group that could be pruned was found. {'. '.join(listed) or 'The graph has no Linears between Linears'}"


def _scored(program: Program) -> tuple[Group, ...]:
    """The groups that this pass prunes."""
    return tuple(group for group in program.groups if isinstance(group, (AttentionGroup, MlpGroup)))


class ChannelPrune(Pass):
    """Choose which units go (see the module's docstring for scores, graph and refusals).

    Args:
        ratio: share of the block Linears' parameters to remove, in (0, 1).
        calibration: `self`, a text file, or a hub data set (see `fxprune.calibration`).
        samples: calibration sequences.
        seq_len: tokens of each.
        seed: of every random choice.
        uniform: whether every group of a kind keeps the same width, as a plain config can say.
        round_to: kept MLP widths are multiples of this.
        min_keep: share of the units of every group that stays whatever the scores say.
        compensate: whether removed channels leave their mean behind as a bias; None means yes, except for uniform
            plans, which would no longer load with a plain config.
        batch_size: calibration samples at once.
    """

    name = "channel"

    def __init__(
        self,
        *,
        ratio: float,
        calibration: str = "self",
        samples: int = 64,
        seq_len: int = 256,
        seed: int = 0,
        uniform: bool = False,
        round_to: int = 8,
        min_keep: float = 0.1,
        compensate: bool | None = None,
        batch_size: int = 4,
    ) -> None:
        check_ratio(ratio)
        if round_to < 1:
            raise UsageError(f"round_to must be at least 1, got {round_to}")
        if not 0 <= min_keep < 1:
            raise UsageError(f"min_keep must lie in [0, 1), got {min_keep}")
        self.ratio = ratio
        self.calibration = calibration
        self.samples = samples
        self.seq_len = seq_len
        self.seed = seed
        self.uniform = uniform
        self.round_to = round_to
        self.min_keep = min_keep
        self.compensate = (not uniform) if compensate is None else compensate
        self.batch_size = batch_size

    def requires(self, program: Program) -> None:
        """There are groups, each consumer belongs to one, and text can be run.

        Raises:
            PreconditionError: something is missing; the message lists what was found and what stood in the way.
        """
        groups = _scored(program)
        if not groups:
            raise PreconditionError(_nothing_found(program))
        if program.source is None or not program.interface.cache:
            raise PreconditionError("channel runs calibration text: it needs a Hugging Face causal language model")
        consumers = [piece.parameter for group in groups for piece in group.consumers]
        twice = sorted({name for name in consumers if consumers.count(name) > 1})
        if twice:
            raise PreconditionError(f"{twice[0]} reads two groups; its compensation bias could not be told apart")

    def call(self, program: Program) -> PassResult:
        """Calibrate, score, allocate and compensate; the plan is left in `Program.plan`."""
        assert program.source is not None
        groups = _scored(program)
        spec = CalibrationSpec(self.calibration, samples=self.samples, seq_len=self.seq_len, seed=self.seed)
        device = program.interface.example_inputs["input_ids"].device
        start = time.perf_counter()
        texts = calibration_set(
            spec,
            tokenizer=program.source.tokenizer,
            runner=GraphRunner(program.graph_module, program.interface),
            config=program.source.config,
            device=device,
        )
        names = [piece.parameter.removesuffix(".weight") for group in groups for piece in group.consumers]
        with track("calibrating", len(texts.tokens)) as advance:
            statistics = collect_statistics(
                program.graph_module,
                program.interface,
                names,
                texts.tokens.to(device),
                batch_size=self.batch_size,
                on_batch=advance,
            )
        calibrated = time.perf_counter() - start
        weights = {name: get_attribute(program.graph_module, name).weight.detach() for name in names}
        plan = self._plan(program, {g.name: unit_scores(g, weights, statistics) for g in groups})
        biases: dict[str, Tensor] = {}
        if self.compensate:
            for group in groups:
                biases |= compensation(group, plan, weights, statistics)
        pruned = (add_biases(program, biases) if biases else program).replace(plan=plan)
        pruned = pruned.with_results(calibration=texts.description)
        return PassResult(pruned, modified=True, details=self._details(program, plan, biases, calibrated))

    def _plan(self, program: Program, scores: Mapping[str, NDArray[np.float64]]) -> Plan:
        total = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
        steps = {
            group.name: steps_of(group, scores[group.name], round_to=self.round_to, min_keep=self.min_keep)
            for group in _scored(program)
        }
        choose = allocate_uniform if self.uniform else allocate
        return choose(_scored(program), steps, round(self.ratio * total), total)

    def _details(self, program: Program, plan: Plan, biases: Mapping[str, Tensor], calibrated: float) -> dict[str, Any]:
        total = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
        removed = sum(group.parameters_removed(plan.kept_units(group)) for group in _scored(program))
        return {
            "requested": self.ratio,
            "removed_share": removed / total,
            "biases": len(biases),
            "seconds": {"calibrate": calibrated},
        }

    def ensures(self, before: Program, after: Program) -> None:
        """The plan is legal.

        Raises:
            PostconditionError: there is no plan.
            PlanError: it is illegal.
        """
        del before
        if after.plan is None:
            raise PostconditionError("channel left no plan")
        after.plan.validate(after.groups)
