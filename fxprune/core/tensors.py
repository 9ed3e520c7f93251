"""What is asked of tensors everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["same_bits"]


def same_bits(first: Tensor | None, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if first is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}[first.element_size()]
    pair = (tensor.detach().cpu().contiguous().reshape(-1).view(bits) for tensor in (first, second))
    return torch.equal(*pair)
