"""Rules for operators that pick by number: embeddings, indexing, top-k, and what routes tokens to experts.

Whole numbers can name channels: `topk` over the router's logits returns numbers of experts. Such a tensor is said to
*address* an axis; where it is counted or used as an index, the axis it meets is that axis.

    softmax, topk, sort over channels     a *choice*: without a channel the others are chosen from
    histc of numbers that address         one count per channel; cumsum of counts: where each channel's rows end
    index, gather, embedding              the addressed axis and the indexed one are the same
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channel_ids import NormSite, Pin
from fxprune.channel_relations import combine, distinct_rows

if TYPE_CHECKING:
    from fxprune.channels import Call

    Ids = Tensor | None | list[Tensor | None]

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


def _pin(call: Call, reason: str) -> None:
    touched = [call.ids_of(node) for node in call.tensor_nodes()]
    ids = [np.unique(t[t > 0].numpy()) for t in touched if t is not None]
    if ids:
        call.ledger.pins.append(Pin(np.concatenate(ids), call.op, call.module, reason))


def _embedding(call: Call) -> Ids:
    weight = call.parameter(0)
    if weight is None:
        _pin(call, "looks up rows of something computed")
        return None
    rows = call.ledger.axis(weight.name, 0, weight.shape[0])
    call.ledger.pins.append(Pin(rows.ids(), call.op, call.module, "rows are looked up by index"))
    columns = call.ledger.axis(weight.name, 1, weight.shape[1]).ids()
    return torch.from_numpy(columns).expand(call.output.shape)


def _ordered(call: Call) -> Ids:
    """`topk`, `sort`, `max` with a dimension: values, and the positions they had."""
    source = call.tensor_nodes()[0]
    ids = call.ids_of(source)
    position = 2 if call.node.target is aten.topk.default else 1
    axis = call.int_argument(position, "dim", -1)
    known = call.addresses(source)
    if known is not None:  # numbers that are put in order still mean the same
        call.set_addresses(known, output=0)
    if ids is None:
        return [None, None]
    if bool((ids == ids.narrow(axis, 0, 1)).all()):  # in order along an axis of positions
        value = ids.narrow(axis, 0, 1)
        kept = value if value.dim() == call.output[0].dim() else value.squeeze(axis)
        same = kept.expand(call.output[0].shape)
        return [same, same]
    line = _axis_ids(ids, axis)
    if call.op == "sort" or not choice(call, ids, axis):  # a sorted axis stays as long as it was
        _pin(call, "puts channels in an order that depends on their values")
        return [None, None]
    assert line is not None
    call.set_addresses(line.numpy(), output=1)
    return [None, None]


def _argmax(call: Call) -> Ids:
    source = call.tensor_nodes()[0]
    ids = call.ids_of(source)
    if ids is None:
        return None
    axis = call.int_argument(1, "dim", -1)
    line = _axis_ids(ids, axis)
    if line is None or not choice(call, ids, axis):
        _pin(call, "chooses among channels that vary")
    else:
        call.set_addresses(line.numpy())
    return None


def _count(call: Call) -> Ids:
    """`histc` over whole numbers: one bin per channel that they address."""
    source = call.tensor_nodes()[0]
    known = call.addresses(source)
    if known is None or len(known) != call.output.shape[0]:
        if call.any_ids():
            _pin(call, "counts values of channels")
        return None
    call.ledger.counts.append(known)
    return torch.from_numpy(known)


def _one_hot(call: Call) -> Ids:
    known = call.addresses(call.tensor_nodes()[0])
    if known is None or len(known) != call.output.shape[-1]:
        return None
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
    used = _indexed_axes(call)
    ids = call.ids_of(source)
    if weight is not None and len(weight.shape) == 2 and [axis for axis, _ in used] == [0]:
        return _index_table(call, used[0][1])
    if ids is None:
        return None
    for axis, index in used:
        if bool((ids == ids.narrow(axis, 0, 1)).all()):
            continue
        line, known = _axis_ids(ids, axis), call.addresses(index)
        if line is None or known is None or len(known) != len(line):
            _pin(call, "picks channels by computed positions")
            return None
        call.ledger.merge(line.numpy(), known)
    positions = {axis for axis, _ in used}
    first = ids
    for axis in positions:
        first = first.narrow(axis, 0, 1)
        if bool((ids != ids.narrow(axis, 0, 1)).any()):
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
    axis = call.int_argument(1, "dim", 0)
    if ids is None:
        return None
    if bool((ids == ids.narrow(axis, 0, 1)).all()):
        return ids.narrow(axis, 0, 1).expand(call.output.shape)
    line, known = _axis_ids(ids, axis), call.addresses(index)
    if line is None or known is None or len(known) != len(line):
        _pin(call, "picks channels by computed positions")
        return None
    call.ledger.merge(line.numpy(), known)
    return None


def _scatter(call: Call) -> Ids:
    """`scatter` at numbers that address an axis: the result runs along that axis."""
    nodes = call.tensor_nodes()
    axis = call.int_argument(1, "dim", 0)
    known = call.addresses(nodes[1])
    ids = call.ids_of(nodes[0])
    if known is None or len(known) != call.output.shape[axis]:
        if ids is not None and bool((ids != ids.narrow(axis, 0, 1)).any()):
            _pin(call, "writes to channels at computed positions")
            return None
        return ids
    shape = [1] * call.output.dim()
    shape[axis] = -1
    addressed = torch.from_numpy(known).reshape(shape)
    out = combine(call, ids, addressed)
    assert out is not None
    return out.expand(call.output.shape)


LOOKUP_RULES: dict[Any, Any] = {
    aten.embedding.default: _embedding,
    aten.topk.default: _ordered,
    aten.sort.default: _ordered,
    aten.max.dim: _ordered,
    aten.min.dim: _ordered,
    aten.argmax.default: _argmax,
    aten.histc.default: _count,
    aten.bincount.default: _count,
    aten.one_hot.default: _one_hot,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter_.src: _scatter,
    aten.scatter_.value: _scatter,
}
