"""Rules for padding, which stays as long as one of the channels of its axis does, and for pairs that become complex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxprune.channels.relations import pin, reduce_last, steady

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["PADDING_RULES"]

aten = torch.ops.aten


_PADS: frozenset[Any] = frozenset({
    aten.constant_pad_nd.default, aten.pad.default, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
    aten.reflection_pad3d.default, aten.replication_pad1d.default, aten.replication_pad2d.default,
    aten.replication_pad3d.default,
})  # fmt: skip


def _pad(call: Call) -> Ids:
    """Padding of an axis of channels is there as long as one of these channels is; only constants may pad one."""
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    widths = call.argument("pad", None) or call.argument("padding")
    constant = call.op == "constant_pad_nd" or (call.op == "pad" and call.argument("mode", "constant") == "constant")
    for index in range(len(widths) // 2):
        before, after = widths[2 * index : 2 * index + 2]
        axis = ids.dim() - 1 - index
        if not before and not after:
            continue
        if steady(ids, axis):
            shape = list(ids.shape)
            shape[axis] += before + after
            ids = ids.narrow(axis, 0, 1).expand(shape)
            continue
        if not constant or before < 0 or after < 0:
            return pin(call, "repeats or cuts off channels at an edge")
        edge = reduce_last(call, ids.movedim(axis, -1), merge=False)
        assert edge is not None
        edge = edge.unsqueeze(axis)
        parts = (edge.repeat_interleave(before, axis), ids, edge.repeat_interleave(after, axis))
        ids = torch.cat(parts, axis)
    return ids


def _as_complex(call: Call) -> Ids:
    """Two channels become one number: they go together."""
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    real, imaginary = ids.unbind(-1)
    both = ((real > 0) & (imaginary > 0) & (real != imaginary)).numpy()
    pairs = np.unique(np.stack([real.numpy()[both], imaginary.numpy()[both]], 1), axis=0)
    call.ledger.merge(pairs[:, 0], pairs[:, 1])
    return torch.where(real > 0, real, imaginary)


def _as_real(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    return None if ids is None else ids.unsqueeze(-1).expand(call.output.shape)


PADDING_RULES: dict[Any, Any] = (
    dict.fromkeys(_PADS, _pad)
    | dict.fromkeys((aten.view_as_complex.default, aten.view_as_complex_copy.default), _as_complex)
    | dict.fromkeys((aten.view_as_real.default, aten.view_as_real_copy.default), _as_real)
)
