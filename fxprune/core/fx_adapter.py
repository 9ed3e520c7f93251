"""Offers a pass in torch.fx's own form, so that it can stand among somebody else's passes.

`torch.fx.passes.infra` knows passes as callables from GraphModule to PassResult. The adapter wraps the graph in a
Program, runs our pass and hands the graph module back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_base import PassResult as FxPassResult

from fxprune.core.program import Interface, Program

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.core.pass_base import Pass
    from fxprune.core.plan import Plan

__all__ = ["FxPass"]


class FxPass(PassBase):
    """One or more fxprune passes as a torch.fx pass.

    Args:
        *passes: run in order on the same Program, so that a locate pass may come before a slim pass.
        example_inputs: one tensor per placeholder, by placeholder name.
        dynamic_axes: axes whose length may change, by placeholder name; the first axis of each input by default.
        plan: the plan for a slim pass, where no pruning pass makes one.
    """

    def __init__(
        self,
        *passes: Pass,
        example_inputs: Mapping[str, Tensor],
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        self.passes = passes
        axes = dynamic_axes or {name: {0: "batch"} for name, tensor in example_inputs.items() if tensor.dim()}
        self.interface = Interface(dict(example_inputs), axes, ())
        self.plan = plan
        self.program: Program | None = None

    def call(self, graph_module: GraphModule) -> FxPassResult:
        """Run the passes; `self.program` holds the last Program (groups, history) afterwards."""
        program = Program(graph_module, self.interface, plan=self.plan)
        modified = False
        for step in self.passes:
            result = step(program)
            program = result.program
            modified |= program.graph_module is not graph_module
        self.program = program
        return FxPassResult(program.graph_module, modified)
