"""What gates keep for the backward pass, counted, and that what is computed again is what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import fx, nn

from fxprune.learned.model import GatedModel
from fxprune.learned.recomputation import Recomputed, before_masks
from fxprune.passes.locate_layers import LocateLayers
from fxprune.tracing.masks import ChannelMask
from tests.zoo import located

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

aten = torch.ops.aten


def units(program: Program) -> list[Group]:
    return [group for group in program.groups if group.kind in {"attention", "mlp"}]


def kept_bytes(model: GatedModel, tokens: Tensor) -> int:
    """Bytes of activations that the backward pass of a forward pass holds."""
    weights = {p.untyped_storage().data_ptr() for p in model.program.graph_module.parameters()}
    weights |= {p.untyped_storage().data_ptr() for p in model.adapters.values()}
    held: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or another tensor would get its place, and not be counted
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), model.frozen():
        if gates := list(model.gates):
            values = {one.group.name: one.soft() for one in gates}
            with model.gates.applied(values):
                model(tokens)
        else:
            model(tokens)
    return sum(held.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gates_keep_no_more_activations_than_a_model_without_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fxprune.learned.model.fuse_lora", lambda *_: None
    )  # which takes the masks: tests/test_lora_product
    program = LocateLayers()(located(name)).program
    tokens = torch.arange(64).reshape(2, 32) % 30
    groups = [group for group in units(program) if group.kind == "mlp"]
    without = kept_bytes(GatedModel(program, (), rank=2), tokens)
    channels = sum(group.units for group in groups) * tokens.numel() * 4
    assert without > 3 * channels
    # A gate's own values are all that comes on top, and what stood in front of it is not kept any more.
    assert kept_bytes(GatedModel(program, groups, rank=2), tokens) < without
    monkeypatch.setattr("fxprune.learned.model.before_masks", lambda _: None)
    assert kept_bytes(GatedModel(program, groups, rank=2), tokens) > without + 0.9 * channels


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon (grouped)"])
def test_gradients_are_those_of_a_graph_that_keeps_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.learned.model.fuse_lora", lambda *_: None)
    program = LocateLayers()(located(name)).program
    tokens = torch.arange(24).reshape(2, 12) % 30

    def gradients() -> tuple[list[Tensor], int]:
        model = GatedModel(program, units(program), rank=2, seed=3)
        with torch.no_grad():
            for index, one in enumerate(model.gates.parameters()):
                one.copy_(torch.linspace(-1, 2, one.numel()).reshape(one.shape) + 0.1 * index)
            for parameter in model.adapters.values():
                parameter.fill_(0.05)
        values = model.gates.soft()
        with model.frozen(), model.gates.applied(values):
            logits, states = model(tokens)
            (logits.square().mean() + sum(state.square().mean() for state in states)).backward()
        pieces = sum(isinstance(part, Recomputed) for part in model._graph.modules())
        trained = [*model.gates.parameters(), *model.adapters.values()]
        return [p.grad.clone() for p in trained if p.grad is not None], pieces

    found, pieces = gradients()
    assert pieces == len(units(program))
    monkeypatch.setattr("fxprune.learned.model.before_masks", lambda _: None)
    expected, none = gradients()
    assert none == 0
    assert len(found) == len(expected) > 2 * pieces
    assert any(bool(one.any()) for one in found)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class _Random(nn.Module):
    """An activation that two read, a random operator, and a mask behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (ChannelMask(torch.ones(4), torch.arange(4)) for _ in range(2))


def targets(module: nn.Module) -> list[str]:
    assert isinstance(module, fx.GraphModule)
    return [str(node.target) for node in module.graph.nodes if node.op in {"call_function", "call_module"}]


def pieces_of(module: fx.GraphModule) -> Sequence[nn.Module]:
    return [part.inner for part in module.modules() if isinstance(part, Recomputed)]


def test_what_others_read_and_what_is_random_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    shared = graph.call_function(aten.silu.default, (x,))
    negative = graph.call_function(aten.neg.default, (shared,))
    one = graph.call_module("first", (graph.call_function(aten.mul.Tensor, (negative, x)),))
    noisy = graph.call_function(aten.bernoulli.p, (shared, 0.5))
    other = graph.call_module("second", (noisy,))
    graph.output((one, other, shared))
    module = fx.GraphModule(_Random(), graph)
    value = torch.linspace(-2, 2, 8).reshape(2, 4)
    expected = module(value)[0]
    before_masks(module)
    module.graph.lint()
    (piece,) = pieces_of(module)
    assert targets(piece) == ["aten.neg.default", "aten.mul.Tensor", "first"]
    assert targets(module) == ["aten.silu.default", "recomputed_4", "aten.bernoulli.p", "second"]
    assert torch.equal(module(value)[0], expected)
    with torch.no_grad():
        assert torch.equal(module(value)[0], expected)
