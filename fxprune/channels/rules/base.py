"""The rule table of channel tracing: one rule per family of operators.

Beside each activation runs an integer tensor of the same shape, its *ids*: for every element the channel it carries,
0 for none. A rule gets an operator's arguments with their ids and returns the ids of its result; what it learns about
channels on the way it writes to the ledger. `None` stands for a tensor of zeros.

    movement      view, transpose, split, cat, expand, ...   the very same op on the ids
    elementwise   add, mul, where, silu, ...                 ids that meet are one channel, or one shares the other
    linear        call_module Linear                         rows come out, columns meet what comes in
    attention     fused attention                            query, key, scores and output of a head form one block
    reduction     mean, sum, ...                             a norm over the channels it reduces
    lookup        embedding, index                           positions, or channels that numbers address
    pin           everything else                            what it touches must stay

Each family has a file of its own. A plain decoder meets no more than these; the rest is for other models:

    contraction   matmul, bmm, dot, outer                    contracted channels form one block, as in attention
    along_axes    softmax, cumsum, triu, layer_norm, ...     a norm or a choice
    choices       topk, sort, argmax, histc, ...             numbers that address channels
    writes        gather, scatter, index_put, ...            positions, or what numbers address
    padding       pad, view_as_complex                       stays as long as a channel of its axis
    grouped       GroupedLinear                              a Linear for each expert
    spatial       conv, pooling, batch_norm                  a Linear, or nothing, at every position
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.call import Ids
from fxprune.channels.relations import combine, distinct_rows, keep_addresses, meet_columns, pin, reduce_last
from fxprune.channels.rules.along_axes import ALONG_AXES_RULES
from fxprune.channels.rules.attention import ATTENTION_RULES
from fxprune.channels.rules.choices import CHOICE_RULES
from fxprune.channels.rules.contraction import CONTRACTION_RULES
from fxprune.channels.rules.grouped import grouped_linear
from fxprune.channels.rules.lookup import LOOKUP_RULES
from fxprune.channels.rules.movement import MOVEMENT, MOVEMENT_RULES
from fxprune.channels.rules.padding import PADDING_RULES
from fxprune.channels.rules.reduction import REDUCTION_RULES
from fxprune.channels.rules.spatial import SPATIAL_RULES
from fxprune.channels.rules.writes import WRITE_RULES
from fxprune.core.channel_ids import ActivationSite
from fxprune.tracing.nodes import functional_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.channels.call import Call

    Rule = Callable[["Call"], "Ids"]

__all__ = ["CASTS", "MOVEMENT", "Ids", "find_rule"]

aten = torch.ops.aten

CASTS: frozenset[Any] = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.alias_copy.default, aten.detach.default,
    aten.detach_copy.default, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.dropout.default,
    aten.native_dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default, aten.real.default,
    aten.imag.default, aten.resolve_conj.default, aten.resolve_neg.default, aten.positive.default,
    aten.conj.default, aten._conj.default,
})  # fmt: skip

CREATION: frozenset[Any] = frozenset({
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.zeros.default,
    aten.ones.default, aten.empty.memory_format, aten.scalar_tensor.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default, aten.new_empty.default, aten.sym_size.int, aten.sym_size.default,
    aten.sym_numel.default, aten.eye.default, aten.eye.m, aten.linspace.default, aten.empty_strided.default,
    aten.new_empty_strided.default, aten.tril_indices.default, aten.triu_indices.default, aten.rand.default,
    aten.randn.default, aten.randint.default, aten.sym_stride.int, aten.item.default,
})  # fmt: skip

LIKE: frozenset[Any] = frozenset({
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.rand_like.default, aten.randn_like.default,
})  # fmt: skip

POINTWISE: frozenset[Any] = frozenset({
    aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.complex.default, aten.polar.default, aten.prelu.default,
    aten._prelu_kernel.default, aten.log_sigmoid.default, aten.special_expit.default, aten.hardswish.default,
    aten.arctan2.default, aten.multiply.Tensor, aten.multiply.Scalar, aten.subtract.Tensor, aten.subtract.Scalar,
    aten.divide.Tensor, aten.divide.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar,
    aten.negative.default, aten.absolute.default, aten.greater.Tensor, aten.greater.Scalar,
    aten.greater_equal.Tensor, aten.greater_equal.Scalar, aten.less.Tensor, aten.less.Scalar,
    aten.less_equal.Tensor, aten.less_equal.Scalar, aten.not_equal.Tensor, aten.not_equal.Scalar,
    aten.isclose.default, aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar,
    aten.__xor__.Tensor, aten.__xor__.Scalar, aten.floor_divide.default, aten.floor_divide.Scalar,
    aten.isin.Tensor_Scalar, aten.fill.Scalar, aten.fill.Tensor, aten.bernoulli.default, aten.bernoulli.p,
    aten.max.other, aten.min.other, aten.fake_quantize_per_tensor_affine.default,
})  # fmt: skip
"""Pointwise operators that torch does not tag as such."""

ACTIVATIONS: frozenset[str] = frozenset({
    "silu", "gelu", "relu", "relu6", "tanh", "sigmoid", "elu", "selu", "celu", "mish", "softplus", "leaky_relu",
    "hardswish", "hardsigmoid", "hardtanh", "log_sigmoid", "prelu", "_prelu_kernel", "rrelu", "erf", "expm1", "glu",
    "hardshrink", "softshrink", "threshold", "special_expit", "sin",
})  # fmt: skip


# --- rules ----------------------------------------------------------------------------------------------------------


def _cast(call: Call) -> Ids:
    keep_addresses(call)
    ids = call.ids_of(call.tensor_nodes()[0])
    return [ids, None] if call.node.target is aten.native_dropout.default else ids


def _mask(call: Call) -> Ids:
    """A mask on its first operand; a gate's two operands are one stream."""
    nodes = [node for node in call.tensor_nodes() if call.value_of(node).is_floating_point()]
    out = call.ids_of(nodes[0])
    for node in nodes[1:]:
        out = combine(call, out, call.ids_of(node))
    return out


