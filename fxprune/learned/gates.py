"""Learned gates of a traced program: hard-concrete gates on its mask nodes, and what becomes of them.

    log_alpha ─ sample ─ values (units,) ─ mask ─ x * mask ─ o_proj / down_proj       training
    log_alpha ─ deterministic ─ values ─┬─ kept units: a Plan                         evaluation
                                        └─ columns of o_proj / down_proj * values     folded, exactly

Each MLP channel has a gate of its own, once, on what down_proj reads: in a gated MLP on act(gate) * up, behind the
activation, so that a soft gate is a factor of down_proj's column and of nothing else.

Query heads have the legal gates of `fxprune.learned.unit_gates.HeadGates`. Hidden channels and layers may have gates
too, which are decided to 0 or 1 at the end, where a plan says it all.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.core.errors import PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, LayerGroup
from fxprune.core.plan import Plan
from fxprune.core.registry import resolve
from fxprune.learned.hard_concrete import HardConcrete
from fxprune.learned.unit_gates import GroupGates, HeadGates, UnitGates
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.unit_masks import LayerGate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.fx import GraphModule, Node

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.learned.expected_size import OpenUnits
    from fxprune.learned.unit_gates import HeadScheme

__all__ = ["ProgramGates", "fold_gates", "plan_of_gates"]

# ---- a program -----------------------------------------------------------------------------------------------------


class ProgramGates(nn.Module):
    """The gates of a program, and its graph with a mask for each of them.

    The graph's weights are no parameters of this module: `parameters()` are the gates alone.

    Args:
        program: the dense, lifted, located program; it is left as it is.
        kinds: which groups get gates, of `attention`, `mlp`, `hidden` and `layers`; none for a graph without masks.
        heads: see `HeadGates`.
        drop_rate: probability of each unit to be closed at the start.

    Attributes:
        members: the gates, one for each group.
        graph_module: the masked graph; it shares all parameters with the program's. All gates are 1 outside `applied`.

    Raises:
        PreconditionError: there is no group of these kinds.
        UsageError: a kind cannot have gates.
    """

    def __init__(
        self,
        program: Program,
        *,
        kinds: Sequence[str] = ("attention", "mlp"),
        heads: HeadScheme = "both",
        drop_rate: float = 0.01,
    ) -> None:
        super().__init__()
        unknown = set(kinds) - {"attention", "mlp", "hidden", "layers"}
        if unknown:
            raise UsageError(f"gates are for attention, mlp, hidden and layers, not for {min(unknown)!r}")
        groups = [group for group in program.groups if group.kind in kinds]
        if kinds and not groups:
            raise PreconditionError(f"no {' or '.join(kinds)} group was found: run the locate passes first")
        device = next(program.graph_module.parameters()).device
        self.members = nn.ModuleList(
            HeadGates(group, heads, drop_rate, device)
            if isinstance(group, AttentionGroup)
            else UnitGates(group, drop_rate, device)
            for group in groups
        )
        masked, masks = _masked(program, groups)
        self._held = (masked,)  # in a tuple, so that its parameters are not the gates'
        self._masks = masks

    @property
    def graph_module(self) -> GraphModule:
        """The masked graph."""
        return self._held[0]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that have gates."""
        return tuple(gates.group for gates in self)

    def __iter__(self) -> Iterator[GroupGates]:
        for member in self.members:
            assert isinstance(member, GroupGates)
            yield member

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Random values of all gates, with gradients, by the group's name."""
        return {gates.group.name: gates.sample(generator) for gates in self}

    def soft(self) -> dict[str, Tensor]:
        """Values at evaluation, with gradients."""
        return {gates.group.name: gates.soft() for gates in self}

    def deterministic(self) -> dict[str, Tensor]:
        """Values at evaluation of a legal plan, without gradients."""
        return {gates.group.name: gates.deterministic() for gates in self}

    def ones(self) -> dict[str, Tensor]:
        """The values of the intact model."""
        device = next(self.parameters()).device
        return {gates.group.name: torch.ones(gates.group.units, device=device) for gates in self}

    def open_units(self) -> dict[str, OpenUnits]:
        """Open probabilities, with gradients: what `ExpectedSize` takes."""
        return {gates.group.name: gates.open_units() for gates in self}

    def start_from(self, scores: Mapping[str, Tensor], counts: Mapping[str, float], spread: float = 4.0) -> None:
        """Warm start; see `GroupGates.start_from`. Groups without scores stay as they are.

        Counts such as those of a plan that keeps everything are brought to half a unit less.
        """
        for gates in self:
            name = gates.group.name
            if name in scores:
                gates.start_from(scores[name], min(counts[name], gates.group.units - 0.5), spread)

    def set_offset(self, offset: float) -> None:
        """Add something to every gate's location, see `fxprune.learned.hard_concrete.HardConcrete`."""
        for part in self.modules():
            if isinstance(part, HardConcrete):
                part.offset = offset

    @contextmanager
    def applied(self, values: Mapping[str, Tensor]) -> Iterator[GraphModule]:
        """Put values into the masks, as long as the context lasts; gradients flow back to them.

        With activation checkpointing the backward pass runs the graph again, so it must lie within the context.

        Args:
            values: (units,) of every group, by name.

        Yields:
            The masked graph.
        """
        before = [(mask, mask.mask) for masks in self._masks.values() for mask, _ in masks]
        try:
            for name, masks in self._masks.items():
                for mask, index in masks:
                    mask.mask = values[name] if index is None else values[name][index]
            yield self.graph_module
        finally:
            for mask, old in before:
                mask.mask = old


