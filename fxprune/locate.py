"""What the locate passes share: the channel map of a program and the sizes behind its parameter axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.channels import trace_channels
from fxprune.errors import PreconditionError
from fxprune.groups import signatures

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from fxprune.channel_ids import ChannelMap, IdArray, ParameterAxis
    from fxprune.groups import Group
    from fxprune.program import Program

__all__ = [
    "activations",
    "alike",
    "between_linears",
    "elements_per_index",
    "expert_axes",
    "normalised_together",
    "pinned_reason",
    "require_lifted",
    "unique_name",
    "with_channels",
]


def require_lifted(program: Program, name: str) -> None:
    """Raise `PreconditionError` when the program's projections have not been lifted."""
    if not any(event.name == "lift_linears" for event in program.history):
        raise PreconditionError(f"{name} works on Linear modules: run lift_linears first")


def with_channels(program: Program) -> Program:
    """Return the program with its channel map, tracing channels if no pass did so before."""
    if program.channels is not None:
        return program
    return program.replace(channels=trace_channels(program.graph_module, program.interface))


def elements_per_index(program: Program) -> dict[str, dict[int, int]]:
    """For each parameter and axis, how many elements stand behind one index."""
    return {
        name: {axis: tensor.numel() // max(1, size) for axis, size in enumerate(tensor.shape)}
        for name, tensor in program.graph_module.state_dict(keep_vars=True).items()
    }


def between_linears(channels: ChannelMap) -> NDArray[np.bool_]:
    """Which classes some Linears write as rows and others read as columns; heads do not count, (classes,)."""
    rows, columns = np.zeros(channels.count, dtype=bool), np.zeros(channels.count, dtype=bool)
    for axis in channels.axes:
        if axis.role in {"rows", "columns"}:
            (rows if axis.role == "rows" else columns)[channels.class_of[axis.ids()]] = True
    found = rows & columns
    for site in channels.attentions:
        found[channels.class_of[site.heads]] = False
    return found


def expert_axes(channels: ChannelMap) -> dict[str, ParameterAxis]:
    """The axis of experts of every grouped Linear's weight, by the weight's qualified name."""
    return {axis.parameter: axis for axis in channels.axes if axis.role == "experts"}


def alike(channels: ChannelMap, wanted: NDArray[np.bool_]) -> list[IdArray]:
    """Wanted classes by the parameter axes they touch, each list in the order of the first Linear that reads them."""
    signature = signatures(channels)
    groups: dict[int, IdArray] = {}
    for axis in channels.axes:
        if axis.role != "columns":
            continue
        classes = channels.class_of[axis.ids()]
        classes = classes[wanted[classes]]
        _, first = np.unique(classes, return_index=True)
        classes = classes[np.sort(first)]
        for key in np.unique(signature[classes]):
            groups.setdefault(int(key), classes[signature[classes] == key])
    return list(groups.values())


def normalised_together(channels: ChannelMap) -> NDArray[np.bool_]:
    """Which classes a norm or a choice reduces together with others, (classes,)."""
    normed = np.zeros(channels.count, dtype=bool)
    for norm in channels.norms:
        classes = np.unique(channels.class_of[norm.ids])
        normed[classes] |= len(classes) > 1
    return normed


def pinned_reason(channels: ChannelMap, classes: IdArray) -> str | None:
    """What pins any of `classes`, None when nothing does."""
    pinned = classes[channels.pinned[classes]]
    return f"pinned by {channels.pin_reasons(pinned)[0]}" if len(pinned) else None


def activations(channels: ChannelMap) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Which classes pass through an activation, and its name by class."""
    active = np.zeros(channels.count, dtype=bool)
    names: dict[int, str] = {}
    for site in channels.activations:
        classes = channels.class_of[site.ids]
        active[classes] = True
        names.setdefault(int(classes[0]), site.op)
    return active, names


def unique_name(owner: str, kind: str, groups: Iterable[Group]) -> str:
    """A name for a group that none of `groups` has: its owner's, with the kind and a number where one is not enough."""
    taken = {group.name for group in groups}
    name, number = owner or "model", 1
    while name in taken:
        name = f"{owner or 'model'}:{kind}" + (f":{number}" if number > 1 else "")
        number += 1
    return name
