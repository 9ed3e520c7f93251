"""Latency tables: what each block of a model costs in milliseconds at each width, measured on one machine.

    time of a case = base (what pruning blocks does not touch) + sum over blocks of ms(kind of block, width)

Only differences of times can be measured, so a block's cost is set to be proportional to its width below the narrowest
width that was measured; the rest is base. Predictions do not depend on where that line is drawn. Between measured
widths the cost is interpolated linearly, and it never falls with the width: noise is pooled away.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.core.errors import PlanError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, ExpertMlpGroup, MlpGroup
from fxprune.core.output import write_json
from fxprune.measure.speed import Case, machine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program

__all__ = [
    "CaseLatency",
    "Identity",
    "LatencyTable",
    "Surface",
    "Width",
    "block_shape",
    "case_weights",
    "dense_width",
    "has_width",
    "identity_of",
    "load_table",
    "save_table",
    "width_of",
]

SCHEMA_VERSION = 1
_FORMAT = "fxprune latency table"


# ---- widths --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Width:
    """How much of a block is kept: `sets` KV heads with `per_set` query heads each, or `sets` channels."""

    sets: int
    per_set: int = 1

    def __str__(self) -> str:
        return f"{self.sets}x{self.per_set}" if self.per_set > 1 else f"{self.sets}"


def has_width(group: Group) -> bool:
    """Whether a table has costs for groups like this: attentions, MLPs, and MLPs of experts."""
    return isinstance(group, (AttentionGroup, MlpGroup, ExpertMlpGroup))


def width_of(group: Group, kept: Sequence[int]) -> Width:
    """The width of a group when the units `kept` stay: of a legal plan, see `Plan.validate`."""
    if isinstance(group, AttentionGroup):
        sets = len(group.kv_kept(kept))
        return Width(sets, len(kept) // max(1, sets))
    return Width(len(kept) // (group.experts if isinstance(group, ExpertMlpGroup) else 1))


def dense_width(group: Group) -> Width:
    """The width of a group of which everything stays."""
    return width_of(group, range(group.units))


def block_shape(group: Group) -> str:
    """A key that groups of equal cost share: kind, units, and the parameters behind each; no names, no weights."""
    head = f"-dim{group.head_dim}" if isinstance(group, AttentionGroup) else ""
    head += "" if group.parts is None else f"-parts{len(group.parts)}"
    return f"{group.kind}-{dense_width(group)}{head}-{group.unit_parameters}+{group.shared_parameters}"


@dataclass(frozen=True)
class Surface:
    """Milliseconds of one block by its width: linear between what was measured, and from the narrowest to 0 at none.

    Attributes:
        sets: measured numbers of KV heads or channels, ascending.
        per_set: measured numbers of query heads per KV head, ascending; (1,) where there is no such choice.
        ms: (sets, per_set) milliseconds, never falling along either axis.
    """

    sets: tuple[int, ...]
    per_set: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, sets: Sequence[int], per_set: Sequence[int], saved: ArrayLike) -> Surface:
        """Fit to what narrowing one block saves.

        Args:
            sets: see the class.
            per_set: see the class.
            saved: (sets, per_set) milliseconds saved by narrowing a block to that width; measured, so noisy.
        """
        times = _monotone(-np.asarray(saved, dtype=np.float64))
        # The two narrowest widths along the longer axis give the line that reaches 0 at width 0.
        line, widths = (times[:, -1], sets) if len(sets) > 1 else (times[0], per_set)
        first = 0.0 if len(widths) < 2 else (line[1] - line[0]) / (widths[1] - widths[0]) * widths[0]
        times = times - line[0] + first
        times = times - min(0.0, float(times.min()))
        return cls(tuple(sets), tuple(per_set), tuple(tuple(float(ms) for ms in row) for row in times))

    def at(self, width: Width) -> float:
        """Milliseconds of a block of this width."""
        along = [np.interp(width.per_set, self.per_set, row) for row in self.ms]
        return float(np.interp(width.sets, (0, *self.sets), (0.0, *along)))


def _monotone(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A nearby grid that never falls along an axis: least squares along each in turn, then a running maximum."""
    for _ in range(20):
        values = np.apply_along_axis(_pooled, 0, np.apply_along_axis(_pooled, 1, values))
    return np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)


def _pooled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Isotonic least squares by pooling adjacent violators (Barlow et al. 1972), (n,)."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, many), (before, few) = pools.pop(), pools.pop()
            pools.append(((last * many + before * few) / (many + few), many + few))
    return np.concatenate([np.full(count, mean) for mean, count in pools])


