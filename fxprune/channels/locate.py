"""What the locate passes share: their form, the channel map of a program, and what they ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.sparse import csc_matrix

from fxprune.channels.walk import trace_channels
from fxprune.core.errors import PreconditionError
from fxprune.core.groups import signatures
from fxprune.core.pass_base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from fxprune.core.channel_ids import ChannelMap, IdArray, NormSite, ParameterAxis
    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = [
    "LocatePass",
    "NormIndex",
    "activation_sites",
    "alike",
    "between_linears",
    "elements_per_index",
    "expert_axes",
    "pinned_reason",
    "require_lifted",
    "unique_name",
    "with_channels",
]


def require_lifted(program: Program, name: str) -> None:
    """Raise `PreconditionError` when the program's projections have not been lifted."""
    if not any(event.name == "lift_linears" for event in program.history):
        raise PreconditionError(f"{name} works on Linear modules: run lift_linears first")


class LocatePass(Pass):
    """What finds groups of some kinds in a lifted program, and says what it refuses and why.

    Attributes:
        finds: the kinds of groups; those that an earlier run has found are replaced.
        reads_channels: whether it needs the channel map.
    """

    finds: ClassVar[tuple[type[Group], ...]]
    reads_channels: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        """Projections are lifted.

        Raises:
            PreconditionError: they are not.
        """
        require_lifted(program, self.name)

    def call(self, program: Program) -> PassResult:
        """Add the groups; `details["refused"]` lists what is none, with reasons."""
        if self.reads_channels:
            program = with_channels(program)
        kept = tuple(group for group in program.groups if not isinstance(group, self.finds))
        refused: dict[str, str] = {}
        groups = self.locate(program, kept, refused)
        details = {"groups": len(groups), "refused": refused}
        return PassResult(program.replace(groups=(*kept, *groups)), modified=True, details=details)

    def locate(self, program: Program, kept: tuple[Group, ...], refused: dict[str, str]) -> Sequence[Group]:
        """The groups in graph order.

        Args:
            program: lifted, with its channel map where that is read.
            kept: groups of other kinds, whose names are taken.
            refused: gets near misses, with the reasons.
        """
        raise NotImplementedError


def with_channels(program: Program) -> Program:
    """Return the program with its channel map, tracing channels if no pass did so before."""
    if program.channels is not None:
        return program
    return program.replace(channels=trace_channels(program.graph_module, program.interface, program.shared))


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
            (rows if axis.role == "rows" else columns)[channels.of_axis(axis)] = True
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
        classes = channels.of_axis(axis)
        classes = classes[wanted[classes]]
        _, first = np.unique(classes, return_index=True)
        classes = classes[np.sort(first)]
        for key in np.unique(signature[classes]):
            groups.setdefault(int(key), classes[signature[classes] == key])
    return list(groups.values())


class NormIndex:
    """Which norms and choices reduce which classes.

    Attributes:
        together: which classes one of them reduces together with others, (classes,).
    """

    def __init__(self, channels: ChannelMap) -> None:
        self._norms = channels.norms
        members = [np.unique(channels.class_of[norm.ids]) for norm in channels.norms]
        self.together = np.zeros(channels.count, dtype=bool)
        for classes in members:
            self.together[classes] |= len(classes) > 1
        self._several = [len(classes) > 1 for classes in members]
        norms = np.repeat(np.arange(len(members)), [len(classes) for classes in members])
        of_class = (norms, np.concatenate(members or [np.zeros(0, np.int64)]))
        self._by_class = csc_matrix((np.ones(len(norms), bool), of_class), (len(members), channels.count))

    def over(self, classes: IdArray, *, together: bool = False) -> list[NormSite]:
        """The norms that reduce any of `classes`, in graph order; with `together` only those over several classes."""
        found = np.unique(self._by_class[:, classes].indices)
        return [self._norms[index] for index in found if self._several[index] or not together]


def pinned_reason(channels: ChannelMap, classes: IdArray) -> str | None:
    """What pins any of `classes`, None when nothing does."""
    pinned = classes[channels.pinned[classes]]
    return f"pinned by {channels.pin_reasons(pinned)[0]}" if len(pinned) else None


def activation_sites(channels: ChannelMap) -> IdArray:
    """The first of `channels.activations` that each class passes through, -1 for none, (classes,)."""
    site = np.full(channels.count, -1, dtype=np.int64)
    for index in reversed(range(len(channels.activations))):
        site[channels.class_of[channels.activations[index].ids]] = index
    return site


def unique_name(owner: str, kind: str, groups: Iterable[Group]) -> str:
    """A name for a group that none of `groups` has: its owner's, with the kind and a number where one is not enough."""
    taken = {group.name for group in groups}
    name, number = owner or "model", 1
    while name in taken:
        name = f"{owner or 'model'}:{kind}" + (f":{number}" if number > 1 else "")
        number += 1
    return name
