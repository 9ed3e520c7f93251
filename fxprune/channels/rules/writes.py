"""Rules for operators that pick or write at computed positions: gather, index_select, scatter, index_put.

Positions may be picked and written freely; channels only by constants, or by numbers that address them (see
`fxprune.channels.rules.choices`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.channels.relations import axis_ids, combine, keep_addresses, pin, steady
from fxprune.channels.rules.lookup import index_table, indexed_axes

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["WRITE_RULES"]

aten = torch.ops.aten


def _gather(call: Call) -> Ids:
    source, index = call.tensor_nodes()[:2]
    ids = call.ids_of(source)
    axis = call.argument("dim", None)
    known = call.addresses(source)
    if known is not None:  # some of the numbers
        call.set_addresses(known)
    if ids is None:
        return None
    if axis is not None and steady(ids, axis):
        return ids.narrow(axis, 0, 1).expand(call.output.shape)
    line, named = None if axis is None else axis_ids(ids, axis), call.addresses(index)
    if line is None or named is None or len(named) != len(line):
        return pin(call, "picks channels by computed positions")
    call.ledger.merge(line.numpy(), named)
    return None


def _index_select(call: Call) -> Ids:
    """Positions along one axis: constant ones may pick channels, others only numbers that address these."""
    source, index = call.node.args[0], call.node.args[2]
    axis = call.argument("dim")
    keep_addresses(call)
    weight = call.parameter(0)
    if weight is not None and len(weight.shape) == 2 and axis == 0:
        return index_table(call, index)
    ids = call.ids_of(source)  # type: ignore[arg-type]
    if ids is None:
        return None
    if steady(ids, axis):
        return ids.narrow(axis, 0, 1).expand(call.output.shape)
    positions = call.constant(index)
    if positions is not None:
        return ids.index_select(axis, positions)
    line, known = axis_ids(ids, axis), call.addresses(index)
    if line is None or known is None or len(known) != len(line):
        return pin(call, "picks channels by computed positions")
    call.ledger.merge(line.numpy(), known)
    return None


def _scatter(call: Call) -> Ids:
    """`scatter` at numbers that address an axis: the result runs along that axis."""
    nodes = call.tensor_nodes()
    axis = call.argument("dim", 0)
    known = call.addresses(call.argument_node("index"))
    ids = call.ids_of(nodes[0])
    source = call.argument_node("src")
    added = None if source is None else call.ids_of(source)
    if known is None or len(known) != call.output.shape[axis]:
        if any(found is not None and not steady(found, axis) for found in (ids, added)):
            return pin(call, "writes to channels at computed positions")
        return _written(call, ids, added, (axis,))
    shape = [1] * call.output.dim()
    shape[axis] = -1
    addressed = torch.from_numpy(known).reshape(shape)
    out = combine(call, ids, addressed)
    assert out is not None
    return out.expand(call.output.shape)


def _written(call: Call, ids: Tensor | None, added: Tensor | None, axes: tuple[int, ...]) -> Ids:
    """Ids of a tensor into which another was written at positions along some axes."""
    for axis in axes:
        added = None if added is None else added.narrow(axis, 0, 1)
        ids = None if ids is None else ids.narrow(axis, 0, 1)
    out = combine(call, ids, added)
    return None if out is None else out.expand(call.output.shape)


def _index_write(call: Call) -> Ids:
    """`index_add`, `index_copy`, `index_fill`: rows are written at positions along one axis."""
    axis = call.argument("dim")
    source = call.argument_node("source")
    ids, added = call.ids_of(call.tensor_nodes()[0]), None if source is None else call.ids_of(source)
    if any(found is not None and not steady(found, axis) for found in (ids, added)):
        return pin(call, "writes to channels at computed positions")
    return _written(call, ids, added, (axis,))


def _index_put(call: Call) -> Ids:
    """`index_put`: values are written at positions along some axes; the others must be as they are in the values."""
    used = [axis for axis, _ in indexed_axes(call)]
    values = call.argument_node("values")
    ids, added = call.ids_of(call.tensor_nodes()[0]), None if values is None else call.ids_of(values)
    if ids is None and added is None:
        return None
    if used != list(range(len(used))) or (ids is not None and any(not steady(ids, axis) for axis in used)):
        return pin(call, "writes to channels at computed positions")
    if added is not None:
        rest = call.output.dim() - len(used)
        leading = range(added.dim() - rest)
        if any(not steady(added, axis) for axis in leading):
            return pin(call, "writes channels that vary from position to position")
        for axis in leading:
            added = added.narrow(axis, 0, 1)
        added = added.reshape([1] * len(used) + list(added.shape[len(leading) :]))
    for axis in used:
        ids = None if ids is None else ids.narrow(axis, 0, 1)
    out = combine(call, ids, added)
    return None if out is None else out.expand(call.output.shape)


WRITE_RULES: dict[Any, Any] = {
    aten.gather.default: _gather,
    aten.take_along_dim.default: _gather,
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_write,
    aten.index_copy.default: _index_write,
    aten.index_fill.int_Scalar: _index_write,
    aten.index_put.default: _index_put,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter.reduce: _scatter,
    aten.scatter.value_reduce: _scatter,
    aten.scatter_add.default: _scatter,
    aten.scatter_reduce.two: _scatter,
}
