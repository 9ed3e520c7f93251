"""Normalising traced graphs: several ways to write one thing become one way.

    index(x, [None, None, [-2]])          slice(x, 2, n - 2, n - 1)      a constant position is a slice
    index(x, [None, None, [0, 2, 1]])     index_select(x, 2, [0, 2, 1])    constant positions along one axis
    writes into tensors                   what they compute                see `fxprune.tracing.normalise_writes`
    einsum, tensordot                     matrix products                  see `fxprune.tracing.normalise_products`

Nothing changes in what is computed; `traced = eager` is verified after it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.nodes import functional_of
from fxprune.tracing.normalise_products import lower_products
from fxprune.tracing.normalise_writes import concatenate_pieces, functionalise

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["normalise"]

aten = torch.ops.aten
_FRESH = {aten.lift_fresh_copy.default, aten.lift_fresh.default}


_REWRITES: tuple[tuple[Callable[[Any], bool], Callable[[Graph], None]], ...] = (
    (lambda target: functional_of(target) is not None, functionalise),
    ({aten.slice_scatter.default}.__contains__, concatenate_pieces),
    ({aten.einsum.default, aten.tensordot.default}.__contains__, lower_products),
)
"""What is rewritten, in this order, where a graph has such an operator."""


def normalise(graph_module: GraphModule) -> None:
    """Rewrite a flat graph in place."""
    graph = graph_module.graph
    for concerns, rewrite in _REWRITES:
        if any(node.op == "call_function" and concerns(node.target) for node in graph.nodes):
            rewrite(graph)
            erase_dead(graph)  # such as views that were only written through
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.index.Tensor:
            _slice_constant_positions(graph_module, node)
    erase_dead(graph)
    graph_module.recompile()


def _unfresh(node: Any) -> Any:
    """The constant behind copies of it."""
    while isinstance(node, Node) and node.target in _FRESH:
        node = node.args[0]
    return node


def _constant(graph_module: GraphModule, node: Any) -> Tensor | None:
    """The value of a small integer constant; None for anything else."""
    node = _unfresh(node)
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(graph_module)
    fits = isinstance(value, Tensor) and not value.is_meta and value.dtype in {torch.int64, torch.int32}
    return value if fits and value.dim() == 1 and len(value) else None


def _slice_constant_positions(graph_module: GraphModule, node: Node) -> None:
    """Turn an index by constant positions along a static axis into a slice, or else a selection."""
    source, indices = node.args
    assert isinstance(source, Node)
    assert isinstance(indices, (list, tuple))
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or "val" not in source.meta:
        return
    axis = used[0]
    size = source.meta["val"].shape[axis]
    positions = _constant(graph_module, indices[axis])
    if positions is None or not isinstance(size, int):
        return
    listed = [int(position) % size for position in positions]
    target: Any = aten.slice.Tensor
    args: tuple[Any, ...] = (source, axis, listed[0], listed[0] + len(listed))
    if listed != list(range(listed[0], listed[0] + len(listed))):
        if source.op == "get_attr" or bool((positions < 0).any()):
            return  # rows of a table; `index_select` takes no negative positions
        target, args = aten.index_select.default, (source, axis, _unfresh(indices[axis]))
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
