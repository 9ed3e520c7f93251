"""Masks: the masked graph computes what the original does with zeroed columns, and masks get gradients."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from fxprune.core.errors import PlanError, PreconditionError
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import InsertMasks
from fxprune.runtimes.runners import EagerRunner, GraphRunner
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.trace import trace
from tests.families import FAMILIES, build, located, random_plan, steps

HEAD_DIM = 6


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_the_original_with_zeroed_columns(family: str) -> None:
    program = located(family)
    plan = Plan.of({"model.layers.0.self_attn": [1, 4], "model.layers.1.mlp": range(0, 20, 3)})
    masked = InsertMasks()(program.replace(plan=plan)).program
    zeroed = copy.deepcopy(program.references["eager"].module)
    heads = [head for head in range(6) if head not in {1, 4}]
    columns = [column for head in heads for column in range(head * HEAD_DIM, (head + 1) * HEAD_DIM)]
    with torch.no_grad():
        zeroed.get_parameter("model.layers.0.self_attn.o_proj.weight")[:, columns] = 0
        zeroed.get_parameter("model.layers.1.mlp.down_proj.weight")[:, [c for c in range(20) if c % 3]] = 0
    step = steps(2)[0]
    runners = EagerRunner(zeroed), GraphRunner(masked.graph_module, masked.interface)
    logits = [runner.step(step.tokens, step.mask, step.positions, None)[0] for runner in runners]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    dense = GraphRunner(program.graph_module, program.interface)
    assert float((dense.step(step.tokens, step.mask, step.positions, None)[0] - logits[0]).abs().max()) > 1e-2


def test_one_mask_stands_before_every_consumer_and_the_weights_are_shared() -> None:
    program = located("llama")
    result = InsertMasks()(program.replace(plan=random_plan(program.groups)))
    masks = {name: m for name, m in result.program.graph_module.named_modules() if isinstance(m, ChannelMask)}
    consumers = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("mlp.down_proj", "self_attn.o_proj")]
    assert sorted(masks) == sorted(f"{name}_mask" for name in consumers)
    assert result.details == {"masks": 4}
    assert {id(p) for p in result.program.graph_module.parameters()} == {
        id(p) for p in program.graph_module.parameters()
    }
    for node in result.program.graph_module.graph.nodes:
        if node.target in consumers:
            assert str(node.args[0].target) == f"{node.target}_mask"
    assert not [m for m in program.graph_module.modules() if isinstance(m, ChannelMask)]
    assert result.program.references["masked"].module is result.program.graph_module


def test_without_a_plan_masks_are_ones_and_a_gradient_reaches_every_unit() -> None:
    program = located("qwen3")
    masked = InsertMasks()(program).program
    examples = tuple(program.interface.example_inputs.values())
    masks = [module for module in masked.graph_module.modules() if isinstance(module, ChannelMask)]
    assert [len(mask.mask) for mask in masks] == [6, 20, 6, 20] or sorted(len(m.mask) for m in masks) == [6, 6, 20, 20]
    for mask in masks:
        assert bool((mask.mask == 1).all())
        mask.mask.requires_grad_()
    logits = masked.graph_module(*examples)[0]
    assert torch.equal(logits, program.graph_module(*examples)[0])
    grads = torch.autograd.grad(logits.square().sum(), [mask.mask for mask in masks])
    assert all(bool((grad != 0).all()) for grad in grads)


def test_a_mask_spreads_units_over_channels_and_leaves_others_alone() -> None:
    mask = ChannelMask(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 1, 2, 2, -1]))
    assert mask.per_channel().tolist() == [1, 0, 0.5, 0.5, 1]
    assert mask(torch.full((2, 5), 2.0)).tolist() == [[2, 0, 1, 1, 2]] * 2
    assert mask(torch.ones(1, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "units=3, kept=2" in repr(mask)


def test_masks_need_groups_and_a_legal_plan() -> None:
    with pytest.raises(PreconditionError, match="insert_masks needs groups"):
        InsertMasks()(trace(build("llama", num_hidden_layers=1)))
    with pytest.raises(PlanError, match=re.escape("model.layers.0.mlp: channel 99 does not exist")):
        InsertMasks()(located("llama").replace(plan=Plan.of({"model.layers.0.mlp": [99]})))
