"""Small helpers on FX graphs that several passes share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["copy_graph_module", "erase_dead"]


def copy_graph_module(graph_module: GraphModule) -> GraphModule:
    """A copy with a graph of its own that shares every module, parameter and buffer."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    graph.set_codegen(graph_module.graph._codegen)
    return GraphModule(graph_module, graph)


def erase_dead(graph: torch.fx.Graph, inputs: Iterable[str] = ()) -> None:
    """Erase what feeds no output; an operator that writes into a value that is used is alive.

    Args:
        graph: a flat graph; it is changed.
        inputs: names of placeholders that may be erased too.
    """
    nodes = list(graph.nodes)
    writers: dict[Node, list[Node]] = {}
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.all_input_nodes:
            writers.setdefault(_base(node), []).append(node)
    alive: set[Node] = set()
    pending = [node for node in nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in alive:
            alive.add(node)
            pending += [*node.all_input_nodes, *writers.get(_base(node), ())]
    removable = set(inputs)
    for node in reversed(nodes):
        if node not in alive and (node.op != "placeholder" or str(node.target) in removable):
            graph.erase_node(node)


def _base(node: Node) -> Node:
    """The value whose memory a view, or an operator that writes, has."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], Node):
        if not node.target._schema.is_mutable and not any(r.alias_info for r in node.target._schema.returns):
            break
        node = node.args[0]
    return node
