"""The rule for grouped Linears, the projections of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxprune.channels.relations import meet_columns
from fxprune.core.channel_ids import Pin

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["grouped_linear"]


def grouped_linear(call: Call) -> Ids:
    """Every expert's rows and columns with one index are one channel; each expert may keep its own (see `groups`)."""
    grouped = call.grouped
    assert grouped is not None
    name = call.weight.name
    rows = call.ledger.axis(name, grouped.out_axis, grouped.out_features, "rows").ids()
    columns = call.ledger.axis(name, grouped.in_axis, grouped.in_features, "columns").ids()
    experts = call.ledger.axis(name, 0, grouped.experts, "experts").ids()
    x, offsets = call.tensor_nodes()
    meet_columns(call, call.ids_of(x), columns)
    ends = call.ids_of(offsets)
    if ends is None:
        call.ledger.pins.append(Pin(experts, call.op, call.module, "its experts are not chosen by traced channels"))
    else:
        call.ledger.merge(ends.numpy(), experts)
    return torch.from_numpy(rows).expand(call.output.shape)
