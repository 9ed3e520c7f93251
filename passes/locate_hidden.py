"""Finds the hidden dimension, and latents with a norm of their own, and names their channels.

    embedding ─┬───────────── add ─ ... ─ norm ─ lm_head
               └ norm ─ q ... o ┘                               =>  HiddenGroup: every weight along the residual stream

    q_a = Linear(x) ─ norm ─ q_b = Linear(...)                   =>  HiddenGroup: the latent between them

Its channels are normalised together. That is no obstacle where the norms are RMS norms with a weight: slimming rescales
weight and epsilon (`fxprune.slimming.norms`).

Refused, and listed in the details with the reason:
 1. channels that are pinned;
 2. a norm that cannot be rescaled exactly, by name: LayerNorm, a norm without a weight, a weight of something else;
 3. channels that own different numbers of weights;
 4. channels that weights outside the graph may read or write (see `fxprune.tracing.unreached`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.channels.locate import (
    LocatePass,
    NormIndex,
    alike,
    between_linears,
    elements_per_index,
    expert_axes,
    pinned_reason,
    unique_name,
)
from fxprune.core.groups import HiddenGroup, collect_slices, common_owner
from fxprune.core.parts import parts_of
from fxprune.slimming.norms import find_rms_norm
from fxprune.tracing.unreached import meets_width

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

    from fxprune.core.channel_ids import ChannelMap, IdArray, NormSite
    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["LocateHidden"]


def _cannot_rescale(
    program: Program, channels: ChannelMap, norm: NormSite, classes: IdArray, nodes: Mapping[str, Node]
) -> str | None:
    """Why a norm cannot be made narrower exactly, None when it can."""
    node = nodes[norm.node]
    where = f"{norm.module or 'the model'} ({norm.kind})"
    if find_rms_norm(program.graph_module, node) is None:
        return f"{where} is not an RMS norm with a weight of its own: it cannot be narrowed exactly"
    if not np.isin(channels.class_of[norm.ids], classes).all() or len(norm.ids) != norm.width:
        return f"{where} normalises these channels together with others"
    return None


def _multiple(program: Program, names: list[str]) -> int:
    """Grouped products need rows of whole 16 bytes."""
    tensors = program.graph_module.state_dict(keep_vars=True)
    return max((16 // tensors[name].element_size() for name in names), default=1)


class LocateHidden(LocatePass):
    """Name the channels of residual streams and latents (see the module's docstring for graph and refusals)."""

    name = "locate_hidden"
    finds = (HiddenGroup,)

    def locate(self, program: Program, kept: tuple[Group, ...], refused: dict[str, str]) -> list[HiddenGroup]:
        """A `HiddenGroup` for every stream and latent; near misses are listed with reasons."""
        channels = program.channels
        assert channels is not None
        norm_index = NormIndex(channels)
        normed = norm_index.together
        candidates = [c for c in alike(channels, between_linears(channels) & normed) if normed[c].all()]
        nodes = {node.name: node for node in program.graph_module.graph.nodes}
        elements, experts = elements_per_index(program), expert_axes(channels)
        groups: list[HiddenGroup] = []
        all_slices, all_parts = collect_slices(channels, candidates, elements), parts_of(channels, candidates)
        for classes, slices, parts in zip(candidates, all_slices, all_parts, strict=True):
            norms = norm_index.over(classes)
            reason = pinned_reason(channels, classes)  # refusal 1
            if reason is None:  # refusal 2
                why = (_cannot_rescale(program, channels, norm, classes, nodes) for norm in norms)
                reason = next((text for text in why if text), None)
            if reason is None and (outside := meets_width(program.unreached, len(classes))):  # refusal 4
                reason = f"{outside}, which the traced sample does not reach, has an axis of them or of a multiple"
            if reason is None and slices is None:
                reason = "its channels own different numbers of weights"  # refusal 3
            if reason is None and isinstance(parts, str):
                reason = parts
            owner = common_owner([s.parameter for s in slices if s.role]) if slices else ""
            if reason is not None or slices is None or isinstance(parts, str):
                refused[f"{owner or 'model'}: {len(classes)} channels"] = str(reason)
                continue
            name = unique_name(owner or "model", HiddenGroup.kind, (*kept, *groups))
            modules = tuple(dict.fromkeys(norm.module for norm in norms))
            multiple = _multiple(program, [s.parameter for s in slices if s.parameter in experts])
            groups.append(HiddenGroup(name, len(groups), slices, parts=parts, norms=modules, multiple=multiple))
        return groups
