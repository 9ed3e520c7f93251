"""Lifting: every form of a projection becomes a call of an nn.Linear under its original name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D

from fxprune.core.errors import PostconditionError
from fxprune.core.program import Program
from fxprune.passes.lift_linears import LiftLinears, lift_graph
from fxprune.tracing.trace import trace
from tests.families import FAMILIES, build, located

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def lifted(module: nn.Module, *inputs: Tensor) -> Program:
    return LiftLinears()(trace(module, example_inputs=inputs or (X,))).program


def called(program: Program) -> list[str]:
    """The Linears that a graph calls, in order."""
    return [str(node.target) for node in program.graph_module.graph.nodes if node.op == "call_module"]


def assert_equal_to_eager(program: Program, *inputs: Tensor) -> None:
    eager = program.references["eager"].module
    assert torch.equal(program.graph_module(*(inputs or (X,)))[0], eager(*(inputs or (X,))))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_of_a_model_is_lifted_under_its_own_name(family: str) -> None:
    program = located(family)
    eager = program.references["eager"].module
    names = {name for name, module in eager.named_modules() if isinstance(module, nn.Linear)}
    assert set(called(program)) == names
    for name in names:
        mine, theirs = program.graph_module.get_submodule(name), eager.get_submodule(name)
        assert isinstance(mine, nn.Linear)
        assert mine.weight is theirs.weight
        assert mine.bias is theirs.bias


def test_the_lifted_graph_is_bitwise_the_model_and_every_parameter_gets_a_gradient() -> None:
    program = located("qwen2")
    examples = tuple(program.interface.example_inputs.values())
    traced = program.references["traced"].module
    for mine, theirs in zip(program.graph_module(*examples), traced(*examples), strict=True):
        assert torch.equal(mine, theirs)
    parameters = list(program.graph_module.parameters())
    grads = torch.autograd.grad(program.graph_module(*examples)[0].square().sum(), parameters)
    assert all(bool((grad != 0).any()) for grad in grads)


class Forms(nn.Module):
    """One projection in each form that graphs write it in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.weight_ = nn.Linear(6, 4).weight
        self.conv, self.form = Conv1D(4, 6), form
        nn.init.normal_(self.conv.bias)

    def forward(self, x: Tensor) -> Any:
        match self.form:
            case "Conv1D":
                out: Tensor = self.conv(x)
                return out
            case "matmul of a transpose":
                return x @ self.weight_.t()
            case "matmul of transpose.int":
                return x @ self.weight_.transpose(0, 1)
            case "matmul of a permute":
                return x @ self.weight_.permute(1, 0)
            case "matmul of T":
                return x @ self.weight_.T
            case _:
                return torch.mm(x.reshape(-1, 6), self.conv.weight)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("Conv1D", "conv"),
        ("matmul of a transpose", "weight__linear"),
        ("matmul of transpose.int", "weight__linear"),
        ("matmul of a permute", "weight__linear"),
        ("matmul of T", "weight__linear"),
        ("mm", "conv"),
    ],
)
def test_every_form_of_a_projection_is_lifted(form: str, name: str) -> None:
    program = lifted(Forms(form))
    assert called(program) == [name]
    assert_equal_to_eager(program)
    linear = program.graph_module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    assert linear.weight.shape == (4, 6)
    owner = program.references["eager"].module
    stored = owner.get_parameter("weight_" if name.startswith("weight_") else "conv.weight")
    assert linear.weight.data_ptr() == stored.data_ptr()  # a view, not a copy


def test_computed_weights_are_left_as_they_are() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            return nn.functional.linear(x, self.fc.weight * 2, self.fc.bias)

    result = LiftLinears()(trace(Computed(), example_inputs=(X,)))
    assert not result.modified
    assert result.details == {"linears": 0}
    assert called(result.program) == []


def test_a_linear_that_is_called_twice_is_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.fc(x).relu())

    program = lifted(Twice())
    assert called(program) == ["fc", "fc"]
    assert_equal_to_eager(program)


def test_a_shared_weight_keeps_each_bias_with_its_own_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x).relu())

    program = lifted(Shared())
    assert called(program) == ["a", "b"]
    assert_equal_to_eager(program)
    assert program.graph_module.get_parameter("a.weight") is program.graph_module.get_parameter("b.weight")


def test_one_weight_with_and_without_its_bias_is_two_linears() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            return self.fc(nn.functional.linear(x, self.fc.weight))

    program = lifted(Both())
    biases = [program.graph_module.get_submodule(name).bias is not None for name in called(program)]
    assert biases == [False, True]
    assert_equal_to_eager(program)


def test_the_traced_graph_is_left_as_it_was() -> None:
    traced = trace(build("llama", num_hidden_layers=1))
    before = traced.graph_module.code
    program = LiftLinears()(traced).program
    assert traced.graph_module.code == before
    assert program.references["traced"].module is traced.graph_module
    assert program.graph_module is not traced.graph_module


def test_lora_attaches_to_the_lifted_linears_by_name() -> None:
    traced = trace(build("llama"))  # its own: adapters freeze the weights
    graph_module, _ = lift_graph(traced.graph_module)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False), graph_module)
    adapters = [name for name, _ in graph_module.named_parameters() if "lora_A" in name]
    assert len(adapters) == 2
    examples = tuple(traced.interface.example_inputs.values())
    with torch.no_grad():
        changed = graph_module(*examples)[0] - traced.graph_module(*examples)[0]
    assert bool((changed != 0).any())


def test_a_projection_that_is_left_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(graph_module: GraphModule) -> tuple[Any, list[str]]:
        return torch.fx.GraphModule(graph_module, graph_module.graph), ["nothing"]

    monkeypatch.setattr("fxprune.passes.lift_linears.lift_graph", lazy)
    with pytest.raises(PostconditionError, match="lift_linears left linear"):
        lifted(nn.Linear(6, 4))
