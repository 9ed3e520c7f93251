"""Depth: consecutive layers go, those whose absence the calibration text minds least.

    embedding ─ layer 0 ─ layer 1 ─ layer 2 ─ layer 3 ─ norm          embedding ─ layer 0 ─ layer 3 ─ norm

As few layers as the target asks for; which ones is decided by the perplexity of the model without them, measured on
some of the calibration samples for every place where they may stand (Gromov et al. 2024, "The unreasonable
ineffectiveness of the deeper layers", remove a run of layers, there chosen by angular distance; perplexity as the
criterion: Kim et al. 2024, "Shortened LLaMA"). With several budgets a longer run contains the shorter one.

Refused:
 1. a program without a stack of layers that can be left out one by one, or without a causal-language-model
    interface to run text through;
 2. a target out of range, or one that leaves no layer;
 3. a target speed-up: latency tables have times of heads and channels, not of layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fxprune.channels.accounting import macs_per_token
from fxprune.channels.block_linears import lm_heads
from fxprune.core.errors import PlanError, PreconditionError, UsageError
from fxprune.core.groups import LayerGroup
from fxprune.core.plan import Plan
from fxprune.core.progress import track
from fxprune.core.registry import resolve
from fxprune.evaluation.perplexity import perplexity
from fxprune.runtimes.runners import GraphRunner
from fxprune.slimming.slim import slim_graph
from fxprune.structured.base import StructuredPass
from fxprune.structured.targets import budgets_of, cost_model
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.unit_masks import LayerGate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.program import Program
    from fxprune.structured.case import Case
    from fxprune.structured.targets import CostModel

__all__ = ["DepthPrune", "Run", "runs_that_reach"]


@dataclass(frozen=True)
class Run:
    """Consecutive layers of a stack.

    Attributes:
        stack: name of the stack's group.
        start: the first layer.
        stop: the one after the last.
    """

    stack: str
    start: int
    stop: int

    def contains(self, other: Run) -> bool:
        """Whether all layers of another run are in this one."""
        return self.stack == other.stack and self.start <= other.start and other.stop <= self.stop


def runs_that_reach(stack: LayerGroup, savings: Sequence[float], needed: float) -> list[Run]:
    """For every first layer the fewest that save what is needed; of these runs only the shortest.

    Args:
        stack: the layers.
        savings: what each layer saves.
        needed: what shall be saved.
    """
    found = []
    for start in range(stack.units):
        saved, stop = 0.0, start
        while stop < stack.units and saved < needed:
            saved += savings[stop]
            stop += 1
        if saved >= needed and stack.units - (stop - start) >= stack.least:
            found.append(Run(stack.name, start, stop))
    fewest = min((run.stop - run.start for run in found), default=0)
    return [run for run in found if run.stop - run.start == fewest]


class DepthPrune(StructuredPass):
    """Remove consecutive layers (see the module's docstring for graph and refusals).

    One of the targets must be given; each may be a list of values, loosest first, for `budgets`.

    Args:
        ratio: share of the block Linears' parameters to remove, in (0, 1).
        target_params: the most parameters that the slim model has.
        target_macs: the most MACs per token, all Linears, without attention scores.
        target_bytes: the most bytes of its weights.
        target_speedup: refused, for the reason above.
        calibration: `self`, a text file, or a hub data set (see `fxprune.calibration.text`).
        text_field: field of calibration records that is read; `text`, or else chats, by default.
        samples: calibration sequences.
        seq_len: tokens of each.
        seed: of every random choice.
        choose_on: how many of the samples the perplexities are measured on.
        forward_dtype: precision of the forward passes' products; `auto` is bfloat16 where the machine is faster in it.
        batch_size: samples at once; None for one at a time.
    """

    name = "depth"
    needs_data: ClassVar[bool] = True
    reads_loss: ClassVar[bool] = True

    def __init__(
        self,
        *,
        ratio: float | Sequence[float] | None = None,
        target_params: float | Sequence[float] | None = None,
        target_macs: float | Sequence[float] | None = None,
        target_bytes: float | Sequence[float] | None = None,
        target_speedup: float | Sequence[float] | None = None,
        calibration: str = "self",
        text_field: str | None = None,
        samples: int = 128,
        seq_len: int = 512,
        seed: int = 0,
        choose_on: int = 8,
        forward_dtype: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        if target_speedup is not None:
            raise UsageError(
                "depth takes no target_speedup: latency tables have times of heads and channels, not of whole layers; "
                "use ratio, target_params, target_macs or target_bytes, and fxprune bench for the speed-up"
            )
        if choose_on < 1:
            raise UsageError(f"choose_on must be at least 1, got {choose_on}")
        super().__init__(
            ratio=ratio,
            target_params=target_params,
            target_macs=target_macs,
            target_bytes=target_bytes,
            calibration=calibration,
            text_field=text_field,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            forward_dtype=forward_dtype,
            batch_size=batch_size,
        )
        self.choose_on = choose_on

    def scored(self, program: Program) -> tuple[LayerGroup, ...]:
        """The stacks of layers."""
        return tuple(group for group in program.groups if isinstance(group, LayerGroup))

    def left_alone(self, program: Program) -> dict[str, str]:
        """The layers that cannot be left out, with the reason."""
        events = (event for event in program.history if event.name == "locate_layers")
        return {name: why for event in events for name, why in event.details.get("refused", {}).items()}

    def requires(self, program: Program) -> None:
        """There is a stack of layers, and text can be run.

        Raises:
            PreconditionError: there is none (the message says what stood in the way), or no text can be run.
        """
        if not self.scored(program):
            refused = [f"{name}: {why}" for e in program.history for name, why in e.details.get("refused", {}).items()]
            raise PreconditionError(
                "no stack of layers that can be left out was found: run locate_layers first"
                + (f". Refused {'; '.join(refused[:8])}" if refused else "")
            )
        super().requires(program)

    def costs(self, program: Program) -> CostModel:
        """The whole model's cost is fixed here; `savings` says what each layer takes from it."""
        return cost_model(self.targets[0].kind, program, ())

    def savings(self, program: Program, stack: LayerGroup) -> list[int]:
        """What each layer of a stack takes with it, in the target's unit."""
        kind = self.targets[0].kind
        if kind == "macs":
            return _macs_of_layers(program, stack)
        if kind == "ratio":
            return _linear_parameters(program, stack)
        tensors = program.graph_module.state_dict(keep_vars=True)
        held = [[tensors[name] for name in names] for names in stack.members]
        return [sum(t.numel() * (t.element_size() if kind == "bytes" else 1) for t in layer) for layer in held]

    def plans(self, case: Case, costs: CostModel, seconds: dict[str, float]) -> list[Plan]:
        """The run of least perplexity for each value of the target, each with the layers of the one before.

        Raises:
            PlanError: a value leaves no layer; the message says the most that can be reached.
        """
        start = time.perf_counter()
        values = [target.value for target in self.targets]
        stacks = {stack.name: stack for stack in self.scored(case.program)}
        savings = {name: self.savings(case.program, stack) for name, stack in stacks.items()}
        gates = _Gates(case, tuple(stacks.values()), self.choose_on)
        chosen: list[Run] = []
        for budget in budgets_of(costs, values):
            needed = costs.fixed - budget
            runs = [run for name, stack in stacks.items() for run in runs_that_reach(stack, savings[name], needed)]
            inside = [run for run in runs if not chosen or run.contains(chosen[-1])]
            if not inside:
                most = max(_most(stack, savings[name]) for name, stack in stacks.items())
                raise PlanError(
                    f"no run of consecutive layers reaches {costs.describe(budget)}; the best reachable is "
                    f"{costs.describe(costs.fixed - most)}, with a layer left (ask for less, or use another method)"
                )
            losses = gates.losses(inside)
            best = min(range(len(inside)), key=losses.__getitem__)
            chosen.append(inside[best])
            case.notes.setdefault("runs", []).append(
                [
                    {"layers": stacks[run.stack].labels[run.start : run.stop], "nll": loss}
                    for run, loss in zip(inside, losses, strict=True)
                ]
            )
        seconds["curves"] = time.perf_counter() - start
        return [
            Plan.of({run.stack: [n for n in range(stacks[run.stack].units) if not run.start <= n < run.stop]})
            for run in chosen
        ]

    def removed_parameters(self, program: Program, plan: Plan) -> int:
        """Parameters of the block Linears that go with a plan."""
        return sum(
            sum(_linear_parameters(program, stack)[layer] for layer in plan.removed_units(stack))
            for stack in self.scored(program)
        )


def _most(stack: LayerGroup, savings: Sequence[float]) -> float:
    """What the longest legal run saves."""
    length = stack.units - stack.least
    return max(sum(savings[start : start + length]) for start in range(stack.units - length + 1))


def _linear_parameters(program: Program, stack: LayerGroup) -> list[int]:
    """Parameters of each layer's Linears."""
    heads = set(lm_heads(program.graph_module, outputs=program.interface.outputs))
    tensors = program.graph_module.state_dict(keep_vars=True)

    def counts(name: str) -> bool:
        owner = name.rpartition(".")[0]
        return owner not in heads and is_projection(get_attribute(program.graph_module, owner))

    return [sum(tensors[name].numel() for name in names if counts(name)) for names in stack.members]


def _macs_of_layers(program: Program, stack: LayerGroup) -> list[int]:
    """MACs a token of each layer's Linears: what the graph without it lacks; layers that are alike are tried once."""
    tensors = program.graph_module.state_dict(keep_vars=True)
    outputs = program.interface.outputs
    dense = macs_per_token(program.graph_module, outputs=outputs).linear
    known: dict[Any, int] = {}
    kinds = [tuple(sorted(tuple(tensors[name].shape) for name in names)) for names in stack.members]
    for layer, kind in enumerate(kinds):
        if kind not in known:
            plan = Plan.of({stack.name: [other for other in range(stack.units) if other != layer]})
            slim, interface, _ = slim_graph(
                program.graph_module, program.interface, program.groups, plan, program.weight_masks
            )
            known[kind] = dense - macs_per_token(slim, outputs=interface.outputs).linear
    return [known[kind] for kind in kinds]


class _Gates:
    """The dense graph with a gate behind every layer, and text to measure it on."""

    def __init__(self, case: Case, stacks: Sequence[LayerGroup], samples: int) -> None:
        self.case = case
        self.tokens = case.tokens[:samples]
        plan = Plan.of({stack.name: range(stack.units) for stack in stacks})
        insert_masks: Any = resolve("fxprune.passes.insert_masks:insert_masks")
        masked = insert_masks(case.program.graph_module, tuple(stacks), plan)
        self.runner = GraphRunner(masked, case.program.interface, "without layers")
        gates = {module.label: module for module in masked.modules() if isinstance(module, LayerGate)}
        self.gates = {stack.name: [gates[label] for label in stack.labels] for stack in stacks}

    def losses(self, runs: Sequence[Run]) -> list[float]:
        """Mean loss, in nats a token, without each run."""
        found = []
        with track("choosing layers", len(runs)) as advance, self._precision():
            for index, run in enumerate(runs):
                found.append(self._loss(run))
                advance(index + 1)
        return found

    def _precision(self) -> torch.autocast:
        dtype = self.case.forward_dtype
        return torch.autocast(self.tokens.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _loss(self, run: Run) -> float:
        gates = self.gates[run.stack][run.start : run.stop]
        for gate in gates:
            gate.mask.fill_(0)
        try:
            return perplexity(
                self.runner,
                self.tokens.reshape(-1),
                text="the calibration text",
                window=self.tokens.shape[1],
                batch_size=self.case.batch_size or 1,
                device=self.tokens.device,
            ).nll
        finally:
            for gate in gates:
                gate.mask.fill_(1)
