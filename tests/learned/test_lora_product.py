"""A Linear, its LoRA and the mask in front of it as one operator: the same values and gradients as peft's three."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, fx, nn

from fxprune.learned.lora_product import LoraProduct, fuse_lora
from fxprune.learned.model import GatedModel
from fxprune.passes.locate_layers import LocateLayers
from fxprune.tracing.masks import ChannelMask
from tests.learned.test_recomputation import kept_bytes
from tests.zoo import located

UNITS = 6


class _Net(nn.Module):
    """A mask and a Linear with LoRA behind it."""

    def __init__(self, *, bias: bool, masked: bool, width: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2 * UNITS, width, bias=bias)
        self.mask = ChannelMask(torch.ones(UNITS), torch.arange(2 * UNITS) // 2)
        graph = fx.Graph()
        x = graph.placeholder("x")
        read = graph.call_module("mask", (x,)) if masked else x
        graph.output(graph.call_module("linear", (read,)))
        self.traced = fx.GraphModule(self, graph)
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=7.5, target_modules=["linear"]), self.traced)
        with torch.no_grad():
            for name, parameter in self.traced.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape))


def results(net: _Net, gate: Tensor, x: Tensor, *, frozen: bool) -> dict[str, Tensor]:
    """The output, and the gradient of everything that has one."""
    gate, x = (value.detach().clone().requires_grad_() for value in (gate, x))
    net.mask.mask = gate
    module = net.traced
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or ".lora_" in name)
        parameter.grad = None
    y = module(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad, "gate": gate.grad}
    found |= {re.split(r"(?=lora_[AB]|base_layer)", name)[-1]: p.grad for name, p in module.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 9])  # 9 x 3 rows are more than the weight has, 3 and 6 are fewer
@pytest.mark.parametrize(("bias", "masked"), [(False, True), (True, True), (True, False)])
def test_values_and_gradients_are_those_of_peft(*, bias: bool, masked: bool, batch: int, frozen: bool) -> None:
    net = _Net(bias=bias, masked=masked)
    net.traced.double()
    gate = torch.tensor([1.0, 0.0, 0.5, 1.0, -0.2, 2.0], dtype=torch.float64)
    x = torch.randn(batch, 3, 2 * UNITS, dtype=torch.float64)
    expected = results(net, gate, x, frozen=frozen)
    fuse_lora(net.traced, ["linear"], "default")
    net.traced.graph.lint()
    (call,) = (node for node in net.traced.graph.nodes if node.op == "call_module")
    fused = net.traced.get_submodule(str(call.target))
    assert isinstance(fused, LoraProduct)
    assert (fused.mask is not None) == masked
    found = results(net, gate, x, frozen=frozen)
    assert len(found) == len(expected) == 4 + masked + (0 if frozen else 1 + bias)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


def test_under_autocast_products_are_in_its_precision() -> None:
    net = _Net(bias=True, masked=True)
    gate, x = torch.linspace(0, 1, UNITS), torch.randn(2, 3, 2 * UNITS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(net, gate, x, frozen=True)
        fuse_lora(net.traced, ["linear"], "default")
        found = results(net, gate, x, frozen=True)
    assert found["y"].dtype is expected["y"].dtype is torch.bfloat16
    assert found["gate"].dtype is torch.float32
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_a_mask_with_another_reader_stays() -> None:
    net = _Net(bias=False, masked=True)
    graph = net.traced.graph
    mask, linear, end = (node for node in graph.nodes if node.op in {"call_module", "output"})
    end.args = ((linear, mask),)
    net.traced.recompile()
    x = torch.randn(2, 2 * UNITS)
    net.mask.mask = torch.linspace(0, 1, UNITS)
    expected = net.traced(x)
    fuse_lora(net.traced, ["linear"], "default")
    assert any(isinstance(part, ChannelMask) for part in net.traced.children())
    for one, other in zip(net.traced(x), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon (grouped)"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_gradients_that_peft_gives(
    name: str, monkeypatch: pytest.MonkeyPatch, *, checkpointing: bool
) -> None:
    program = LocateLayers()(located(name)).program
    groups = [group for group in program.groups if group.kind in {"attention", "mlp"}]
    tokens = torch.arange(24).reshape(2, 12) % 30

    def gradients() -> tuple[list[Tensor], int]:
        model = GatedModel(program, groups, rank=2, seed=3, checkpointing=checkpointing)
        with torch.no_grad():
            for index, one in enumerate(model.gates.parameters()):
                one.copy_(torch.linspace(-1, 2, one.numel()).reshape(one.shape) + 0.1 * index)
            for parameter in model.adapters.values():
                parameter.fill_(0.05)
        values = model.gates.soft()
        with model.frozen(), model.gates.applied(values):
            logits, states = model(tokens)
            (logits.square().mean() + sum(state.square().mean() for state in states)).backward()
        fused = [part for part in model._graph.modules() if isinstance(part, LoraProduct)]
        trained: list[Any] = [*model.gates.parameters(), *model.adapters.values()]
        return [p.grad.clone() for p in trained if p.grad is not None], sum(part.mask is not None for part in fused)

    found, masks = gradients()
    assert masks == len(groups)
    monkeypatch.setattr("fxprune.learned.model.fuse_lora", lambda *_: None)
    expected, none = gradients()
    assert none == 0
    assert len(found) == len(expected) > 2 * masks
    for one, other in zip(found, expected, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_what_a_mask_multiplies_nothing_is_kept_but_what_goes_in(name: str) -> None:
    program = LocateLayers()(located(name)).program
    tokens = torch.arange(64).reshape(2, 32) % 30
    groups = [group for group in program.groups if group.kind == "mlp"]
    without = kept_bytes(GatedModel(program, (), rank=2), tokens)
    values = sum(group.units for group in groups) * 4
    # The gates' values, and their indices: LoRA alone keeps one activation of each channel for each token, too.
    assert kept_bytes(GatedModel(program, groups, rank=2), tokens) < without + 8 * values
