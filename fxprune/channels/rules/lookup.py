"""Rules for operators that pick by number: embeddings, indexing, top-k, and what routes tokens to experts.

Whole numbers can name channels: `topk` over the router's logits returns numbers of experts. Such a tensor is said to
*address* an axis; where it is counted or used as an index, the axis it meets is that axis.

    softmax, topk, sort over channels     a *choice*: without a channel the others are chosen from
    topk, max inside rows of channels     a choice in each row: what is chosen speaks for the row, which stays
    histc of numbers that address         one count per channel; cumsum of counts: where each channel's rows end
    index, gather, embedding              the addressed axis and the indexed one are the same
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.relations import combine, distinct_rows, keep_addresses, pin, steady
from fxprune.core.channel_ids import NormSite, Pin

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids


__all__ = ["LOOKUP_RULES", "choice"]

aten = torch.ops.aten


def _axis_ids(ids: Tensor | None, axis: int) -> Tensor | None:
    """The ids along one axis, (n,), when they do not vary along the others; None otherwise."""
    if ids is None:
        return None
    rows, _ = distinct_rows(ids.movedim(axis, -1))
    return torch.from_numpy(rows[0]) if len(rows) == 1 else None


def choice(call: Call, ids: Tensor, axis: int) -> bool:
    """Note that channels along an axis compete with each other; False when they cannot be told apart."""
    line = _axis_ids(ids, axis)
    if line is None or bool((line == 0).any()) or len(torch.unique(line)) < len(line):
        return False
    call.ledger.norms.append(NormSite(call.node.name, call.module, call.op, line.numpy(), len(line), choice=True))
    return True


def _embedding(call: Call) -> Ids:
    weight = call.parameter(0)
    if weight is None:
        return pin(call, "looks up rows of something computed")
    rows = call.ledger.axis(weight.name, 0, weight.shape[0])
    call.ledger.pins.append(Pin(rows.ids(), call.op, call.module, "rows are looked up by index"))
    columns = call.ledger.axis(weight.name, 1, weight.shape[1]).ids()
    return torch.from_numpy(columns).expand(call.output.shape)


def _ordered(call: Call) -> Ids:
    """`topk`, `sort`, `max` with a dimension: values, and the positions they had."""
    source = call.tensor_nodes()[0]
    ids = call.ids_of(source)
    axis = call.argument("dim", -1)
    known = call.addresses(source)
    if known is not None:  # numbers that are put in order still mean the same
        call.set_addresses(known, output=0)
    if ids is None:
        return [None, None]
    if steady(ids, axis):  # in order along an axis of positions
        same = _without(ids.narrow(axis, 0, 1), axis, call.output[0])
        return [same, same]
    line = _axis_ids(ids, axis)
    if line is None and call.op in {"topk", "max"} and (rows := _choice_in_rows(call, ids, axis)) is not None:
        return [_without(rows.unsqueeze(axis), axis, call.output[0]), None]
    if call.op in {"sort", "median", "kthvalue", "mode"} or not choice(call, ids, axis):  # all others count there
        return pin(call, "puts channels in an order that depends on their values")
    assert line is not None
    call.set_addresses(line.numpy(), output=1)
    return [None, None]


def _choice_in_rows(call: Call, ids: Tensor, axis: int) -> Tensor | None:
    """Note that channels compete inside rows, no channel in two of them; None when it is not so.

    Returns:
        Ids of what is chosen, without the axis: a channel for each row, which stays as long as one of the row's does.
    """
    rows, which = distinct_rows(ids.movedim(axis, -1))
    if (rows == 0).any() or len(np.unique(rows)) < rows.size:
        return None
    site = NormSite(call.node.name, call.module, call.op, rows.reshape(-1), rows.shape[1], choice=True, rows=rows)
    call.ledger.norms.append(site)
    call.ledger.rows.append(rows.astype(np.int32))
    fresh = call.ledger.fresh(len(rows))
    call.ledger.need(rows.reshape(-1), np.repeat(fresh, rows.shape[1]))
    return torch.from_numpy(fresh)[which]


def _without(ids: Tensor, axis: int, like: Tensor) -> Tensor:
    """Ids with one element along an axis in the shape of a result that may have lost the axis."""
    return (ids if ids.dim() == like.dim() else ids.squeeze(axis)).expand(like.shape)


def _argmax(call: Call) -> Ids:
    source = call.tensor_nodes()[0]
    ids = call.ids_of(source)
    if ids is None:
        return None
    axis = call.argument("dim")
    if axis is not None and steady(ids, axis):
        return None
    line = None if axis is None else _axis_ids(ids, axis)
    if line is None or call.op == "argsort" or not choice(call, ids, axis):
        return pin(call, "chooses among channels that vary")
    call.set_addresses(line.numpy())
    return None


def _count(call: Call) -> Ids:
    """`histc` over whole numbers: one bin per channel that they address."""
    source = call.tensor_nodes()[0]
    known = call.addresses(source)
    if known is None or len(known) != call.output.shape[0]:
        return pin(call, "counts values of channels")
    call.ledger.counts.append(known)
    return torch.from_numpy(known)


def _one_hot(call: Call) -> Ids:
    known = call.addresses(call.tensor_nodes()[0])
    if known is None or len(known) != call.output.shape[-1]:
        return pin(call, "spreads numbers that do not name channels") if call.any_ids() else None
    return torch.from_numpy(known).expand(call.output.shape)


def _indexed_axes(call: Call) -> list[tuple[int, Any]]:
    """Axes of the source that `index` picks from, with the tensor that says which positions."""
    indices = call.node.args[1]
    assert isinstance(indices, (list, tuple))
    return [(axis, index) for axis, index in enumerate(indices) if index is not None]


def _index(call: Call) -> Ids:
    """`index.Tensor`: positions may be picked freely; channels only by numbers that address them."""
    source: Any = call.node.args[0]
    weight = call.parameter(0)
    keep_addresses(call)
    used = _indexed_axes(call)
    ids = call.ids_of(source)
    if weight is not None and len(weight.shape) == 2 and [axis for axis, _ in used] == [0]:
        return _index_table(call, used[0][1])
    if ids is None:
        return None
    for axis, index in used:
        if steady(ids, axis):
            continue
        line, known = _axis_ids(ids, axis), call.addresses(index)
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


def _index_table(call: Call, index: Any) -> Ids:
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
    line, named = None if axis is None else _axis_ids(ids, axis), call.addresses(index)
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
        return _index_table(call, index)
    ids = call.ids_of(source)  # type: ignore[arg-type]
    if ids is None:
        return None
    if steady(ids, axis):
        return ids.narrow(axis, 0, 1).expand(call.output.shape)
    positions = call.constant(index)
    if positions is not None:
        return ids.index_select(axis, positions)
    line, known = _axis_ids(ids, axis), call.addresses(index)
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
    used = [axis for axis, _ in _indexed_axes(call)]
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


LOOKUP_RULES: dict[Any, Any] = {
    aten.embedding.default: _embedding,
    aten.topk.default: _ordered,
    aten.sort.default: _ordered,
    aten.sort.stable: _ordered,
    aten.msort.default: pin,
    aten.kthvalue.default: _ordered,
    aten.median.dim: _ordered,
    aten.mode.default: _ordered,
    aten.max.dim: _ordered,
    aten.min.dim: _ordered,
    aten.argmax.default: _argmax,
    aten.argmin.default: _argmax,
    aten.argsort.default: _argmax,
    aten.argsort.stable: _argmax,
    aten.histc.default: _count,
    aten.bincount.default: _count,
    aten.one_hot.default: _one_hot,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.take_along_dim.default: _gather,
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_write,
    aten.index_copy.default: _index_write,
    aten.index_fill.int_Scalar: _index_write,
    aten.index_put.default: _index_put,
    aten._unsafe_index.Tensor: _index,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter.reduce: _scatter,
    aten.scatter.value_reduce: _scatter,
    aten.scatter_add.default: _scatter,
    aten.scatter_reduce.two: _scatter,
}
