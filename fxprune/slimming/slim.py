"""Slimming: writing a new graph in which removed units do not exist.

    decide (cut.py)  ->  write node by node (slim_builder.py)  ->  assemble and check (slim_assembly.py)

The old graph is walked with ids beside its values; once it is known which ids stay, the builder sees the same calls in
the same order. At the end the new graph is run on fake tensors and every shape is compared with what was predicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.channels.walk import walk
from fxprune.core.channel_ids import ChannelMap
from fxprune.slimming.assembly import assemble
from fxprune.slimming.builder import GraphBuilder
from fxprune.slimming.cut import decide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.channels.call import Call
    from fxprune.channels.rules.base import Ids
    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Interface

__all__ = ["slim_graph"]


def slim_graph(
    graph_module: GraphModule,
    interface: Interface,
    groups: Sequence[Group],
    plan: Plan,
    weight_masks: Mapping[str, Tensor] | None = None,
) -> tuple[GraphModule, Interface, dict[str, Tensor]]:
    """Write the graph in which the units that `plan` removes do not exist.

    Args:
        graph_module: a lifted graph, with or without masks; it is left as it is.
        interface: how it is called.
        groups: the groups the plan speaks of.
        plan: which units stay.
        weight_masks: bool masks of projections, in the layout of the weight, by qualified name.

    Returns:
        A new graph module that shares every parameter no unit was removed from; its interface: cache inputs become
        smaller, those of layers that were left out are gone; and what stays of the masks.

    Raises:
        PlanError: the plan is illegal, or removes part of what a norm that cannot be rescaled normalises together.
        UnsupportedOpError: an operator cannot be rewritten for what stays.
    """
    plan.validate(groups)
    seen: list[tuple[Call, Ids]] = []
    channels = ChannelMap(walk(graph_module, interface, lambda call, ids: seen.append((call, ids)), keep=True))
    builder = GraphBuilder(graph_module, interface, channels, decide(graph_module, channels, groups, plan))
    for call, ids in seen:
        builder.visit(call, ids)
    slim, slim_interface = assemble(builder)
    called = {str(node.target) for node in slim.graph.nodes if node.op == "call_module"}  # layers may be gone
    masks = {name: builder.narrowed_like(name, mask) for name, mask in (weight_masks or {}).items() if name in called}
    return slim, slim_interface, masks
