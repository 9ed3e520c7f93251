"""The grouped Linear: each expert's rows are multiplied by that expert's weight."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fxprune.tracing.grouped import GroupedLinear, expert_of_rows
from fxprune.tracing.lifted import Origin, is_projection, make_grouped, origin_of, with_parameters


def loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A grouped product written as a loop: (rows, in), (experts, in, out) and the ends of each expert's rows."""
    starts = [0, *offsets.tolist()]
    parts = [x[first:last] @ weight[e] for e, (first, last) in enumerate(pairwise(starts))]
    return torch.cat(parts)


GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(3, 5, 4, generator=GENERATOR)  # (experts, out, in)
X = torch.randn(7, 4, generator=GENERATOR)


@pytest.mark.parametrize("ends", [[2, 5, 7], [0, 7, 7], [7, 7, 7]])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_projected_by_their_expert(ends: list[int], transposed: bool) -> None:
    weight = nn.Parameter(WEIGHT.transpose(1, 2).contiguous() if transposed else WEIGHT)
    grouped = GroupedLinear(weight, transposed=transposed, op=loop)
    offsets = torch.tensor(ends, dtype=torch.int32)
    experts = expert_of_rows(offsets, 7)
    expected = torch.stack([WEIGHT[e] @ x for e, x in zip(experts.tolist(), X, strict=True)])
    torch.testing.assert_close(grouped(X, offsets), expected)
    assert (grouped.experts, grouped.in_features, grouped.out_features) == (3, 4, 5)
    assert grouped.weight.shape[grouped.in_axis] == 4
    assert grouped.weight.shape[grouped.out_axis] == 5
    assert "experts=3, in_features=4, out_features=5" in repr(grouped)


def test_rows_belong_to_the_expert_before_whose_end_they_stand() -> None:
    assert expert_of_rows(torch.tensor([2, 2, 5]), 7).tolist() == [0, 0, 2, 2, 2, 2, 2]  # rows behind the last end too
    assert expert_of_rows(torch.tensor([0, 3]), 3).tolist() == [1, 1, 1]
    assert expert_of_rows(torch.tensor([1, 4]), 0).tolist() == []


def test_other_parameters_keep_layout_operator_and_origin() -> None:
    origin = Origin("experts.down", "experts.down_bias")
    grouped = make_grouped(nn.Parameter(WEIGHT, requires_grad=False), transposed=True, op=loop, origin=origin)
    narrow = with_parameters(grouped, WEIGHT[:, :2], None)
    assert isinstance(narrow, GroupedLinear)
    assert is_projection(narrow)
    assert (narrow.transposed, narrow.op, origin_of(narrow)) == (True, loop, origin)
    assert narrow.weight.shape == (3, 2, 4)
    assert not narrow.weight.requires_grad


def test_float64_has_no_kernel_of_torch_and_is_multiplied_expert_by_expert() -> None:
    op = torch.ops.aten._grouped_mm.default
    x, weight = X.double().requires_grad_(), nn.Parameter(WEIGHT.double())
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)  # the second expert has no rows, and the last row no expert
    with pytest.raises(RuntimeError, match="Double"):
        op(x, weight.transpose(-2, -1), offsets)
    result = GroupedLinear(weight, transposed=False, op=op)(x, offsets)
    expected = torch.cat([x[:2] @ WEIGHT[0].double().T, x[2:6] @ WEIGHT[2].double().T])
    torch.testing.assert_close(result[:6], expected)
    assert not result[6:].any()
    result.sum().backward()
    assert x.grad is not None
    assert bool(x.grad[:6].any())
