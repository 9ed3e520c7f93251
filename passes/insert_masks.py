"""Writes the plan into the graph as masks.

    x ─ down_proj          x ─ mask ─ down_proj          heads, MLP channels: on what the Linears that read them read
    o_proj ─ add           o_proj ─ mask ─ add           hidden channels: behind all that writes them
    logits ─ top-k         logits ─ mask ─ top-k         experts: minus infinity wherever they are chosen among
    x ─ layer ─ y          x ─ layer ─ gate(x) ─ y       layers: what went in goes on

The masked graph computes exactly what the slim one will. It is the reference of slimming's verification, and the place
where gradients and learned gates attach.

Refused:
 1. a program without groups (nothing was located);
 2. a plan that names unknown groups or units, or is illegal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.core.errors import PreconditionError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.plan import Plan
from fxprune.slimming.other_masks import AnyMaskWriter
from fxprune.tracing.masks import UnitMask

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["InsertMasks", "insert_masks"]


def insert_masks(graph_module: GraphModule, groups: tuple[Group, ...], plan: Plan) -> GraphModule:
    """Insert the masks of every group where its units can be taken out exactly (`Group.masked`).

    Args:
        graph_module: a lifted graph without masks; left as it is.
        groups: the groups.
        plan: kept units; heads and MLP channels that it does not name get a mask of ones, so that gradients reach
            every unit.

    Returns:
        A new graph module that shares all parameters.
    """
    writer = AnyMaskWriter(graph_module, plan)
    # Gates first: what goes past a layer is then masked like everything else.
    for group in sorted(groups, key=lambda group: group.masked != "layers"):
        if group.masked == "consumers" or group.name in plan.kept:
            getattr(writer, group.masked)(group)
    writer.masked.recompile()
    return writer.masked


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
        count = sum(isinstance(module, UnitMask) for module in masked.modules())
        changed = program.replace(graph_module=masked, channels=None).with_reference("masked", masked)
        return PassResult(changed, modified=True, details={"masks": count})
