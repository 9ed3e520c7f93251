"""What is asked of a lifted graph: its Linears' calls, what its logits come from, its tensors as the model has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.fx import GraphModule, Node

from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.lifted import parameter_of, with_parameters
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["linear_calls", "own_projections", "source_of_logits", "state_tensors"]


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
