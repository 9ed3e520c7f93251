"""Finds the MLPs of a graph and names their channels.

    up = Linear(x)                      gate = Linear(x) ─ act ─┐
     └ act ─ down = Linear(...)         up = Linear(x) ─────────┴ mul ─ down = Linear(...)      =>  MlpGroup

An MLP's channels are classes that some Linears produce as rows and others consume as columns, with an activation in
between. Fused gate-and-up weights come out of channel tracing as two rows a channel.

Refused, and listed in the details with the reason:
 1. channels that are pinned;
 2. channels that are normalised together (removing one changes the others): the hidden dimension, sub-norms;
 3. channels without an activation between the Linears (a low-rank pair);
 4. channels that own different numbers of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.groups import Group, MlpGroup, collect_slices, common_owner, signatures
from fxprune.locate import elements_per_index, require_lifted, unique_name, with_channels
from fxprune.pass_base import Pass, PassResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fxprune.channel_ids import ChannelMap, IdArray
    from fxprune.program import Program

__all__ = ["LocateMlp"]


def _candidates(channels: ChannelMap) -> list[IdArray]:
    """Classes between two Linears, by the parameter axes they touch, each list in the order of the first axis."""
    rows, columns = np.zeros(channels.count, dtype=bool), np.zeros(channels.count, dtype=bool)
    for axis in channels.axes:
        if axis.role in {"rows", "columns"}:
            (rows if axis.role == "rows" else columns)[channels.class_of[axis.ids()]] = True
    wanted = rows & columns
    for site in channels.attentions:
        wanted[channels.class_of[site.heads]] = False
    signature = signatures(channels)
    groups: dict[int, IdArray] = {}
    for axis in channels.axes:
        if axis.role != "columns":
            continue
        classes = channels.class_of[axis.ids()]
        classes = classes[wanted[classes]]
        if len(classes) == 0:
            continue
        _, first = np.unique(classes, return_index=True)
        classes = classes[np.sort(first)]
        for key in np.unique(signature[classes]):
            groups.setdefault(int(key), classes[signature[classes] == key])
    return list(groups.values())


def _refusal(
    channels: ChannelMap, classes: IdArray, normed: NDArray[np.bool_], active: NDArray[np.bool_]
) -> str | None:
    """Why channels are no MLP, None when they are."""
    pinned = classes[channels.pinned[classes]]
    if len(pinned):
        return f"pinned by {channels.pin_reasons(pinned)[0]}"  # refusal 1
    if normed[classes].any():
        return "normalised together: removing a channel changes the others"  # refusal 2
    if not active[classes].all():
        return "no activation between the Linears"  # refusal 3
    return None


def _activations(channels: ChannelMap) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Which classes pass through an activation, and its name by class."""
    active = np.zeros(channels.count, dtype=bool)
    names: dict[int, str] = {}
    for site in channels.activations:
        classes = channels.class_of[site.ids]
        active[classes] = True
        names.setdefault(int(classes[0]), site.op)
    return active, names


class LocateMlp(Pass):
    """Name the channels of every MLP (see the module's docstring for the graph and the refusals)."""

    name = "locate_mlp"

    def requires(self, program: Program) -> None:
        """Projections are lifted.

        Raises:
            PreconditionError: they are not.
        """
        require_lifted(program, self.name)

    def call(self, program: Program) -> PassResult:
        """Add an `MlpGroup` for every MLP; `details["refused"]` lists the near misses with reasons."""
        program = with_channels(program)
        channels = program.channels
        assert channels is not None
        elements = elements_per_index(program)
        normed = np.zeros(channels.count, dtype=bool)
        for norm in channels.norms:
            classes = np.unique(channels.class_of[norm.ids])
            normed[classes] |= len(classes) > 1
        active, activation = _activations(channels)
        candidates = _candidates(channels)
        refused: dict[str, str] = {}
        kept = tuple(group for group in program.groups if not isinstance(group, MlpGroup))
        groups: list[Group] = []
        for classes, slices in zip(candidates, collect_slices(channels, candidates, elements), strict=True):
            reason = _refusal(channels, classes, normed, active)
            if slices is None:
                refused[f"{len(classes)} channels"] = reason or "they own different numbers of weights"  # refusal 4
                continue
            name = common_owner([s.parameter for s in slices if s.role])
            if reason is not None:
                refused[name or "model"] = reason
                continue
            rows = sum(s.per_unit for s in slices if s.produces)
            members = set(classes.tolist())
            op = next(op for first, op in activation.items() if first in members)
            name = unique_name(name, MlpGroup.kind, (*kept, *groups))
            groups.append(MlpGroup(name, len(groups), slices, activation=op, gated=rows > 1))
        details = {"groups": len(groups), "refused": refused}
        return PassResult(program.replace(groups=(*kept, *groups)), modified=True, details=details)
