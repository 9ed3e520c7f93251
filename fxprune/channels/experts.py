"""Experts of mixtures and the channels inside them, named; `fxprune.passes.locate_experts` draws the graph.

Asked only where a graph has grouped Linears.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fxprune.channels.locate import (
    NormIndex,
    activation_sites,
    alike,
    between_linears,
    elements_per_index,
    expert_axes,
    pinned_reason,
    unique_name,
)
from fxprune.core.groups import ExpertGroup, ExpertMlpGroup, collect_slices, common_owner
from fxprune.core.parts import parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import Node

    from fxprune.core.channel_ids import ChannelMap, IdArray, NormSite
    from fxprune.core.groups import Group, UnitSlice
    from fxprune.core.program import Program

__all__ = ["locate_expert_channels", "locate_experts"]


def _per_token(sites: Sequence[NormSite], nodes: Mapping[str, Node]) -> int:
    """The largest k of some top-ks."""
    counts = (nodes[site.node].args[1] for site in sites if site.kind == "topk")
    return max((count for count in counts if isinstance(count, int)), default=1)


def _per_part(
    channels: ChannelMap, classes: IdArray, sites: Sequence[NormSite], nodes: Mapping[str, Node], per_token: int
) -> int:
    """How many experts of each part must stay: what is chosen inside it, and a token's share of the parts it sees."""
    speakers = np.unique(channels.needs[classes].indices)  # what is chosen inside a part speaks for it
    among = [
        site
        for site in channels.norms
        if site.choice and site.rows is None and np.isin(channels.class_of[site.ids], speakers).all()
    ]
    seen = min((_per_token([site], nodes) for site in among if site.kind == "topk"), default=1)
    return max(_per_token(sites, nodes), -(-per_token // seen))


def locate_experts(
    program: Program, channels: ChannelMap, known: tuple[Group, ...], refused: dict[str, str]
) -> list[ExpertGroup]:
    """The experts of every mixture; `known` groups have names that are taken, `refused` gets near misses."""
    listed: dict[tuple[int, ...], IdArray] = {}
    for axis in expert_axes(channels).values():
        classes = channels.of_axis(axis)
        listed.setdefault(tuple(classes.tolist()), classes)
    candidates = list(listed.values())
    norms, nodes = NormIndex(channels), {node.name: node for node in program.graph_module.graph.nodes}
    groups: list[ExpertGroup] = []
    slices_of = collect_slices(channels, candidates, elements_per_index(program))
    for classes, slices, parts in zip(candidates, slices_of, parts_of(channels, candidates), strict=True):
        sites = norms.over(classes, together=True)
        reason = pinned_reason(channels, classes)
        if reason is None and slices is None:
            reason = "its experts own different numbers of weights"
        if reason is None and not any(site.kind == "topk" for site in sites):
            reason = "nothing chooses among its experts"  # refusal 2
        if reason is None and not all(site.choice for site in sites):
            reason = "its experts are normalised together"
        if reason is None and not channels.source[classes].all():
            reason = "something else needs its experts"
        if reason is None and isinstance(parts, str):
            reason = parts
        owner = common_owner([s.parameter for s in slices if s.role]) if slices else ""
        if reason is not None or slices is None or isinstance(parts, str):
            refused[f"{owner or 'model'}: {len(classes)} experts"] = str(reason)
            continue
        name = unique_name(owner, ExpertGroup.kind, (*known, *groups))
        choices = tuple(site.node for site in sites)
        per_token = _per_token([site for site in sites if site.rows is None], nodes)
        inside = [site for site in sites if site.rows is not None]
        per_part = _per_part(channels, classes, inside, nodes, per_token) if inside else 1
        groups.append(
            ExpertGroup(name, len(groups), slices, parts=parts, per_token=per_token, choices=choices, per_part=per_part)
        )
    return groups


def locate_expert_channels(
    program: Program, channels: ChannelMap, known: tuple[Group, ...], refused: dict[str, str]
) -> list[ExpertMlpGroup]:
    """The channels inside the experts of every mixture; arguments as for `locate_experts`."""
    experts = expert_axes(channels)
    inside = np.zeros(channels.count, dtype=bool)
    for axis in channels.axes:
        if axis.role == "columns" and axis.parameter in experts:
            inside[channels.of_axis(axis)] = True
    for axis in channels.axes:  # a class that any other Linear touches is not inside the experts
        if axis.role in {"rows", "columns"} and axis.parameter not in experts:
            inside[channels.of_axis(axis)] = False
    candidates = alike(channels, between_linears(channels) & inside)
    norms, activation = NormIndex(channels), activation_sites(channels)
    owners = _ExpertsOf(program, channels)
    tensors = program.graph_module.state_dict(keep_vars=True)
    groups: list[ExpertMlpGroup] = []
    slices_of = collect_slices(channels, candidates, elements_per_index(program))
    for classes, slices, parts in zip(candidates, slices_of, parts_of(channels, candidates), strict=True):
        reason = pinned_reason(channels, classes)
        if reason is None and parts is not None:
            reason = "a layout holds them in parts, and every expert keeps channels of its own"
        if reason is None and norms.over(classes, together=True):
            reason = "normalised together: removing a channel changes the others"
        if reason is None and (activation[classes] < 0).any():
            reason = "no activation between the grouped Linears"  # refusal 4
        count = 0
        if reason is None:
            count, reason = owners.count(slices)
        owner = common_owner([s.parameter for s in slices if s.role]) if slices else ""
        if reason is not None or slices is None:
            refused[f"{owner or 'model'}: {len(classes)} expert channels"] = str(reason)
            continue
        op = channels.activations[activation[classes].min()].op
        name = unique_name(owner, ExpertMlpGroup.kind, (*known, *groups))
        gated = sum(s.per_unit for s in slices if s.produces) > 1
        multiple = 16 // tensors[slices[0].parameter].element_size()
        own = tuple(replace(s, elements=s.elements // count) for s in slices)
        groups.append(
            ExpertMlpGroup(name, len(groups), own, multiple=multiple, experts=count, activation=op, gated=gated)
        )
    return groups


class _ExpertsOf:
    """How many experts own channels: the experts of grouped weights, and the first axis of every parameter."""

    def __init__(self, program: Program, channels: ChannelMap) -> None:
        self._channels = channels
        self._sizes = {
            name: t.shape[0] for name, t in program.graph_module.state_dict(keep_vars=True).items() if t.dim()
        }
        self._experts = expert_axes(channels)
        self._rows = {axis.parameter: axis for axis in reversed(channels.axes) if axis.axis == 0}

    def count(self, slices: tuple[UnitSlice, ...] | None) -> tuple[int, str | None]:
        """The number, or why that is not one number (refusal 3)."""
        if slices is None:
            return 0, "they own different numbers of weights"
        of = self._channels.of_axis
        first = of(next(self._experts[s.parameter] for s in slices if s.parameter in self._experts))
        for piece in slices:
            rows = self._rows.get(piece.parameter)
            along = piece.axis > 0 and rows is not None and self._sizes[piece.parameter] == len(first)
            if not along or rows is None or not np.array_equal(of(rows), first):
                return 0, f"{piece.parameter} has no axis of experts"
        return len(first), None
