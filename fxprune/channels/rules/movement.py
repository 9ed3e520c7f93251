"""Rules for operators that move elements without changing them: the very same operator moves their ids.

Three things need more than that. *Copies* along a static axis (`repeat_kv`) become channels of their own that need the
original. A *cache* that is extended gets the channels of what extends it. *Rows* into which a view splits channels are
written down: each must keep as many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.relations import combine, keep_addresses, steady

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["CONCATENATIONS", "MOVEMENT", "MOVEMENT_RULES", "SCATTERS"]

aten = torch.ops.aten

_VIEWS: frozenset[Any] = frozenset({
    aten.view.default, aten.view_copy.default, aten._unsafe_view.default, aten.reshape.default, aten.view_as.default,
    aten._reshape_copy.default, aten.reshape_as.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.ravel.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze_copy.default,
    aten.squeeze_copy.dim, aten.squeeze_copy.dims, aten.unsqueeze.default, aten.unsqueeze_copy.default,
    aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default,
})  # fmt: skip
_ORDERS: frozenset[Any] = frozenset({
    aten.transpose.int, aten.transpose_copy.int, aten.permute.default, aten.permute_copy.default, aten.t.default,
    aten.t_copy.default, aten.numpy_T.default, aten.mT.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int, aten.moveaxis.intlist, aten.swapaxes.default, aten.swapdims.default, aten.flip.default,
    aten.fliplr.default, aten.flipud.default, aten.roll.default, aten.rot90.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.native_channel_shuffle.default,
})  # fmt: skip
_PARTS: frozenset[Any] = frozenset({
    aten.slice.Tensor, aten.slice_copy.Tensor, aten.select.int, aten.select_copy.int, aten.narrow.default,
    aten.narrow_copy.default, aten.split.Tensor, aten.split.default, aten.split.sizes, aten.split_copy.Tensor,
    aten.split_with_sizes.default, aten.split_with_sizes_copy.default, aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default, aten.chunk.default, aten.tensor_split.sections,
    aten.tensor_split.indices, aten.hsplit.int, aten.hsplit.array, aten.vsplit.int, aten.vsplit.array,
    aten.dsplit.int, aten.dsplit.array, aten.unbind.int, aten.unbind_copy.int, aten.diagonal.default,
    aten.diagonal_copy.default, aten.linalg_diagonal.default, aten.unfold.default, aten.unfold_copy.default,
})  # fmt: skip
COPYING: frozenset[Any] = frozenset({
    aten.expand.default, aten.expand_copy.default, aten.repeat.default, aten.tile.default,
    aten.repeat_interleave.self_int, aten.broadcast_to.default,
})  # fmt: skip
_BROADCASTS: frozenset[Any] = frozenset({
    aten.expand_as.default, aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing,
})  # fmt: skip
CONCATENATIONS: frozenset[Any] = frozenset({aten.cat.default, aten.concat.default, aten.concatenate.default})
_STACKS: frozenset[Any] = frozenset({
    aten.stack.default, aten._stack.default, aten.hstack.default, aten.vstack.default, aten.dstack.default,
    aten.column_stack.default, aten.row_stack.default,
})  # fmt: skip
SCATTERS: frozenset[Any] = frozenset({
    aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default,
})  # fmt: skip
"""Operators that write one tensor into a part of another, both of which they read."""

MOVEMENT = _VIEWS | _ORDERS | _PARTS | COPYING | _BROADCASTS | CONCATENATIONS | _STACKS | SCATTERS
"""Operators whose constants follow from what stays (`fxprune.slimming.rewrite`)."""


def _movement(call: Call) -> Ids:
    keep_addresses(call)
    _same_addresses(call)
    if not call.any_ids():
        return None
    if call.node.target in CONCATENATIONS:
        _align_state(call)
        if (even := _along_positions(call)) is not None:
            return even
    ids = call.apply_to_ids()
    if isinstance(ids, Tensor) and call.node.target in _VIEWS | _ORDERS | _STACKS:
        _note_rows(call, ids)
    return _copies(call, ids) if isinstance(ids, Tensor) and call.node.target in COPYING else ids


def _note_rows(call: Call, ids: Tensor) -> None:
    """Write down the rows that a result has and its operand has not: an axis was split, or axes changed places."""
    carried = call.ids_of(call.tensor_nodes()[0])
    line = _varying(ids)
    if line.dim() < 2:
        return
    before: set[int] = set()
    if carried is not None:
        known = _varying(carried)
        if torch.equal(known, line):  # only positions were moved
            return
        before = _prefixes(known) if call.node.target in _VIEWS else before
    for rows in sorted(_prefixes(line) - before):
        call.ledger.rows.append(line.reshape(rows, -1).numpy().astype(np.int32))


def _varying(ids: Tensor) -> Tensor:
    """Ids without the axes along which they do not vary."""
    for axis in reversed(range(ids.dim())):
        if ids.shape[axis] and steady(ids, axis):
            ids = ids.select(axis, 0)
    return ids


def _prefixes(ids: Tensor) -> set[int]:
    """How many rows leading axes make, for each number of them that leaves an axis."""
    found, count = set(), 1
    for size in ids.shape[:-1]:
        count *= size
        found.add(count)
    return found - {0, 1}


def _same_addresses(call: Call) -> None:
    """Numbers that are put side by side name channels of one axis."""
    known = [call.addresses(node) for node in call.tensor_nodes()]
    first = known[0] if known else None
    for other in known[1:]:
        if first is not None and other is not None and len(first) == len(other):
            call.ledger.merge(first, other)


def _copies(call: Call, ids: Tensor) -> Tensor:
    """Give each copy along a static axis channels of its own that need the original.

    `repeat_kv` copies a KV head for each of its query heads: a copy goes with its query head, the original with the
    last of them.
    """
    source = call.tensor_nodes()[0]
    before, carried = call.value_of(source).shape, call.ids_of(source)
    assert carried is not None
    copy = torch.zeros((), dtype=torch.int64)
    for axis, count, stride in _copied_axes(call, list(before), list(ids.shape)):
        own = axis - (ids.dim() - carried.dim())
        if own >= 0 and before[own] > 1 and steady(carried, own):
            continue  # positions are repeated
        index = torch.arange(ids.shape[axis]) // stride % count
        shape = [1] * ids.dim()
        shape[axis] = -1
        copy = copy * count + index.reshape(shape)
    if not copy.any():
        return ids
    scale = int(copy.max()) + 1
    key = torch.where(ids > 0, ids * scale + copy, 0)
    unique, inverse = np.unique(key.numpy(), return_inverse=True)
    new = call.ledger.fresh(int((unique > 0).sum()))
    call.ledger.need(new, unique[unique > 0] // scale)
    named = np.zeros(len(unique), dtype=np.int64)
    named[unique > 0] = new
    return torch.from_numpy(named[inverse]).reshape(ids.shape)


def _copied_axes(call: Call, before: list[int], after: list[int]) -> list[tuple[int, int, int]]:
    """Result axes along which a copying operator repeats by a literal count: (axis, copies, run length)."""
    args = call.node.args
    if call.node.target is aten.repeat_interleave.self_int:
        count, dim = args[1], call.int_argument(2, "dim", 0) % len(after)
        return [(dim, count, 1)] if isinstance(count, int) and count > 1 else []
    sizes = args[1]
    assert isinstance(sizes, (list, tuple))
    padded = [1] * (len(after) - len(before)) + before
    literal = [
        axis
        for axis, size in enumerate(sizes, start=len(after) - len(sizes))
        # A graph for one number of tokens has it as a literal: what is repeated as often is repeated for each token.
        if isinstance(size, int) and after[axis] > padded[axis] and size != call.fixed_length
    ]
    return [(axis, after[axis] // padded[axis], padded[axis]) for axis in literal]


def _align_state(call: Call) -> None:
    """Give a cache, or a padding without channels, the channels of what it is concatenated with.

    A graph input that is extended along an axis over which ids do not vary holds earlier values of the same channels.
    """
    dim = call.int_argument(1, "dim", 0)
    # An empty operand adds nothing; `cat` even takes one of a single axis.
    tensors = [node for node in call.operand_nodes(0) if call.value_of(node).numel()]
    ids = [call.ids_of(node) for node in tensors]
    even = [t is not None and steady(t, dim) for t in ids]
    if not any(even):
        return
    is_input = [t is not None and call.only_inputs(t) for t in ids]
    partner = next((t for t, ok, inp in zip(ids, even, is_input, strict=True) if ok and not inp), None)
    if partner is None:
        return
    assert isinstance(partner, Tensor)
    first = partner.narrow(dim, 0, 1)
    for node, t, ok, inp in zip(tensors, ids, even, is_input, strict=True):
        if inp and ok:
            assert t is not None
            mine = t.narrow(dim, 0, 1)
            both = ((mine > 0) & (first > 0)).numpy()
            call.ledger.merge(mine.numpy()[both], first.numpy()[both])
            call.ledger.states.append(np.unique(mine.numpy()[both]))
        if t is None or (inp and ok):
            call.override(node, first.expand(call.value_of(node).shape).contiguous())


def _along_positions(call: Call) -> Tensor | None:
    """Ids of what is concatenated along positions; None for other `cat`s.

    A class token before patches, or attention sinks beside scores: what follows treats all positions alike, so the
    channels that stand on them are the same, or one is shared by the other.
    """
    dim = call.int_argument(1, "dim", 0)
    listed = [ids for node in call.operand_nodes(0) if (ids := call.ids_of(node)) is not None]
    scores = any(call.ledger.is_score(ids.numpy()).any() for ids in listed)
    # Single elements may be channels as well as positions: what stands beside them tells.
    if not all(steady(ids, dim) for ids in listed) or not (scores or any(ids.shape[dim] > 1 for ids in listed)):
        return None
    out: Tensor | None = None
    for ids in listed:
        out = combine(call, out, ids.narrow(dim, 0, 1))
    return None if out is None else out.expand(call.output.shape)


MOVEMENT_RULES: dict[Any, Any] = dict.fromkeys(MOVEMENT, _movement)
