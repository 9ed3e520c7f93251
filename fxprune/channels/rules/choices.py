"""Rules for operators that choose among channels: top-k, sort, max, and what counts or spreads the chosen numbers.

Whole numbers can name channels: `topk` over the router's logits returns numbers of experts. Such a tensor is said to
*address* an axis; where it is counted or used as an index, the axis it meets is that axis.

    softmax, topk, sort over channels     a *choice*: without a channel the others are chosen from
    topk, max inside rows of channels     a choice in each row: what is chosen speaks for the row, which stays
    histc of numbers that address         one count per channel; cumsum of counts: where each channel's rows end
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.relations import axis_ids, distinct_rows, pin, steady
from fxprune.core.channel_ids import NormSite

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["CHOICE_RULES", "choice"]

aten = torch.ops.aten


def choice(call: Call, ids: Tensor, axis: int) -> bool:
    """Note that channels along an axis compete with each other; False when they cannot be told apart."""
    line = axis_ids(ids, axis)
    if line is None or bool((line == 0).any()) or len(torch.unique(line)) < len(line):
        return False
    call.ledger.norms.append(NormSite(call.node.name, call.module, call.op, line.numpy(), len(line), choice=True))
    return True


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
    line = axis_ids(ids, axis)
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
    line = None if axis is None else axis_ids(ids, axis)
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


CHOICE_RULES: dict[Any, Any] = {
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
}
