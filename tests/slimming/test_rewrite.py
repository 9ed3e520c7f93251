"""Rewrites: the slim form of every kind of operator computes what the masked one does; grids count what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.core.errors import PlanError
from fxprune.core.groups import AttentionGroup
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.locate_hidden import LocateHidden
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.passes.slim import Slim
from fxprune.slimming.grid import Grid, full_grid
from fxprune.tracing.trace import trace
from tests.families import located_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxprune.core.program import Program

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, generator=GENERATOR)
TOKENS = torch.randn(2, 5, 6, generator=GENERATOR)


def assert_slim_equals_masked(program: Program, plan: Plan, x: Tensor) -> Program:
    """Both forms agree and differ from the dense one, which would hide a mask that masks nothing."""
    masked = InsertMasks()(program.replace(plan=plan)).program
    slim: Program = Slim()(masked).program
    with torch.no_grad():
        mine, theirs, dense = (form.graph_module(x)[0] for form in (slim, masked, program))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert float((theirs - dense).abs().max()) > 1e-3
    return slim


class Between(nn.Module):
    """fc1, an activation, something that moves or changes channels, fc2."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 12, read: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, width), nn.Linear(read, 6)
        self.between = between
        self.register_buffer("order", torch.tensor([5, 0, 7, 1, 11, 2, 10, 3, 9, 4, 8, 6]))
        self.register_buffer("position", torch.tensor([1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        between: Any = self.between
        read: Tensor = self.fc2(between(self, functional.silu(self.fc1(x))))
        return read


def pieces(t: Any, sizes: Sequence[int]) -> list[Tensor]:
    return list(t.split(list(sizes), -1))


MOVES: dict[str, Any] = {
    "flip": lambda _, t: t.flip(-1),
    "roll": lambda _, t: t.roll(5, -1),
    "roll backwards": lambda _, t: torch.roll(t, -3, -1),
    "selection": lambda m, t: t.index_select(-1, m.order),
    "index": lambda _, t: t[..., [5, 0, 7, 1, 11, 2, 10, 3, 9, 4, 8, 6]],
    "selection of positions": lambda m, t: t.index_select(0, m.position),
    "uneven split": lambda _, t: torch.cat(pieces(t, (5, 3, 4))[::-1], -1),
    "tensor_split": lambda _, t: torch.cat(t.tensor_split(3, -1)[::-1], -1),
    "chunk": lambda _, t: torch.cat(t.chunk(3, -1)[::-1], -1),
    "narrow": lambda _, t: torch.cat([t.narrow(-1, 6, 6), t.narrow(-1, 0, 6)], -1),
    "negative slices": lambda _, t: torch.cat([t[..., -5:], t[..., :-5]], -1),
    "unflatten": lambda _, t: t.unflatten(-1, (3, 4)).flatten(-2),
    "stack": lambda _, t: torch.stack([t, t * 2]).sum(0),
    "unbind": lambda _, t: torch.cat(t.unflatten(-1, (2, 6)).unbind(-2)[::-1], -1),
    "unsqueeze and squeeze": lambda _, t: t.unsqueeze(1).squeeze(1),
    "swapped axes": lambda _, t: t.transpose(0, 1).contiguous().movedim(0, -1),
    "sum of the same": lambda _, t: torch.einsum("bc,bc->bc", t, t),
    "addition in place": lambda _, t: t.clone().add_(t),
    "complex": lambda _, t: torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (6, 2))).square()).flatten(-2),
    "roll of positions": lambda _, t: t.roll(1, 0),
    "padding of positions": lambda _, t: functional.pad(t, (0, 0, 1, 2)),
}
KEPT = [[0, 1, 2, 3, 5, 6, 7, 8, 10], [0, 2, 4, 6, 8, 10], [1, 6, 7, 11]]


