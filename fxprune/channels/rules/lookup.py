"""Rules for operators that pick by number: embeddings and indexing.

Positions may be picked freely; channels only by numbers that address them (see `fxprune.channels.rules.choices`): then
the addressed axis and the indexed one are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxprune.channels.relations import axis_ids, keep_addresses, pin, steady
from fxprune.core.channel_ids import Pin

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids


__all__ = ["LOOKUP_RULES", "index_table", "indexed_axes"]

aten = torch.ops.aten


def _embedding(call: Call) -> Ids:
    weight = call.parameter(0)
    if weight is None:
        return pin(call, "looks up rows of something computed")
    rows = call.ledger.axis(weight.name, 0, weight.shape[0])
    call.ledger.pins.append(Pin(rows.ids(), call.op, call.module, "rows are looked up by index"))
    columns = call.ledger.axis(weight.name, 1, weight.shape[1]).ids()
    return torch.from_numpy(columns).expand(call.output.shape)


def indexed_axes(call: Call) -> list[tuple[int, Any]]:
    """Axes of the source that `index` picks from, with the tensor that says which positions."""
    indices = call.node.args[1]
    assert isinstance(indices, (list, tuple))
    return [(axis, index) for axis, index in enumerate(indices) if index is not None]


def _index(call: Call) -> Ids:
    """`index.Tensor`: positions may be picked freely; channels only by numbers that address them."""
    source: Any = call.node.args[0]
    weight = call.parameter(0)
    keep_addresses(call)
    used = indexed_axes(call)
    ids = call.ids_of(source)
    if weight is not None and len(weight.shape) == 2 and [axis for axis, _ in used] == [0]:
        return index_table(call, used[0][1])
    if ids is None:
        return None
    for axis, index in used:
        if steady(ids, axis):
            continue
        line, known = axis_ids(ids, axis), call.addresses(index)
        if line is None or known is None or len(known) != len(line):
            return pin(call, "picks channels by computed positions")
        call.ledger.merge(line.numpy(), known)
    positions = {axis for axis, _ in used}
    first = ids
    for axis in positions:
        first = first.narrow(axis, 0, 1)
        if not steady(ids, axis):
            first = torch.zeros_like(first)
    # The picked axes become those of the index tensors; they carry nothing, so only the others matter.
    rest = [axis for axis in range(ids.dim()) if axis not in positions]
    ordered = sorted(positions)
    adjacent = ordered == list(range(ordered[0], ordered[-1] + 1))
    inserted = call.output.dim() - len(rest)
    where = ordered[0] if adjacent else 0
    kept = first.permute(*rest, *ordered).reshape([ids.shape[axis] for axis in rest])
    shape = [ids.shape[axis] for axis in rest]
    return kept.reshape([*shape[:where], *[1] * inserted, *shape[where:]]).expand(call.output.shape)


def index_table(call: Call, index: Any) -> Ids:
    """Rows of a parameter, one for each number: an expert's bias for each of its rows."""
    weight = call.parameter(0)
    assert weight is not None
    rows = call.ledger.axis(weight.name, 0, weight.shape[0]).ids()
    columns = call.ledger.axis(weight.name, 1, weight.shape[1]).ids()
    known = call.addresses(index)
    if known is not None and len(known) == len(rows):
        call.ledger.merge(rows, known)
    else:
        call.ledger.pins.append(Pin(rows, call.op, call.module, "rows are looked up by index"))
    return torch.from_numpy(columns).expand(call.output.shape)


LOOKUP_RULES: dict[Any, Any] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
}
