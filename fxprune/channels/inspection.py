"""Inspection: what a located program has to prune, what it costs, what must stay, and which weights are one.

Everything is read from the program's graph, channel map and groups; no weights are needed, so a model on the meta
device will do. Module names label what is returned; numbers in them are replaced where like things are listed once.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fxprune.channels.accounting import count_parameters, macs_per_token, removed_share
from fxprune.channels.attention_shapes import grouped_rows, propagated_shapes
from fxprune.channels.block_linears import block_linear_parameters
from fxprune.core.groups import LayerGroup
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.nodes import get_attribute, module_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fxprune.core.groups import Group, UnitSlice
    from fxprune.core.program import Program

__all__ = [
    "GroupCost",
    "Inspection",
    "PinSummary",
    "Refusal",
    "SharedWeight",
    "TiedWeights",
    "inspect_groups",
    "like_names",
    "shared_weights",
    "tied_weights",
]

_NUMBER = re.compile(r"(?<![^\W\d_])\b\d+\b")


@dataclass(frozen=True)
class GroupCost:
    """A group with what goes when its units do.

    Attributes:
        name: name of the group.
        kind: `attention`, `mlp`, `hidden`, `experts`, `expert_mlp` or `layers`.
        layer: position among the groups of its kind.
        unit: what one unit is called.
        units: how many there are.
        description: widths and form in one line.
        unit_parameters: parameters that go with one unit (the average one where units differ).
        shared_parameters: parameters that go besides, once the last unit that shares them has gone (a KV head's).
        parameters: parameters that all units own, with what they share.
        unit_macs: multiply-accumulates (MACs) per token in Linears that go with one unit. Attention scores, which
            depend on the length of the context, are not in it; an expert has none but its router's, because a token
            is sent to as many experts as before.
        shared_macs: MACs per token that go with what is shared.
        macs: MACs per token of all units, with what they share.
        removed_share: share of all parameters of the model that goes with one unit.
    """

    name: str
    kind: str
    layer: int
    unit: str
    units: int
    description: str
    unit_parameters: int
    shared_parameters: int
    parameters: int
    unit_macs: float
    shared_macs: float
    macs: float
    removed_share: float


@dataclass(frozen=True)
class PinSummary:
    """Pins that are alike but for numbers in their module's name.

    Attributes:
        op: operator that pins.
        module: name of the module with `*` for the numbers that differ.
        reason: why the channels stay.
        count: how many pins.
        channels: how many channels they hold, all together.
    """

    op: str
    module: str
    reason: str
    count: int
    channels: int

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.op}{where}: {self.reason}{times}"


@dataclass(frozen=True)
class Refusal:
    """Near misses that a locate pass listed, alike but for numbers: which pass, where, why, and how many."""

    by: str
    where: str
    reason: str
    count: int


@dataclass(frozen=True)
class TiedWeights:
    """Names of one and the same parameter, and its elements."""

    names: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class SharedWeight:
    """A parameter that is used several times: by several modules, or by one that is called again.

    Attributes:
        name: qualified name of the parameter.
        uses: qualified names of the modules that use it, one entry a use, in graph order.
    """

    name: str
    uses: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """All that `fxprune inspect` tells.

    Attributes:
        model: name of the model.
        model_class: class that was traced.
        parameters: elements of all parameters, tied ones once.
        block_parameters: those of the block Linears.
        macs: MACs per token of all Linears, the output projection included.
        lm_head_macs: those of the output projection.
        uncounted: products whose MACs are in no figure (see `fxprune.channels.accounting.MacCount`).
        groups: every group with its cost, by kind and layer.
        pins: what must stay and why.
        refusals: what looks like a group and is none.
        tied: names of one tensor.
        shared: parameters used more than once.
    """

    model: str
    model_class: str
    parameters: int
    block_parameters: int
    macs: int
    lm_head_macs: int
    uncounted: tuple[str, ...]
    groups: tuple[GroupCost, ...]
    pins: tuple[PinSummary, ...]
    refusals: tuple[Refusal, ...]
    tied: tuple[TiedWeights, ...]
    shared: tuple[SharedWeight, ...]

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON data; a group's units are `dense`, as in a report."""
        data = asdict(self)
        for group in data["groups"]:
            group["dense"] = group.pop("units")
        return data


def inspect_groups(program: Program) -> Inspection:
    """Gather what there is to know about a located program.

    Args:
        program: a program that the locate passes went over, on any device, meta included.

    Returns:
        The inspection.
    """
    module, interface = program.graph_module, program.interface
    total = count_parameters(module)
    count = macs_per_token(module, outputs=interface.outputs)
    uses = _macs_per_element(program)
    groups = sorted(program.groups, key=lambda group: (group.kind, group.layer))
    eager = program.references.get("eager")
    return Inspection(
        model=program.source.name if program.source else "nn.Module",
        model_class=type(eager.module).__name__ if eager else "GraphModule",
        parameters=total,
        block_parameters=block_linear_parameters(module, outputs=interface.outputs),
        macs=count.linear,
        lm_head_macs=count.lm_head,
        uncounted=_alike(count.uncounted),
        groups=tuple(_cost(group, uses, total) for group in groups),
        pins=_pins(program),
        refusals=_refusals(program),
        tied=tied_weights(eager.module if eager else module),
        shared=shared_weights(program),
    )


# --- costs ----------------------------------------------------------------------------------------------------------


def _macs_per_element(program: Program) -> dict[str, tuple[Fraction, int]]:
    """For each weight of a projection: MACs per token and element, and its elements.

    A Linear's element is one MAC for every call; an expert's only for the share of tokens that is sent to it.
    """
    root = program.graph_module
    rows = grouped_rows(root, propagated_shapes(root, program.interface.example_inputs))
    names: dict[int, str] = {}
    for name, tensor in root.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    uses: dict[str, tuple[Fraction, int]] = {}
    for node in root.graph.nodes:
        module = get_attribute(root, str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Module) and is_projection(module):
            weight: Any = module.weight
            share = rows[node] / weight.shape[0] if node in rows else Fraction(1)
            before, _ = uses.get(names[id(weight)], (Fraction(0), 0))
            uses[names[id(weight)]] = (before + share, weight.numel())
    return uses


def _macs(slices: Iterable[UnitSlice], uses: Mapping[str, tuple[Fraction, int]]) -> Fraction:
    """MACs per token that go with one unit's (or one sharing set's) rows and columns."""
    return sum(
        (uses[s.parameter][0] * s.per_unit * s.elements for s in slices if s.role in {"rows", "columns"}), Fraction(0)
    )


def _cost(group: Group, uses: Mapping[str, tuple[Fraction, int]], total: int) -> GroupCost:
    unit_macs, shared_macs = _macs(group.slices, uses), _macs(group.shared, uses)
    if isinstance(group, LayerGroup):
        of_layers = sum(
            (uses[name][0] * uses[name][1] for m in group.members for name in m if name in uses), Fraction(0)
        )
        unit_macs = of_layers / max(1, group.units)
    sets = 0 if group.sharing is None else len(np.unique(group.sharing))
    return GroupCost(
        name=group.name,
        kind=group.kind,
        layer=group.layer,
        unit=group.unit,
        units=group.units,
        description=group.describe(),
        unit_parameters=group.unit_parameters,
        shared_parameters=group.shared_parameters,
        parameters=group.parameters_removed([]),
        unit_macs=float(unit_macs),
        shared_macs=float(shared_macs),
        macs=float(unit_macs * group.units + shared_macs * sets),
        removed_share=removed_share(total, total - group.unit_parameters) or 0.0,
    )


# --- what must stay -------------------------------------------------------------------------------------------------


def like_names(name: str) -> str:
    """A name with `*` for every number that stands alone in it: `layers.3.mlp` becomes `layers.*.mlp`."""
    return _NUMBER.sub("*", name)


def _once(patterns: Mapping[Any, list[str]], key: Any) -> str:
    """The name itself where there is one, the pattern where there are several."""
    names = patterns[key]
    return names[0] if len(set(names)) == 1 else like_names(names[0])


def _alike(names: Iterable[str]) -> tuple[str, ...]:
    """Names, those that differ by numbers only once with their count."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(like_names(name), []).append(name)
    return tuple(_once(found, key) + (f" ({len(v)} times)" if len(v) > 1 else "") for key, v in found.items())


def _pins(program: Program) -> tuple[PinSummary, ...]:
    modules: dict[tuple[str, str, str], list[str]] = {}
    channels: Counter[tuple[str, str, str]] = Counter()
    for pin in program.channels.pins if program.channels is not None else []:
        key = (pin.op, like_names(pin.module), pin.reason)
        modules.setdefault(key, []).append(pin.module)
        channels[key] += len(np.unique(pin.ids))
    return tuple(
        PinSummary(key[0], _once(modules, key), key[2], len(found), channels[key]) for key, found in modules.items()
    )


def _refusals(program: Program) -> tuple[Refusal, ...]:
    places: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for event in program.history:
        for where, reason in event.details.get("refused", {}).items():
            key = (event.name, like_names(where), like_names(reason))
            places.setdefault(key, []).append((where, reason))
    return tuple(
        Refusal(key[0], *(found[0] if len(found) == 1 else key[1:]), len(found)) for key, found in places.items()
    )


# --- weights that are one -------------------------------------------------------------------------------------------


def tied_weights(module: nn.Module) -> tuple[TiedWeights, ...]:
    """Parameters that a module holds under several names."""
    names: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        sizes[id(parameter)] = parameter.numel()
    return tuple(TiedWeights(tuple(found), sizes[key]) for key, found in names.items() if len(found) > 1)


def shared_weights(program: Program) -> tuple[SharedWeight, ...]:
    """Parameters that the graph reads more than once: tied ones, and those of layers that are called again."""
    root = program.graph_module
    names: dict[int, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    uses: dict[str, list[str]] = {}
    for node in root.graph.nodes:
        if node.op == "call_module":
            held = get_attribute(root, str(node.target)).named_parameters()
            for name in {names[id(parameter)] for _, parameter in held}:
                uses.setdefault(name, []).append(str(node.target))
        elif node.op == "get_attr" and id(value := get_attribute(root, str(node.target))) in names:
            for user in node.users:
                uses.setdefault(names[id(value)], []).append(module_of(user) or user.name)
    # Operators of one module that all read a parameter (the two products of a norm) are one use.
    calls = {name: Counter(found) for name, found in uses.items()}
    linears = {str(node.target) for node in root.graph.nodes if node.op == "call_module"}
    merged = {
        name: tuple(use for use, times in count.items() for _ in range(times if use in linears else 1))
        for name, count in calls.items()
    }
    return tuple(SharedWeight(name, found) for name, found in merged.items() if len(found) > 1)
