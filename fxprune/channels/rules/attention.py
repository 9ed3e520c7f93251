"""The rule for fused attention: query and key channels, scores and outputs of a head form one block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.channels.relations import combine, contract

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["ATTENTION", "ATTENTION_RULES", "operand"]

aten = torch.ops.aten


ATTENTION: frozenset[Any] = frozenset({
    aten.scaled_dot_product_attention.default, aten._scaled_dot_product_attention_math.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
})  # fmt: skip
"""Fused attention: query, key, value and perhaps a mask, (batch, heads, sequence, head_dim)."""


def operand(call: Call, position: int) -> Tensor | None:
    """Ids of a positional argument; one tensor may stand at several positions."""
    node = call.node.args[position]
    assert isinstance(node, Node)
    return call.ids_of(node)


def _attention(call: Call) -> Ids:
    query, key, value = (operand(call, position) for position in range(3))
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


ATTENTION_RULES: dict[Any, Any] = dict.fromkeys(ATTENTION, _attention)
