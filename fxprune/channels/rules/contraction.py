"""Rules for products of activations: matrix products, dot and outer products.

Channels that are summed over on both sides form one block with what they produce: a head's query and key channels, its
scores, its outputs (`fxprune.channels.relations.contract`). Products with a parameter are Linears and have their own
rule. `einsum` and `tensordot` do not come here: normalising turns them into matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.channels.relations import combine, contract, pin
from fxprune.channels.rules.attention import operand

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["CONTRACTION_RULES"]

aten = torch.ops.aten


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
    return _product(call, operand(call, 0), operand(call, 1))


def _inner(call: Call) -> Ids:
    """Sums over the last axes of both: `inner` of tensors, `dot` of vectors."""
    a, b = operand(call, 0), operand(call, 1)
    if any(ids is not None and ids.dim() > 2 for ids in (a, b)):
        return pin(call, "sums products of tensors of more than two axes")
    return _product(call, a, None if b is None else b.t())


def _add_matmul(call: Call) -> Ids:
    bias, a, b = (operand(call, position) for position in range(3))
    out = contract(call, _as_matrix(a, 0), _as_matrix(b, 1))
    if out is not None and call.op == "addmv":
        out = out.squeeze(-1)
    out = combine(call, out, bias)
    return None if out is None else out.expand(call.output.shape)


def _outer(call: Call) -> Ids:
    first = 1 if call.op == "addr" else 0
    a, b = operand(call, first), operand(call, first + 1)
    out = combine(call, None if a is None else a.unsqueeze(-1), None if b is None else b.unsqueeze(-2))
    if first:
        out = combine(call, out, operand(call, 0))
    return None if out is None else out.expand(call.output.shape)


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
}
