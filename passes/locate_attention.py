"""Finds the attentions of a graph and names their heads.

    q = Linear(x) -> heads ─┐
    k = Linear(x) -> heads ─┴─ scores ─ softmax ─┐
    v = Linear(x) -> heads ──────────────────────┴─ heads -> o = Linear(...)     =>  AttentionGroup

Channel tracing has already made one block of each query head (its query rows, its output columns) and found which
key and value rows several heads share; this pass only gives the blocks their names.

Refused, and listed in the details with the reason:
 1. heads that are pinned (by an operator without a rule, or because the caller sees them);
 2. heads that are not independent units (one class for several heads);
 3. heads whose units own different numbers of weights;
 4. heads that no Linear reads;
 5. heads that a norm over all of them ties together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.groups import AttentionGroup, UnitSlice, collect_slices, common_owner
from fxprune.locate import elements_per_index, require_lifted, unique_name, with_channels
from fxprune.pass_base import Pass, PassResult

if TYPE_CHECKING:
    from fxprune.channel_ids import AttentionSite, ChannelMap, IdArray
    from fxprune.program import Program

__all__ = ["LocateAttention"]


def _refusal(channels: ChannelMap, classes: IdArray) -> str | None:
    """Why the heads of an attention cannot be units, None when they can."""
    pinned = classes[channels.pinned[classes]]
    if len(pinned):
        return f"pinned by {channels.pin_reasons(pinned)[0]}"  # refusal 1
    if len(np.unique(classes)) < len(classes):
        return "its heads are not independent of each other"  # refusal 2
    if not channels.source[classes].all():
        return "nothing reads its heads"
    mine = np.zeros(channels.count, dtype=bool)
    mine[classes] = True
    for norm in channels.norms:
        members = channels.class_of[norm.ids]
        if mine[members].any() and len(np.unique(members)) > 1:
            return f"{norm.module} ({norm.kind}) normalises several of its heads together"  # refusal 5
    return None


def _sharing(channels: ChannelMap, heads: IdArray) -> tuple[IdArray, list[IdArray]]:
    """Which heads share parameters: a set index per head, and for each set the classes that its heads share."""
    carries = np.zeros(channels.count, dtype=bool)
    for axis in channels.axes:
        if axis.role:
            carries[channels.class_of[axis.ids()]] = True
    needs = channels.needs[heads].tocoo()
    useful = carries[needs.col] & ~channels.source[needs.col]
    head, candidate = needs.row[useful], needs.col[useful]
    if len(head) == 0:
        return np.zeros(0, dtype=np.int64), []
    # Two classes are shared by the same heads if the random numbers of their users add up to the same.
    number = np.random.default_rng(0).integers(1, 2**62, size=len(heads), dtype=np.uint64)
    total = np.zeros(channels.count, dtype=np.uint64)
    np.add.at(total, candidate, number[head])
    shared = np.unique(candidate)
    _, first, set_of = np.unique(total[shared], return_index=True, return_inverse=True)
    first_head = np.full(channels.count, len(heads), dtype=np.int64)
    np.minimum.at(first_head, candidate, head)
    order = np.argsort(np.argsort(first_head[shared[first]]))  # sets in the order of their first head
    set_of = order[set_of]
    set_of_class = np.full(channels.count, -1, dtype=np.int64)
    set_of_class[shared] = set_of
    sharing = np.full(len(heads), -1, dtype=np.int64)
    sharing[head] = set_of_class[candidate]
    return sharing, [shared[set_of == index].astype(np.int64) for index in range(len(first))]


def _shared_slices(
    channels: ChannelMap, sets: list[IdArray], elements: dict[str, dict[int, int]]
) -> tuple[UnitSlice, ...]:
    """Rows that each sharing set owns, one slice per parameter axis."""
    set_of = np.full(channels.count, -1, dtype=np.int64)
    for index, classes in enumerate(sets):
        set_of[classes] = index
    slices = []
    for axis in channels.axes:
        owners = set_of[channels.class_of[axis.ids()]]
        found = np.flatnonzero(owners >= 0)
        if len(found):
            order = found[np.argsort(owners[found], kind="stable")]
            indices = order.reshape(len(sets), -1)
            size = elements[axis.parameter][axis.axis]
            slices.append(UnitSlice(axis.parameter, axis.axis, indices, size, axis.role))
    return tuple(slices)


class LocateAttention(Pass):
    """Name the heads of every attention (see the module's docstring for the graph and the refusals)."""

    name = "locate_attention"

    def requires(self, program: Program) -> None:
        """Projections are lifted.

        Raises:
            PreconditionError: they are not.
        """
        require_lifted(program, self.name)

    def call(self, program: Program) -> PassResult:
        """Add an `AttentionGroup` for every attention; `details["refused"]` lists the others with reasons."""
        program = with_channels(program)
        channels = program.channels
        assert channels is not None
        elements = elements_per_index(program)
        refused: dict[str, str] = {}
        sites: list[tuple[AttentionSite, IdArray]] = []
        for site in channels.attentions:
            classes = channels.class_of[site.heads]
            reason = _refusal(channels, classes)
            if reason is None:
                sites.append((site, classes))
            else:
                refused[site.module or site.node] = reason
        kept = tuple(group for group in program.groups if not isinstance(group, AttentionGroup))
        groups: list[AttentionGroup] = []
        for (site, classes), slices in zip(
            sites, collect_slices(channels, [c for _, c in sites], elements), strict=True
        ):
            if slices is None:
                refused[site.module or site.node] = "its heads own different numbers of weights"  # refusal 3
                continue
            if not any(s.consumes for s in slices):
                refused[site.module or site.node] = "no Linear reads its heads"  # refusal 4
                continue
            sharing, sets = _sharing(channels, classes)
            whole = bool(sets) and bool((sharing >= 0).all()) and len(sets) < len(classes)
            shared = _shared_slices(channels, sets, elements) if whole else ()
            head_dim = next(s.per_unit for s in slices if s.consumes)
            owner = common_owner([s.parameter for s in (*slices, *shared) if s.role])
            name = unique_name(owner, AttentionGroup.kind, (*kept, *groups))
            groups.append(
                AttentionGroup(
                    name, len(groups), slices, shared, sharing if whole else None, head_dim=head_dim, node=site.node
                )
            )
        details = {"groups": len(groups), "refused": refused}
        return PassResult(program.replace(groups=(*kept, *groups)), modified=True, details=details)
