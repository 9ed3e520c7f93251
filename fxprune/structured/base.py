"""What all structured methods share: calibrate, curves, allocation under a budget, reconstruction.

    calibration text ─ curves: units and loss at every legal width ─ knapsack ─ Plan
                                                     reconstruction ─ new weights of the consumers

Before and after, for a consumer of which channels 2 and 5 go:

    x ─ down_proj(W)              x ─ down_proj(W', bias')         W' is 0 in columns 2 and 5          and a Plan

A method says how it comes to its curves; everything else is an option that every method has, so that methods differ
in what they are about and can be compared. Several budgets share one calibration: their plans are nested.

Refused:
 1. a program without heads or MLP channels; one that reads no text, for methods that read some; one that predicts no
    next token, for methods that read the loss (see `fxprune.models.methods`);
 2. a target that is out of range, or that no legal plan reaches (the message says what can be reached);
 3. a consumer that two groups share (its reconstruction could not be told apart);
 4. more inputs than calibration tokens.

Heads and MLP channels are pruned; hidden channels, experts, their channels and layers are left as they are.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast, get_args

import torch

from fxprune.calibration.engine import text_samples
from fxprune.calibration.input_grams import input_grams
from fxprune.calibration.overflow import naming_overflow
from fxprune.calibration.text import CalibrationSpec, texts_of
from fxprune.channels.block_linears import block_linear_parameters
from fxprune.core.errors import CalibrationError, PlanError, PostconditionError, PreconditionError, UsageError
from fxprune.core.goals import Goal
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.core.one_goal import OneGoal
from fxprune.core.pass_base import Pass, PassResult
from fxprune.measure.latency_table import load_table
from fxprune.models.loading import resolve_dtype
from fxprune.models.methods import check_method
from fxprune.structured.case import Budgets, Case
from fxprune.structured.curves import Limits
from fxprune.structured.reconstruct_consumers import consumers_of, reconstruct_consumers, reconstruct_on_grams
from fxprune.structured.reconstruction import Reconstruction
from fxprune.structured.targets import Target, budgets_of, cost_model, plans_for
from fxprune.structured.timed_plans import PlanTimer, corrected_plans
from fxprune.structured.unit_scores import consumer_names
from fxprune.tracing.nodes import get_attribute
from fxprune.weights.base import dtype_of, forward_precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.structured.curves import Curve
    from fxprune.structured.targets import CostModel, TargetKind

__all__ = ["Budgets", "Case", "StructuredPass"]

_REASONS = 3
"""How many refused candidates, and operators that pin channels, an error names."""
_SPEED_ROUNDS = 2
_TARGETS = ("ratio", "target_params", "target_macs", "target_bytes", "target_speedup")


class StructuredPass(Pass):
    """Base of the passes that remove heads and MLP channels (see the module's docstring for graph and refusals).

    One of the targets must be given; each may be a list of values, loosest first, for `budgets`.

    Args:
        ratio: share of the block Linears' parameters to remove, in (0, 1).
        target_params: the most parameters that the slim model has.
        target_macs: the most MACs per token, all Linears, without attention scores.
        target_bytes: the most bytes of its weights.
        target_speedup: how much faster by a latency table.
        table: file of the latency table (`fxprune bench MODEL --table FILE`).
        mix: what share of the time each case of the table stands for, such as `{"prefill-512": 1}`; all alike by
            default.
        threads: that the deployed model will have, as the table was measured with.
        speed_rounds: how often at most a plan for a speed-up is timed, and the table corrected by what was measured
            (see `fxprune.structured.timed_plans`); 0 trusts the table.
        uniform: whether every group of a kind keeps the same counts, as a plain config can say.
        round_to: kept MLP widths are multiples of this.
        min_keep: share of the units of every group that stays whatever the curves say.
        keep: the same for groups whose name matches a shell-style pattern; 1 leaves a group as it is.
        kinds: which groups are pruned, of `attention` and `mlp`.
        calibration: `self`, a text file, or a hub data set (see `fxprune.calibration.text`).
        text_field: field of calibration records that is read; `text`, or else chats, by default.
        samples: calibration sequences.
        seq_len: tokens of each.
        seed: of every random choice.
        reconstruct: what may change in the consumers (see `fxprune.structured.reconstruction`); None for the method's
            own way.
        biases: whether consumers may get biases; None means yes, except for uniform plans, which would no longer load
            with a plain config. The reconstruction `dense` gives none.
        drift: how much of what the layers before lost a reconstruction asks back, from 0 to 1 (see
            `fxprune.structured.reconstruction`).
        forward_dtype: precision of the forward passes' products; `auto` is bfloat16 where the machine is faster in it.
        batch_size: calibration samples at once; None finds it.
        signals: directory where the gradients of the loss are kept for later runs, and found again if text, weights and
            all else are the same (see `fxprune.calibration.kept_signals`); for methods that read them.
    """

    reconstruction: ClassVar[Reconstruction] = "none"
    """What the method does with the consumers unless told otherwise."""
    prunes: ClassVar[bool] = True
    guarded: ClassVar[bool] = True
    own_uniform: ClassVar[bool] = False
    """Whether the method prunes uniformly unless told otherwise."""
    own_kinds: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    needs_data: ClassVar[bool] = True
    """Whether `curves` reads the calibration text."""
    reads_loss: ClassVar[bool] = False
    """Whether the method reads the loss of a language model; its gradients may be kept in `signals`."""
    inverts: bool = False
    """Whether the curves need the inverse of the Gram matrices."""

    def __init__(
        self,
        *,
        ratio: float | Sequence[float] | None = None,
        target_params: float | Sequence[float] | None = None,
        target_macs: float | Sequence[float] | None = None,
        target_bytes: float | Sequence[float] | None = None,
        target_speedup: float | Sequence[float] | None = None,
        table: str | None = None,
        mix: Mapping[str, float] | None = None,
        threads: int = 2,
        speed_rounds: int = _SPEED_ROUNDS,
        uniform: bool | None = None,
        round_to: int = 8,
        min_keep: float = 0.1,
        keep: Mapping[str, float] | None = None,
        kinds: Sequence[str] | None = None,
        calibration: str = "self",
        text_field: str | None = None,
        samples: int = 128,
        seq_len: int = 512,
        seed: int = 0,
        reconstruct: Reconstruction | None = None,
        biases: bool | None = None,
        drift: float = 0.0,
        forward_dtype: str = "auto",
        batch_size: int | None = None,
        signals: str | None = None,
    ) -> None:
        self.ratio = ratio
        self.target_params = target_params
        self.target_macs = target_macs
        self.target_bytes = target_bytes
        self.target_speedup = target_speedup
        self.table = table
        self.mix = mix
        self.threads = threads
        self.speed_rounds = speed_rounds
        self.uniform = self.own_uniform if uniform is None else uniform
        self.round_to = round_to
        self.min_keep = min_keep
        self.keep = dict(keep or {})
        self.kinds = tuple(kinds or self.own_kinds)
        self.calibration = calibration
        self.text_field = text_field
        self.samples = samples
        self.seq_len = seq_len
        self.seed = seed
        self.reconstruct = self.reconstruction if reconstruct is None else reconstruct
        self.biases = (not self.uniform) if biases is None else biases
        if biases and self.reconstruct == "dense":
            raise UsageError("reconstruct=dense gives no biases; use bias, ridge or auto, or leave biases out")
        self.drift = drift
        self.forward_dtype = forward_dtype
        self.batch_size = batch_size
        self.signals = signals
        self.targets = self._targets()
        self._check()

    def _targets(self) -> tuple[Target, ...]:
        given = [(name, getattr(self, name)) for name in _TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"{self.name} needs one target, of {', '.join(_TARGETS)}; {len(given)} were given")
        ((name, value),) = given
        values = value if isinstance(value, (list, tuple)) else (value,)
        if not values:
            raise UsageError(f"{name} is an empty list")
        kind = cast("TargetKind", name.removeprefix("target_"))
        return tuple(Target(kind, float(one)) for one in values)

    def _check(self) -> None:
        if self.round_to < 1:
            raise UsageError(f"round_to must be at least 1, got {self.round_to}")
        if not 0 <= self.min_keep < 1:
            raise UsageError(f"min_keep must lie in [0, 1), got {self.min_keep}")
        for pattern, share in self.keep.items():
            if not 0 <= share <= 1:
                raise UsageError(f"keep {pattern}: the share that stays must lie in [0, 1], got {share}")
        unknown = set(self.kinds) - {"attention", "mlp"}
        if unknown:
            raise UsageError(f"kinds are attention and mlp, got {min(unknown)!r}")
        if self.reconstruct not in get_args(Reconstruction):
            raise UsageError(f"reconstruct is one of {', '.join(get_args(Reconstruction))}, got {self.reconstruct!r}")
        if not 0 <= self.drift <= 1:
            raise UsageError(f"drift must lie in [0, 1], got {self.drift}")
        if self.drift and self.reconstruct in {"none", "dense"}:
            raise UsageError(
                f"reconstruct={self.reconstruct} runs nothing again, so drift={self.drift} has no part in it; use "
                "bias, ridge, auto or scale"
            )
        if self.signals is not None and not self.reads_loss:
            raise UsageError(f"{self.name} reads no gradients of the loss: leave signals out")
        self._check_speed()
        if self.forward_dtype != "auto":
            resolve_dtype(self.forward_dtype)
        self.calibration_spec()

    def _check_speed(self) -> None:
        if self.speed_rounds < 0:
            raise UsageError(f"speed_rounds must be 0 or more, got {self.speed_rounds}")
        if (self.table is not None) != (self.target_speedup is not None):
            raise UsageError("a latency table goes with target_speedup, and target_speedup with a latency table")
        if self.target_speedup is None and self.speed_rounds != _SPEED_ROUNDS:
            raise UsageError("speed_rounds are of target_speedup: leave them out")

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """The curves of a case's groups, by name. All losses must be in one unit.

        Every method has these, unless it finds its plans without (see `plans`).
        """
        raise NotImplementedError(f"{type(self).__name__} has neither curves nor plans of its own")

    def refine(self, case: Case, plan: Plan, within: Plan | None) -> Plan:
        """Change which units stay when it is known how many do; the shapes that stay must be the plan's.

        Args:
            case: what `curves` was given.
            plan: the knapsack's.
            within: the refined plan of the budget before, which nothing may be kept outside of.
        """
        del case, within
        return plan

    def finish(
        self, dense: Program, rebuilt: Program, kept: Mapping[str, Tensor], budgets: Budgets
    ) -> tuple[Program, dict[str, Any]]:
        """Change what is left after reconstruction; `rebuilt` as it is, by default.

        Args:
            dense: the program before.
            rebuilt: its consumers are 0 in the columns that are gone, and must stay so.
            kept: (in,) bool by consumer.
            budgets: what was learned from the text.

        Returns:
            The program, and what the report shall say of it; nothing if nothing was done.
        """
        del dense, kept, budgets
        return rebuilt, {}

    def costs(self, program: Program) -> CostModel:
        """What units cost in the target's terms.

        Raises:
            PreconditionError: the latency table was measured on something else.
        """
        table = None if self.table is None else load_table(self.table)
        if table is not None:
            table.check(program, threads=self.threads)
        return cost_model(self.targets[0].kind, program, self.scored(program), table, self.mix)

    def plans(self, case: Case, costs: CostModel, seconds: dict[str, float]) -> list[Plan]:
        """One plan for each value of the target, each within the one before; `seconds` gets the time of parts."""
        start = time.perf_counter()
        curves = self.curves(case)
        seconds["curves"] = time.perf_counter() - start
        start = time.perf_counter()
        values = [target.value for target in self.targets]

        def planned(values: Sequence[float]) -> list[Plan]:
            return plans_for(case.groups, curves, costs, values, uniform=self.uniform)

        plans = planned(values)
        seconds["allocate"] = time.perf_counter() - start
        if self.table is not None and self.speed_rounds:
            start = time.perf_counter()
            with PlanTimer(case.program, load_table(self.table), self.mix) as timer:
                plans, timed = corrected_plans(
                    planned, values, costs, groups=case.groups, clock=timer.time, rounds=self.speed_rounds
                )
            case.notes["timed_plans"] = [each.to_json() for each in timed]
            seconds["timing plans"] = time.perf_counter() - start
        start = time.perf_counter()
        refined: list[Plan] = []
        for plan in plans:
            refined.append(self.refine(case, plan, refined[-1] if refined else None))
        seconds["allocate"] += time.perf_counter() - start
        return refined

    def calibration_spec(self) -> CalibrationSpec:
        """Which calibration samples are wanted.

        Raises:
            UsageError: an option is out of range.
        """
        return CalibrationSpec(
            self.calibration, samples=self.samples, seq_len=self.seq_len, seed=self.seed, text_field=self.text_field
        )

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed: by the method, or by its reconstruction."""
        return self.needs_data or self.reconstruct != "none"

    def scored(self, program: Program) -> tuple[Group, ...]:
        """The groups that this pass prunes."""
        return tuple(
            group
            for group in program.groups
            if isinstance(group, (AttentionGroup, MlpGroup)) and group.kind in self.kinds
        )

    def left_alone(self, program: Program) -> dict[str, str]:
        """What is of this pass's kinds and stays whatever is asked: the reason by name, as it was refused."""
        passes = {f"locate_{kind}" for kind in self.kinds}
        found: dict[str, str] = {}
        for event in program.history:
            if event.name in passes:
                found |= event.details.get("refused", {})
        return found

    @contextmanager
    def saying_what_stays(self, program: Program) -> Iterator[None]:
        """A target that cannot be reached is told with what of the model is left alone, and why."""
        try:
            yield
        except PlanError as error:
            stays = self.left_alone(program)
            if not stays:
                raise
            name, why = next(iter(stays.items()))
            more = f" (and {len(stays) - 1} more)" if len(stays) > 1 else ""
            raise PlanError(f"{error}. What is left alone counts too: {name}, for {why}{more}") from error

    def requires(self, program: Program) -> None:
        """There are groups, each consumer belongs to one, and text can be run.

        Raises:
            PreconditionError: something is missing; the message lists what was found and what stood in the way.
        """
        groups = self.scored(program)
        if not groups:
            raise PreconditionError(_nothing_found(program))
        self.require_text(program)
        consumers = [piece.parameter for group in groups for piece in group.consumers]
        twice = sorted({name for name in consumers if consumers.count(name) > 1})
        if twice:
            raise PreconditionError(f"{twice[0]} reads two groups; its reconstruction could not be told apart")
        unmatched = [p for p in self.keep if not any(fnmatchcase(group.name, p) for group in groups)]
        if unmatched:
            raise UsageError(f"keep: {unmatched[0]!r} matches no group; they are {', '.join(g.name for g in groups)}")

    def require_text(self, program: Program) -> None:
        """Text can be run through the program, if it is read, and there is a loss on it, if that is read.

        Raises:
            PreconditionError: it cannot, or there is none; the message names the methods that work.
            UsageError: the text shall be sampled from a model that writes none.
        """
        if not self.reads_text:
            return
        if program.source is None:
            kind = "causal language model" if self.loss_reader() else "model that reads tokens"
            raise PreconditionError(f"{self.name} runs calibration text: it needs a Hugging Face {kind}")
        check_method(self, program.source.model_class, program.source.config)
        text_samples(program.interface, torch.zeros(1, self.seq_len, dtype=torch.long))

    def _limits(self, group: Group) -> Limits:
        shares = [share for pattern, share in self.keep.items() if fnmatchcase(group.name, pattern)]
        return Limits(self.round_to, max([self.min_keep, *shares]))

    def budgets(self, program: Program) -> Budgets:
        """Calibrate once, and plan for every value of the target.

        Raises:
            PlanError: no legal plan reaches one.
            UsageError: they are not in order.
            CalibrationError: the calibration text is too small.
        """
        groups = self.scored(program)
        costs = self.costs(program)
        budgets_of(costs, [target.value for target in self.targets])  # a wrong order is told before anything runs
        seconds: dict[str, float] = {}
        tokens, description = self._text(program, seconds)
        self._require_enough(program, groups, tokens)
        limits = {group.name: self._limits(group) for group in groups}
        dtype = forward_precision(self.forward_dtype, dtype_of(program), tokens.device)
        case = Case(program, groups, tokens, limits, dtype, self.batch_size, self.seed, self.signals)
        with naming_overflow(program, tokens, dtype), self.saying_what_stays(program):
            plans = self.plans(case, costs, seconds)
            if self.reconstruct == "dense" and not case.grams:
                start = time.perf_counter()
                collected: dict[str, Gram] = {}
                input_grams(
                    program,
                    consumer_names(groups),
                    tokens,
                    collected.update,
                    title="collecting",
                    forward_dtype=dtype,
                    batch_size=self.batch_size,
                )
                case.grams = collected
                seconds["grams"] = time.perf_counter() - start
        described = (tokens, description, seconds, case.notes)
        return Budgets(self.targets, tuple(plans), *described, case.grams, case.outputs)

    def _text(self, program: Program, seconds: dict[str, float]) -> tuple[Tensor, Mapping[str, Any] | None]:
        device = next(program.graph_module.parameters()).device
        if not self.reads_text:
            return torch.zeros(0, self.seq_len, dtype=torch.int64, device=device), None
        start = time.perf_counter()
        with naming_overflow(program, None):
            texts = texts_of(program, self.calibration_spec(), device)
        seconds["text"] = time.perf_counter() - start
        return texts.tokens.to(device), texts.description

    def _require_enough(self, program: Program, groups: Sequence[Group], tokens: Tensor) -> None:
        if not self.inverts and self.reconstruct not in {"ridge", "auto", "dense"}:
            return
        widest = max(get_attribute(program.graph_module, name).in_features for name in consumer_names(groups))
        if tokens.numel() < widest:
            length = tokens.shape[1]
            raise CalibrationError(
                f"{tokens.numel()} calibration tokens cannot tell {widest} inputs of a Linear apart: use at least "
                f"{-(-2 * widest // length)} samples of {length} tokens"
                + ("" if self.inverts else ", or reconstruct=none")
            )

    def goals(self) -> Sequence[Goal]:
        """See the base: one for each target, where there are several."""
        if len(self.targets) < 2:
            return ()
        grows = self.targets[0].kind in {"ratio", "speedup"}
        for one, other in itertools.pairwise(self.targets):
            if one.value == other.value or (other.value > one.value) != grows:
                way = "grow" if grows else "shrink"
                listed = ", ".join(f"{target.value:g}" for target in self.targets)
                raise UsageError(f"budgets go from loose to tight: values of {one.option} must {way}, got {listed}")
        names = [target.short for target in self.targets]
        if len(set(names)) < len(names):
            raise UsageError(f"budgets {', '.join(names)} lie too close together to be told apart")
        return tuple(
            Goal(target.short, str(target), target.option, target.value, speedup=target.kind == "speedup")
            for target in self.targets
        )

    def for_goals(self, program: Program) -> Sequence[Pass]:
        """See the base: one calibration, and plans each within the one before."""
        goals = self.goals()
        if not goals:
            return [self]
        planned = self.budgets(program)
        seconds = sum(planned.seconds.values())

        def apply(index: int, program: Program) -> PassResult:
            return self.apply(program, planned, index)

        return [
            OneGoal(self, goal, partial(apply, index), seconds=seconds, goals=len(goals))
            for index, goal in enumerate(goals)
        ]

    def apply(self, program: Program, budgets: Budgets, index: int) -> PassResult:
        """Reconstruct for one of the plans; the plan is left in `Program.plan`."""
        precision = forward_precision(self.forward_dtype, dtype_of(program), budgets.tokens.device)
        with naming_overflow(program, budgets.tokens, precision):
            return self._applied(program, budgets, index, precision)

    def _applied(self, program: Program, budgets: Budgets, index: int, precision: torch.dtype | None) -> PassResult:
        plan = budgets.plans[index]
        groups = self.scored(program)
        start = time.perf_counter()
        consumers = consumers_of(groups, plan, program.graph_module)
        if self.reconstruct == "dense":
            rebuilt, layers = reconstruct_on_grams(program, consumers, budgets.grams)
        else:
            rebuilt, layers = reconstruct_consumers(
                program,
                consumers,
                budgets.tokens,
                mode=self.reconstruct,
                biases=self.biases,
                drift=self.drift,
                forward_dtype=precision,
                batch_size=self.batch_size,
            )
        seconds = {**budgets.seconds, "reconstruct": time.perf_counter() - start}
        start = time.perf_counter()
        rebuilt, notes = self.finish(program, rebuilt, {name: one.kept for name, one in consumers.items()}, budgets)
        if notes:
            seconds["finish"] = time.perf_counter() - start
        total = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
        removed = self.removed_parameters(program, plan)
        section: dict[str, Any] = {
            "method": self.name,
            "target": str(budgets.targets[index]),
            "removed_share": removed / total,
            "uniform": self.uniform,
            "reconstruct": self.reconstruct,
            "consumers": layers,
            "seconds": seconds,
            **budgets.notes,
            **notes,
        }
        if stays := self.left_alone(program):
            section["left_alone"] = stays
        results = {} if budgets.description is None else {"calibration": budgets.description}
        after = rebuilt.replace(plan=plan).with_results(**results, structured=section)
        details = {
            "requested": str(budgets.targets[index]),
            "removed_share": removed / total,
            "biases": sum(bool(layer["bias"]) for layer in layers),
            "seconds": seconds,
        }
        return PassResult(after, modified=True, details=details)

    def removed_parameters(self, program: Program, plan: Plan) -> int:
        """Parameters of the block Linears that go with a plan."""
        return sum(group.parameters_removed(plan.kept_units(group)) for group in self.scored(program))

    def call(self, program: Program) -> PassResult:
        """Calibrate, plan, reconstruct; the plan is left in `Program.plan`.

        Raises:
            UsageError: there are several values of the target; use `budgets` and `apply`.
        """
        if len(self.targets) > 1:
            raise UsageError(f"{self.name} has {len(self.targets)} targets here; one program takes one")
        return self.apply(program, self.budgets(program), 0)

    def ensures(self, before: Program, after: Program) -> None:
        """The plan is legal.

        Raises:
            PostconditionError: there is no plan.
            PlanError: it is illegal.
        """
        del before
        if after.plan is None:
            raise PostconditionError(f"{self.name} left no plan")
        after.plan.validate(after.groups)


def _nothing_found(program: Program) -> str:
    """Why there is no group: candidates that were refused, and operators that pin channels; and what else to do."""
    if program.channels is None:
        return "no group that could be pruned was found: run locate_attention and locate_mlp first"
    refused = [f"{name}: {why}" for event in program.history for name, why in event.details.get("refused", {}).items()]
    pins = list(dict.fromkeys(map(str, program.channels.pins)))
    found = [("refused", refused), ("pinned by", pins)]
    listed = [
        f"{what} {'; '.join(lines[:_REASONS])}{f'; and {rest} more' if (rest := len(lines) - _REASONS) > 0 else ''}"
        for what, lines in found
        if lines
    ]
    why = f"no group that could be pruned was found. {'. '.join(listed) or 'The graph has no Linears between Linears'}"
    kinds = Counter(group.kind for group in program.groups)
    others = ", ".join(f"{count} of kind {kind}" for kind, count in kinds.items())
    return f"{why}. Other groups were found ({others}): a plan of your own may name them" if others else why
