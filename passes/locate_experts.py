"""Finds the mixtures of a graph: their experts, and the channels inside them.

    router = Linear(x) ─ softmax ─ top-k ─ where each expert's rows end ─┐
    rows of x by expert ─ gate_up = GroupedLinear ─ act, mul ─ down = GroupedLinear    =>  ExpertGroup, ExpertMlpGroup

An expert goes with its row of the router: it is never chosen again. Channels inside the experts go like an MLP's, the
same number in every expert, each expert its own: experts do not see each other's order of channels.

Refused, and listed in the details with the reason:
 1. experts or channels that are pinned, or that a norm reduces together with others;
 2. experts that nothing chooses among;
 3. channels that own different numbers of weights, or weights without an axis of experts;
 4. channels without an activation between the grouped Linears.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.channels.experts import locate_expert_channels, locate_experts
from fxprune.channels.locate import LocatePass, expert_axes
from fxprune.core.groups import ExpertGroup, ExpertMlpGroup

if TYPE_CHECKING:
    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["LocateExperts"]


class LocateExperts(LocatePass):
    """Name the experts and their channels (see the module's docstring for the graph and the refusals)."""

    name = "locate_experts"
    finds = (ExpertGroup, ExpertMlpGroup)

    def locate(self, program: Program, kept: tuple[Group, ...], refused: dict[str, str]) -> list[Group]:
        """The groups of every mixture; near misses are listed with reasons."""
        channels = program.channels
        assert channels is not None
        if not expert_axes(channels):
            return []
        experts = locate_experts(program, channels, kept, refused)
        return [*experts, *locate_expert_channels(program, channels, (*kept, *experts), refused)]
