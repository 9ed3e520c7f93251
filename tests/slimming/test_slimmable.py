"""Groups that slimming would refuse are left out before a pass that would prune them works."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.core.pipeline import build_pass
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.slimming.slimmable import without_unslimmable
from tests.families import located, located_plain


class GatedHeads(nn.Module):
    """A gate on values whose channels no Linear makes, head by head (linear attention), and an MLP behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 16) to the same."""
        heads = x.cumsum(1).sum(-1, keepdim=True) * torch.arange(1.0, 17.0)
        gate = nn.functional.silu(self.gate(x)).reshape(-1, 4)
        x = x + self.out((heads.reshape(-1, 4) * gate).reshape(x.shape))
        return x + self.down(nn.functional.silu(self.up(x)))


def test_a_gate_on_values_without_channels_is_left_out_and_the_rest_stays() -> None:
    program = located_plain(GatedHeads(), torch.randn(2, 5, 16))
    before = {group.name for group in program.groups}
    step = build_pass("magnitude-units", {"ratio": 0.1})
    asked = build_pass("slim", {}).precheck(program, step)
    refused = asked.history[-1].details["refused"]
    assert [name for name in before if name not in refused] == [group.name for group in asked.groups] == ["model:mlp"]
    assert all("cannot be slimmed" in why or "does not pack" in why for why in refused.values())


def test_groups_that_can_be_slimmed_stay() -> None:
    program = located("llama")
    assert without_unslimmable(program, build_pass("magnitude-units", {"ratio": 0.1})) is program


class GroupedConvolution(nn.Module):
    """A convolution of groups with several channels each stands beside an MLP that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(16, 16, 1, groups=4)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 16) to the same."""
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(nn.functional.silu(self.up(x)))


def test_a_convolution_of_groups_that_stays_whole_keeps_its_groups() -> None:
    program = located_plain(GroupedConvolution().eval(), torch.randn(2, 5, 16))
    (group,) = program.groups
    assert without_unslimmable(program, build_pass("magnitude-units", {"ratio": 0.1})) is program
    masked = InsertMasks()(program.replace(plan=Plan.of({group.name: range(8)}))).program
    slim = Slim()(masked).program
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(slim.graph_module(x)[0], masked.graph_module(x)[0])