# ---- what a table was measured on ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Model, runtime and machine: times hold for these and no others.

    Attributes:
        model: sha256 of the structure: shapes and precision of all parameters and of the cache, kinds and widths of
            the blocks. Weights and names are not in it.
        summary: the structure in words.
        runtime: such as `"onnxruntime"`.
        runtime_version: its version.
        threads: of the runtime.
        cpu: the processor's model name.
        cores: cores that the process may use.
    """

    model: str
    summary: str
    runtime: str
    runtime_version: str
    threads: int
    cpu: str
    cores: int

    def differences(self, other: Identity) -> list[str]:
        """What differs, one phrase each: `self` is what a table says, `other` what is here."""
        labels = {
            "runtime": "runtime",
            "runtime_version": f"{self.runtime} version",
            "threads": "threads",
            "cpu": "processor",
            "cores": "usable cores",
        }
        found = [
            f"{label}: {getattr(self, name)} in the table, {getattr(other, name)} here"
            for name, label in labels.items()
            if getattr(self, name) != getattr(other, name)
        ]
        if self.model != other.model:
            there, here = (f"{side.summary} [{side.model[:8]}]" for side in (self, other))
            found.insert(0, f"model: {there} in the table, {here} here")
        return found


def identity_of(program: Program, *, threads: int, runtime: str = "onnxruntime") -> Identity:
    """The identity of a located, dense program on this machine.

    Raises:
        PreconditionError: the runtime is not installed.
    """
    facts = machine()
    if runtime not in facts:
        raise PreconditionError(f"{runtime} is not installed here, so nothing can be timed with it; install it")
    model, summary = _structure(program)
    cores = int(facts.get("usable_cores", facts.get("logical_cores", 0)))
    return Identity(model, summary, runtime, str(facts[runtime]), threads, str(facts.get("cpu", "unknown")), cores)


def _structure(program: Program) -> tuple[str, str]:
    """Hash and summary of a program's structure."""
    parameters = [(str(p.dtype), tuple(p.shape)) for p in program.graph_module.parameters()]
    shapes = Counter(f"{dtype}{shape}" for dtype, shape in parameters)
    examples = program.interface.example_inputs
    cache = [(examples[entry.input].shape[1], examples[entry.input].shape[3]) for entry in program.interface.cache]
    blocks = Counter(block_shape(group) for group in program.groups if has_width(group))
    facts = {"parameters": sorted(shapes.items()), "cache": cache, "blocks": sorted(blocks.items())}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    count = sum(math.prod(shape) for _, shape in parameters)
    dtypes = "/".join(sorted({dtype.removeprefix("torch.") for dtype, _ in parameters}))
    listed = ", ".join(f"{number} x {shape}" for shape, number in sorted(blocks.items()))
    return digest, f"{count:,} parameters in {dtypes} ({listed or 'no blocks'})"


# ---- mixes of workloads ---------------------------------------------------------------------------------------------


