"""Masks: modules that take units out of a computation without changing any width.

    ChannelMask         on what a consumer reads (heads, MLP channels) or a producer writes (hidden channels)
    ExpertChannelMask   on what experts read: each expert has its own channels
    ChoiceMask          on what a softmax or a top-k chooses among: an expert with a zero is never chosen
    LayerGate           behind a layer: with a zero, what went into the layer goes on

Each stands where zeroing a unit equals removing it, biases or not. The same nodes give Fisher gradients, hold learned
gates, and are the reference that slimming is verified against.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["ChannelMask", "UnitMask", "has_masks"]


class UnitMask(nn.Module):
    """A mask of one value per unit; what comes out has the shape and dtype of the first argument.

    Attributes:
        mask: floating point; 1 keeps a unit, 0 removes it, anything between is a soft gate.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def extra_repr(self) -> str:
        """Units and how many are kept."""
        return f"units={self.mask.numel()}, kept={int((self.mask != 0).sum())}"


class ChannelMask(UnitMask):
    """Multiplies the last axis by a mask of one value per unit.

    Attributes:
        mask: (units,).
        unit_of: (channels,) int64, the unit of each channel; -1 for channels that belong to no unit.
        place: whether it stands on the `input` of what reads the channels or the `output` of what writes them.
    """

    unit_of: Tensor

    def __init__(self, mask: Tensor, unit_of: Tensor, place: Literal["input", "output"] = "input") -> None:
        super().__init__(mask)
        self.register_buffer("unit_of", unit_of)
        self.place = place

    def per_channel(self) -> Tensor:
        """The mask spread over the channels, (channels,)."""
        spread = self.mask[self.unit_of.clamp(min=0)]
        return torch.where(self.unit_of >= 0, spread, torch.ones_like(spread))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., channels)."""
        return x * self.per_channel().to(x.dtype)


def has_masks(module: nn.Module) -> bool:
    """Whether a mask stands anywhere in a model, so that it is not slimmed yet."""
    return any(isinstance(part, UnitMask) for part in module.modules())
