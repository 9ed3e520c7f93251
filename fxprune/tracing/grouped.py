"""The grouped Linear: one projection for every expert of a mixture, over rows sorted by expert.

Its weight is one three-dimensional parameter. `offsets[e]` says where the rows of expert e end, as in
`torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GroupedLinear", "expert_of_rows"]


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """The expert of each row, (rows,) int64, from the end of each expert's rows, (experts,)."""
    positions = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, positions, right=True).clamp(max=offsets.shape[0] - 1)


def _one_by_one(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """What torch's grouped product, which has no kernel for float64, gives: (rows, in) to (rows, out)."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    rows = [x[start:end] @ each for start, end, each in zip(starts, ends, weight, strict=True)]
    rest = x.new_zeros(x.shape[0] - ends[-1], weight.shape[-1])
    return torch.cat([*rows, rest])


class GroupedLinear(nn.Module):
    """`y[r] = x[r] @ W[e(r)].T` for rows sorted by expert.

    Args:
        weight: (experts, out, in), or (experts, in, out) when `transposed`; taken as it is, not copied.
        transposed: whether the weight is stored with its inputs first.
        op: the operator that multiplies, of (rows, in), (experts, in, out) and the ends of the experts' rows.
    """

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, *, transposed: bool, op: Any) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed
        self.op = op

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.weight.shape[0]

    @property
    def out_axis(self) -> int:
        """Axis of the weight that runs along what one expert puts out."""
        return 2 if self.transposed else 1

    @property
    def in_axis(self) -> int:
        """Axis of the weight that runs along what one expert reads."""
        return 3 - self.out_axis

    @property
    def in_features(self) -> int:
        """Channels that every expert reads."""
        return self.weight.shape[self.in_axis]

    @property
    def out_features(self) -> int:
        """Channels that every expert puts out."""
        return self.weight.shape[self.out_axis]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Project (rows, in) to (rows, out); `offsets` (experts,) int32 are the ends of the experts' rows."""
        weight = self.weight if self.transposed else self.weight.transpose(-2, -1)
        if self.op is torch.ops.aten._grouped_mm.default and x.dtype is torch.float64:
            return _one_by_one(x, weight, offsets)
        projected: Tensor = self.op(x, weight, offsets)
        return projected

    def extra_repr(self) -> str:
        """Experts and widths."""
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
