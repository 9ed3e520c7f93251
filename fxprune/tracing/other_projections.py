"""Projections that are no `aten.linear`: Conv1D's `addmm`, products with a transposed weight, and those of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxprune.tracing.projections import Projection, projection_of, weight_behind

__all__ = ["OTHER_PRODUCTS", "match_other"]

aten = torch.ops.aten
OTHER_PRODUCTS: set[Any] = {aten.addmm.default, aten.matmul.default, aten.mm.default}


def _added_bias(product: Node) -> Any:
    """The parameter that is added to a product and to nothing else."""
    users = list(product.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
        return None
    bias = next((operand for operand in users[0].args if operand is not product), None)
    value = bias.meta.get("val") if isinstance(bias, Node) and bias.op == "get_attr" else None
    same = isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(product.meta["val"].shape[-1:])
    return bias if same else None


def match_other(node: Node) -> Projection | None:
    """See a node with one of these products as a projection; None where its weight or its bias is no parameter."""
    if node.target is aten.addmm.default:
        if node.kwargs:
            return None
        bias, x, w = node.args
        return projection_of(x, weight_behind(w), bias, turned=True)
    if node.target in OTHER_PRODUCTS:
        x, w = node.args
        return projection_of(x, weight_behind(w), _added_bias(node), turned=True)
    if len(node.args) != 3:
        return None
    x, w, offsets = node.args
    weight = weight_behind(w, axes=3)
    if weight is None or not isinstance(x, Node) or not isinstance(offsets, Node):
        return None
    return Projection(x, weight[0], not weight[1], None, offsets, node.target)
