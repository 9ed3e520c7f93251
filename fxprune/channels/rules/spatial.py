"""Rules for operators on images and sequences with channels on axis 1: convolutions, pooling, batch norms.

    conv, groups = 1                   a Linear at every position: rows on axis 0 of the weight, columns on axis 1
    conv, groups = channels            one filter a channel, which goes with it
    pooling, interpolation             positions only
    batch_norm                         elementwise: its weight, bias and statistics go with the channels

Channels of a convolution with other groups are pinned: equally many of every group would have to go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.relations import combine, meet_columns, pin, steady
from fxprune.core.channel_ids import Pin

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["CONVOLUTIONS", "SPATIAL_RULES"]

aten = torch.ops.aten

CONVOLUTIONS: frozenset[Any] = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.convolution.default, aten._convolution.default,
})  # fmt: skip

_POOLS: frozenset[Any] = frozenset({
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.max_pool1d.default,
    aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool2d.default,
    aten.upsample_nearest1d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.default, aten.upsample_bicubic2d.vec, aten.upsample_linear1d.default,
    aten.upsample_linear1d.vec,
})  # fmt: skip

_BATCH_NORMS: frozenset[Any] = frozenset({
    aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default,
})  # fmt: skip

_GROUP_NORMS: frozenset[Any] = frozenset({
    aten.group_norm.default, aten.native_group_norm.default, aten.instance_norm.default,
})  # fmt: skip


def _convolution(call: Call) -> Ids:
    weight, x = call.parameter(1), call.tensor_nodes()[0]
    ids = call.ids_of(x)
    if weight is None or call.argument("transposed", default=False):
        return pin(call, "its weight is computed, or it is transposed")
    positions = len(weight.shape) - 2
    channel = call.value_of(x).dim() - positions - 1  # 1, or 0 without a batch
    groups, shape = call.argument("groups", default=1), [-1, *[1] * positions]
    if groups > 1 and (groups != call.value_of(x).shape[channel] or weight.shape[0] != groups):
        _pin_rows(call)
        return pin(call, "equally many channels of every group would have to go")
    if ids is not None and not all(steady(ids, axis) for axis in range(channel + 1, ids.dim())):
        varied = np.unique(ids[ids > 0].numpy())
        call.ledger.pins.append(Pin(varied, call.op, call.module, "its channels differ from position to position"))
        ids = None
    rows = torch.from_numpy(call.ledger.axis(weight.name, 0, weight.shape[0]).ids())
    if groups == 1:
        columns = call.ledger.axis(weight.name, 1, weight.shape[1]).ids()
        meet_columns(call, None if ids is None else ids.movedim(channel, -1), columns)
        out: Tensor | None = rows.reshape(shape)
    elif ids is None:
        _pin_rows(call)
        out = rows.reshape(shape)
    else:
        line = ids
        for axis in range(channel + 1, ids.dim()):
            line = line.narrow(axis, 0, 1)
        out = combine(call, line, rows.reshape(shape))
    bias = None if len(call.node.args) < 3 else call.ids_of(call.node.args[2])  # type: ignore[arg-type]
    out = combine(call, out, None if bias is None else bias.reshape(shape))
    assert out is not None
    return out.expand(call.output.shape)


def _pin_rows(call: Call) -> None:
    weight = call.parameter(1)
    assert weight is not None
    ids = call.ledger.axis(weight.name, 0, weight.shape[0]).ids()
    call.ledger.pins.append(Pin(ids, call.op, call.module, "reads values that carry no traced channels"))


def _pool(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    positions = next(int(letter) for letter in call.op if letter.isdigit())
    for axis in range(ids.dim() - positions, ids.dim()):
        if not steady(ids, axis):
            return pin(call, "its channels differ from position to position")
        ids = ids.narrow(axis, 0, 1)
    return ids.expand(call.output.shape)


def _batch_norm(call: Call) -> Ids:
    several = isinstance(call.output, (tuple, list))
    value = call.output[0] if several else call.output
    out = call.ids_of(call.tensor_nodes()[0])
    shape = [-1, *[1] * (value.dim() - 2)]
    for node in call.tensor_nodes()[1:]:
        ids = call.ids_of(node)
        out = combine(call, out, None if ids is None else ids.reshape(shape))
    out = None if out is None else out.expand(value.shape)
    return [out, *[None] * (len(call.output) - 1)] if several else out


def _group_norm(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is not None and all(steady(ids, axis) for axis in range(1, ids.dim())):
        return [ids, None, None] if isinstance(call.output, (tuple, list)) else ids
    return pin(call, "normalises groups of channels together")


SPATIAL_RULES: dict[Any, Any] = (
    dict.fromkeys(CONVOLUTIONS, _convolution)
    | dict.fromkeys(_POOLS, _pool)
    | dict.fromkeys(_BATCH_NORMS, _batch_norm)
    | dict.fromkeys(_GROUP_NORMS, _group_norm)
)
