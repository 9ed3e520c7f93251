"""One run of learned pruning, from calibration text to a program with a plan.

    scores ─ gates and LoRA learn ─ gates decided ─ consumers fitted ─ LoRA anew ─ fine-tuning ─ merged, folded
                                                   └── without LoRA, or with soft gates: at the end ──┘

What the pass `fxprune.passes.l0` was asked for is read from it; what is made is of its parts.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import CalibrationError
from fxprune.core.pass_base import option_names
from fxprune.evaluation.perplexity import hash_tokens
from fxprune.learned.finish import Finished, choose, program_divergence, refit
from fxprune.learned.gates import fold_gates
from fxprune.learned.hard_budget import BudgetProjector
from fxprune.learned.model import GatedModel
from fxprune.learned.post import Instructions, fine_tune, read_instructions
from fxprune.learned.size import HardBudget, LagrangianBudget, expected_sparsity
from fxprune.learned.start import one_shot
from fxprune.learned.state import StateDirectory
from fxprune.learned.training import Learner, divergence
from fxprune.structured.reconstruct_consumers import consumers_of
from fxprune.tracing.nodes import get_attribute
from fxprune.weights.base import dtype_of, forward_precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.learned.size import SizeControl

__all__ = ["CURVE_POINTS", "EXTRA_KINDS", "Run", "unit_index"]

CURVE_POINTS = 200
"""Rows of a log that go into the report at most."""
EXTRA_KINDS = ("hidden", "layers")
"""Kinds of groups that have gates, and no one-shot scores."""


def unit_index(plan: Plan, group: Group) -> Tensor:
    """The units of a group that a plan keeps, (kept,) int64."""
    return torch.tensor(plan.kept_units(group), dtype=torch.int64)


class Run:
    """One training, from text to a program.

    Attributes:
        learner: the training.
        groups: those that have gates.
        measured: divergences on held-out text before the end.
        notes: what else the report says.
        post: the log of the fine-tuning, thinned out; None without.
    """

    def __init__(self, step: Any, program: Program, tokens: Tensor, seconds: dict[str, float]) -> None:
        self.step = step  # passes stand above this room
        self.program = program
        self.seconds = seconds
        self.held, self.tokens = tokens[-step.held_out :], tokens[: -step.held_out]
        self.groups = step.gated(program)
        self.options = step.training_options(layers=any(group.kind == "layers" for group in program.groups))
        self.dtype = forward_precision(step.forward_dtype, dtype_of(program), tokens.device)
        self.measured: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self.post: dict[str, Any] | None = None
        # Read now: what is wrong with them is told before the training, not after.
        self.instructions = None if step.post_data is None else self._instructions(step.post_data)
        state = None if step.state is None else StateDirectory(step.state, self._settings(tokens))
        resumed = state is not None and state.read() is not None  # a refusal comes before any work
        options = self.options
        self.model = GatedModel(
            program,
            self.groups,
            heads=options.heads,
            drop_rate=options.drop_rate,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets,
            checkpointing=options.checkpointing,
            hidden=options.hidden,
            forward_dtype=self.dtype,
            seed=options.seed,
        )
        self.control = self._control()
        refitted = self._refit_decided if step.refits_decided else None
        self.learner = Learner(self.model, self.control, self.tokens, options, state, refit=refitted)
        if options.warm_start and not resumed:
            self._start()

    def _settings(self, tokens: Tensor) -> dict[str, Any]:
        """What the training follows from."""
        own = {name: getattr(self.step, name) for name in option_names(type(self.step)) if hasattr(self.step, name)}
        after = {"state", "save_every", "biases", "drift", "batch_size", "signals", "text_field"}
        if not self.step.refits_decided:
            after |= {"reconstruct", "fit_samples", "fit_steps"}
        after |= {name for name in own if name.startswith("post_")}
        weights = hashlib.sha256()
        for name, parameter in self.program.graph_module.named_parameters():
            total = float(parameter.detach().double().sum())
            weights.update(f"{name} {tuple(parameter.shape)} {total!r}".encode())
        facts = {"text": hash_tokens(tokens), "weights": weights.hexdigest(), "dtype": str(dtype_of(self.program))}
        if self.program.weight_masks:
            masks = self.program.weight_masks
            facts["removed_weights"] = str({name: int((~mask).sum()) for name, mask in masks.items()})
        return {name: value for name, value in own.items() if name not in after} | facts

    def _control(self) -> SizeControl:
        step, options = self.step, self.options
        target = step.targets[0]
        expected, sparsity = expected_sparsity(self.program, self.groups, target, step.table, step.mix)
        units = all(group.kind not in EXTRA_KINDS for group in self.groups)
        if not units:
            return LagrangianBudget(self.model.gates, expected, sparsity, options, None)
        costs = step.costs(self.program)
        budget = costs.budget(target.value)
        limits = {group.name: step._limits(group) for group in self.groups}
        if options.budget == "hard":
            return HardBudget(
                self.model.gates,
                costs,
                budget,
                limits=limits,
                uniform=step.uniform,
                expected=expected,
                options=options,
            )
        projector = BudgetProjector(self.model.gates, costs, budget, limits, uniform=step.uniform)
        return LagrangianBudget(self.model.gates, expected, sparsity, options, projector)

    def _start(self) -> None:
        """Put the gates in the order of the one-shot scores."""
        step = self.step
        begun = time.perf_counter()
        units = step.scored(self.program)
        if not units:  # hidden channels and layers have no one-shot scores
            return
        limits = {group.name: step._limits(group) for group in units}
        # Where other kinds go too, heads and MLP channels alone need not reach the target.
        alone = len(units) == len(self.groups)
        start = one_shot(
            self.program,
            units,
            self.tokens[: step.start_samples],
            step.costs(self.program),
            step.targets[0].value if alone else None,
            limits=limits,
            uniform=step.uniform,
            evenness=step.evenness,
            forward_dtype=self.dtype,
            seed=step.seed,
            kept_in=step.signals,
        )
        if start.read:
            self.notes["signals_read_from"] = step.signals
        # With a Lagrangian the size starts dense and is drawn down.
        counts = {group.name: group.units * (1 - self.options.drop_rate) for group in units}
        if start.plan is not None:
            if self.options.budget == "hard":
                counts = {name: float(len(kept)) for name, kept in start.plan.kept.items()}
            plan = {g.name: torch.zeros(g.units).index_fill(0, unit_index(start.plan, g), 1.0) for g in units}
            self.learner.notes["one-shot plan"] = self._divergence(plan)
        self.model.gates.start_from(dict(start.scores), counts, self.options.spread)
        self.seconds["start"] = time.perf_counter() - begun

    def _divergence(self, values: Mapping[str, Tensor]) -> float:
        on = {name: value.to(self.model.device) for name, value in values.items()}
        return divergence(self.model, on, self.held, self.learner.teachers.intact, self.options.batch)

    def finished(self) -> Finished:
        """Train, fine-tune, and make the program."""
        step = self.step
        begun = time.perf_counter()
        self.learner.run()
        notes = dict(self.learner.notes)
        fitted = notes.pop("fit", None) or {"consumers": [], "notes": {}}
        self.measured = {**notes, **self.measured}
        self.seconds["learn"] = time.perf_counter() - begun
        binary = dict(self.learner.settled().values)
        if step.post_steps:
            self._fine_tune(binary)
        begun = time.perf_counter()
        merged = self.model.merged()
        decided = Finished(fold_gates(merged, binary), "decided", {}, fitted["consumers"], fitted["notes"])
        candidates = {"decided": decided}
        if all(group.masked == "consumers" for group in self.groups) and not self.options.settle_steps:
            soft = self.control.soft(self.options.steps)
            candidates["soft gates"] = Finished(fold_gates(merged, soft), "soft gates", {})
        if step.reconstruct != "none" and self.learner.refit is None:
            candidates[f"refit {step.reconstruct}"] = self._refit(merged, binary)
        best = choose(candidates, self.program, self.held, self.dtype, self.options.batch)
        self.seconds["finish"] = time.perf_counter() - begun
        return best

    def _refit(self, program: Program, binary: Mapping[str, Tensor]) -> Finished:
        step = self.step
        return refit(
            program,
            self.program,
            binary,
            step.scored(self.program),
            self.tokens[: step.fit_samples],
            mode=step.reconstruct,
            biases=step.biases,
            drift=step.drift,
            steps=step.fit_steps,
            forward_dtype=self.dtype,
            batch_size=step.batch_size,
            seed=step.seed,
            # Weights that were learned are nobody else's.
            kept_in=step.signals if program is self.program or not step.lora_rank else None,
        )

    def _refit_decided(self, binary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The dense model's consumers, fitted to the decided gates without LoRA; none where LoRA does better."""
        begun = time.perf_counter()
        notes = self.learner.notes
        learned = notes["decided, with LoRA"] = self._divergence(binary)
        done = self._refit(self.program, binary)
        fitted = program_divergence(done.program, self.program, self.held, self.dtype, self.options.batch)
        notes["decided, fitted"] = fitted
        self.seconds["fit"] = time.perf_counter() - begun
        if not fitted < learned:
            return {}
        plan = done.program.plan
        assert plan is not None
        names = consumers_of(self.step.scored(self.program), plan, self.program.graph_module)
        notes["fit"] = {"consumers": [dict(one) for one in done.consumers], "notes": dict(done.notes)}
        return {name: get_attribute(done.program.graph_module, name).weight for name in names}

    def _instructions(self, name: str) -> Instructions:
        assert self.program.source is not None
        if self.program.source.tokenizer is None:
            raise CalibrationError("instructions need the model's tokenizer; the model has none")
        return read_instructions(name, self.program.source.tokenizer, self.step.seq_len, self.step.seed)

    def _fine_tune(self, binary: Mapping[str, Tensor]) -> None:
        step = self.step
        begun = time.perf_counter()
        tokens, answers, facts = self.tokens, None, {"data": step.calibration}
        if (read := self.instructions) is not None:
            tokens, answers = read.tokens.to(self.tokens.device), read.answers.to(self.tokens.device)
            facts = {"data": str(step.post_data), "records": str(read.records)}
        self.measured["before fine-tuning"] = self._divergence(binary)
        rows = fine_tune(
            self.model,
            binary,
            tokens,
            answers,
            self.learner.teachers.intact,
            steps=step.post_steps,
            batch=step.batch,
            lr=step.post_lr,
            loss=step.post_loss,
            seed=step.seed,
        )
        stride = max(1, len(rows) // CURVE_POINTS)
        self.post = {**facts, "loss": step.post_loss, "steps": step.post_steps, "curves": rows[::stride]}
        self.seconds["fine-tune"] = time.perf_counter() - begun
