"""Allocation by the loss: the total stays, shares move where the ranking says, and the sensitivities are gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.core.errors import PreconditionError
from fxprune.tracing.nodes import get_attribute
from fxprune.weights.allocation import allocate_by_loss, blend_shares, loss_sensitivity, shares_by_ranking
from fxprune.weights.sparsity import Sparsity
from tests.zoo import located

LINEARS = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")]


def test_ranking_gives_the_counts_below_one_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(400, generator=generator).double(),
        "b": 10 * torch.rand(600, generator=generator).double(),
    }
    scores["a"][:8] = 0
    shares = shares_by_ranking({name: values.log().float() for name, values in scores.items()}, 0.5)
    threshold = torch.cat(list(scores.values())).sort().values[499]
    for name, values in scores.items():
        assert shares[name] == pytest.approx(float((values <= threshold).double().mean()), abs=0.02)


def test_blended_shares_keep_the_total_and_the_limit() -> None:
    sizes = {"a": 100, "b": 300, "c": 600}
    uniform = dict.fromkeys(sizes, 0.5)
    blended = blend_shares(uniform, {"a": 0.9, "b": 0.5, "c": 0.1}, sizes, strength=1.0, limit=0.1)
    assert sum(blended[name] * sizes[name] for name in sizes) == pytest.approx(500, abs=1e-3)
    assert blended["a"] == pytest.approx(0.6)
    assert all(abs(blended[name] - 0.5) <= 0.1 + 1e-9 for name in sizes)
    assert blend_shares(uniform, {"a": 0.9, "b": 0.5, "c": 0.1}, sizes, strength=0.0, limit=0.1) == pytest.approx(
        uniform
    )


def test_sensitivities_are_squared_inputs_and_output_gradients() -> None:
    program = located("llama")
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs, outputs = loss_sensitivity(program, LINEARS, tokens)
    model = program.references["eager"].module
    squares = {name: [0.0, 0.0] for name in LINEARS}
    outs: dict[str, torch.Tensor] = {}
    for row in tokens:
        handles = []
        for name in LINEARS:

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor, name: str = name) -> None:
                squares[name][0] += args[0].detach()[0].square().sum(0).double()
                out.retain_grad()
                outs[name] = out

            handles.append(get_attribute(model, name).register_forward_hook(hook))
        logits = model(input_ids=row[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
        for name in LINEARS:
            squares[name][1] += outs[name].grad[0].square().sum(0).double()
        for handle in handles:
            handle.remove()
    model.zero_grad()
    for name in LINEARS:
        torch.testing.assert_close(inputs[name], squares[name][0] / tokens.numel(), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(outputs[name], squares[name][1] / tokens.numel(), rtol=1e-3, atol=1e-9)


def test_parameters_are_left_as_they_were() -> None:
    program = located("llama")
    before = [(p.requires_grad, p.grad) for p in program.graph_module.parameters()]
    targets = {name: Sparsity(0.5) for name in LINEARS} | {"lm_head": Sparsity.pattern(2, 4)}
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    found = allocate_by_loss(program, targets, tokens)
    assert found["lm_head"].describe() == "2:4"
    sizes = {name: get_attribute(program.graph_module, name).weight.numel() for name in LINEARS}
    removed = sum(found[name].share * size for name, size in sizes.items())
    assert removed == pytest.approx(0.5 * sum(sizes.values()), rel=1e-6)
    assert len({round(found[name].share, 4) for name in LINEARS}) > 1
    assert [(p.requires_grad, p.grad) for p in program.graph_module.parameters()] == before


def test_experts_are_refused() -> None:
    program = located("mixtral")
    name = next(n for n, m in program.graph_module.named_modules() if type(m).__name__ == "GroupedLinear")
    with pytest.raises(PreconditionError, match="does not handle experts"):
        allocate_by_loss(program, {name: Sparsity(0.5)}, torch.ones(1, 4, dtype=torch.long))