@pytest.mark.parametrize("name", MOVES)
def test_movement_between_linears_is_rewritten_for_what_stays(name: str) -> None:
    program = located_plain(nn.Sequential(Between(MOVES[name])), X)
    done = 0
    for units in KEPT:
        plan = Plan.of({group.name: [unit for unit in units if unit < group.units] for group in program.groups})
        try:
            slim = assert_slim_equals_masked(program, plan, X)
        except PlanError as error:  # only where what stays cannot be packed: such a plan is not legal
            assert "keep the same number in every part" in str(error)
            assert name in {"unflatten", "unbind"}
            continue
        done += 1
        assert slim.graph_module.get_submodule("0.fc1").out_features != 12
    assert done


WIDER: dict[str, tuple[Any, int, int]] = {
    "glu": (lambda _, t: functional.glu(t, -1), 12, 6),
    "padding": (lambda _, t: functional.pad(t, (1, 2), value=0.5), 12, 15),
}


@pytest.mark.parametrize("name", WIDER)
def test_operators_that_change_how_many_channels_there_are(name: str) -> None:
    between, width, read = WIDER[name]
    program = located_plain(nn.Sequential(Between(between, width, read)), X)
    (group,) = program.groups
    assert_slim_equals_masked(program, Plan.of({group.name: range(1, group.units - 1)}), X)


