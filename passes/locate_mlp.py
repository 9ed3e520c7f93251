"""Finds the MLPs of a graph and names their channels.

    up = Linear(x)                      gate = Linear(x) ─ act ─┐
     └ act ─ down = Linear(...)         up = Linear(x) ─────────┴ mul ─ down = Linear(...)      =>  MlpGroup

An MLP's channels are classes that some Linears produce as rows and others consume as columns, with an activation in
between. Fused gate-and-up weights come out of channel tracing as two rows a channel.

Refused, and listed in the details with the reason:
 1. channels that are pinned;
 2. channels that are normalised together (removing one changes the others): sub-norms;
 3. channels without an activation between the Linears (a low-rank pair);
 4. channels that own different numbers of weights;
 5. channels that layouts hold in parts in two ways at once;
 6. channels with a number each in a buffer that no checkpoint holds: the class computes it anew, for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.channels.locate import (
    LocatePass,
    NormIndex,
    activation_sites,
    alike,
    between_linears,
    elements_per_index,
    expert_axes,
    pinned_reason,
    unique_name,
)
from fxprune.core.groups import Group, MlpGroup, collect_slices, common_owner
from fxprune.core.parts import parts_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fxprune.core.channel_ids import ChannelMap, IdArray
    from fxprune.core.program import Program

__all__ = ["LocateMlp"]


def _refusal(channels: ChannelMap, classes: IdArray, normed: NDArray[np.bool_], activation: IdArray) -> str | None:
    """Why channels are no MLP, None when they are."""
    reason = pinned_reason(channels, classes)
    if reason is not None:
        return reason  # refusal 1
    if normed[classes].any():
        return "normalised together: removing a channel changes the others"  # refusal 2
    if (activation[classes] < 0).any():
        return "no activation between the Linears"  # refusal 3
    return None


def _computed_anew(program: Program) -> set[str]:
    """Buffers of the graph that the original model does not save."""
    original = program.references.get("eager")
    if original is None or program.source is None:
        return set()
    return {name for name, _ in program.graph_module.named_buffers()} - set(original.module.state_dict())


class LocateMlp(LocatePass):
    """Name the channels of every MLP (see the module's docstring for the graph and the refusals)."""

    name = "locate_mlp"
    finds = (MlpGroup,)

    def locate(self, program: Program, kept: tuple[Group, ...], refused: dict[str, str]) -> list[MlpGroup]:
        """An `MlpGroup` for every MLP; near misses are listed with reasons."""
        channels = program.channels
        assert channels is not None
        elements = elements_per_index(program)
        normed = NormIndex(channels).together
        activation = activation_sites(channels)
        wanted = between_linears(channels)
        experts = expert_axes(channels)
        for axis in channels.axes:
            if axis.role == "columns" and axis.parameter in experts:
                wanted[channels.of_axis(axis)] = False  # what experts read is for locate_experts to name
        # Channels under a norm and without an activation are a residual stream, or a latent: locate_hidden's.
        candidates = [c for c in alike(channels, wanted) if not normed[c].any() or (activation[c] >= 0).all()]
        anew = _computed_anew(program)
        groups: list[MlpGroup] = []
        all_slices, all_parts = collect_slices(channels, candidates, elements), parts_of(channels, candidates)
        for classes, slices, parts in zip(candidates, all_slices, all_parts, strict=True):
            reason = _refusal(channels, classes, normed, activation)
            if slices is None:
                refused[f"{len(classes)} channels"] = reason or "they own different numbers of weights"  # refusal 4
                continue
            name = common_owner([s.parameter for s in slices if s.role])
            computed = next((s.parameter for s in slices if s.parameter in anew), None)
            if reason is None and computed is not None:
                reason = f"{computed} has a number for each, which the class computes anew for all of them"  # refusal 6
            if reason is not None or isinstance(parts, str):
                refused[name or "model"] = reason or str(parts)  # refusal 5
                continue
            rows = sum(s.per_unit for s in slices if s.produces)
            op = channels.activations[activation[classes].min()].op
            name = unique_name(name, MlpGroup.kind, (*kept, *groups))
            groups.append(MlpGroup(name, len(groups), slices, parts=parts, activation=op, gated=rows > 1))
        return groups
