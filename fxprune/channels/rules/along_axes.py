"""Rules for operators that compute along an axis and keep it: softmax, cumulative sums, triangles, fused norms.

Along positions they change no channels. Along channels, what they compute depends on all of these: that is recorded
as a norm, as a choice (softmax), or pinned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.relations import combine, distinct_rows, pin, steady
from fxprune.channels.rules.choices import choice
from fxprune.core.channel_ids import NormSite

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["ALONG_AXES_RULES", "NORMS"]

aten = torch.ops.aten


_SOFTMAX: frozenset[Any] = frozenset({
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int,
    aten._log_softmax.default, aten.special_softmax.default,
})  # fmt: skip


_ACCUMULATIONS: frozenset[Any] = frozenset({
    aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.diff.default,
})  # fmt: skip


_TRIANGLES: frozenset[Any] = frozenset({aten.triu.default, aten.tril.default})


NORMS: frozenset[Any] = frozenset({
    aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default,
})  # fmt: skip


def _softmax(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    axis = call.int_argument(1, "dim", -1)
    if ids is None or steady(ids, axis) or choice(call, ids, axis):
        return ids
    return pin(call, "mixes channels along an axis")


def _accumulation(call: Call) -> Ids:
    """Sums along positions; along channels only counts, which are zero where a channel has gone."""
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    axis = call.argument("dim", -1)
    if steady(ids, axis):
        return ids.narrow(axis, 0, 1).expand(call.output.shape)
    if call.op == "cumsum" and call.ledger.is_count(ids.numpy()).all():
        return ids
    return pin(call, "mixes channels along an axis")


def _triangle(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None or (steady(ids, -1) and steady(ids, -2)):
        return ids
    return pin(call, "mixes channels along an axis")


def _norm(call: Call) -> Ids:
    """A norm over the last axes; weight and bias run along the channels they scale."""
    ids = call.ids_of(call.tensor_nodes()[0])
    several = isinstance(call.output, (tuple, list))
    if ids is None:
        return [None] * len(call.output) if several else None
    width = len(call.argument("normalized_shape"))
    rows, _ = distinct_rows(ids.flatten(-width))
    for row in rows:
        members = np.unique(row[row > 0])
        if len(members) > 1:
            call.ledger.norms.append(NormSite(call.node.name, call.module, call.op, members, len(row)))
    out: Tensor | None = ids
    for node in call.tensor_nodes()[1:]:
        out = combine(call, out, call.ids_of(node))
    return [out, *[None] * (len(call.output) - 1)] if several else out


ALONG_AXES_RULES: dict[Any, Any] = (
    dict.fromkeys(_SOFTMAX, _softmax)
    | dict.fromkeys(_ACCUMULATIONS, _accumulation)
    | dict.fromkeys(_TRIANGLES, _triangle)
    | dict.fromkeys(NORMS, _norm)
)
