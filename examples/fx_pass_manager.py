"""Our slim pass inside somebody else's torch.fx pass manager.

python examples/fx_pass_manager.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune import FxPass, Plan
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.passes.slim import Slim


class Mlp(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it on (batch, 16)."""
        change: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + change


def count_nodes(graph_module: torch.fx.GraphModule) -> PassResult:
    """Somebody else's pass."""
    print(f"{len(graph_module.graph.nodes)} nodes")
    return PassResult(graph_module, modified=False)


torch.manual_seed(0)
model, x = Mlp().eval(), torch.randn(2, 16)
graph_module = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module(check_guards=False)
plan = Plan.of({"model": range(24)})  # the MLP at the top level of the module
ours = FxPass(LiftLinears(), LocateMlp(), Slim(), example_inputs={"x": x}, plan=plan)
result = PassManager(passes=[count_nodes, ours, count_nodes])(graph_module)
print(result.graph_module.up, result.graph_module.down, tuple(result.graph_module(x).shape))
