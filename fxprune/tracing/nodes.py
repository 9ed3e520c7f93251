"""What is asked of graphs and nodes everywhere: an attribute by its name, a node's module, an operator's form."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Node

__all__ = ["functional_of", "get_attribute", "module_of"]

aten = torch.ops.aten


def module_of(node: Node) -> str:
    """Qualified name of the module a node belongs to; for labels only."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def get_attribute(root: nn.Module, target: str) -> Any:
    """Follow a dotted name."""
    return operator.attrgetter(target)(root)


def functional_of(target: Any) -> Any:
    """The operator that computes what an in-place operator writes; None for any other operator."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target._overloadpacket.__name__
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return getattr(packet, target._overloadname, None)
