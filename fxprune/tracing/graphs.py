"""Small helpers on FX graphs that several passes share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxprune.tracing.lifted import parameter_of, with_parameters
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["copy_graph_module", "erase_dead", "linear_calls", "own_projections", "source_of_logits", "state_tensors"]


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


def linear_calls(graph_module: GraphModule) -> dict[str, list[Node]]:
    """The calls of each Linear, by its qualified name, in graph order."""
    calls: dict[str, list[Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(get_attribute(graph_module, str(node.target)), nn.Linear):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def source_of_logits(graph_module: GraphModule, outputs: tuple[str, ...]) -> Node | None:
    """The value that the last Linear before the output `logits` reads; None when there is no such output."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    values = dict(zip(outputs, output.args[0], strict=False))
    node = values.get("logits")
    while isinstance(node, Node):
        if node.op == "call_module" and isinstance(get_attribute(graph_module, str(node.target)), nn.Linear):
            source = node.args[0]
            return source if isinstance(source, Node) else None
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return None


def state_tensors(graph_module: GraphModule) -> dict[str, Tensor]:
    """The parameters and buffers of a lifted graph, named and laid out as the model's class has them.

    Constants that rewriting added (selections) are left out.
    """
    tensors = {}
    for name, tensor in graph_module.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if not leaf.startswith("_kept_"):
            original, turned = parameter_of(graph_module.get_submodule(owner), name)
            tensors[original] = (tensor.t() if turned else tensor).detach()
    return tensors


def own_projections(graph_module: GraphModule, names: Iterable[str]) -> GraphModule:
    """A copy of a graph with projections of its own; weights are shared until they are replaced."""
    copy = copy_graph_module(graph_module)
    for name in names:
        module = get_attribute(copy, name)
        bias = getattr(module, "bias", None)
        copy.set_submodule(name, with_parameters(module, module.weight.detach(), bias))
    return copy