def _elementwise(call: Call) -> Ids:
    out: Tensor | None = None
    for node in call.tensor_nodes():
        out = combine(call, out, call.ids_of(node))
    if out is not None and call.op.removesuffix("_") in ACTIVATIONS:
        call.ledger.activations.append(ActivationSite(call.op, call.module, np.unique(out[out > 0].numpy())))
    return None if out is None else out.expand(call.output.shape)


def _linear(call: Call) -> Ids:
    weight = call.weight
    rows = call.ledger.axis(weight.name, 0, weight.shape[0], "rows").ids()
    columns = call.ledger.axis(weight.name, 1, weight.shape[1], "columns").ids()
    ids = call.ids_of(call.tensor_nodes()[0])
    meet_columns(call, ids, columns)
    if weight.bias is not None:
        call.ledger.merge(rows, call.ledger.axis(weight.bias, 0, weight.shape[0]).ids())
    out: Tensor | None = torch.from_numpy(rows)
    if ids is not None and len(distinct_rows(ids)[0]) > 1:
        reduced = reduce_last(call, ids, merge=False)
        out = combine(call, None if reduced is None else reduced.unsqueeze(-1), out)
    assert out is not None
    return out.expand(call.output.shape)


def _copy(call: Call) -> Ids:
    """`copy` and `fill` take the values of the second operand, in the shape of the first."""
    ids = call.ids_of(call.tensor_nodes()[1])
    return None if ids is None else ids.expand(call.output.shape)


def _gated(call: Call) -> Ids:
    """`glu`: one half of an axis gates the other."""
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    gated, gate = ids.chunk(2, call.argument("dim", -1))
    out = combine(call, gated, gate)
    if out is not None:
        call.ledger.activations.append(ActivationSite(call.op, call.module, np.unique(out[out > 0].numpy())))
    return out


def _like(call: Call) -> Ids:
    """A tensor shaped like another runs along the same channels."""
    return call.ids_of(call.tensor_nodes()[0])


def _nothing(call: Call) -> Ids:
    return [None] * len(call.output) if isinstance(call.output, (tuple, list)) else None


_RULES: dict[Any, Rule] = (
    dict.fromkeys(CASTS, _cast)
    | dict.fromkeys(LIKE, _like)
    | dict.fromkeys(CREATION, _nothing)
    | dict.fromkeys(POINTWISE, _elementwise)
    | {aten.copy.default: _copy, aten.glu.default: _gated}
    | MOVEMENT_RULES
    | PADDING_RULES
    | ATTENTION_RULES
    | CONTRACTION_RULES
    | REDUCTION_RULES
    | ALONG_AXES_RULES
    | LOOKUP_RULES
    | CHOICE_RULES
    | WRITE_RULES
    | SPATIAL_RULES
)


def _in_place(call: Call) -> Ids:
    """An in-place operator is like its functional form as long as nobody reads what it overwrote under its old name."""
    node, base = call.node, call.node.args[0]
    while isinstance(base, torch.fx.Node):
        if any(user is not node and node < user for user in base.users):
            return pin(call, "writes in place into a value that is read again")
        aliased = isinstance(base.target, torch._ops.OpOverload) and any(
            r.alias_info for r in base.target._schema.returns
        )
        base = base.args[0] if aliased and base.args else None
    return _rule_of(functional_of(node.target))(call)


def _rule_of(target: Any) -> Rule:
    if target in _RULES:
        return _RULES[target]
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return _elementwise if pointwise else pin


def find_rule(call: Call) -> Rule:
    """The rule for a call: Linear modules, the table, then whatever torch tags as pointwise; the rest pins."""
    if call.is_linear:
        return _linear
    if call.grouped is not None:
        return grouped_linear
    if call.is_elementwise_module:
        return _mask
    return _in_place if functional_of(call.node.target) is not None else _rule_of(call.node.target)
