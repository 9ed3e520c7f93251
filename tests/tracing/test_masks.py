"""Masks as modules: what each takes out, what it leaves alone, and the gradients that reach it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.tracing.masks import ChannelMask, UnitMask, has_masks
from fxprune.tracing.unit_masks import ChoiceMask, ExpertChannelMask, LayerGate


def test_a_channel_mask_scales_the_channels_of_each_unit() -> None:
    mask = ChannelMask(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([2, 0, -1, 1, 2]))
    x = torch.arange(10.0).reshape(2, 5)
    assert mask(x).tolist() == [[0, 1, 2, 0, 2], [2.5, 6, 7, 0, 4.5]]


def test_an_expert_mask_scales_the_rows_of_each_expert_by_its_own() -> None:
    mask = ExpertChannelMask(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0]]), torch.tensor([0, 1, 1]))
    out = mask(torch.ones(5, 3), torch.tensor([1, 3, 5]))
    assert out.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1], [0.5, 1, 1], [0.5, 1, 1]]
    assert mask(torch.ones(5, 3, dtype=torch.float16), torch.tensor([1, 3, 5])).dtype == torch.float16


def test_an_expert_without_rows_masks_nobody() -> None:
    mask = ExpertChannelMask(torch.tensor([[0.0], [1.0]]), torch.tensor([0]))
    assert mask(torch.ones(2, 1), torch.tensor([0, 2])).tolist() == [[1], [1]]


def test_a_choice_mask_makes_removed_candidates_unchoosable_along_its_axis() -> None:
    scores = torch.arange(12.0).reshape(2, 3, 2)
    out = ChoiceMask(torch.tensor([1.0, 0.0, 1.0]), -2)(scores)
    assert out[:, 1].isneginf().all()
    assert torch.equal(out[:, [0, 2]], scores[:, [0, 2]])
    chosen = ChoiceMask(torch.tensor([1.0, 1.0, 0.0, 0.0]), -1)(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).topk(2)[1]
    assert sorted(chosen[0].tolist()) == [0, 1]
    softmax = ChoiceMask(torch.tensor([1.0, 0.0]), -1)(torch.zeros(1, 2)).softmax(-1)
    assert softmax.tolist() == [[1, 0]]


def test_a_layer_gate_blends_what_went_in_with_what_came_out() -> None:
    before, after = torch.tensor([2.0, 4.0]), torch.tensor([10.0, 20.0])
    for value, expected in ((1.0, after), (0.0, before), (0.25, torch.tensor([4.0, 8.0]))):
        gate = LayerGate(torch.tensor(value), "layers.0")
        assert torch.equal(gate(before, after), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_out_has_the_shape_and_dtype_of_what_went_in(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    calls: list[tuple[UnitMask, tuple[torch.Tensor, ...]]] = [
        (ChannelMask(torch.ones(2), torch.tensor([0, 1, 1, -1])), (x,)),
        (ExpertChannelMask(torch.ones(2, 2), torch.tensor([0, 1, 1, 0])), (x, torch.tensor([1, 3]))),
        (ChoiceMask(torch.ones(4), -1), (x,)),
        (LayerGate(torch.tensor(0.5), "layers.0"), (x, x)),
    ]
    assert {type(mask) for mask, _ in calls} == set(UnitMask.__subclasses__())  # the walk counts on all of them
    for mask, arguments in calls:
        out = mask(*arguments)
        assert (out.shape, out.dtype) == (x.shape, dtype)


def test_gradients_reach_every_unit_that_something_flows_through() -> None:
    mask = ChannelMask(torch.ones(2), torch.tensor([0, 0, 1, -1]))
    mask.mask.requires_grad_()
    mask(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert mask.mask.grad is not None
    assert mask.mask.grad.tolist() == [3, 3]


def test_masks_are_found_anywhere_in_a_model() -> None:
    assert not has_masks(nn.Sequential(nn.Linear(2, 2)))
    assert has_masks(nn.Sequential(nn.Sequential(ChoiceMask(torch.ones(2), 0))))
