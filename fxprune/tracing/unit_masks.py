"""Masks of experts, of the channels inside them, and of layers; `fxprune.tracing.masks` says where each stands."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.tracing.grouped import expert_of_rows
from fxprune.tracing.masks import UnitMask

__all__ = ["ChoiceMask", "ExpertChannelMask", "LayerGate"]


class ExpertChannelMask(UnitMask):
    """Multiplies the rows of each expert by that expert's mask.

    Attributes:
        mask: (experts, units of one expert).
        unit_of: (channels,) int64, the unit of each channel, the same for all experts.
    """

    unit_of: Tensor

    def __init__(self, mask: Tensor, unit_of: Tensor) -> None:
        super().__init__(mask)
        self.register_buffer("unit_of", unit_of)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Scale (rows, channels); `offsets` (experts,) are the ends of the experts' rows."""
        spread = self.mask[:, self.unit_of]
        return x * spread[expert_of_rows(offsets, x.shape[0])].to(x.dtype)


class ChoiceMask(UnitMask):
    """Gives removed candidates the score minus infinity.

    Attributes:
        mask: (candidates,), or (parts, candidates) where there is a choice in each part.
        axis: along which the candidates stand, or the parts, right before their candidates.
    """

    def __init__(self, mask: Tensor, axis: int) -> None:
        super().__init__(mask)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Mask scores."""
        first = self.axis % x.dim()
        shape = [*[1] * first, *self.mask.shape, *[1] * (x.dim() - first - self.mask.dim())]
        return x.masked_fill((self.mask == 0).reshape(shape), -torch.inf)


class LayerGate(UnitMask):
    """Blends what went into a layer with what came out: all of the layer at 1, none of it at 0.

    Attributes:
        mask: () one value.
        label: qualified name of the layer's module.
    """

    def __init__(self, mask: Tensor, label: str) -> None:
        super().__init__(mask)
        self.label = label

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Blend two tensors of one shape."""
        gate = self.mask.to(after.dtype)
        return after * gate + before * (1 - gate)
