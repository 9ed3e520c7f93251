"""Writes the plan into the graph as masks.

    x ─ down_proj          x ─ mask ─ down_proj          one mask on the input of every Linear that reads units

The masked graph computes exactly what the slim one will: removed units are zero where they are read. It is the
reference of slimming's verification, and the place where gradients and learned gates attach.

Refused:
 1. a program without groups (nothing was located);
 2. a plan that names unknown groups or units, or is illegal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxprune.channels import get_attribute
from fxprune.errors import PreconditionError
from fxprune.graphs import copy_graph_module, linear_calls
from fxprune.masks import ChannelMask
from fxprune.pass_base import Pass, PassResult
from fxprune.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from fxprune.groups import Group, UnitSlice
    from fxprune.program import Program

__all__ = ["InsertMasks", "insert_masks"]


def _unit_of(piece: UnitSlice, size: int, device: torch.device) -> Tensor:
    unit_of = torch.full((size,), -1, dtype=torch.int64)
    units = torch.arange(piece.indices.shape[0]).unsqueeze(1).expand(piece.indices.shape)
    unit_of[torch.from_numpy(piece.indices).reshape(-1)] = units.reshape(-1)
    return unit_of.to(device)


def insert_masks(graph_module: GraphModule, groups: tuple[Group, ...], plan: Plan) -> GraphModule:
    """Insert one mask in front of every consumer of every group that the plan prunes.

    Args:
        graph_module: a lifted graph without masks; left as it is.
        groups: the groups.
        plan: kept units; groups it does not name get a mask of ones, so that gradients reach every unit.

    Returns:
        A new graph module that shares all parameters.
    """
    masked = copy_graph_module(graph_module)
    graph = masked.graph
    calls = linear_calls(masked)
    for group in groups:
        for piece in group.consumers:
            target = piece.parameter.removesuffix(".weight")
            linear: nn.Linear = get_attribute(masked, target)
            weight = linear.weight
            mask = torch.zeros(group.units, dtype=weight.dtype, device=weight.device)
            mask[list(plan.kept_units(group))] = 1
            name = f"{target}_mask"
            masked.add_submodule(name, ChannelMask(mask, _unit_of(piece, weight.shape[1], weight.device)))
            # A weight may be shared by several Linears: all of them read the units.
            readers = [
                node for name, nodes in calls.items() if masked.get_submodule(name).weight is weight for node in nodes
            ]
            for node in readers:
                with graph.inserting_before(node):
                    call = graph.call_module(name, (node.args[0],))
                call.meta = dict(node.all_input_nodes[0].meta)
                node.args = (call, *node.args[1:])
    masked.recompile()
    return masked


class InsertMasks(Pass):
    """Insert the plan's masks (see the module's docstring for the graph and the refusals)."""

    name = "insert_masks"

    def requires(self, program: Program) -> None:
        """There are groups, and the plan is legal for them.

        Raises:
            PreconditionError: nothing was located.
            PlanError: the plan is illegal.
        """
        if not program.groups:
            raise PreconditionError("insert_masks needs groups: run locate_attention and locate_mlp first")
        if program.plan is not None:
            program.plan.validate(program.groups)

    def call(self, program: Program) -> PassResult:
        """Insert the masks and keep the masked graph as the reference `masked`."""
        plan = program.plan or Plan({})
        masked = insert_masks(program.graph_module, program.groups, plan)
        count = sum(isinstance(module, ChannelMask) for module in masked.modules())
        changed = program.replace(graph_module=masked, channels=None).with_reference("masked", masked)
        return PassResult(changed, modified=True, details={"masks": count})