class Filtered(nn.Module):
    """A convolution along the sequence with one filter a channel, between the Linears, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.conv = nn.Conv1d(10, 10, 3, padding=1, groups=10)
        self.norm = nn.BatchNorm1d(10)
        for tensor in (self.norm.weight, self.norm.running_var, self.norm.running_mean):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Any:
        hidden = self.norm(self.conv(self.fc1(x).transpose(1, 2))).transpose(1, 2)
        return self.fc2(functional.gelu(hidden))


def test_a_filter_for_each_channel_is_narrowed_with_its_bias_groups_and_batch_norm() -> None:
    program = located_plain(nn.Sequential(Filtered()), TOKENS)
    (group,) = program.groups
    slim = assert_slim_equals_masked(program, Plan.of({group.name: [0, 3, 4, 9]}), TOKENS).graph_module
    shapes = {
        name: tuple(tensor.shape) for name, tensor in slim.state_dict().items() if "conv" in name or "norm" in name
    }
    assert shapes["0.conv.weight"] == (4, 1, 3)
    assert {shape for name, shape in shapes.items() if name != "0.conv.weight"} == {(4,)}
    (conv,) = [node for node in slim.graph.nodes if node.target is torch.ops.aten.conv1d.default]
    assert conv.args[6] == 4


class Patches(nn.Module):
    """A vision model without a class of its own: patches by a convolution, RMS norms, one block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 10, 2, stride=2)
        self.norm, self.last = nn.RMSNorm(10, eps=0.1), nn.RMSNorm(10, eps=0.1)
        self.fc1, self.fc2, self.head = nn.Linear(10, 14), nn.Linear(14, 10), nn.Linear(10, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.last.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Any:
        hidden = self.conv(x).flatten(2).transpose(1, 2)
        hidden = hidden + self.fc2(functional.gelu(self.fc1(self.norm(hidden))))
        return self.head(self.last(hidden))


def test_the_hidden_dimension_behind_patches_is_narrowed_in_the_convolution_too() -> None:
    images = torch.randn(2, 3, 6, 8, generator=GENERATOR)
    locate = (LiftLinears(), LocateMlp(), LocateHidden())
    program = Pipeline(locate)(trace(Patches(), example_inputs=(images,))).program
    mlp, hidden = program.groups
    assert (mlp.kind, hidden.kind, hidden.units) == ("mlp", "hidden", 10)
    plan = Plan.of({hidden.name: [0, 1, 4, 6, 7, 9], mlp.name: [2, 3, 5]})
    slim = assert_slim_equals_masked(program, plan, images).graph_module
    assert slim.get_parameter("conv.weight").shape == (6, 3, 2, 2)
    assert slim.get_parameter("conv.bias").shape == (6,)


class EinsumAttention(nn.Module):
    """Attention written with einsum, with an axis for the KV heads, and rotary by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(6, 24), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(24, 6)

    def rotate(self, x: Any) -> Any:
        angle = torch.arange(x.shape[1]).float()[:, None] * torch.tensor([1.0, 0.1])
        turns = torch.polar(torch.ones_like(angle), angle)
        pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
        return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(-2)

    def forward(self, x: Any) -> Any:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)) for layer in (self.q, self.k, self.v))
        q = self.rotate(q).unflatten(2, (2, 3))
        scores = torch.einsum("bqghd,bkgd->bghqk", q, self.rotate(k)) / 2
        out = torch.einsum("bghqk,bkgd->bqghd", scores.softmax(-1), v)
        return self.o(out.flatten(2))


def test_attention_in_einsum_with_complex_rotary_is_slimmed() -> None:
    program = located_plain(nn.Sequential(EinsumAttention()), TOKENS)
    (group,) = program.groups
    assert isinstance(group, AttentionGroup)
    assert (group.units, group.kv_heads) == (6, 2)
    for kept in ([0, 5], [3, 4, 5], [1, 2, 3, 4]):
        assert_slim_equals_masked(program, Plan.of({group.name: kept}), TOKENS)


class Latent(nn.Module):
    """Keys made of two parts that are written into an empty tensor, one of them shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.shared, self.v, self.o = (nn.Linear(6, n) for n in (30, 18, 4, 12, 6))
        self.o = nn.Linear(12, 6)

    def forward(self, x: Any) -> Any:
        batch, length, _ = x.shape
        q, own, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k = x.new_empty(batch, 3, length, 10)
        k[..., :6] = own
        k[..., 6:] = self.shared(x)[:, None].expand(-1, 3, -1, -1)
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_keys_that_are_assembled_by_writing_are_slimmed() -> None:
    program = located_plain(nn.Sequential(Latent()), TOKENS)
    (group,) = program.groups
    assert isinstance(group, AttentionGroup)
    slim = assert_slim_equals_masked(program, Plan.of({group.name: [0, 2]}), TOKENS).graph_module
    assert slim.get_submodule("0.q").out_features == 20
    assert slim.get_submodule("0.shared").out_features == 4  # all heads read it


# --- grids ----------------------------------------------------------------------------------------------------------


def grid(mask: list[Any]) -> Grid:
    stays = np.array(mask, dtype=bool)
    shape = tuple(
        int(np.unique(stays.any(axis=tuple(range(axis + 1, stays.ndim))).sum(-1)).max()) for axis in range(stays.ndim)
    )
    return Grid(stays.shape, stays, shape)


def test_a_grid_counts_what_stays_before_a_position() -> None:
    line = grid([1, 0, 1, 1, 0])
    assert [line.count_before(0, position) for position in range(6)] == [0, 1, 1, 2, 3, 3]
    assert line.narrow(torch.arange(5)).tolist() == [0, 2, 3]
    assert line.line(0) is not None
    assert full_grid((4, 5)).count_before(1, 9) == 5


def test_a_ragged_grid_has_no_line_and_no_count_where_it_varies() -> None:
    ragged = grid([[1, 0, 1], [0, 1, 1]])
    assert ragged.new_shape == (2, 2)
    assert ragged.ragged(1)
    assert not ragged.ragged(0)
    assert ragged.count_before(1, 1) == -1
    assert ragged.count_before(1, 3) == 2
    assert ragged.narrow(torch.arange(6).reshape(2, 3)).tolist() == [[0, 2], [4, 5]]
    with pytest.raises(ValueError, match="axis 1 of shape"):
        ragged.line(1)


def test_selecting_narrows_what_stays_further() -> None:
    chosen = grid([1, 1, 0, 1]).select(0, np.array([0, 3]))
    assert chosen.new_shape == (2,)
    assert chosen.narrow(torch.arange(4)).tolist() == [0, 3]
