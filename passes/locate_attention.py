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
 5. heads that a norm over all of them ties together;
 6. heads that layouts hold in parts in two ways at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.channels.locate import LocatePass, NormIndex, elements_per_index, unique_name
from fxprune.core.groups import AttentionGroup, collect_slices, common_owner
from fxprune.core.parts import parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from fxprune.core.channel_ids import AttentionSite, ChannelMap, IdArray
    from fxprune.core.groups import Group, UnitSlice
    from fxprune.core.program import Program

    _Slices = tuple[UnitSlice, ...] | None

__all__ = ["LocateAttention"]


def _refusal(channels: ChannelMap, classes: IdArray, norms: NormIndex) -> str | None:
    """Why the heads of an attention cannot be units, None when they can."""
    pinned = classes[channels.pinned[classes]]
    if len(pinned):
        return f"pinned by {channels.pin_reasons(pinned)[0]}"  # refusal 1
    if len(np.unique(classes)) < len(classes):
        return "its heads are not independent of each other"  # refusal 2
    if not channels.source[classes].all():
        return "nothing reads its heads"
    over = norms.over(classes, together=True)
    if over:
        return f"{over[0].module} ({over[0].kind}) normalises several of its heads together"  # refusal 5
    return None


def _in_linears(channels: ChannelMap) -> NDArray[np.bool_]:
    """Which classes are rows, columns or experts of some Linear, (classes,)."""
    found = np.zeros(channels.count, dtype=bool)
    for axis in channels.axes:
        if axis.role:
            found[channels.of_axis(axis)] = True
    return found


def _sharing(channels: ChannelMap, heads: IdArray, carries: NDArray[np.bool_]) -> tuple[IdArray, IdArray, IdArray]:
    """Which heads share parameters.

    Args:
        channels: the channel map.
        heads: class of each head.
        carries: which classes are those of Linears.

    Returns:
        The sharing set of each head, -1 for none; the shared classes; and the set that each of these belongs to. Sets
        come in the order of their first head.
    """
    needs = channels.needs[heads].tocoo()
    useful = carries[needs.col] & ~channels.source[needs.col]
    head, candidate = needs.row[useful], needs.col[useful]
    sharing = np.full(len(heads), -1, dtype=np.int64)
    if len(head) == 0:
        return sharing, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    shared, position = np.unique(candidate, return_inverse=True)
    # Two classes are shared by the same heads if the random numbers of their users add up to the same.
    number = np.random.default_rng(0).integers(1, 2**62, size=len(heads), dtype=np.uint64)
    total = np.zeros(len(shared), dtype=np.uint64)
    np.add.at(total, position, number[head])
    first_head = np.full(len(shared), len(heads), dtype=np.int64)
    np.minimum.at(first_head, position, head)
    _, first, set_of = np.unique(total, return_index=True, return_inverse=True)
    set_of = np.argsort(np.argsort(first_head[first]))[set_of].astype(np.int64)
    sharing[head] = set_of[position]
    return sharing, shared.astype(np.int64), set_of


def _owned(
    program: Program, channels: ChannelMap, sites: Sequence[tuple[AttentionSite, IdArray]]
) -> Iterator[tuple[AttentionSite, _Slices, _Slices, IdArray | None, IdArray | str | None]]:
    """For each attention what its heads own, what they share, which set each head shares, and the parts they are in."""
    elements = elements_per_index(program)
    carries = _in_linears(channels)
    found = [_sharing(channels, classes, carries) for _, classes in sites]
    # Sharing is useful where every head does it, and some with another.
    whole = [len(s) > 0 and bool((h >= 0).all()) and int(s.max()) + 1 < len(h) for h, _, s in found]
    own = collect_slices(channels, [classes for _, classes in sites], elements)
    sets = [(classes, set_of) for (_, classes, set_of), useful in zip(found, whole, strict=True) if useful]
    shared = iter(collect_slices(channels, [c for c, _ in sets], elements, [s for _, s in sets]))
    sharing = [s if useful else None for (s, _, _), useful in zip(found, whole, strict=True)]
    parts = parts_of(channels, [classes for _, classes in sites], sharing)
    for (site, _), slices, mine, part in zip(sites, own, sharing, parts, strict=True):
        yield site, slices, () if mine is None else next(shared), mine, part


class LocateAttention(LocatePass):
    """Name the heads of every attention (see the module's docstring for the graph and the refusals)."""

    name = "locate_attention"
    finds = (AttentionGroup,)

    def locate(self, program: Program, kept: tuple[Group, ...], refused: dict[str, str]) -> list[AttentionGroup]:
        """An `AttentionGroup` for every attention; those that are refused are listed with reasons."""
        channels = program.channels
        assert channels is not None
        sites: list[tuple[AttentionSite, IdArray]] = []
        norms = NormIndex(channels)
        for site in channels.attentions:
            classes = channels.class_of[site.heads]
            reason = _refusal(channels, classes, norms)
            if reason is None:
                sites.append((site, classes))
            else:
                refused[site.module or site.node] = reason
        groups: list[AttentionGroup] = []
        for site, slices, shared, sharing, parts in _owned(program, channels, sites):
            if slices is None or shared is None:
                refused[site.module or site.node] = "its heads own different numbers of weights"  # refusal 3
                continue
            if not any(s.consumes for s in slices):
                refused[site.module or site.node] = "no Linear reads its heads"  # refusal 4
                continue
            if isinstance(parts, str):
                refused[site.module or site.node] = parts  # refusal 6
                continue
            head_dim = next(s.per_unit for s in slices if s.consumes)
            owner = common_owner([s.parameter for s in (*slices, *shared) if s.role])
            name = unique_name(owner, AttentionGroup.kind, (*kept, *groups))
            groups.append(
                AttentionGroup(
                    name, len(groups), slices, shared, sharing, parts=parts, head_dim=head_dim, node=site.node
                )
            )
        return groups
