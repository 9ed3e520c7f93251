"""Masks of a plan written into a graph: on what the Linears that read heads and MLP channels are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxprune.core.groups import ExpertMlpGroup
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.unit_masks import ExpertChannelMask

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from fxprune.core.groups import Group, UnitSlice
    from fxprune.core.plan import Plan

__all__ = ["MaskWriter", "unit_of"]


def unit_of(piece: UnitSlice, size: int, device: torch.device) -> Tensor:
    """The unit of each of `size` channels, (size,) int64, -1 for none."""
    found = torch.full((size,), -1, dtype=torch.int64)
    units = torch.arange(piece.indices.shape[0]).unsqueeze(1).expand(piece.indices.shape)
    found[torch.from_numpy(piece.indices).reshape(-1)] = units.reshape(-1)
    return found.to(device)


class MaskWriter:
    """Writes the masks of one plan into a copy of a graph."""

    def __init__(self, graph_module: GraphModule, plan: Plan) -> None:
        self.masked = copy_graph_module(graph_module)
        self.graph = self.masked.graph
        self.plan = plan
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.readers: dict[int, list[Node]] = {}  # calls of projections, by the identity of their weight
        for node in self.graph.nodes:
            if node.op == "call_module" and is_projection(module := get_attribute(self.masked, str(node.target))):
                self.readers.setdefault(id(module.weight), []).append(node)
        self.tensors = self.masked.state_dict(keep_vars=True)

    def mask_of(self, group: Group, like: Tensor) -> Tensor:
        """The plan as a mask, (units,)."""
        mask = torch.zeros(group.units, dtype=like.dtype if like.is_floating_point() else None, device=like.device)
        mask[list(self.plan.kept_units(group))] = 1
        return mask

    def consumers(self, group: Group) -> None:
        """One mask on what every Linear that reads units is given; a weight may be shared by several Linears."""
        for piece in group.consumers:
            weight = self.tensors[piece.parameter]
            mask = self.mask_of(group, weight)
            units = unit_of(piece, weight.shape[piece.axis], weight.device)
            for node in self.readers[id(weight)]:
                source, *rest = node.args
                assert isinstance(source, Node)
                module: nn.Module = ChannelMask(mask, units)
                if isinstance(group, ExpertMlpGroup):
                    module = ExpertChannelMask(mask.reshape(group.experts, group.width), units)
                name = f"{node.target}_mask"
                if name in dict(self.masked.named_modules()):
                    name = f"{name}_{node.name}"
                self.masked.add_submodule(name, module)
                with self.graph.inserting_before(node):
                    call = self.graph.call_module(name, (source, *rest))
                call.meta = dict(source.meta)
                node.args = (call, *rest)
