"""Normalising: constant positions, writes and products come out as operators that channel tracing knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.tracing.trace import trace

aten = torch.ops.aten


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def normalised(function: Any, x: Tensor, y: Tensor) -> GraphModule:
    """Trace, check that other inputs of other lengths give the same numbers, and return the graph."""
    graph_module = trace(Function(function), example_inputs=(x, y)).graph_module
    for longer in (0, 1):
        inputs = [torch.randn(t.shape[0] + longer, *t.shape[1:], generator=GENERATOR) for t in (x, y)]
        if x.shape[0] != y.shape[0]:
            inputs = [x, y]
        expected = function(*(t.clone() for t in inputs))
        torch.testing.assert_close(graph_module(*inputs)[0], expected, rtol=1e-6, atol=1e-6)
    return graph_module


def ops(graph_module: GraphModule) -> list[str]:
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    names = [getattr(node.target, "_overloadpacket", node.target).__name__ for node in calls]
    return [name for name in names if name not in {"sym_size", "mul"} or name == "mul"]


GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(3, 4, 6, generator=GENERATOR), torch.randn(3, 4, 6, generator=GENERATOR)


# --- constant positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "bounds"), [([1], (1, 2)), ([2, 3, 4], (2, 5)), ([-2], (4, 5)), ([-2, -1], (4, 6))]
)
def test_a_run_of_constant_positions_is_a_slice(positions: list[int], bounds: tuple[int, int]) -> None:
    graph_module = normalised(lambda x, y: x[:, :, positions] + y[:, :, :1], X, Y)
    (node,) = [n for n in graph_module.graph.nodes if n.target is aten.slice.Tensor and n.args[2:4] == bounds]
    assert node.args[1] == 2
    assert "index" not in ops(graph_module)


def test_other_constant_positions_along_one_axis_are_a_selection() -> None:
    graph_module = normalised(lambda x, y: x[:, :, [4, 0, 0]] * y[:, :, :3], X, Y)
    assert "index_select" in ops(graph_module)
    assert "index" not in ops(graph_module)


def test_positions_along_an_axis_that_may_change_and_along_two_axes_are_left_alone() -> None:
    assert "index" in ops(normalised(lambda x, y: x[[0, 2]] + y[:1], X, Y))
    assert "index" in ops(normalised(lambda x, y: x[:, [0, 2], [1, 3]] + y[:, :2, 0], X, Y))


# --- writes ---------------------------------------------------------------------------------------------------------


def fill(x: Tensor, y: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 4, 10)
    made[..., :6] = x
    made[..., 6:] = y[..., :4]
    return made * 2


def test_a_tensor_filled_piece_by_piece_is_a_concatenation() -> None:
    graph_module = normalised(fill, X, Y)
    (node,) = [n for n in graph_module.graph.nodes if n.target is aten.cat.default]
    assert node.args[1] == 2
    assert node.meta["val"].shape[1:] == (4, 10)
    assert not {"copy_", "new_empty", "slice_scatter"} & set(ops(graph_module))


def backwards(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], 4, 10)
    made[..., 6:] = y[..., :4]
    made[..., :6] = x
    return made


def test_the_pieces_may_be_written_in_any_order() -> None:
    (node,) = [n for n in normalised(backwards, X, Y).graph.nodes if n.target is aten.cat.default]
    assert [piece.meta["val"].shape[2] for piece in node.args[0]] == [6, 4]


def gap(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], 4, 14)
    made[..., :6] = x
    made[..., 7:13] = y
    return made


def overlap(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], 4, 10)
    made[..., :6] = x
    made[..., 4:] = y
    return made


def over_itself(x: Tensor, y: Tensor) -> Tensor:
    made = x + 1
    made[..., :3] = y[..., :3]
    made[..., 3:] = y[..., :3]
    return made


@pytest.mark.parametrize("function", [gap, overlap, over_itself])
def test_what_is_no_concatenation_is_written_by_slice_scatter(function: Any) -> None:
    graph_module = normalised(function, X, Y)
    assert "slice_scatter" in ops(graph_module)
    assert not {"copy_", "cat"} & set(ops(graph_module))


def in_place(x: Tensor, y: Tensor) -> Tensor:
    total = x * 2
    total.mul_(y).add_(1)
    total[:, 1].fill_(3)
    total[:, 2] += y[:, 0]
    return total - x


def test_operators_that_write_in_place_become_functional() -> None:
    graph_module = normalised(in_place, X, Y)
    assert not [name for name in ops(graph_module) if name.endswith("_")]
    assert ops(graph_module).count("select_scatter") >= 2


def test_an_in_place_result_keeps_the_dtype_of_what_it_is_written_to() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        half = x.to(torch.bfloat16)
        half.mul_(y)
        return half

    graph_module = trace(Function(function), example_inputs=(X, Y)).graph_module
    assert graph_module(X, Y)[0].dtype == torch.bfloat16
    assert torch.equal(graph_module(X, Y)[0], function(X, Y))


def test_writes_that_another_view_sees_are_left_in_place() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = x * 1
        seen = made[:, :2]
        made[:, 1] = y[:, 0]
        return seen + y[:, :2]

    graph_module = normalised(function, X, Y)
    assert "copy_" in ops(graph_module)


def test_writes_into_inputs_are_left_in_place() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(y)
        return x + 1

    assert "mul_" in ops(trace(Function(function), example_inputs=(X, Y)).graph_module)


# --- products -------------------------------------------------------------------------------------------------------

A4, B4 = (torch.randn(3, 4, 5, 6, generator=GENERATOR) for _ in range(2))
EINSUMS = {
    "attention scores": ("bqhd,bkhd->bhqk", A4.transpose(1, 2), B4[:, :, :, :].transpose(1, 2)),
    "attention values": ("bhqk,bkhd->bqhd", torch.randn(3, 2, 4, 5), torch.randn(3, 5, 2, 6)),
    "several rows and columns": ("abcd,aefd->abcef", A4, B4),
    "several summed axes": ("abcd,aecd->abe", A4, torch.randn(3, 7, 5, 6)),
    "outer": ("ab,ac->abc", torch.randn(3, 4), torch.randn(3, 5)),
    "elementwise": ("abc,ac->abc", X, torch.randn(3, 6)),
    "scalar": ("abc,abc->", X, Y),
    "no arrow": ("abc,acd", X, torch.randn(3, 6, 2)),
    "dots": ("...c,dc->...d", X, torch.randn(3, 6)),
    "two kinds of dots": ("...ac,...ca->...a", torch.randn(3, 4, 6), torch.randn(3, 6, 4)),
    "alone in one operand": ("abc,ad->ad", X, torch.randn(3, 2)),
    "vector": ("abc,c->ab", X, torch.randn(6)),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_is_lowered_to_products(name: str) -> None:
    equation, x, y = EINSUMS[name]
    graph_module = trace(Function(lambda x, y: torch.einsum(equation, x, y)), example_inputs=(x, y)).graph_module
    assert "einsum" not in ops(graph_module)
    torch.testing.assert_close(graph_module(x, y)[0], torch.einsum(equation, x, y), rtol=1e-5, atol=1e-5)


def test_einsum_with_three_operands_is_lowered_two_by_two() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("abc,abd,cd->ab", x, y, x[0, :4, :].new_ones(6, 6))

    graph_module = normalised(function, X, Y)
    assert "einsum" not in ops(graph_module)


def test_a_diagonal_is_left_to_einsum() -> None:
    square = torch.randn(3, 4, 4)
    graph_module = trace(
        Function(lambda x, y: torch.einsum("abb,ac->bc", x, y)), example_inputs=(square, torch.randn(3, 5))
    ).graph_module
    assert "einsum" in ops(graph_module)


def test_tensordot_is_lowered_to_a_product() -> None:
    x, y = torch.randn(3, 4, 6), torch.randn(6, 4, 2)
    graph_module = normalised(lambda x, y: torch.tensordot(x, y, ([1, 2], [1, 0])), x, y)
    assert "tensordot" not in ops(graph_module)
    assert "matmul" in ops(graph_module)


def test_new_nodes_belong_to_the_module_of_the_old_one_and_have_values() -> None:
    graph_module = trace(nn.Sequential(Einsum()), example_inputs=(X,)).graph_module
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node
            assert next(reversed(node.meta["nn_module_stack"].values()))[0].endswith("0")


class Einsum(nn.Module):
    """A projection written as einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsd,fd->bsf", x, self.weight)
