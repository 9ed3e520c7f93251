"""Masks: a module on the input of a consumer that scales its channels.

The input of the consumer (o_proj, down_proj) is the one place where zeroing a unit equals removing it, biases or not.
The same node gives Fisher gradients, holds learned gates, and is the reference that slimming is verified against.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelMask", "has_masks"]


class ChannelMask(nn.Module):
    """Multiplies the last axis by a mask of one value per unit.

    Attributes:
        mask: (units,) floating point; 1 keeps a unit, 0 removes it, anything between is a soft gate.
        unit_of: (channels,) int64, the unit of each channel; -1 for channels that belong to no unit.
    """

    mask: Tensor
    unit_of: Tensor

    def __init__(self, mask: Tensor, unit_of: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("unit_of", unit_of)

    def per_channel(self) -> Tensor:
        """The mask spread over the channels, (channels,)."""
        spread = self.mask[self.unit_of.clamp(min=0)]
        return torch.where(self.unit_of >= 0, spread, torch.ones_like(spread))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., channels)."""
        return x * self.per_channel().to(x.dtype)

    def extra_repr(self) -> str:
        """Units and how many are kept."""
        return f"units={len(self.mask)}, kept={int((self.mask != 0).sum())}"


def has_masks(module: nn.Module) -> bool:
    """Whether a mask stands anywhere in a model, so that it is not slimmed yet."""
    return any(isinstance(part, ChannelMask) for part in module.modules())
