"""The cut: everything that follows from a plan before a node is written.

Which ids stay, which indices each expert keeps, what constants RMS norms need, which layers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fxprune.core.errors import PlanError
from fxprune.core.groups import ExpertGroup, ExpertMlpGroup, HiddenGroup, LayerGroup
from fxprune.slimming.norms import find_rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch.fx import GraphModule

    from fxprune.core.channel_ids import ChannelMap, IdArray, NormSite
    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.slimming.norms import RmsNorm

__all__ = ["Cut", "decide", "removed_classes"]


@dataclass(frozen=True)
class Cut:
    """What a plan means for one graph.

    Attributes:
        keep: one boolean per channel id.
        own: by parameter and axis, the old indices that each expert keeps, (experts, kept).
        epsilons: by node name, the epsilon of an RMS norm over fewer channels.
        norms: by the name of a norm's weight, its constants and the share of channels that stays.
        skipped: by the node name of a layer's exit, the node name of its entry.
        dropped: outputs of the graph that are gone: caches of layers that are left out.
    """

    keep: NDArray[np.bool_]
    own: Mapping[tuple[str, int], IdArray] = field(default_factory=dict)
    epsilons: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, tuple[RmsNorm, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()


def removed_classes(channels: ChannelMap, groups: Sequence[Group], plan: Plan) -> IdArray:
    """The channel classes that a plan removes.

    Of channels inside experts, which are not the same in every expert, the last ones stand for those that go.

    Raises:
        PlanError: a unit to be removed is tied to something that must stay.
    """
    axes = {(axis.parameter, axis.axis): axis for axis in channels.axes}
    found = []
    for group in groups:
        removed = plan.removed_units(group)
        if removed and isinstance(group, ExpertMlpGroup):
            removed = list(range(len(plan.kept_units(group)) // group.experts, group.width))
        for piece in group.slices if removed else ():
            axis = axes[piece.parameter, piece.axis]
            classes = np.unique(channels.class_of[axis.ids()[piece.indices[removed].ravel()]])
            blocked = classes[~channels.source[classes]]
            if len(blocked):
                reasons = channels.pin_reasons(blocked)
                why = f": {reasons[0]}" if reasons else ""
                raise PlanError(f"{group.name}: {piece.parameter} axis {piece.axis} cannot be narrowed{why}")
            found.append(classes)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def decide(graph_module: GraphModule, channels: ChannelMap, groups: Sequence[Group], plan: Plan) -> Cut:
    """Work out a legal plan.

    Args:
        graph_module: the graph that will be slimmed.
        channels: its channel map.
        groups: the groups the plan speaks of.
        plan: which units stay.

    Raises:
        PlanError: the plan removes part of what is normalised together, or a unit that is tied to what must stay.
    """
    keep = channels.keep(removed_classes(channels, groups, plan))
    epsilons, norms = _norm_constants(graph_module, channels, groups, plan, keep)
    skipped: dict[str, str] = {}
    dropped: set[str] = set()
    own: dict[tuple[str, int], IdArray] = {}
    for group in groups:
        removed = plan.removed_units(group)
        if removed and isinstance(group, LayerGroup):
            skipped |= {group.exits[layer]: group.entries[layer] for layer in removed}
            dropped |= {name for layer in removed for name in group.caches[layer]}
        elif removed and isinstance(group, ExpertMlpGroup):
            own |= _own_indices(group, group.kept_channels(plan.kept_units(group)))
    return Cut(keep, own, epsilons, norms, skipped, frozenset(dropped))


def _own_indices(group: ExpertMlpGroup, kept: IdArray) -> dict[tuple[str, int], IdArray]:
    """For every parameter axis, the old index of each expert behind each position that stays."""
    own = {}
    width = kept.shape[1]
    for piece in group.slices:
        first = piece.indices[:width].ravel()
        order = np.argsort(first, kind="stable")
        slot = np.repeat(np.arange(width), piece.per_unit)[order]
        part = np.tile(np.arange(piece.per_unit), width)[order]
        own[piece.parameter, piece.axis] = piece.indices[kept[:, slot], part]
    return own


def _norm_constants(
    graph_module: GraphModule,
    channels: ChannelMap,
    groups: Sequence[Group],
    plan: Plan,
    keep: NDArray[np.bool_],
) -> tuple[dict[str, float], dict[str, tuple[RmsNorm, float]]]:
    """What norms over fewer channels need; refuses norms that would change what they compute."""
    hidden = [group for group in groups if isinstance(group, HiddenGroup)]
    experts = [group for group in groups if isinstance(group, ExpertGroup)]
    zeroed, unchosen = (_flags(channels, removed_classes(channels, listed, plan)) for listed in (hidden, experts))
    nodes = {node.name: node for node in graph_module.graph.nodes}
    epsilons: dict[str, float] = {}
    norms: dict[str, tuple[RmsNorm, float]] = {}
    for site in channels.norms:
        stays = keep[site.ids]
        gone = channels.class_of[site.ids[~stays]]
        if not stays.any() or stays.all() or (site.choice and unchosen[gone].all()):
            continue
        norm = find_rms_norm(graph_module, nodes[site.node]) if zeroed[gone].all() and not site.choice else None
        ratio = float(stays.mean())
        if norm is None or norms.get(norm.weight, (norm, ratio))[1] != ratio:
            raise PlanError(_refusal(site, int((~stays).sum())))
        epsilons[norm.epsilon_node.name] = norm.epsilon / ratio
        norms[norm.weight] = (norm, ratio)
    return epsilons, norms


def _flags(channels: ChannelMap, classes: IdArray) -> NDArray[np.bool_]:
    flags = np.zeros(channels.count, dtype=bool)
    flags[classes] = True
    return flags


def _refusal(site: NormSite, removed: int) -> str:
    return (
        f"{site.module} ({site.kind}, node {site.node}): the plan removes {removed} of the {site.width} channels it "
        "normalises together; that changes the others, so it is refused"
    )
