"""The rule table of channel tracing: one rule per family of operators.

Beside each activation runs an integer tensor of the same shape, its *ids*: for every element the channel it carries,
0 for none. A rule gets an operator's arguments with their ids and returns the ids of its result; what it learns about
channels on the way it writes to the ledger. `None` stands for a tensor of zeros.

    movement      view, transpose, split, cat, expand, ...   the very same op on the ids
    elementwise   add, mul, where, silu, ...                 ids that meet are one channel, or one shares the other
    linear        call_module Linear                         rows come out, columns meet what comes in
    contraction   matmul, bmm, attention                     contracted channels form one block: a head
    reduction     mean, sum, layer_norm, ...                 a norm over the channels it reduces
    pin           everything else                            what it touches must stay
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channel_ids import ActivationSite, NormSite, Pin
from fxprune.channel_relations import combine, contract, distinct_rows, meet_columns, reduce_last
from fxprune.channel_rules_lookup import LOOKUP_RULES, choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.channels import Call

    Rule = Callable[["Call"], "Ids"]

__all__ = ["CASTS", "MOVEMENT", "NORMS", "Ids", "find_rule"]

Ids = Tensor | None | list[Tensor | None]
aten = torch.ops.aten

MOVEMENT: frozenset[Any] = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.numpy_T.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.expand.default, aten.expand_as.default,
    aten.repeat.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.flatten.using_ints, aten.unflatten.int, aten.narrow.default, aten.index_select.default, aten.roll.default,
    aten.flip.default, aten.movedim.int, aten.movedim.intlist, aten.repeat_interleave.self_int, aten.cat.default,
    aten.stack.default, aten.swapaxes.default, aten.swapdims.default, aten.tile.default, aten.view_as.default,
    aten.reshape_as.default, aten.broadcast_to.default,
})  # fmt: skip

COPYING: frozenset[Any] = frozenset({
    aten.expand.default, aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int,
    aten.broadcast_to.default,
})  # fmt: skip

CASTS: frozenset[Any] = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.dropout.default, aten.native_dropout.default,
})  # fmt: skip

CREATION: frozenset[Any] = frozenset({
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.zeros.default,
    aten.ones.default, aten.empty.memory_format, aten.scalar_tensor.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default, aten.new_empty.default, aten.sym_size.int, aten.sym_size.default,
    aten.sym_numel.default, aten.eye.default, aten.linspace.default,
})  # fmt: skip

LIKE: frozenset[Any] = frozenset({
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.rand_like.default, aten.randn_like.default,
})  # fmt: skip

MATMUL: frozenset[Any] = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
ADD_MATMUL: frozenset[Any] = frozenset({aten.baddbmm.default, aten.addmm.default, aten.addbmm.default})

POINTWISE: frozenset[Any] = frozenset({
    aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor,
})  # fmt: skip
"""Pointwise operators that torch does not tag as such."""

REDUCTIONS: frozenset[Any] = frozenset({
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.any.dim,
    aten.all.dim, aten.linalg_vector_norm.default, aten.std.correction, aten.logsumexp.default, aten.prod.dim_int,
})  # fmt: skip

ALONG_AXIS: dict[Any, int] = {
    aten.softmax.int: 1, aten._softmax.default: 1, aten.log_softmax.int: 1, aten._log_softmax.default: 1,
    aten.cumsum.default: 1, aten.triu.default: -1, aten.tril.default: -1,
}  # fmt: skip

ACTIVATIONS: frozenset[str] = frozenset({
    "silu", "gelu", "relu", "relu6", "tanh", "sigmoid", "elu", "selu", "celu", "mish", "softplus", "leaky_relu",
    "hardswish", "hardsigmoid", "hardtanh", "log_sigmoid",
})  # fmt: skip

NORMS: frozenset[Any] = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default})


# --- rules ----------------------------------------------------------------------------------------------------------


def _keep_addresses(call: Call) -> None:
    """Numbers that are moved or cast still name the same channels."""
    known = [call.addresses(node) for node in call.tensor_nodes()]
    if known and known[0] is not None and isinstance(call.output, Tensor):
        call.set_addresses(known[0])


def _movement(call: Call) -> Ids:
    _keep_addresses(call)
    if not call.any_ids():
        return None
    if call.node.target in {aten.cat.default, aten.stack.default}:
        _align_state(call)
    if call.node.target is aten.cat.default and (scores := _scores_and_sinks(call)) is not None:
        return scores
    ids = call.apply_to_ids()
    return _copies(call, ids) if isinstance(ids, Tensor) and call.node.target in COPYING else ids


def _copies(call: Call, ids: Tensor) -> Tensor:
    """Give each copy along a static axis channels of its own that need the original.

    `repeat_kv` copies a KV head for each of its query heads: a copy goes with its query head, the original with the
    last of them.
    """
    source = call.tensor_nodes()[0]
    before = call.value_of(source).shape
    copy = torch.zeros((), dtype=torch.int64)
    for axis, count, stride in _copied_axes(call, list(before), list(ids.shape)):
        index = torch.arange(ids.shape[axis]) // stride % count
        shape = [1] * ids.dim()
        shape[axis] = -1
        copy = copy * count + index.reshape(shape)
    if not copy.any():
        return ids
    scale = int(copy.max()) + 1
    key = torch.where(ids > 0, ids * scale + copy, 0)
    unique, inverse = np.unique(key.numpy(), return_inverse=True)
    new = call.ledger.fresh(int((unique > 0).sum()))
    call.ledger.need(new, unique[unique > 0] // scale)
    named = np.zeros(len(unique), dtype=np.int64)
    named[unique > 0] = new
    return torch.from_numpy(named[inverse]).reshape(ids.shape)


def _copied_axes(call: Call, before: list[int], after: list[int]) -> list[tuple[int, int, int]]:
    """Result axes along which a copying operator repeats by a literal count: (axis, copies, run length)."""
    args = call.node.args
    if call.node.target is aten.repeat_interleave.self_int:
        count, dim = args[1], call.int_argument(2, "dim", 0) % len(after)
        return [(dim, count, 1)] if isinstance(count, int) and count > 1 else []
    sizes = args[1]
    assert isinstance(sizes, (list, tuple))
    padded = [1] * (len(after) - len(before)) + before
    literal = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and after[axis] > padded[axis]]
    return [(axis, after[axis] // padded[axis], padded[axis]) for axis in literal]


def _align_state(call: Call) -> None:
    """Give a cache, or a padding without channels, the channels of what it is concatenated with.

    A graph input that is extended along an axis over which ids do not vary holds earlier values of the same channels.
    """
    dim = call.int_argument(1, "dim", 0)
    # An empty operand adds nothing; `cat` even takes one of a single axis.
    tensors = [node for node in call.operand_nodes(0) if call.value_of(node).numel()]
    ids = [call.ids_of(node) for node in tensors]
    steady = [t is not None and bool((t == t.narrow(dim, 0, 1)).all()) for t in ids]
    if call.node.target is aten.stack.default or not any(steady):
        return
    is_input = [t is not None and call.only_inputs(t) for t in ids]
    partner = next((t for t, ok, inp in zip(ids, steady, is_input, strict=True) if ok and not inp), None)
    if partner is None:
        return
    assert isinstance(partner, Tensor)
    first = partner.narrow(dim, 0, 1)
    for node, t, ok, inp in zip(tensors, ids, steady, is_input, strict=True):
        if inp and ok:
            assert t is not None
            mine = t.narrow(dim, 0, 1)
            both = ((mine > 0) & (first > 0)).numpy()
            call.ledger.merge(mine.numpy()[both], first.numpy()[both])
            call.ledger.states.append(np.unique(mine.numpy()[both]))
        if t is None or (inp and ok):
            call.override(node, first.expand(call.value_of(node).shape).contiguous())


def _scores_and_sinks(call: Call) -> Tensor | None:
    """Ids of attention scores that are extended by a column of their own (attention sinks); None for other `cat`s."""
    dim = call.int_argument(1, "dim", 0)
    listed = [ids for node in call.operand_nodes(0) if (ids := call.ids_of(node)) is not None]
    if not any(call.ledger.is_score(ids.numpy()).any() for ids in listed):
        return None
    if not all(bool((ids == ids.narrow(dim, 0, 1)).all()) for ids in listed):
        return None
    out: Tensor | None = None
    for ids in listed:
        out = combine(call, out, ids.narrow(dim, 0, 1))
    return None if out is None else out.expand(call.output.shape)


def _cast(call: Call) -> Ids:
    _keep_addresses(call)
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
    if out is not None and call.op in ACTIVATIONS:
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


def _grouped_linear(call: Call) -> Ids:
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


def _matmul(call: Call) -> Ids:
    a, b = (call.ids_of(node) for node in call.tensor_nodes()[:2])
    out = contract(call, _as_matrix(a, 0), _as_matrix(b, 1))
    if out is None:
        return None
    shape = call.output.shape
    return out.expand(shape) if out.dim() == len(shape) else out.reshape(shape)


def _as_matrix(ids: Tensor | None, side: int) -> Tensor | None:
    if ids is None or ids.dim() > 1:
        return ids
    return ids.unsqueeze(0) if side == 0 else ids.unsqueeze(-1)


def _add_matmul(call: Call) -> Ids:
    bias, a, b = call.tensor_nodes()[:3]
    out = combine(call, contract(call, call.ids_of(a), call.ids_of(b)), call.ids_of(bias))
    return None if out is None else out.expand(call.output.shape)


def _attention(call: Call) -> Ids:
    nodes = call.tensor_nodes()
    query, key, value = (call.ids_of(node) for node in nodes[:3])
    if call.node.kwargs.get("enable_gqa") and query is not None:
        groups = query.shape[-3] // call.value_of(nodes[1]).shape[-3]
        key = None if key is None else key.repeat_interleave(groups, -3)
        value = None if value is None else value.repeat_interleave(groups, -3)
    scores = contract(call, query, None if key is None else key.transpose(-1, -2))
    for mask in nodes[3:]:
        mask_ids = call.ids_of(mask)
        scores = combine(call, scores, mask_ids) if mask_ids is not None else scores
    out = contract(call, scores, value)
    return None if out is None else out.expand(call.output.shape)


def _reduction(call: Call) -> Ids:
    node = call.tensor_nodes()[0]
    ids = call.ids_of(node)
    if ids is None:
        return None
    dims = call.int_list_argument(1, "dim") or list(range(ids.dim()))
    dims = sorted(dim % ids.dim() for dim in dims)
    rest = [dim for dim in range(ids.dim()) if dim not in dims]
    moved = ids.permute(*rest, *dims).reshape(*(ids.shape[dim] for dim in rest), -1)
    out = reduce_last(call, moved, merge=False, norm=call.op)
    return None if out is None else out.reshape(call.output.shape)


def _along_axis(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    position = ALONG_AXIS[call.node.target]
    axes = [-1, -2] if position < 0 else [call.int_argument(position, "dim", -1)]
    for axis in axes:
        if bool((ids == ids.narrow(axis, 0, 1)).all()):
            continue
        if position < 0 or (call.op == "cumsum" and not call.ledger.is_count(ids.numpy()).all()):
            return _pin(call, "mixes channels along an axis")
        if call.op != "cumsum" and not choice(call, ids, axis):
            return _pin(call, "mixes channels along an axis")
    return ids


def _norm(call: Call) -> Ids:
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return None
    rows, _ = distinct_rows(ids)
    for row in rows:
        members = np.unique(row[row > 0])
        if len(members) > 1:
            call.ledger.norms.append(NormSite(call.node.name, call.module, call.op, members, len(row)))
    out: Tensor | None = ids
    for node in call.tensor_nodes()[1:]:
        out = combine(call, out, call.ids_of(node))
    return [out, None] if isinstance(call.output, (tuple, list)) else out


def _pin(call: Call, reason: str = "no rule for this operator") -> Ids:
    touched = [call.ids_of(node) for node in call.tensor_nodes()]
    ids = [np.unique(t[t > 0].numpy()) for t in touched if t is not None]
    if ids:
        call.ledger.pins.append(Pin(np.concatenate(ids), call.op, call.module, reason))
    return [None] * len(call.output) if isinstance(call.output, (tuple, list)) else None


def _like(call: Call) -> Ids:
    """A tensor shaped like another runs along the same channels."""
    return call.ids_of(call.tensor_nodes()[0])


def _nothing(call: Call) -> Ids:
    return [None] * len(call.output) if isinstance(call.output, (tuple, list)) else None


_TABLE: list[tuple[frozenset[Any], Rule]] = [
    (MOVEMENT, _movement),
    (CASTS, _cast),
    (LIKE, _like),
    (CREATION, _nothing),
    (MATMUL, _matmul),
    (ADD_MATMUL, _add_matmul),
    (POINTWISE, _elementwise),
    (REDUCTIONS, _reduction),
    (frozenset(ALONG_AXIS), _along_axis),
    (NORMS, _norm),
    (frozenset({aten.scaled_dot_product_attention.default}), _attention),
]
_RULES: dict[Any, Rule] = {target: rule for targets, rule in _TABLE for target in targets} | LOOKUP_RULES


def find_rule(call: Call) -> Rule:
    """The rule for a call: Linear modules, the table, then whatever torch tags as pointwise; the rest pins."""
    if call.is_linear:
        return _linear
    if call.grouped is not None:
        return _grouped_linear
    target = call.node.target
    if target in _RULES:
        return _RULES[target]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _elementwise
    if call.is_elementwise_module:
        return _mask
    return _pin