def case_weights(cases: Sequence[Case], mix: Mapping[str, float]) -> dict[str, float]:
    """The share of each case in a mix, in sum 1, by name.

    Args:
        cases: the workloads that were measured.
        mix: weights by name of a case (`"prefill-512"`), or by kind (`"prefill"`) where there is one of it.

    Raises:
        UsageError: a case is unknown or ambiguous, or a weight is negative or not finite, or all are 0.
    """
    shares = {case.name: 0.0 for case in cases}
    for wanted, weight in mix.items():
        found = [case.name for case in cases if wanted in {case.name, case.kind}]
        if len(found) != 1:
            raise UsageError(f"{wanted!r} names {len(found)} of the measured cases; they are {', '.join(shares)}")
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"the weight of {wanted!r} is {weight}; give a number from 0 up")
        shares[found[0]] += weight
    total = sum(shares.values())
    if not total:
        raise UsageError(f"no case has a weight; give one of {', '.join(shares)} more than 0")
    return {name: share / total for name, share in shares.items()}


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseLatency:
    """The costs of one workload.

    Attributes:
        case: the workload.
        dense_ms: milliseconds of the dense model: of the step for prefill, per token for decoding.
        blocks: costs of a block, by `block_shape`.
        base_ms: milliseconds of all that narrowing blocks does not touch (may be slightly off 0 for noise).
    """

    case: Case
    dense_ms: float
    blocks: Mapping[str, Surface]
    base_ms: float


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds by block and width, see the module's docstring.

    Attributes:
        identity: what it was measured on.
        cases: the workloads.
        measurements: JSON data of each measured variant: median times, interval, repeats.
    """

    identity: Identity
    cases: tuple[CaseLatency, ...]
    measurements: tuple[Mapping[str, Any], ...] = field(default=())

    def check(self, program: Program, *, threads: int) -> None:
        """Refuse to speak of anything but what was measured.

        Args:
            program: the located, dense program.
            threads: that the deployed model will have.

        Raises:
            PreconditionError: model, runtime, its version, the threads or the processor differ.
        """
        here = identity_of(program, threads=threads, runtime=self.identity.runtime)
        if different := self.identity.differences(here):
            raise PreconditionError(
                f"the latency table was measured on something else: {'; '.join(different)}. Times do not carry over: "
                "build one here with `fxprune bench MODEL --table FILE`"
            )

    def ms(self, group: Group, kept: Sequence[int] | Width) -> dict[str, float]:
        """Milliseconds of one block when the units `kept` stay (or at a width), by name of the case.

        Raises:
            PlanError: the table has no costs for blocks like this.
        """
        width = kept if isinstance(kept, Width) else width_of(group, kept)
        shape = block_shape(group)
        if any(shape not in case.blocks for case in self.cases):
            raise PlanError(
                f"{group.name}: the latency table has no times for {group.kind} blocks like this ({shape}); it knows "
                f"{', '.join(self.cases[0].blocks) or 'none'}"
            )
        return {case.case.name: case.blocks[shape].at(width) for case in self.cases}

    def predict(self, groups: Sequence[Group], plan: Plan) -> dict[str, float]:
        """Milliseconds of the model that a plan makes, by name of the case.

        Args:
            groups: the groups of the dense model.
            plan: which units stay.

        Raises:
            PlanError: the plan removes units of a kind that the table has no times for.
        """
        times = {case.case.name: case.dense_ms for case in self.cases}
        for group in groups:
            kept = plan.kept_units(group)
            if len(kept) == group.units:
                continue
            dense = self.ms(group, dense_width(group))
            for name, slim in self.ms(group, kept).items():
                times[name] += slim - dense[name]
        return times

    def weights(self, mix: Mapping[str, float]) -> dict[str, float]:
        """The share of each case in a mix, see `case_weights`."""
        return case_weights([case.case for case in self.cases], mix)

    def cost(self, group: Group, kept: Sequence[int] | Width, mix: Mapping[str, float]) -> float:
        """The share of the dense model's time that a block takes at a width: a knapsack's cost.

        In a mix each case counts by its own dense time: sum over cases of weight * ms / dense_ms.

        Raises:
            PlanError, UsageError: see `ms` and `weights`.
        """
        times, shares = self.ms(group, kept), self.weights(mix)
        return sum(shares[case.case.name] * times[case.case.name] / case.dense_ms for case in self.cases)

    def base(self, mix: Mapping[str, float]) -> float:
        """The share of the dense model's time that narrowing blocks does not touch."""
        shares = self.weights(mix)
        return sum(shares[case.case.name] * case.base_ms / case.dense_ms for case in self.cases)

    def budget(self, speedup: float, mix: Mapping[str, float]) -> float:
        """What all blocks together may cost (see `cost`) so that the model is `speedup` times as fast.

        Raises:
            UsageError: the speed-up is not a number above 1, or the mix is wrong.
        """
        if not (math.isfinite(speedup) and speedup > 1):
            raise UsageError(f"a target speed-up must be a number above 1, got {speedup}")
        return 1 / speedup - self.base(mix)

    def speedup(self, cost: float, mix: Mapping[str, float]) -> float:
        """The speed-up when all blocks together cost `cost`; the inverse of `budget`."""
        return 1 / max(1e-12, cost + self.base(mix))

    def to_json(self) -> dict[str, Any]:
        """The table as JSON data."""
        cases = [
            {
                "name": case.case.name,
                "case": asdict(case.case),
                "dense_ms": case.dense_ms,
                "base_ms": case.base_ms,
                "blocks": {shape: asdict(surface) for shape, surface in case.blocks.items()},
            }
            for case in self.cases
        ]
        head = {"format": _FORMAT, "schema_version": SCHEMA_VERSION, "identity": asdict(self.identity)}
        return {**head, "cases": cases, "measurements": [dict(entry) for entry in self.measurements]}


def save_table(table: LatencyTable, path: Path | str) -> None:
    """Write a table, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    write_json(path, table.to_json())


def load_table(path: Path | str) -> LatencyTable:
    """Read a table; `LatencyTable.check` says whether it speaks of the model and machine at hand.

    Raises:
        UsageError: the file is missing, damaged, no latency table, or of a later schema.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a latency table: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise UsageError(f"{path} is no latency table; `fxprune bench MODEL --table FILE` writes one")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {data.get('schema_version')}, this fxprune reads {SCHEMA_VERSION}; build the "
            "table again"
        )
    try:
        cases = tuple(
            CaseLatency(
                Case(**entry["case"]),
                float(entry["dense_ms"]),
                {shape: _surface(surface) for shape, surface in entry["blocks"].items()},
                float(entry["base_ms"]),
            )
            for entry in data["cases"]
        )
        return LatencyTable(Identity(**data["identity"]), cases, tuple(data["measurements"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); build the table again") from error


def _surface(entry: Mapping[str, Any]) -> Surface:
    ms = tuple(tuple(float(value) for value in row) for row in entry["ms"])
    surface = Surface(tuple(entry["sets"]), tuple(entry["per_set"]), ms)
    if np.shape(ms) != (len(surface.sets), len(surface.per_set)):
        raise ValueError(f"{np.shape(ms)} times for {len(surface.sets)} x {len(surface.per_set)} widths")
    return surface
