"""Slimming: the removed units disappear from the graph.

    x ─ up_proj (1536) ─ act ─ mask ─ down_proj (1536)      =>      x ─ up_proj (1024) ─ act ─ down_proj (1024)
    k ─ expand (…, 3, 3, …) ─ reshape (…, 9, …)             =>      k ─ expand (…, 2, 3, …) ─ reshape (…, 6, …)

Linears, parameters and cache inputs become narrower, baked-in constants are rewritten, masks vanish (soft gates are
folded into the consumer). Parameters that no unit was removed from are shared with the old graph. Masks of single
weights are cut with their weights; how many groups still hold an N:M pattern is told.

Refused:
 1. a program without a plan;
 2. a plan that removes part of what is normalised together;
 3. an operator whose constants cannot express what stays (`UnsupportedOpError` names node and module).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import PostconditionError, PreconditionError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.slimming.slim import slim_graph
from fxprune.slimming.slimmable import without_unslimmable
from fxprune.tracing.masks import has_masks
from fxprune.weights.figures import pattern_figures

if TYPE_CHECKING:
    from fxprune.core.program import Program

__all__ = ["Slim"]

_LOGGER = logging.getLogger(__name__)


class Slim(Pass):
    """Write the graph without the removed units (see the module's docstring)."""

    name = "slim"

    def precheck(self, program: Program, pruning: Pass | None = None) -> Program:
        """Groups that could not be slimmed are left out before the pass that would prune them works."""
        return program if pruning is None else without_unslimmable(program, pruning)

    def requires(self, program: Program) -> None:
        """There is a plan, and it is legal.

        Raises:
            PreconditionError: there is none.
            PlanError: it names unknown groups or units, or leaves too little.
        """
        if program.plan is None:
            raise PreconditionError("slim needs a plan: run a pruning pass first, or set Program.plan yourself")
        program.plan.validate(program.groups)

    def call(self, program: Program) -> PassResult:
        """Slim; a plan that removes nothing leaves a program without masks as it is."""
        assert program.plan is not None
        before = _linear_parameters(program)
        nothing = all(not program.plan.removed_units(group) for group in program.groups)
        if nothing and not has_masks(program.graph_module):
            return PassResult(program, modified=False, details={"linear_parameters": [before, before]})
        graph_module, interface, masks = slim_graph(
            program.graph_module, program.interface, program.groups, program.plan, program.weight_masks
        )
        slim = program.with_reference("unslimmed", program.graph_module)
        slim = slim.replace(graph_module=graph_module, interface=interface, channels=None, weight_masks=masks)
        details: dict[str, Any] = {"linear_parameters": [before, _linear_parameters(slim)]}
        patterns = pattern_figures(program.graph_module, program.weight_masks, graph_module, masks)
        if patterns:
            details["patterns"] = patterns
            slim = slim.with_results(mask_patterns=patterns)
        for one in patterns:
            if one["holding"] < one["groups"]:
                _LOGGER.warning(
                    "%d of %d groups still hold the pattern %s in %d Linears: channels were cut out of what they read; "
                    "to have both, remove units first and prune weights to the pattern afterwards",
                    one["holding"],
                    one["groups"],
                    one["pattern"],
                    one["linears"],
                )
        return PassResult(slim, modified=True, details=details)

    def ensures(self, before: Program, after: Program) -> None:
        """No mask is left.

        Raises:
            PostconditionError: one is.
        """
        del before
        if has_masks(after.graph_module):
            raise PostconditionError("slim left a mask in the graph")


def _linear_parameters(program: Program) -> int:
    called = {str(node.target) for node in program.graph_module.graph.nodes if node.op == "call_module"}
    modules = (program.graph_module.get_submodule(name) for name in called)
    return sum(p.numel() for module in modules for p in module.parameters())
