"""Backward passes in float16: the loss is scaled up, so that gradients do not vanish, and gradients are scaled back.

A mean over a thousand tokens has gradients by logits of a millionth, and float16 ends at 6e-8. The gradient is asked
for again with half the scale while it overflows (Micikevicius et al. 2018, "Mixed precision training", there from step
to step). Where the scale starts follows from the batch alone, so a training that is resumed goes on bit by bit.
Other precisions have float32's range: nothing is scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

__all__ = ["backward", "first_scale"]

_ABOVE_SUM = 64.0
"""How much more than its sum over tokens the mean loss is scaled by at first."""


def first_scale(tokens: int) -> float:
    """The largest scale that is tried for a mean over so many tokens: a power of 2, which rounds nothing."""
    return _ABOVE_SUM * 2.0 ** max(0, tokens - 1).bit_length()


def backward(loss: Tensor, parameters: Iterable[nn.Parameter], dtype: torch.dtype, tokens: int) -> bool:
    """Leave the gradient of a loss in its parameters, which have none yet.

    Args:
        loss: a float32 scalar, a mean over tokens.
        parameters: all that have gradients, in float32.
        dtype: of the model's products.
        tokens: of the batch.

    Returns:
        Whether the gradient is finite.
    """
    trained = list(parameters)
    run: Any = loss.backward
    if dtype is not torch.float16:
        run()
        return _finite(trained)
    scale = first_scale(tokens)
    while True:
        (loss * scale).backward(retain_graph=scale > 1)  # type: ignore[no-untyped-call]  # torch
        finite = _finite(trained)
        if finite:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        if finite or scale <= 1:
            return finite
        for parameter in trained:
            parameter.grad = None
        scale /= 2


def _finite(parameters: Iterable[nn.Parameter]) -> bool:
    found = [p.grad.isfinite().all() for p in parameters if p.grad is not None]
    return not found or bool(torch.stack(found).all())