_Mask = ChannelMask | LayerGate


def _masked(program: Program, groups: Sequence[Group]) -> tuple[GraphModule, dict[str, list[tuple[_Mask, int | None]]]]:
    """The graph with masks of ones, and which masks each group has; of a layer's gate also which layer."""
    insert_masks: Any = resolve("fxprune.passes.insert_masks:insert_masks")
    masked: GraphModule = insert_masks(
        program.graph_module, tuple(groups), Plan.of({g.name: range(g.units) for g in groups})
    )
    found: dict[str, list[tuple[_Mask, int | None]]] = {group.name: [] for group in groups}
    weights = dict(masked.named_parameters(remove_duplicate=False))
    owners: dict[int, list[tuple[Group, Tensor]]] = {}
    for group in groups:
        for piece in {"consumers": group.consumers, "producers": group.slices}.get(group.masked, ()):
            weight = weights[piece.parameter]
            unit_of = torch.full((weight.shape[piece.axis],), -1, dtype=torch.int64)
            unit_of[torch.from_numpy(piece.indices)] = torch.arange(group.units)[:, None]
            owners.setdefault(id(weight), []).append((group, unit_of))
    for node in masked.graph.nodes:
        mask = get_attribute(masked, str(node.target)) if node.op == "call_module" else None
        if isinstance(mask, LayerGate):
            stack = next(g for g in groups if isinstance(g, LayerGroup) and mask.label in g.labels)
            assert isinstance(stack, LayerGroup)
            found[stack.name].append((mask, stack.labels.index(mask.label)))
        elif isinstance(mask, ChannelMask):
            at = _reader(masked, node) if mask.place == "input" else _writer(masked, node)
            known = owners[id(at)]
            owner = next(group for group, unit_of in known if torch.equal(unit_of, mask.unit_of.cpu()))
            found[owner.name].append((mask, None))
    return masked, found


def _reader(masked: GraphModule, node: Node) -> Tensor:
    """The weight of the projection behind a mask; where two groups are read by one, a mask is behind a mask."""
    user = next(iter(node.users))
    module: Any = get_attribute(masked, str(user.target))
    return module.weight if is_projection(module) else _reader(masked, user)


def _writer(masked: GraphModule, node: Node) -> Tensor:
    """The weight of the projection, or the table, before a mask."""
    source = node.all_input_nodes[0]
    if source.op == "get_attr":
        return masked.get_parameter(str(source.target))
    module: Any = get_attribute(masked, str(source.target)) if source.op == "call_module" else None
    return module.weight if is_projection(module) else _writer(masked, source)


# ---- the end of training -------------------------------------------------------------------------------------------


def plan_of_gates(groups: Sequence[Group], values: Mapping[str, Tensor]) -> Plan:
    """The plan that keeps the units whose gates are more than 0.

    Args:
        groups: all groups of the program.
        values: (units,) by name.

    Raises:
        PlanError: the plan is not legal; values that do not come from `ProgramGates` need not be.
        UsageError: a value is negative or no number.
    """
    for name, value in values.items():
        if not bool((value >= 0).all()):
            raise UsageError(f"{name}: a gate is negative or not a number; training has diverged, use an earlier state")
    plan = Plan.of({name: torch.nonzero(value.detach() > 0).flatten().tolist() for name, value in values.items()})
    plan.validate(groups)
    return plan


def fold_gates(program: Program, values: Mapping[str, Tensor]) -> Program:
    """Multiply the columns of what reads units by the units' gates: exactly what the masks do.

    Args:
        program: the dense, lifted program without masks; it is left as it is.
        values: (units,) by the group's name, such as `ProgramGates.deterministic` gives.

    Returns:
        A program with new weights of these projections (columns of closed units are 0) and the plan of what stays;
        the passes `insert_masks`, `slim` and `verify` take it from there.

    Raises:
        PlanError, UsageError: see `plan_of_gates`; or a gate of a layer or hidden channel is neither 0 nor 1.
    """
    plan = plan_of_gates(program.groups, values)
    weights = dict(program.graph_module.named_parameters(remove_duplicate=False))
    factors: dict[int, Tensor] = {}
    for name, value in values.items():
        group = program.group(name)
        if group.masked != "consumers":
            if not bool(((value == 0) | (value == 1)).all()):
                raise UsageError(
                    f"{name}: the gate of a {group.unit} is neither 0 nor 1, which cannot be folded into weights; "
                    "decide it first, as deterministic() does"
                )
            continue
        for piece in group.consumers:
            weight = weights[piece.parameter]
            factor = factors.setdefault(id(weight), torch.ones(weight.shape[1], device=weight.device))
            columns = torch.from_numpy(np.ascontiguousarray(piece.indices)).to(weight.device)
            factor[columns] *= value.detach().to(factor)[:, None]
    # A weight that several projections share is scaled once and stays shared.
    names = [name for name in _projections(program) if id(weights[f"{name}.weight"]) in factors]
    root = own_projections(program.graph_module, names)
    scaled: dict[int, nn.Parameter] = {}
    for name in names:
        old = weights[f"{name}.weight"]
        if id(old) not in scaled:
            product = (old.detach().float() * factors[id(old)]).to(old.dtype)
            scaled[id(old)] = nn.Parameter(product, old.requires_grad)
        get_attribute(root, name).weight = scaled[id(old)]
    return program.replace(graph_module=root, plan=plan, channels=None)


def _projections(program: Program) -> list[str]:
    module = program.graph_module
    called = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    return [name for name in called if is_projection(get_attribute(module, name))]
