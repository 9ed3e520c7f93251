"""Precisions of a graph: which one it is in. How it runs in a wider one is in `fxprune.core.widened`.

Models may be mixed: norms or routers in float32 within a model in bfloat16.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["coarsest", "is_low", "main_dtype", "short_name"]


def is_low(dtype: torch.dtype) -> bool:
    """Whether a floating dtype rounds more coarsely than float32."""
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def short_name(dtype: torch.dtype) -> str:
    """The name that users give: `bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating dtype of the largest roundoff among tensors; float32 when none is floating.

    What a model computes is no more precise than the coarsest of its weights, whatever its norms and inputs are in.
    """
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating dtype that most elements of the tensors have; float32 when none is floating."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32
