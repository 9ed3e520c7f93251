"""What every writer of a slim graph has: the new graph, what stands in it for old nodes, and what stays of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.core.errors import UnsupportedOpError
from fxprune.slimming.grid import Scaled

if TYPE_CHECKING:
    from fxprune.channels.call import Call
    from fxprune.core.channel_ids import IdArray
    from fxprune.core.program import Interface
    from fxprune.slimming.cut import Cut
    from fxprune.slimming.grid import Grid

__all__ = ["Writer", "line_of", "unclear"]


class Writer:
    """State of a graph that is being written.

    Attributes:
        graph: the new graph.
        new: for every old node what stands for it in the new graph.
        grids: for every old node what stays of each of its results.
        tensors: of the new graph, by qualified name.
        call: of the node that is being written.
    """

    def __init__(self, interface: Interface, cut: Cut) -> None:
        self.interface = interface
        self.cut = cut
        self.graph = torch.fx.Graph()
        self.new: dict[Node, Any] = {}
        self.grids: dict[Node, list[Grid]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.selections: dict[tuple[Any, ...], tuple[Node, Grid]] = {}
        self.selected: dict[Node, tuple[Node, Grid]] = {}  # for the node that is being written
        self.call: Call | None = None

    def _copy(self, node: Node) -> Node:
        return self.graph.node_copy(node, self._operand)

    def _mapped(self, argument: Any) -> Any:
        return torch.fx.node.map_aggregate(argument, self._operand)

    def _operand(self, argument: Any) -> Any:
        if isinstance(argument, Scaled):
            assert self.call is not None
            return self._scaled(self.call, argument.node, argument.old, argument.new)
        if not isinstance(argument, Node):
            return argument
        node = argument
        return self.selected[node][0] if node in self.selected else self.new[node]

    def grid(self, node: Node) -> Grid:
        """The grid of an operand with one result."""
        return self.selected[node][1] if node in self.selected else self.grids[node][0]

    def _scaled(self, call: Call, number: Node, old: int, new: int) -> Node:
        """A number like an old one but for a literal factor, see `fxprune.slimming.selections`."""
        raise NotImplementedError


def unclear(call: Call, why: str) -> UnsupportedOpError:
    """The refusal of one node."""
    return UnsupportedOpError(
        f"{call.op} in {call.module or 'the model'} (node {call.node.name}) cannot be slimmed: {why}"
    )


def line_of(call: Call, grid: Grid, axis: int) -> IdArray | None:
    """The kept positions of an axis, None for all.

    Raises:
        UnsupportedOpError: which positions stay depends on the other axes.
    """
    try:
        return grid.line(axis)
    except ValueError as error:
        raise unclear(call, str(error)) from error
