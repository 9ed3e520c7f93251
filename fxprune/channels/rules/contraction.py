"""Rules for products of activations: matrix products, dot and outer products, fused attention.

Channels that are summed over on both sides form one block with what they produce: a head's query and key channels, its
scores, its outputs (`fxprune.channels.relations.contract`). Products with a parameter are Linears and have their own
rule. `einsum` and `tensordot` do not come here: normalising turns them into matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.channels.relations import combine, contract, pin

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["ATTENTION", "CONTRACTION_RULES"]

aten = torch.ops.aten

ATTENTION: frozenset[Any] = frozenset({
    aten.scaled_dot_product_attention.default, aten._scaled_dot_product_attention_math.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
})  # fmt: skip
"""Fused attention: query, key, value and perhaps a mask, (batch, heads, sequence, head_dim)."""


def _operand(call: Call, position: int) -> Tensor | None:
    """Ids of a positional argument; one tensor may stand at several positions."""
    node = call.node.args[position]
    assert isinstance(node, Node)
    return call.ids_of(node)


def _as_matrix(ids: Tensor | None, side: int) -> Tensor | None:
    if ids is None or ids.dim() > 1:
        return ids
    return ids.unsqueeze(0) if side == 0 else ids.unsqueeze(-1)


def _product(call: Call, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Ids of a matrix product in which either side may be a vector."""
    out = contract(call, _as_matrix(a, 0), _as_matrix(b, 1))
    if out is None:
        return None
    shape = call.output.shape
    return out.expand(shape) if out.dim() == len(shape) else out.reshape(shape)


def _matmul(call: Call) -> Ids:
    return _product(call, _operand(call, 0), _operand(call, 1))


def _inner(call: Call) -> Ids:
    """Sums over the last axes of both: `inner` of tensors, `dot` of vectors."""
    a, b = _operand(call, 0), _operand(call, 1)
    if any(ids is not None and ids.dim() > 2 for ids in (a, b)):
        return pin(call, "sums products of tensors of more than two axes")
    return _product(call, a, None if b is None else b.t())


def _add_matmul(call: Call) -> Ids:
    bias, a, b = (_operand(call, position) for position in range(3))
    out = contract(call, _as_matrix(a, 0), _as_matrix(b, 1))
    if out is not None and call.op == "addmv":
        out = out.squeeze(-1)
    out = combine(call, out, bias)
    return None if out is None else out.expand(call.output.shape)


def _outer(call: Call) -> Ids:
    first = 1 if call.op == "addr" else 0
    a, b = _operand(call, first), _operand(call, first + 1)
    out = combine(call, None if a is None else a.unsqueeze(-1), None if b is None else b.unsqueeze(-2))
    if first:
        out = combine(call, out, _operand(call, 0))
    return None if out is None else out.expand(call.output.shape)


def _attention(call: Call) -> Ids:
    query, key, value = (_operand(call, position) for position in range(3))
    if call.argument("enable_gqa", default=False) and query is not None:
        groups = query.shape[-3] // call.value_of(call.node.args[1]).shape[-3]  # type: ignore[arg-type]
        key = None if key is None else key.repeat_interleave(groups, -3)
        value = None if value is None else value.repeat_interleave(groups, -3)
    scores = contract(call, query, None if key is None else key.transpose(-1, -2))
    for mask in [node for node in call.tensor_nodes() if node not in call.node.args[:3]]:
        mask_ids = call.ids_of(mask)
        scores = combine(call, scores, mask_ids) if mask_ids is not None else scores
    out = contract(call, scores, value)
    if isinstance(call.output, Tensor):
        return None if out is None else out.expand(call.output.shape)
    first = None if out is None else out.expand(call.output[0].shape)
    return [first, *[None] * (len(call.output) - 1)]


def _computed_weight(call: Call) -> Ids:
    return pin(call, "its weight is computed, not a parameter")


CONTRACTION_RULES: dict[Any, Any] = {
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _inner,
    aten.vdot.default: _inner,
    aten.inner.default: _inner,
    aten.baddbmm.default: _add_matmul,
    aten.addmm.default: _add_matmul,
    aten.addmv.default: _add_matmul,
    aten.outer.default: _outer,
    aten.ger.default: _outer,
    aten.addr.default: _outer,
    aten.linear.default: _computed_weight,
} | dict.fromkeys(ATTENTION, _attention)
