"""Activations that a backward pass computes again instead of keeping them.

    by_block      x ─ layer ─ layer ─ ...      what goes into a layer is kept, nothing that is computed inside
    before_masks  gate_proj ─ silu ┐
                  up_proj ─────────┴ mul ─ mask ─ down_proj
                                └── again ──┘

A gate's gradient needs what the gate multiplies, which nothing else keeps: gates would cost the memory of one more
activation each. What is multiplied follows by cheap operators (pointwise ones, views) from what is kept in any case,
so that is where it is taken from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from fxprune.tracing.masks import ChannelMask

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.fx import GraphModule, Node

__all__ = ["Recomputed", "before_masks", "by_block"]


class Recomputed(nn.Module):
    """Runs a piece of a graph and keeps what goes in, not what is computed inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *values: Any) -> Any:
        """What the piece gives."""
        if not torch.is_grad_enabled():
            return self.inner(*values)
        return checkpoint(self.inner, *values, use_reentrant=False, preserve_rng_state=False)


def by_block(graph_module: Any, exits: Sequence[str]) -> nn.Module:
    """The graph cut behind every layer, each piece `Recomputed`; what follows the last layer runs as it is.

    Args:
        graph_module: a flat graph.
        exits: names of the nodes that layers end with.
    """
    ends = set(exits)
    part: dict[Node, int] = {}
    index = 0
    for node in graph_module.graph.nodes:
        part[node] = index
        index += node.name in ends
    split = split_module(graph_module, graph_module, part.__getitem__, keep_original_order=True)
    for number in range(index):
        name = f"submod_{number}"
        split.set_submodule(name, Recomputed(split.get_submodule(name)))
    found: nn.Module = split
    return found


def before_masks(graph_module: GraphModule) -> None:
    """Put each mask of channels and the cheap operators in front of it into a `Recomputed` piece, in place.

    Operators whose values something else reads too stay where they are, as do random ones.

    Args:
        graph_module: a flat graph with masks; its own, as nodes move.
    """
    graph = graph_module.graph
    for index, mask in enumerate(list(graph.nodes)):
        if mask.op != "call_module" or not isinstance(graph_module.get_submodule(str(mask.target)), ChannelMask):
            continue
        inside = _cheap_before(mask)
        if len(inside) == 1:
            continue
        piece, inputs = _piece(graph_module, inside)
        name = f"recomputed_{index}"
        graph_module.add_submodule(name, Recomputed(piece))
        with graph.inserting_before(mask):
            mask.replace_all_uses_with(graph.call_module(name, tuple(inputs)))
        for node in reversed(inside):
            graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _cheap_before(mask: Node) -> list[Node]:
    """The mask behind all cheap operators that nothing but it reads, in the graph's order."""
    found = {mask}
    waiting = list(mask.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and _is_cheap(node) and found.issuperset(node.users):
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in mask.graph.nodes if node in found]


def _is_cheap(node: Node) -> bool:
    """Pointwise operators and views, which read and write what they are given once."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    pointwise = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
    return (pointwise or target.is_view) and not target._schema.is_mutable


def _piece(graph_module: GraphModule, nodes: Iterable[Node]) -> tuple[GraphModule, list[Node]]:
    """A graph of these nodes, the last of which it returns, and the nodes whose values it is to be called with."""
    nodes = list(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in nodes))
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(graph_module, graph), inputs
