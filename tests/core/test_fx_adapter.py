"""fxprune's passes inside somebody else's torch.fx pass manager."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune.core.fx_adapter import FxPass
from fxprune.core.plan import Plan
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.passes.slim import Slim


class Mlp(nn.Module):
    """A sequence of tokens through one MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x).relu())


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
FREE = {"x": {0: "batch", 1: "tokens"}}


def exported(model: nn.Module) -> GraphModule:
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    return torch.export.export(model, (X,), dynamic_shapes=shapes).module(check_guards=False)


def rename(graph_module: GraphModule) -> PassResult:
    """Somebody else's pass: swaps relu for silu."""
    changed = False
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target, changed = torch.ops.aten.silu.default, True
    graph_module.recompile()
    return PassResult(graph_module, changed)


def test_slimming_stands_among_other_passes() -> None:
    model = Mlp()
    kept = [0, 3, 5]
    ours = FxPass(
        LiftLinears(), LocateMlp(), Slim(), example_inputs={"x": X}, dynamic_axes=FREE, plan=Plan.of({"model": kept})
    )
    result = PassManager(passes=[rename, ours, lambda gm: PassResult(gm, False)])(exported(model))
    assert result.modified
    slim = result.graph_module
    assert {name: tuple(p.shape) for name, p in slim.named_parameters()} == {
        "up.weight": (3, 6),
        "up.bias": (3,),
        "down.weight": (6, 3),
        "down.bias": (6,),
    }
    x = torch.randn(2, 7, 6)
    hidden = nn.functional.silu(model.up(x))[..., kept]
    torch.testing.assert_close(slim(x), hidden @ model.down.weight[:, kept].T + model.down.bias)


def test_the_last_program_is_at_hand_afterwards() -> None:
    locate = FxPass(LiftLinears(), LocateMlp(), example_inputs={"x": X}, dynamic_axes=FREE)
    locate(exported(Mlp()))
    assert locate.program is not None
    assert [str(group) for group in locate.program.groups] == ["model [mlp]: 8 channels, relu, up -> down"]
    assert [event.name for event in locate.program.history] == ["lift_linears", "locate_mlp"]


def test_modified_is_false_when_the_graph_is_the_same() -> None:
    lift = FxPass(LiftLinears(), example_inputs={"x": X})
    once = lift(exported(Mlp()))
    assert once is not None
    assert once.modified
    again = lift(once.graph_module)
    assert again is not None
    assert not again.modified
    assert again.graph_module is once.graph_module
