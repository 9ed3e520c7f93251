"""An FX rewrite that prepares a graph for ONNX: what is computed from constant numbers alone is a constant.

Code that turns a setting into a factor (a quantile of the normal distribution, say) leaves operators in the graph that
no runtime has, of a number that is always the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["fold_numbers"]


def fold_numbers(graph_module: GraphModule) -> int:
    """Compute now what a graph computes from constants of one element, in place.

    Parameters are no constants, and stay. Results of more than one element stay as well.

    Args:
        graph_module: a flat graph of functional aten operators.

    Returns:
        How many operators were computed.
    """
    graph = graph_module.graph
    known: dict[Node, Tensor] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = get_attribute(graph_module, str(node.target))
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() == 1:
                known[node] = value
        elif _computes(node) and node.all_input_nodes and all(each in known for each in node.all_input_nodes):
            value = _value(node, known)
            if value is None:
                continue
            known[node] = value
            name = f"folded_{count}"
            graph_module.register_buffer(name, value)
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta = dict(node.meta)
            known[constant] = value
            node.replace_all_uses_with(constant)
            count += 1
    erase_dead(graph)
    return count


def _computes(node: Node) -> bool:
    """Whether a node gives the same for the same, and writes nowhere."""
    target: Any = node.target
    is_operator = node.op == "call_function" and isinstance(target, torch._ops.OpOverload)
    random = is_operator and torch.Tag.nondeterministic_seeded in target.tags
    return is_operator and not target._schema.is_mutable and not random


def _value(node: Node, known: dict[Node, Tensor]) -> Tensor | None:
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    assert callable(node.target)
    with torch.no_grad():
        value = node.target(*args, **kwargs)
    one = isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta"
    return value.clone() if one else None
